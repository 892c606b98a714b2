"""Every method with a reward function and data of one's own, as a newcomer has them."""

from __future__ import annotations

import copy
import dataclasses

import datasets
import numpy as np
import optax
import pytest

from rlft.algorithms import (
  best_of_n,
  dpo,
  expert_iteration,
  grpo,
  ppo,
  return_conditioned,
  reward_model,
  sft,
)
from rlft.core.errors import ConfigError, DataError
from rlft.models.lora import LoRAConfig
from rlft.probes.evaluate import EvalConfig, evaluate
from rlft.sampling.generate import generate
from rlft.training.optimizer import OptimizerConfig

ROWS = [{"prompt": "ab"[i % 2] * (1 + i // 2), "bonus": i} for i in range(6)]
CHATS = [[{"role": "system", "content": "b"}, {"role": "user", "content": "a"}]] * 2
SHARED = {
  "iterations": 1, "prompts_per_iteration": 2, "samples_per_prompt": 4,
  "max_new_tokens": 3,
}  # fmt: skip
TRAIN = sft.SFTConfig(OptimizerConfig(learning_rate=1e-2), batch_size=4)
EI = expert_iteration.EIConfig(
  TRAIN, rounds=1, samples_per_prompt=4, max_new_tokens=3, threshold=1.0
)
RC = return_conditioned.RCRLConfig(
  TRAIN, samples_per_prompt=8, max_new_tokens=3, threshold=1.0
)
SEEN: list = []


def length(completions, **_):
  return [float(len(t)) for t in completions]


async def bonus(completions, bonus, **_):
  SEEN.append(list(bonus))
  return [b / 10 for b in bonus]


RUNS = {
  "grpo": lambda policy, rows, reward: (
    grpo.run(policy, rows, reward, grpo.preset("grpo", **SHARED)).iterations
  ),
  "ppo": lambda policy, rows, reward: (
    ppo.run(
      policy, rows, reward, ppo.PPOConfig(**SHARED, epochs=1, minibatches=1)
    ).iterations
  ),
  "best_of_n": lambda policy, rows, reward: (
    best_of_n.run(
      policy, rows, reward, best_of_n.BestOfNConfig(n=2, max_new_tokens=3)
    ).rows
  ),
  "expert_iteration": lambda policy, rows, reward: (
    expert_iteration.run(policy, rows, reward, EI).solutions
  ),
  "expert_iteration, by name": lambda policy, rows, reward: (
    expert_iteration.run(policy, rows, reward=reward, config=EI).solutions
  ),
  "return_conditioned": lambda policy, rows, reward: (
    return_conditioned.run(policy, rows, reward, RC).solutions
  ),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_reward_and_rows_of_ones_own(tiny, name):
  rows = datasets.Dataset.from_list(ROWS) if name == "grpo" else ROWS
  SEEN.clear()
  assert RUNS[name](tiny, rows, [(length, 1.0), (bonus, 0.5)])
  assert SEEN and set(SEEN[0]) <= set(range(6)) and len(set(SEEN[0])) > 1


@pytest.mark.parametrize("name", RUNS)
def test_what_does_not_fit_is_refused(name, tiny):
  with pytest.raises(DataError, match="prompt 0 has no column 'prompt'"):
    RUNS[name](tiny, [{"question": "a"}], length)
  with pytest.raises(DataError, match="needs rubric, and the columns are"):
    RUNS[name](tiny, ROWS, lambda completions, rubric: 0)
  with pytest.raises(ConfigError, match="is no function"):
    RUNS[name](tiny, ROWS, "accuracy")


def test_expert_iteration_accepts_by_threshold(tiny):
  result = expert_iteration.run(
    tiny, ROWS, length, dataclasses.replace(EI, threshold=2)
  )
  assert result.solutions and all(len(s.text) >= 2 for s in result.solutions)
  (stats,) = result.rounds
  assert stats["correct"] >= stats["accepted"] > 0  # some that reach it were cut


def test_a_threshold_that_float32_does_not_hold_is_reached(tiny):
  flat = lambda completions, **_: [0.7] * len(completions)
  config = dataclasses.replace(EI, threshold=0.7)
  assert expert_iteration.run(tiny, ROWS, flat, config).solutions
  found = return_conditioned.run(
    tiny, ROWS, flat, dataclasses.replace(RC, threshold=0.7)
  )
  assert all(all(s.labels) for s in found.solutions)


def test_return_conditioned_labels_by_reward(tiny):
  config = dataclasses.replace(RC, threshold=2.0)
  for s in return_conditioned.run(tiny, ROWS, length, config).solutions:
    assert s.labels == (len(s.text) >= 2,) and s.values == (len(s.text),)


def test_messages_are_prompts(tiny):
  tokenizer = copy.deepcopy(tiny.tokenizer)
  tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}b"
  chatty = dataclasses.replace(tiny, tokenizer=tokenizer)
  seen = []

  def look(prompts, completions, **_):
    seen.extend(prompts)
    return length(completions)

  for name in ("grpo", "best_of_n", "expert_iteration"):
    assert RUNS[name](chatty, CHATS, look)
  assert all(prompt == CHATS[0] for prompt in seen)
  rollout = generate(chatty, CHATS, max_new_tokens=1)
  assert rollout.tokens[0][rollout.mask[0]][:3].tolist() == [2, 1, 2]


def test_supervised_methods_train_on_prompts_as_they_are_sampled(tiny):
  """With `chat` in the template, here "b" behind what a user says."""
  tokenizer = copy.deepcopy(tiny.tokenizer)
  tokenizer.chat_template = (
    "{% for m in messages %}{{ m['content'] }}{{ 'b' if m['role'] == 'user' }}"
    "{% endfor %}"
  )
  chatty = dataclasses.replace(tiny, tokenizer=tokenizer)
  methods = {
    sft: TRAIN,
    dpo: dpo.DPOConfig(TRAIN.optimizer, batch_size=4),
    reward_model: reward_model.RewardModelConfig(TRAIN.optimizer, batch_size=4),
  }
  for module, config in methods.items():
    config = dataclasses.replace(config, epochs=2)
    losses = {}
    for prompt, chat in (("a", True), ("ab", False), ("a", False)):
      pairs = [{"prompt": prompt, "chosen": "ab", "rejected": "b"}] * 4
      rows = [(prompt, "ab")] * 4 if module is sft else pairs
      one = dataclasses.replace(config, chat=chat)
      losses[prompt, chat] = module.run(chatty, rows, one).losses[-1]
    assert losses["a", True] == losses["ab", False] != losses["a", False]


def test_generate_and_evaluate_read_data_sets(tiny):
  rows = [{"prompt": "a", "id": 9}, {"prompt": "b", "id": 4}]
  rollout = generate(tiny, datasets.Dataset.from_list(rows), max_new_tokens=2)
  assert rollout.prompt_ids.tolist() == [9, 4]
  bare = generate(tiny, ["a", "b"], prompt_ids=[9, 4], max_new_tokens=2)
  np.testing.assert_array_equal(rollout.tokens, bare.tokens)

  def judge(text, example):
    from rlft.core.types import Verdict

    return Verdict(text, bool(text))

  config = EvalConfig(samples=2, ks=(1,), max_new_tokens=2)
  assert evaluate(tiny, rows, judge, config).sampled_solutions == 6


def test_supervised_methods_run_on_dicts(tiny):
  rows = [{"prompt": "a", "completion": "ab"}, {"prompt": "b", "completion": "a"}]
  assert sft.train is sft.run and dpo.train is dpo.run
  one = sft.run(tiny, datasets.Dataset.from_list(rows), TRAIN)
  assert one.losses == sft.run(tiny, [("a", "ab"), ("b", "a")], TRAIN).losses
  pairs = [{"prompt": "a", "chosen": "ab", "rejected": "b"}] * 4
  assert dpo.run(tiny, pairs, dpo.DPOConfig(batch_size=4)).steps == 1
  config = reward_model.RewardModelConfig(batch_size=4)
  assert reward_model.run(tiny, pairs, config).model.kind == "reward"


@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=2)], ids=["all", "LoRA"])
def test_every_method_takes_an_optax_transformation(tiny, lora):
  adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
  config = grpo.preset("grpo", **SHARED, optimizer=adam, lora=lora)
  result = grpo.run(tiny, ROWS, length, config)
  assert result.iterations[0]["update_norm"] > 0
  if lora is None:
    own = {"optimizer": adam, "value_optimizer": optax.sgd(1e-2)}
    result = ppo.run(tiny, ROWS, length, ppo.PPOConfig(**SHARED, **own))
    assert result.iterations[0]["value/update_norm"] > 0
    train = dataclasses.replace(TRAIN, optimizer=adam)
    assert sft.run(tiny, [("a", "ab")] * 4, train).steps == 1
    step = sft.make_train_step(tiny.model, adam)
    assert sft.make_train_step(tiny.model, adam) is step  # compiled once


def test_a_run_without_signal_says_so_once(tiny, caplog):
  config = grpo.preset("grpo", **SHARED | {"iterations": 4, "max_new_tokens": 1})
  grpo.run(tiny, ROWS, lambda completions, **_: [1.0] * len(completions), config)
  said = [r.message for r in caplog.records if "nothing tells good" in r.message]
  assert len(said) == 1 and "of iterations 1 to 2" in said[0]
  assert "temperature=1.0 or samples_per_prompt=4" in said[0]

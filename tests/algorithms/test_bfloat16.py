"""Every RL method in bfloat16, from the first fact to the result."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from rlft.algorithms import best_of_n, dpo, grpo, ppo, sft
from rlft.algorithms import expert_iteration as ei
from rlft.algorithms import return_conditioned as rc
from rlft.core.types import Example, Reward, Verdict
from rlft.models.hub import MINI, load
from rlft.rewards.verifiable import make_reward
from rlft.tasks import arithmetic
from rlft.tasks.preferences import Preference
from rlft.training.optimizer import OptimizerConfig

PROMPTS = [Example(i, "a" if i % 2 else "b", "", "") for i in range(8)]
RATE = OptimizerConfig(learning_rate=1e-2, schedule="linear", eps=1e-5)
SHARED = {
  "iterations": 2, "prompts_per_iteration": 8, "samples_per_prompt": 8,
  "max_new_tokens": 8, "compute_dtype": "bfloat16", "optimizer": RATE,
}  # fmt: skip
OLD = ("auto", "sampler", "recompute")


def pay(rollout, examples):
  value = ((rollout.tokens == 1) & rollout.completion_mask).sum(1)
  return Reward(value=value.astype(np.float32), judged=np.ones(len(value), bool))


def sound(result, start):
  """It learned something, of finite numbers, and gives float32 back."""
  for stats in result.iterations:
    assert all(np.isfinite(x) for x in stats.values())
    assert stats["update/skipped"] == 0
  first = result.iterations[0]
  assert first["mismatch/token_mult_prob_error"] < 1.05
  moved = jax.tree.map(
    lambda a, b: float(abs(a - b).max()), result.policy.params, start
  )
  assert max(jax.tree.leaves(moved)) > 5e-5  # half of the smallest rate above


@pytest.mark.parametrize("old_logp", OLD)
def test_grpo(tiny, old_logp):
  config = grpo.preset("grpo", **SHARED, old_logp=old_logp)
  sound(grpo.run(tiny, PROMPTS, pay, config), tiny.params)


@pytest.mark.parametrize("old_logp", OLD)
def test_ppo(tiny, old_logp):
  config = ppo.PPOConfig(**SHARED, old_logp=old_logp, value_optimizer=RATE)
  sound(ppo.run(tiny, PROMPTS, pay, config), tiny.params)


@pytest.mark.parametrize("old_logp", [OLD[0]] + [
  pytest.param(name, marks=pytest.mark.slow) for name in OLD[1:]
])  # fmt: skip
@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_on_a_mesh(spread, method, old_logp):
  how = SHARED | {"old_logp": old_logp, "iterations": 1}
  if method == "grpo":
    result = grpo.run(spread, PROMPTS, pay, grpo.preset("grpo", **how))
  else:
    shared = ppo.PPOConfig(**how, value="shared", minibatches=2)
    result = ppo.run(spread, PROMPTS, pay, shared)
  sound(result, spread.params)


def judge(text, example):
  return Verdict(text, "a" in text, None, tuple(text) or None)


def test_methods_that_train_on_their_samples(tiny):
  low = dataclasses.replace(tiny, model=tiny.model.clone(dtype=jax.numpy.bfloat16))
  train = sft.SFTConfig(
    optimizer=RATE, batch_size=8, epochs=1, compute_dtype="bfloat16"
  )
  how = {"train": train, "samples_per_prompt": 4, "max_new_tokens": 8}
  found = ei.run(low, PROMPTS, judge, ei.EIConfig(**how, rounds=1))
  assert np.isfinite(found.rounds[0]["train_loss"])
  found = rc.run(low, PROMPTS, judge, rc.RCRLConfig(**how))
  assert np.isfinite(found.stats["train_loss"])
  best = best_of_n.BestOfNConfig(n=4, max_new_tokens=8)
  found, _ = best_of_n.distill(low, PROMPTS, pay, best, train)
  assert np.isfinite(found.losses).all()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["grpo", "ppo"])
@pytest.mark.parametrize("old_logp", OLD)
def test_the_embedded_model(method, old_logp):
  """32 x 8 rows have a token whose ratio is 1.14, which stopped the run."""
  policy = load(str(MINI))
  problems = arithmetic.generate("train", 64, arithmetic.Knobs(), 0, 0)
  how = SHARED | {
    "prompts_per_iteration": 32, "iterations": 1, "max_new_tokens": 64,
    "old_logp": old_logp, "optimizer": dataclasses.replace(RATE, learning_rate=1e-4),
  }  # fmt: skip
  reward = make_reward(arithmetic.judge, "final")
  if method == "grpo":
    result = grpo.run(policy, problems, reward, grpo.preset("grpo", **how))
    # One update of all rows: it still sees what rounding did.
    assert result.iterations[0]["ratio_max"] > 1.1
    assert result.iterations[0]["approx_kl"] < 1e-3
  else:
    result = ppo.run(policy, problems, reward, ppo.PPOConfig(**how, epochs=1))
  sound(result, policy.params)


@pytest.mark.parametrize("method", ["grpo", "dpo"])
def test_a_reference_that_is_given_computes_as_the_policy_does(tiny, method):
  """Of the same weights: what bfloat16 rounds away is no KL, and no margin."""
  if method == "grpo":
    config = grpo.preset("grpo", **SHARED | {"iterations": 1}, old_logp="recompute")
    result = grpo.run(tiny, PROMPTS, pay, config, reference=tiny)
    assert result.iterations[0]["kl/sequence"] == 0
    return
  pairs = [Preference(i, "a", "a" * (1 + i), "b" * (1 + i)) for i in range(8)]
  config = dpo.DPOConfig(
    optimizer=RATE, beta=5.0, batch_size=8, compute_dtype="bfloat16"
  )
  result = dpo.run(tiny, pairs, config, tiny)
  assert abs(result.margins[0]) < 1e-3  # 0.025 of a reference in float32

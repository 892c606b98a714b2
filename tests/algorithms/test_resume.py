"""A run that is stopped and goes on gives what one that was left alone gives."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from rlft.algorithms import grpo, ppo
from rlft.core.errors import CheckpointError, StoppedError
from rlft.core.types import Example, Reward
from rlft.models.lora import LoRAConfig
from rlft.training.checkpoint import Checkpointer
from rlft.training.optimizer import OptimizerConfig
from rlft.training.saving import Saving

A = 1
PROMPTS = [Example(i, "a" if i % 2 else "b", "", "") for i in range(6)]
ITERATIONS = 5
SHARED = {
  "iterations": ITERATIONS,
  "prompts_per_iteration": 2,
  "samples_per_prompt": 4,
  "max_new_tokens": 4,
  "eval_every": 2,
  "optimizer": OptimizerConfig(learning_rate=1e-2, schedule="cosine", eps=1e-5),
}
RUNS = {
  # Adaptive KL, warm-up of the value model, two networks.
  "ppo": (
    ppo.run,
    ppo.PPOConfig(**SHARED, epochs=2, critic_warmup=1, kl_target=0.1, kl_horizon=20),
  ),
  "ppo, LoRA, shared trunk": (
    ppo.run,
    ppo.PPOConfig(**SHARED, value="shared", lora=LoRAConfig(rank=2)),
  ),
  # Draws more prompts than it trains on.
  "dapo": (grpo.run, grpo.preset("dapo", **SHARED)),
}


def pay(rollout, examples):
  """Few distinct values, so that some groups are equal."""
  value = ((rollout.tokens == A) & rollout.completion_mask).sum(1) > 1
  return Reward(value=value.astype(np.float32), judged=np.ones(len(value), bool))


def dev_score(policy):
  """Of the weights: better, worse, better, so that the best is an earlier one."""
  return float(
    np.sin(sum(1e3 * float(x.sum()) for x in jax.tree.leaves(policy.params)))
  )


def go(name, tiny, saving=None):
  run, config = RUNS[name]
  return run(tiny, PROMPTS, pay, config, dev_score=dev_score, saving=saving)


def untimed(result):
  timed = ("time/", "tokens_per_second")
  return [
    {k: x for k, x in one.items() if not any(word in k for word in timed)}
    for one in result.iterations
  ]


@pytest.mark.parametrize("name", RUNS)
def test_going_on_is_bit_exact(name, tiny, tmp_path):
  """Weights, metrics, scores and counts; stopped after iterations 1 and 3."""
  straight = go(name, tiny)
  for stops in (1, 3):
    asked = iter([False] * (0 if stops == 1 else 1) + [True])
    with (
      Checkpointer(tmp_path) as checkpoints,
      pytest.raises(StoppedError, match=f"after iteration {stops} of 5"),
    ):
      go(
        name, tiny, Saving(checkpoints, every=100, stop=functools.partial(next, asked))
      )
  seen = []
  with Checkpointer(tmp_path) as checkpoints:
    resumed = go(name, tiny, Saving(checkpoints, on_restore=seen.append))
  assert [found.step for found in seen] == [3]
  assert untimed(resumed) == untimed(straight)
  assert resumed.history == straight.history
  assert len({score for _, score in straight.history}) > 1
  assert resumed.sampled_solutions == straight.sampled_solutions
  assert resumed.update_tokens == straight.update_tokens
  both = (jax.tree.leaves(x.policy.params) for x in (straight, resumed))
  for due, found in zip(*both, strict=True):
    np.testing.assert_array_equal(due, found)


def test_a_finished_run_gives_its_result_again(tiny, tmp_path):
  with Checkpointer(tmp_path) as checkpoints:
    first = go("dapo", tiny, Saving(checkpoints, every=2))
    assert checkpoints.steps() == [4, 5]  # every second, and the last
  with Checkpointer(tmp_path) as checkpoints:
    again = go("dapo", tiny, Saving(checkpoints))
  assert untimed(again) == untimed(first) and again.history == first.history


def test_a_run_with_other_models_is_refused(tiny, tmp_path):
  with Checkpointer(tmp_path) as checkpoints:
    go("dapo", tiny, Saving(checkpoints))
  with (
    Checkpointer(tmp_path) as checkpoints,
    pytest.raises(CheckpointError, match="another model or optimiser"),
  ):
    go("ppo", tiny, Saving(checkpoints))

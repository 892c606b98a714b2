"""Numbers that are not finite, in whole runs: skipped, counted, and the end (B1)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlft.algorithms import grpo, ppo
from rlft.core.errors import ConfigError, DivergenceError
from rlft.core.types import Example, Reward
from rlft.training.checkpoint import Checkpointer
from rlft.training.divergence import Guard
from rlft.training.epochs import Order, fit
from rlft.training.optimizer import OptimizerConfig
from rlft.training.saving import Saving
from rlft.training.step import init_state, make_step

PROMPT = [Example(0, "a", "", "")]
BOTH = [pytest.param(ppo, marks=pytest.mark.slow), grpo]
HUGE = np.float32(3e38)  # finite, as rewards must be; no float32 holds its square


def paying(huge_in=()):
  """A reward by the parity of the length; in some iterations without measure."""
  calls = iter(range(1000))

  def reward(rollout, examples):
    value = (rollout.lengths % 2).astype(np.float32)
    if next(calls) in huge_in:
      value[:] = np.where(np.arange(len(value)) % 2, HUGE, -HUGE)
    return Reward(value=value, judged=np.ones(len(value), bool))

  return reward


def config_of(module, **changes):
  kind = {ppo: ppo.PPOConfig, grpo: grpo.GRPOConfig}[module]
  if module is grpo:  # a baseline would hide what is huge
    changes |= {"baseline": "none", "scale": "none"}
  return kind(
    **{
      "iterations": 3,
      "prompts_per_iteration": 1,
      "samples_per_prompt": 8,
      "max_new_tokens": 3,
      "epochs": 1,
      "minibatches": 2,
      "max_rows": 8,
    }
    | changes
  )


@pytest.mark.parametrize("module", BOTH)
def test_an_iteration_without_finite_numbers_is_skipped(tiny, module, caplog):
  """Its two updates are: they are counted, and the run goes on as it was."""
  seen = []
  result = module.run(
    tiny,
    PROMPT,
    paying(huge_in=[1]),
    config_of(module),
    on_event=lambda kind, x: seen.append(dict(x)) if kind == "iteration" else None,
  )
  assert [one["update/skipped"] for one in seen] == [0, 2, 0]
  assert "2 in a row (max_nonfinite=3)" in caplog.text
  assert not np.isfinite(seen[1]["loss"])  # on record as it was
  assert np.isfinite([seen[0]["loss"], seen[2]["loss"]]).all()
  for x in jax.tree.leaves(result.policy.params):
    assert np.isfinite(x).all()


@pytest.mark.parametrize("module", BOTH)
def test_three_updates_in_a_row_end_the_run(tiny, module, tmp_path):
  """After the iteration's metrics, before its checkpoint; the batch can be read."""
  seen = []
  with Checkpointer(tmp_path) as checkpoints, pytest.raises(DivergenceError) as info:
    module.run(
      tiny,
      PROMPT,
      paying(huge_in=[1, 2]),
      config_of(module),
      on_event=lambda kind, x: seen.append(kind) if kind == "iteration" else None,
      saving=Saving(checkpoints, every=1),
    )
  assert str(info.value).startswith("iteration 2, update 1 of 2")
  assert "loss is " in str(info.value) and "3 updates in a row" in str(info.value)
  assert seen == ["iteration"] * 3
  arrays = info.value.arrays
  assert arrays["tokens"].shape[0] == 4  # a minibatch
  assert not np.abs(arrays["advantage"]).max() < 1e38
  assert "--- row 3" in info.value.text and "a" in info.value.text
  with Checkpointer(tmp_path) as checkpoints:
    assert checkpoints.steps() == [1, 2]  # what was skipped has changed nothing


# ------------------------------------------------------------ supervised training

RATE = OptimizerConfig(learning_rate=0.1, schedule="constant")


def quadratic(params, batch):
  return {"loss": (jnp.sum(params["w"] * batch["x"]), jnp.float32(2))}


def fitted(bad, config=RATE, saving=None, updates=8, scale=np.nan):
  """Updates on batches of two rows; those of the indices in `bad` are broken."""
  seen = []
  batch_of = lambda i: {"x": np.full(2, scale if i in bad else 1.0, np.float32)}
  out = fit(
    make_step(quadratic, config),
    init_state({"w": jnp.float32(1.0)}, config, updates),
    lambda epoch, seen: map(batch_of, range(updates)),
    Order([1] * updates, batch_size=1, seed=0),
    1,
    Guard(config),
    on_step=lambda i, of, metrics: seen.append((i, metrics["skipped"])),
    saving=saving,
  )
  return out, seen


def test_skipped_updates_are_counted(tmp_path, caplog):
  with Checkpointer(tmp_path) as checkpoints:
    out, seen = fitted({2, 3, 6}, saving=Saving(checkpoints, every=3))
  assert out.skipped == 3 and int(out.state.step) == 5
  assert [i for i, skipped in seen if skipped] == [3, 4, 7]
  assert np.isnan(out.curves["loss"]).sum() == 3
  assert "3 of 8 updates had numbers that were not finite" in caplog.text
  alone, _ = fitted((), updates=5)
  assert float(out.state.params["w"]) == pytest.approx(float(alone.state.params["w"]))


@pytest.mark.parametrize("limit, at", [(1, 3), (3, 5)])
def test_the_run_ends_after_so_many(limit, at, tmp_path):
  config = dataclasses.replace(RATE, max_nonfinite=limit)
  with Checkpointer(tmp_path) as checkpoints, pytest.raises(DivergenceError) as info:
    fitted({2, 3, 4, 5, 6}, config, Saving(checkpoints, every=1))
  assert f"update {at}: loss is nan, grad_norm is nan" in str(info.value)
  assert np.isnan(info.value.arrays["x"]).all()
  with Checkpointer(tmp_path) as checkpoints:
    found = checkpoints.restore(init_state({"w": jnp.float32(1.0)}, RATE, 8))
    assert found.step == at - 1
    assert np.isfinite(float(found.arrays.params["w"]))


def test_weights_that_an_update_poisons_are_not_saved(tmp_path):
  """Gradients are finite and the step is not: the run ends at once."""
  config = OptimizerConfig(learning_rate=3e38, schedule="constant", clip_norm=0.0)
  config = dataclasses.replace(config, weight_decay=10.0, no_decay=())
  with Checkpointer(tmp_path) as checkpoints, pytest.raises(DivergenceError) as info:
    fitted((), config, Saving(checkpoints, every=1))
  assert "update 1: update_norm is inf" in str(info.value)
  with Checkpointer(tmp_path) as checkpoints:
    assert not checkpoints.steps()


def test_the_command_writes_the_batch(tmp_path):
  """Beside the run, and the message says where."""
  from rlft.cli import runs
  from rlft.cli.saving import CheckpointConfig, saving

  @dataclasses.dataclass(frozen=True)
  class Config:
    model: runs.ModelConfig = dataclasses.field(default_factory=runs.ModelConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)

  config = dataclasses.replace(RATE, max_nonfinite=1)
  with (
    pytest.raises(DivergenceError, match=r"update 2: loss is nan.*diverged\.npz"),
    saving(tmp_path, "sft", Config(), "update") as keep,
  ):
    fitted({1}, config, keep)
  with np.load(tmp_path / "diverged.npz") as found:
    assert np.isnan(found["x"]).all() and found["x"].shape == (2,)
  assert "update 2" in (tmp_path / "diverged.txt").read_text()


def test_no_limit_is_no_limit():
  with pytest.raises(ConfigError, match="max_nonfinite=0"):
    OptimizerConfig(max_nonfinite=0)

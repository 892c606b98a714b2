"""A device out of memory: what is said, the exit code, and the checkpoint (C10)."""

from __future__ import annotations

import jax.errors
import jax.numpy as jnp
import pytest

from rlft.algorithms import sft
from rlft.cli import main, memory
from rlft.training.checkpoint import Checkpointer
from rlft.training.metrics import PhaseTimers, phase_of

# As XLA says it on CPU, GPU and TPU, at run time and when it compiles.
MESSAGES = {
  "Out of memory allocating 1125899906842624 bytes.": "1,125,899,906,842,624 bytes",
  "Out of memory while trying to allocate 8589934592 bytes.": "(8.00 GiB) were asked",
  "Attempting to allocate 12.50G. That was not possible. There are 3.20G free.": (
    "12.50G were asked for, 3.20G are free"
  ),
  "XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.51G "
  "of 15.75G hbm. Exceeded hbm capacity by 4.76G.": (
    "20.51G were asked for, there are 15.75G in all"
  ),
}


def failed(text, *phases):
  """The error, as it comes out of phases, the innermost last."""
  error, timers = (
    jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {text}"),
    PhaseTimers(),
  )
  with pytest.raises(jax.errors.JaxRuntimeError):
    raise_in(timers, error, phases)
  return error


def raise_in(timers, error, phases):
  if not phases:
    raise error
  with timers.phase(phases[0]):
    raise_in(timers, error, phases[1:])


@pytest.mark.parametrize(
  "text, due", MESSAGES.items(), ids=["cpu", "gpu", "tpu", "hbm"]
)
def test_sizes_are_said(text, due):
  assert due in memory.explain(failed(text))


@pytest.mark.parametrize(
  "phase, knob",
  [
    ("rollout", "max_rows"),
    ("score", "max_tokens"),
    ("update", "micro_batches"),
    ("evaluation", "eval.max_rows"),
  ],
)
def test_the_knob_is_that_of_the_phase(phase, knob):
  error = failed("Out of memory allocating 64 bytes.", "idle", phase)
  assert phase_of(error) == phase
  told = memory.explain(error)
  assert f"in the phase {phase!r}" in told and knob in told
  others = {"max_rows", "max_tokens", "micro_batches"} - {knob.removeprefix("eval.")}
  assert not any(other in told for other in others)


def test_without_a_phase_every_knob_is_named():
  told = memory.explain(failed("Out of memory."))
  assert "sizes are not said" in told
  assert all(knob in told for knob in ("max_rows", "max_tokens", "micro_batches"))


@pytest.mark.slow
def test_a_run_ends_with_the_message_and_its_checkpoint(tmp_path, monkeypatch, capsys):
  """XLA itself refuses, in the sixth update: once, and the fifth is saved."""
  right, tried = sft.make_train_step, []

  def make(*args):
    step = right(*args)

    def greedy(state, batch):
      tried.append(1)
      if len(tried) == 6:
        jnp.zeros((2**25, 2**25), jnp.int8)
      return step(state, batch)

    return greedy

  monkeypatch.setattr(sft, "make_train_step", make)
  code = main.main(
    ["sft", f"--workdir={tmp_path}"]
    + [f"--config.{x}" for x in ("task.train=64", "sft.batch_size=8", "eval_prompts=0")]
    + ["--config.checkpoint.every=5"]
  )
  told = capsys.readouterr().err
  assert (code, len(tried)) == (1, 6), told
  assert "in the phase 'update': 1,125,899,906,842,624 bytes" in told
  assert "micro_batches" in told and "Traceback" not in told
  checkpoints = Checkpointer(tmp_path)
  assert checkpoints.steps() == [5] and not checkpoints.verify(5)
  checkpoints.close()

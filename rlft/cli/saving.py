"""A work directory goes on from its checkpoints; SIGTERM and Ctrl-C save and then end.

The first SIGTERM (a spot machine that is taken away, `kill`, a scheduler) lets the
iteration or update end, saves it and ends the command with exit code 75, which
launchers take for "start it again"; after Ctrl-C it is 130. A second one ends it at
once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlft.cli import changes, record
from rlft.cli import config as configs
from rlft.cli.interrupts import Stopping
from rlft.core import hosts, watchdog
from rlft.core.errors import ConfigError, DivergenceError
from rlft.training.checkpoint import DIRECTORY, Checkpoint, Checkpointer
from rlft.training.fingerprint import fingerprint
from rlft.training.metrics import COMPILES, compiles_logged
from rlft.training.saving import Saving


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """Checkpoints of a run.

  Attributes:
    every: iterations, or updates of supervised training, between two; the last one is
      always saved.
    keep_last, keep_every: the newest ones that stay, and those of which iterations (or
      updates) stay for good (multiples; 0 is none).
    strict_resume: a damaged newest checkpoint is an error; else the one before it is
      used, and a warning says so.
    step_deadline: seconds without any progress after which one of several processes
      ends itself, and shows where it stands; 0 is off, and one process alone is never
      ended. Longer than the longest compilation.
    allow_changed: settings that may be others in a run that goes on, though they are
      not among those that may (docs/resume.md); --allow_changed is short for it.
  """

  every: int = 10
  keep_last: int = 2
  keep_every: int = 0
  strict_resume: bool = False
  step_deadline: float = 3600.0
  allow_changed: tuple[str, ...] = ()

  def __post_init__(self):  # before a model is loaded
    if min(self.every, self.keep_last, self.keep_every + 1) < 1:
      raise ConfigError(
        f"every={self.every}, keep_last={self.keep_last}: at least 1; "
        f"keep_every={self.keep_every}: 0 (off) or positive"
      )
    if not self.step_deadline >= 0:
      raise ConfigError(f"step_deadline={self.step_deadline}: 0 (off) or positive")


DIVERGED = "diverged.npz"

# Updates are faster than iterations: of supervised training.
every_100_updates = functools.partial(CheckpointConfig, every=100)


@contextlib.contextmanager
def saving(
  workdir: Path,
  algorithm: str,
  config: Any,
  unit: str = "iteration",
  within: Saving | None = None,
  models: Mapping[str, Any] | None = None,
) -> Iterator[Saving]:
  """The `Saving` of a command's run; takes the directory's lock and both signals.

  A run that may not go on is refused here, before anything is written; the record of
  one that may is written here.

  Args:
    workdir: of the run.
    algorithm: its checkpoints are those of no other one.
    config: of the command; has `checkpoint`.
    unit: what its steps are, for people.
    within: the run that this one is a stage of, with a directory of its own: a SIGTERM
      is then for both.
    models: name -> policy or scalar model that the run starts from or is held against;
      None is none. Their weights are compared, not where they lie.

  Raises:
    CheckpointError: another process runs there, it cannot be written, or what is there
      is another run's (see `changes`).
    DivergenceError: of the run, which names the file that its batch was written to.
  """
  settings = configs.redact(configs.dump(config))
  settings[changes.WEIGHTS] = {
    name: fingerprint(model.params) for name, model in (models or {}).items() if model
  }
  allowed = config.checkpoint.allow_changed

  identity = {"algorithm": algorithm}
  with contextlib.closing(Checkpointer(workdir, identity=identity, lock=False)) as seen:
    saved = seen.newest_config()  # raises where the directory is another run's
  if saved is not None:
    changes.check(workdir, saved, settings, allowed)

  def begin() -> None:
    command, *_ = algorithm.split()
    record.begin(workdir, command, config, keep=saved is not None)

  def on_restore(found: Checkpoint) -> None:
    changed = changes.check(workdir, found.config, settings, allowed)
    print(f"{workdir}: going on after {unit} {found.step}")
    for name, (old, new) in changed.items():
      print(f"  changed setting {name}: {old} -> {new}")

  keep = config.checkpoint
  stop = Stopping(unit, not hosts.several()) if within is None else within.stop
  with (
    _watched(keep.step_deadline if within is None else 0),
    Checkpointer(
      workdir,
      keep_last=keep.keep_last,
      keep_every=keep.keep_every,
      identity=identity,
      config=settings,
    ) as checkpoints,
    stop.handling() if within is None else nullcontext(),
    _batch_kept(workdir),
    compiles_logged(workdir / COMPILES)
    if within is None and hosts.first()
    else nullcontext(),
  ):
    if within is None and not any(workdir.glob(f"**/{DIRECTORY}/[0-9]*")):
      begin()  # nothing is there that could refuse it
    yield Saving(
      checkpoints,
      every=keep.every,
      other_prompts=any(changes.decides_prompts(name) for name in allowed),
      strict=keep.strict_resume,
      stop=stop,
      on_begin=stop.begin,
      on_restore=on_restore,
      on_allowed=begin if within is None else within.on_allowed,
    )


@contextlib.contextmanager
def _batch_kept(workdir: Path) -> Iterator[None]:
  """Writes the batch that a run diverged on: arrays, and rows that people can read.

  Of several processes the first writes, and its own rows.
  """
  try:
    yield
  except DivergenceError as error:
    if not error.arrays:
      raise
    path = workdir / DIVERGED
    if hosts.first():
      np.savez(path, **error.arrays)
      path.with_suffix(".txt").write_text(f"{error}\n\n{error.text}")
    raise DivergenceError(f"{error}. The batch is in {path} and .txt") from error


def _watched(deadline: float) -> contextlib.AbstractContextManager[None]:
  who = f"rlft: process {jax.process_index()} of {jax.process_count()}"
  return watchdog.watching(deadline if hosts.several() else 0, who)

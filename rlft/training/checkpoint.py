"""Checkpoints of a run: each is complete and verified, or it is not used.

  workdir/run.lock                         who writes here
  workdir/checkpoints/00000120/arrays/     every array, by orbax
  workdir/checkpoints/00000120/manifest/   sha256 of each array, and what is no array
  workdir/checkpoints/00000120.damaged/    what a restore has refused

Orbax copies arrays off the device, writes in the background and commits a directory by
one rename, so that a killed save leaves nothing that looks like a checkpoint. It does
not see a flipped bit: it restores wrong values without a word. Hence the manifest.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from rlft.core.errors import CheckpointError, ConfigError, StoppedError
from rlft.core.hosts import by_first, everyone, several
from rlft.training.lock import take_lock
from rlft.training.manifest import (
  FILE,
  digest,
  digests,
  entry,
  few,
  is_key,
  misfits,
  named_arrays,
  one_line,
  parallel,
  plain,
  seal,
  stored,
  unseal,
)
from rlft.training.verified import Damaged, read_arrays

LOCK = "run.lock"
DIRECTORY = "checkpoints"
_FORMAT = 1
_STEP = re.compile(r"\d{8,}")
_PACKAGES = ("rlft", "jax", "jaxlib", "orbax-checkpoint", "flax", "optax", "numpy")

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """What a checkpoint holds.

  Attributes:
    step: that it was saved at.
    arrays: the tree of `like`; by name, as numpy arrays, where none was given.
    meta: what was saved beside the arrays, as JSON gives it back (tuples are lists).
    metrics: of that step.
    config: of the run that saved it, to be compared with that of the run that resumes.
  """

  step: int
  arrays: Any
  meta: dict[str, Any]
  metrics: dict[str, float]
  config: dict[str, Any]


class Checkpointer:
  """Saves and restores the state of a run in its work directory.

  All processes of a run call the same methods in the same order. `workdir` is one
  directory that all of them see.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    *,
    keep_last: int = 2,
    keep_every: int = 0,
    keep_best: tuple[str, Literal["max", "min"]] | None = None,
    identity: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    max_failures: int = 3,
    lock: bool = True,
  ):
    """Takes the directory; what killed saves have left is removed.

    Args:
      workdir: of the run, made if missing.
      keep_last: how many of the newest checkpoints stay. Two, so that there is one to
        fall back to.
      keep_every: those whose step is a multiple of it stay for good; 0 is off.
      keep_best: metric, and whether its largest or smallest value is the best: the best
        checkpoint (the first of equal ones) stays as well.
      identity: what must be equal for a checkpoint to be this run's: algorithm, model.
      config: settings of the run, without secrets; whoever resumes compares them.
      max_failures: how many saves in a row may fail before one raises.
      lock: False only reads: nothing is made, removed or saved.

    Raises:
      ConfigError: a setting cannot be.
      CheckpointError: another run writes here, or nothing can be written here.
    """
    if "://" in os.fspath(workdir):
      raise ConfigError(
        f"workdir={workdir!r}: mount the bucket (gcsfuse), give its path"
      )
    if min(keep_last, keep_every + 1, max_failures) < 1:
      raise ConfigError(
        f"keep_last={keep_last}, max_failures={max_failures}: at least 1; "
        f"keep_every={keep_every}: 0 (off) or positive"
      )
    if keep_best is not None and keep_best[1] not in ("max", "min"):
      raise ConfigError(f"keep_best={keep_best}: a metric, and 'max' or 'min'")
    import orbax.checkpoint as ocp

    self._ocp = ocp
    self._workdir = Path(workdir).expanduser().absolute()
    self._root = self._workdir / DIRECTORY
    self._keep_last, self._keep_every = keep_last, keep_every
    self._keep_best, self._max_failures = keep_best, max_failures
    self._identity = plain(identity or {}, "identity")
    self._config = plain(config or {}, "config")
    self._writes, self._held = lock, None
    self._pending: tuple[int, int] | None = None  # step, bytes
    self._error: CheckpointError | None = None
    self._failures = 0
    self._own: set[int] = set()  # steps that this run has saved or restored
    self._metrics: dict[int, dict[str, float]] = {}
    if lock:
      by_first(self._take)
    items = ocp.CompositeCheckpointHandler(
      arrays=ocp.PyTreeCheckpointHandler(), manifest=ocp.JsonCheckpointHandler(FILE)
    )
    self._orbax = ocp.AsyncCheckpointer(items)

  # ---------------------------------------------------------------------- saving

  def save(
    self,
    step: int,
    arrays: Any,
    meta: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
  ) -> bool:
    """Starts a save; returns once the arrays may be donated or changed.

    A save that fails is logged and the run goes on, for the next one may succeed. It
    raises where `max_failures` in a row have failed; `wait` and `close` raise where the
    last one has.

    Args:
      step: of the state, larger than that of every checkpoint that is there.
      arrays: tree of jax or numpy arrays, typed keys among them.
      meta: what JSON can hold: integers of seeds, coefficients, cursors, data.
      metrics: numbers to choose the best checkpoint by.

    Returns:
      False where this step is already saved, or the save could not be started.

    Raises:
      CheckpointError: there is a later checkpoint, a leaf is no array, or too many
        saves have failed.
    """
    if not self._writes:
      raise CheckpointError(f"{self._root}: opened with lock=False, only to be read")
    named = named_arrays(arrays)
    meta, metrics = plain(meta or {}, "meta"), plain(metrics or {}, "metrics")
    self._settle()
    step, path = int(step), self._path(step)
    if step in self._own:
      return False
    newer = [other for other in self.steps() if other >= step]
    if newer:
      raise CheckpointError(
        f"{path} would not be the newest, there are {newer}: remove those (they are "
        "later than the step that was restored), or choose another workdir"
      )
    data = {k: jax.random.key_data(x) if is_key(x) else x for k, x in named.items()}
    pieces = dict(zip(data, parallel(digests, data.values())))
    entries = {name: entry(x) | {"sha256": {}} for name, x in named.items()}
    for of_a_host in everyone(pieces):
      for name, one in of_a_host.items():
        entries[name]["sha256"] |= one
    data = {name: x for name, x in data.items() if x.size}  # orbax refuses empty ones
    manifest = {
      "format": _FORMAT,
      "step": step,
      "identity": self._identity,
      "arrays": entries,
      "meta": meta,
      "metrics": metrics,
      "config": self._config,
      "config_sha256": digest(self._config),
      "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }
    items = {"manifest": self._ocp.args.JsonSave(seal(manifest))}
    if data:
      items["arrays"] = self._ocp.args.PyTreeSave(data)
    self._pending = step, sum(x.nbytes for x in data.values())
    self._metrics[step] = metrics
    try:
      self._orbax.save(path, args=self._ocp.args.Composite(**items))
    except Exception as error:  # of disk, network or device: orbax has no type for them
      self._fail(error)
      return False
    return True

  def wait(self) -> None:
    """Waits for the save that runs; `CheckpointError` where the last one has failed."""
    self._settle()
    error, self._error = self._error, None
    if error is not None:
      raise error

  def close(self) -> None:
    """Waits, then lets go of the directory; safe to call twice."""
    try:
      self.wait()
    finally:
      self._orbax.close()
      self._writes = False
      self._let_go()

  def __enter__(self) -> Checkpointer:
    return self

  def __exit__(self, kind: type | None, *exc: object) -> None:
    if kind is not None and not issubclass(kind, StoppedError) and several():
      # Nobody knows where the others are: no message may be sent to them any more, and
      # a save that runs would wait for theirs.
      self._let_go()
      return
    try:
      self.close()
    except CheckpointError as error:
      if kind is None:
        raise
      log.error("%s", error)  # what ends the run is the other one

  def _settle(self) -> None:
    """Waits for the save that runs, then removes what retention does not keep."""
    try:
      self._orbax.wait_until_finished()
    except Exception as error:
      self._fail(error)
    if self._pending is None:
      return
    self._own.add(self._pending[0])
    self._pending, self._error, self._failures = None, None, 0
    by_first(self._retain)
    by_first(self._sweep)  # threads of a failed save may have gone on for a while

  def _fail(self, error: Exception) -> None:
    (step, size), self._pending = self._pending or (-1, 0), None
    self._metrics.pop(step, None)
    free = shutil.disk_usage(self._workdir).free
    self._failures += 1
    self._error = CheckpointError(
      f"{self._path(step)} could not be written: {one_line(error)}. It takes up to "
      f"{size:,} bytes, {free:,} are free: make room, or keep fewer checkpoints. Older "
      "checkpoints are untouched"
    )
    self._error.__cause__ = error
    by_first(self._sweep)
    if self._failures >= self._max_failures:
      raise self._error
    log.error("%s; the run goes on, and the next save tries again", self._error)

  def _retain(self) -> None:
    """Removes what is not kept; what cannot be read is neither counted nor removed."""
    steps = [step for step in self._steps() if self._metrics_of(step) is not None]
    keep = set(steps[-self._keep_last :])
    keep |= {s for s in steps if self._keep_every and s % self._keep_every == 0}
    keep |= {self._best(steps)}
    for step in set(steps) - keep:
      path = self._path(step)
      gone = path.with_suffix(".deleting")
      try:
        path.rename(gone)  # half of a checkpoint must not look like one
        shutil.rmtree(gone)
      except OSError as error:
        log.warning("%s could not be removed: %s", path, error)
      else:
        self._metrics.pop(step, None)

  def _metrics_of(self, step: int) -> dict[str, float] | None:
    if step not in self._metrics:
      manifest, problem = self._manifest(step)
      if problem:
        return None
      self._metrics[step] = manifest["metrics"]
    return self._metrics[step]

  def _best(self, steps: list[int]) -> int | None:
    if self._keep_best is None:
      return None
    name, mode = self._keep_best
    values = {s: (self._metrics_of(s) or {}).get(name) for s in steps}
    values = {s: v for s, v in values.items() if v is not None and v == v}
    return (max if mode == "max" else min)(values, key=values.get, default=None)

  # ------------------------------------------------------------------- restoring

  def steps(self) -> list[int]:
    """The steps that can be tried, oldest first: committed, not yet verified."""
    return by_first(self._steps)

  def best(self) -> int | None:
    """The step that `keep_best` keeps; None where no checkpoint has the metric."""
    return by_first(lambda: self._best(self._steps()))

  def manifest(self, step: int) -> dict[str, Any]:
    """What was saved at a step, without its arrays' values.

    Raises:
      CheckpointError: it is missing or damaged.
    """
    manifest, problem = by_first(lambda: self._manifest(step))
    if problem:
      raise Damaged(self._path(step), {FILE: problem})
    return manifest

  def newest_config(self) -> dict[str, Any] | None:
    """The settings of the newest checkpoint whose manifest is whole; None of none.

    Raises:
      CheckpointError: it is another run's.
    """
    for step in reversed(self.steps()):
      manifest, problem = by_first(functools.partial(self._manifest, step))
      if not problem:
        self._check_identity(manifest, self._path(step))
        return manifest["config"]
    return None

  def _check_identity(self, manifest: Mapping[str, Any], path: Path) -> None:
    if self._identity and manifest["identity"] != self._identity:
      theirs, ours = manifest["identity"], self._identity
      differ = {
        name: f"{theirs.get(name)!r}, here {ours.get(name)!r}"
        for name in sorted(theirs.keys() | ours.keys())
        if theirs.get(name) != ours.get(name)
      }
      raise CheckpointError(
        f"{path} is of another run: {few(differ)}; choose another workdir"
      )

  def verify(self, step: int) -> dict[str, str]:
    """Reads a checkpoint: what is wrong with it, by name of array or file."""
    self._settle()
    try:
      self._read(step, None)
    except Damaged as error:
      return error.problems
    return {}

  def restore(
    self, like: Any = None, step: int | None = None, strict: bool = False
  ) -> Checkpoint | None:
    """The newest checkpoint that is whole; None where there is none at all.

    A damaged one is reported, put aside as `STEP.damaged`, and the one before it used.

    Args:
      like: tree of arrays or `jax.ShapeDtypeStruct` that the checkpoint must fit; each
        array lies where that of `like` does, or is a numpy array where it has no
        sharding. The mesh may be another one than that of the save.
      step: this one and no other.
      strict: whether damage to the newest is an error.

    Raises:
      CheckpointError: it is another run's or another model's, there is no such step,
        all are damaged, or one is and may not be passed over.
    """
    self._settle()
    steps = self.steps()
    if step is not None and step not in steps:
      raise CheckpointError(f"{self._root} has no step {step}; there are {steps}")
    if not steps:
      return None
    for candidate in [step] if step is not None else reversed(steps):
      try:
        found = self._read(candidate, like)
      except Damaged as error:
        if strict or step is not None or candidate == steps[0]:
          older = [s for s in steps if s < candidate]
          raise CheckpointError(
            f"{error}. Checkpoints before it: {older or 'none'}; restore one of them, "
            "or start anew in another workdir"
          ) from error
        log.error("%s. THE ONE BEFORE IT IS USED INSTEAD", error)
        if self._writes:
          by_first(functools.partial(self._put_aside, candidate))
        continue
      self._own.add(candidate)
      return found

  def _read(self, step: int, like: Any) -> Checkpoint:
    path, manifest = self._path(step), self.manifest(step)
    self._check_identity(manifest, path)
    saved = manifest["arrays"]
    if like is None:
      want = {
        name: jax.ShapeDtypeStruct(e["shape"], np.dtype(e["dtype"]))
        for name, e in saved.items()
      }
    else:
      tree = named_arrays(like, abstract=True)
      differ = misfits(saved, {name: entry(x) for name, x in tree.items()})
      if differ:
        raise CheckpointError(
          f"{path} is of another model or optimiser: {few(differ)}; resume with the "
          "settings it was saved with, or choose another workdir"
        )
      want = {name: stored(x) for name, x in tree.items()}
    named = read_arrays(path, want, saved)
    for name, x in named.items():
      if saved[name]["key"]:
        named[name] = jax.random.wrap_key_data(x, impl=saved[name]["key"])
    if like is not None:
      named = jax.tree.unflatten(jax.tree.structure(like), named.values())
    return Checkpoint(
      step, named, manifest["meta"], manifest["metrics"], manifest["config"]
    )

  # --------------------------------------------------- the directory, on process 0

  def _path(self, step: int) -> Path:
    return self._root / f"{step:08d}"

  def _steps(self) -> list[int]:
    done = self._ocp.utils.is_checkpoint_finalized
    found = self._root.iterdir() if self._root.is_dir() else ()
    return sorted(
      int(p.name) for p in found if _STEP.fullmatch(p.name) and p.is_dir() and done(p)
    )

  def _manifest(self, step: int) -> tuple[dict[str, Any] | None, str]:
    path = self._path(step)
    manifest, problem = unseal(path / "manifest" / FILE)
    if not problem and manifest["format"] > _FORMAT:
      release = manifest["versions"]["rlft"]
      raise CheckpointError(f"{path} is of rlft {release}, a later one: use that")
    if not problem and manifest["step"] != step:
      problem = f"is of step {manifest['step']}"
    return manifest, problem

  def _take(self) -> None:
    """Makes the directories and takes the lock; shows that both can be written."""
    try:
      self._root.mkdir(parents=True, exist_ok=True)
      self._held = take_lock(self._workdir / LOCK)
      probe = self._root / ".probe"
      probe.write_bytes(b"1")
      probe.unlink()
      self._sweep()
    except OSError as error:
      self._let_go()
      raise CheckpointError(
        f"{self._workdir} cannot be written ({error}): choose another workdir, or "
        "change its owner, mode or mount"
      ) from error

  def _let_go(self) -> None:
    if self._held is not None:
      os.close(self._held)  # and with it the lock
      self._held = None

  def _sweep(self) -> None:
    for path in self._root.glob("*.*"):
      if ".orbax-checkpoint-tmp" in path.name or path.suffix == ".deleting":
        shutil.rmtree(path, ignore_errors=True)

  def _put_aside(self, step: int) -> None:
    path = self._path(step)
    aside = path.with_suffix(".damaged")
    try:
      shutil.rmtree(aside, ignore_errors=True)
      path.rename(aside)
    except OSError as error:
      log.warning("%s could not be put aside: %s", path, error)

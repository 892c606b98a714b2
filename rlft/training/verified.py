"""Reads the arrays of a checkpoint, and says which are not what was saved."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlft.core.errors import CheckpointError
from rlft.core.hosts import everyone, spread
from rlft.training.manifest import compare, few, one_line, parallel

log = logging.getLogger(__name__)


class Damaged(CheckpointError):
  """A checkpoint is not what was saved.

  Attributes:
    problems: name of an array, or of a file -> what is wrong with it.
  """

  def __init__(self, path: Path, problems: Mapping[str, str]):
    self.problems = dict(problems)
    super().__init__(f"{path} is damaged: {few(self.problems)}")


def read_arrays(
  path: Path,
  want: Mapping[str, jax.ShapeDtypeStruct],
  saved: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
  """The arrays of a checkpoint, verified; all processes get them, or the same error.

  Args:
    path: of the checkpoint.
    want: by name; where an array is to lie, a numpy array without a sharding.
    saved: by name, the entry of the manifest.

  Raises:
    Damaged: with the name of each array that is not what was saved.
    CheckpointError: they could not be restored, but each can be read.
  """
  some = {name: x for name, x in want.items() if math.prod(x.shape)}
  problems, missed, found, failure = {}, set(), {}, None
  try:
    found = _load(path, some) if some else {}
  except Exception as error:  # orbax has no type for them
    problems = _unreadable(path, some)
    # Where each array can be read, it is not the checkpoint: too little memory, say.
    failure = None if problems else one_line(error)
  else:
    judged = parallel(lambda n: _judge(found.get(n), some[n], saved[n]), some)
    for name, (wrong, unseen) in zip(some, judged):
      missed |= {f"{name}[{region}]" for region in unseen}
      if wrong:
        problems[name] = wrong
  said = everyone([problems, sorted(missed), failure])
  for theirs, _, _ in said:
    problems |= theirs
  if problems:
    raise Damaged(path, problems)
  for process, (_, _, theirs) in enumerate(said):
    if theirs:
      raise CheckpointError(
        f"{path}: process {process} could not restore it, though it can read each "
        f"array: {theirs}"
      )
  missed.intersection_update(*(regions for _, regions, _ in said))
  if missed:  # the mesh has changed, and no host holds such a piece whole
    log.warning("%s: %d pieces could not be verified", path, len(missed))
  for name in want.keys() - some.keys():
    empty, home = np.zeros(want[name].shape, want[name].dtype), want[name].sharding
    found[name] = empty if home is None else spread(empty, home)
  return {name: found[name] for name in want}


def _load(path: Path, want: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
  import orbax.checkpoint as ocp
  from etils import epath  # orbax's paths

  args = {
    name: ocp.RestoreArgs(restore_type=np.ndarray)
    if x.sharding is None
    else ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape)
    for name, x in want.items()
  }
  args = ocp.args.PyTreeRestore(dict(want), args, partial_restore=True)
  # Not by a checkpointer: after it has read it waits for the other processes, and one
  # that cannot read would never come.
  with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
    return handler.restore(epath.Path(path) / "arrays", args=args)


def _unreadable(path: Path, want: Mapping[str, Any]) -> dict[str, str]:
  """Orbax says of a tree that it cannot be read; this asks for each array."""
  problems = {}
  for name, x in want.items():
    try:
      _load(path, {name: x})
    except Exception as error:
      problems[name] = f"cannot be read: {one_line(error)}"
  return problems


def _judge(x: Any, want: Any, saved: Mapping[str, Any]) -> tuple[str, list[str]]:
  """What is wrong with an array that was read; and the pieces that were not judged."""
  # A flipped bit of orbax's own index can make it leave an array out, or misshape it.
  is_array = isinstance(x, jax.Array | np.ndarray)
  if not is_array or (x.shape, x.dtype) != (want.shape, want.dtype):
    return "is missing, or has another shape or type", []
  return compare(x, saved["sha256"])

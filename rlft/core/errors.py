"""The errors that rlft raises on purpose: each names the value and the cure."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any


class RlftError(ValueError):
  """Base of every error that rlft raises on purpose.

  It derives from `ValueError`, so that code which catches the standard error works.
  """


class ConfigError(RlftError):
  """A setting is unknown, has the wrong type or contradicts another one."""


class DataError(RlftError):
  """A data set, or one of its rows, cannot be used; names the file and the line."""


class CheckpointError(RlftError):
  """Model files are missing, damaged or do not describe the model they claim."""


class RewardError(RlftError):
  """A reward could not be computed; never turned into a reward of 0."""


class StoppedError(RlftError):
  """The run was asked to stop, and has saved its state: run it again to go on.

  Attributes:
    interrupted: whether a person asked, by Ctrl-C, and not a machine, by SIGTERM.
  """

  interrupted = False


class DivergenceError(RlftError):
  """A number of training has left the values that are possible; names it.

  Attributes:
    arrays: {name: array} of the batch it was seen on; {} where it is of none.
    text: the rows of that batch, readable.
  """

  def __init__(
    self, message: str, arrays: Mapping[str, Any] | None = None, text: str = ""
  ):
    super().__init__(message)
    self.arrays, self.text = dict(arrays or {}), text


def check_kind(name: str, value: Any, kind: type, cure: str) -> None:
  """Raises `ConfigError` where an argument is of another kind than its name says."""
  if not isinstance(value, kind):
    raise ConfigError(f"{name} is {value!r:.100}, and no {kind.__name__}: {cure}")


def nearest(name: str, names: list[str], what: str) -> str:
  """The end of an error message: the nearest name, then all of them."""
  near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
  hint = f"; did you mean {near[0]!r}?" if near else ""
  return f"{hint} ({what}: {', '.join(names)})" if names else hint

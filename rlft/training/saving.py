"""When a run saves itself, what it goes on from, and when it stops."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from rlft.core.errors import ConfigError, StoppedError
from rlft.core.hosts import everyone
from rlft.training.checkpoint import Checkpoint, Checkpointer


@dataclasses.dataclass
class Saving:
  """How a run saves itself, and when it stops.

  Attributes:
    checkpoints: of its work directory.
    every: iterations, or updates of supervised training, between checkpoints; the last
      one is always saved.
    strict: whether a damaged checkpoint is an error, see `Checkpointer.restore`.
    other_prompts: whether PPO and GRPO may go on with other prompts, or another order.
    stop: whether the run should save and end now; of any process of the run.
    on_begin: called when the run begins: from then on it asks `stop`.
    on_restore: gets the checkpoint that the run goes on from.
    on_allowed: called when nothing that was saved can refuse the run any more.
  """

  checkpoints: Checkpointer
  every: int = 10
  strict: bool = False
  other_prompts: bool = False
  stop: Callable[[], bool] = lambda: False
  on_begin: Callable[[], None] = lambda: None
  on_restore: Callable[[Checkpoint], None] = lambda found: None
  on_allowed: Callable[[], None] = lambda: None

  def __post_init__(self):
    if self.every < 1:
      raise ConfigError(f"every={self.every}: at least 1")

  def restore(
    self, like: Any, check: Callable[[Mapping[str, Any]], None] = lambda meta: None
  ) -> Checkpoint | None:
    """The checkpoint to go on from; None at the start of a run.

    `check` gets what is saved beside the arrays, and raises where it refuses the run.
    """
    self.on_begin()
    found = self.checkpoints.restore(like, strict=self.strict)
    if found is not None:
      check(found.meta)
      self.on_restore(found)
    self.on_allowed()
    return found

  def asked_to_stop(self) -> bool:
    """The same on every process."""
    return any(everyone(self.stop()))

  def end(self, after: str) -> NoReturn:
    """Waits for the save that runs, and ends the run by `StoppedError`."""
    self.checkpoints.wait()
    raise StoppedError(
      f"asked to stop after {after}; the state is saved, and the same command goes on "
      "from there"
    )

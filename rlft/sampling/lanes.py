"""Which prompt decodes in which slot, on one host and on many.

Letters: B rows, S slots.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rlft.core import hosts
from rlft.core.mesh import replicated


class Lanes:
  """Which prompt is in which slot; one lane a part of the batch that shares a program.

  A process that works alone has one lane. Where all hosts run one program each knows
  the lanes of the others, for all must call the same programs: what they hold follows
  from the flags of all rows.

  Attributes:
    of, index: how many lanes there are, and which is this process's.
    first: its first slot.
  """

  def __init__(self, mesh: Mesh | None, part: hosts.Share, alone: bool, count: int):
    """Args: of the rollout; this process's part, and whether it works alone; prompts of
    each lane."""
    self.of, self.index = (1, 0) if alone else (part.of, part.index)
    self._mesh, self._slots, self.first = mesh, 0, 0
    self._waits = [list(range(count))[::-1] for _ in range(self.of)]
    self._holds: list[dict[int, int]] = [{} for _ in range(self.of)]

  def open(self, slots: int) -> None:
    """Args: slots of each lane."""
    self._slots, self.first = slots, self.index * slots

  def busy(self) -> bool:
    return any(self._waits) or any(self._holds)

  def waiting(self) -> bool:
    return any(self._waits)

  def free(self) -> int:
    """Slots without a prompt: decoding takes them for done."""
    return sum(self._slots - len(holds) for holds in self._holds)

  def take(self, most: int) -> list[list[tuple[int, int]]]:
    """(slot, prompt) of each lane, for up to `most` of its free slots."""
    taken = []
    for waits, holds in zip(self._waits, self._holds):
      free = [slot for slot in range(self._slots) if slot not in holds]
      pairs = [(slot, waits.pop()) for slot in free[: min(most, len(waits))]]
      holds.update(pairs)
      taken.append(pairs)
    return taken

  def end(self, done_S: np.ndarray) -> list[tuple[int, int]]:
    """Frees the slots that are done; (slot, prompt) of this process's."""
    ended = []
    for lane, holds in enumerate(self._holds):
      flags = done_S[lane * self._slots : (lane + 1) * self._slots]
      pairs = [(slot, holds.pop(slot)) for slot in list(holds) if flags[slot]]
      ended = pairs if lane == self.index else ended
    return ended

  def place(self, batch: Any) -> Any:
    """Own rows for the lanes' program."""
    if self.of == 1:
      return hosts.put(batch, self._mesh)
    return hosts.place_own(batch, self._mesh)

  def flags(self, x: jax.Array) -> np.ndarray:
    """One flag a row, of all lanes."""
    if self.of > 1:
      x = jax.device_put(x, replicated(self._mesh))
    return np.asarray(x)

  def read(self, x: jax.Array) -> np.ndarray:
    """Own rows."""
    if self.of == 1:
      return np.asarray(x)
    return hosts.own_rows(x, self._mesh)

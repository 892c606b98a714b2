"""Updates over epochs of batches: of supervised training, DPO and reward models.

An epoch's order depends on its index alone, so a run that goes on skips the batches
that it has had. With other batches, or more rows, the rows that the epoch has not had
come next: each is trained on once an epoch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from rlft.core.errors import CheckpointError
from rlft.training.data import grouped
from rlft.training.divergence import Guard
from rlft.training.metrics import PhaseTimers
from rlft.training.saving import Saving
from rlft.training.step import COUNT, TrainState, go_on_from

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Order:
  """Which rows the batches of an epoch hold.

  Attributes:
    lengths: tokens of each row.
    batch_size, seed: see `training.data.grouped`.
    content: of a row, what tells it from another.
  """

  lengths: Sequence[int]
  batch_size: int
  seed: int
  content: Callable[[int], bytes] = lambda row: b""

  @property
  def per_epoch(self) -> int:
    """Batches; one that its epoch cannot fill is an update too."""
    return math.ceil(len(self.lengths) / self.batch_size)

  def planned(self, epochs: float) -> int:
    """Updates of so many epochs."""
    return math.ceil(epochs * self.per_epoch)

  def epoch(self, index: int, seen: frozenset[int]) -> list[list[int]]:
    """The rows of every batch, without those that were seen before."""
    settings = {"batch_size": self.batch_size, "seed": self.seed, "epoch": index}
    return [rows for _, rows in grouped(self.lengths, seen=seen, **settings)]

  def digest(self, rows: int) -> str:
    """Of the first rows."""
    found = hashlib.sha256()
    for row in range(rows):
      content = self.content(row)
      found.update(len(content).to_bytes(8, "big") + content)
    return found.hexdigest()

  def facts(self) -> dict[str, Any]:
    """What it depends on, for JSON."""
    rows = len(self.lengths)
    own = {"rows": rows, "batch_size": self.batch_size, "seed": self.seed}
    return own | {"digest": self.digest(rows)}


@dataclasses.dataclass
class Fitted:
  """What updates gave.

  Attributes:
    state: after the last one.
    curves: name -> its value in every update.
    updates, tokens: how many, and `tokens_of` of their batches.
    skipped: updates that were not made, as their numbers were not finite.
    earlier: seconds of the runs that this one went on from.
  """

  state: TrainState
  curves: dict[str, list[float]]
  updates: int
  tokens: int
  skipped: int
  earlier: float


@dataclasses.dataclass
class _Progress:
  """What a run has done; saved with its state.

  Attributes:
    epoch: the one that is under way.
    batches, of: that it has had, of how many.
    seen: its rows that came before these batches, when they were others: bits as hex.
    data: the facts of the `Order` of these batches; {} where nothing is saved.
  """

  curves: dict[str, list[float]]
  updates: int = 0
  tokens: int = 0
  skipped: int = 0
  seconds: float = 0.0
  epoch: int = 0
  batches: int = 0
  of: int = 0
  seen: str = ""
  data: dict[str, Any] = dataclasses.field(default_factory=dict)

  def seen_rows(self) -> frozenset[int]:
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(self.seen), np.uint8))
    return frozenset(np.flatnonzero(bits).tolist())

  def go_on(self, order: Order) -> None:
    """Finds its place in another order.

    Raises:
      CheckpointError: which rows of the epoch have been trained on cannot be told.
    """
    now, before = order.facts(), self.data
    if now == before:
      return
    if not before:
      raise CheckpointError(
        "the checkpoint is of an older release, and does not say which rows it was "
        "made of: finish the run with that release, or start in another directory"
      )
    rows, seen = before["rows"], self.seen_rows()
    if rows <= now["rows"] and order.digest(rows) == before["digest"]:
      old = dataclasses.replace(
        order,
        lengths=order.lengths[:rows],
        batch_size=before["batch_size"],
        seed=before["seed"],
      )
      had = old.epoch(self.epoch, seen)[: self.batches]
      seen |= {row for batch in had for row in batch}
      log.warning(
        "the checkpoint is of %d rows in batches of %d, the run now of %d in batches "
        "of %d: epoch %d goes on with the %d rows that it has not had",
        *(rows, before["batch_size"], now["rows"], now["batch_size"]),
        *(self.epoch + 1, now["rows"] - len(seen)),
      )
    elif self.batches == self.of:  # an epoch with the new rows is next
      self.epoch, seen = self.epoch + 1, frozenset()
    elif self.batches or seen:
      raise CheckpointError(
        f"the run was saved within epoch {self.epoch + 1}, and its {rows} rows are not "
        f"the first of the {now['rows']} rows that are given now: which of them have "
        "been trained on cannot be told. Give the same rows, with new ones at their "
        "end only, or start in another directory"
      )
    bits = np.zeros(now["rows"] if seen else 0, np.uint8)
    bits[sorted(seen)] = 1
    self.batches, self.seen = 0, np.packbits(bits).tobytes().hex()
    self.data = now

  def planned(self, order: Order, epochs: float) -> int:
    """Updates of so many epochs, those that were made among them."""
    if not self.seen and self.updates == self.epoch * order.per_epoch + self.batches:
      return order.planned(epochs)
    seen = self.seen_rows()
    plan, later = len(order.epoch(self.epoch, seen)), epochs - self.epoch - 1
    if later < 0:  # it ends within this epoch
      rows = (1 + later) * len(order.lengths) - len(seen)
      plan = min(plan, math.ceil(rows / order.batch_size))
    left = plan - self.batches + order.planned(max(0, later))
    return self.updates + max(0, left)


def fit(
  step: Callable[[TrainState, Any], tuple[TrainState, Mapping[str, jax.Array]]],
  state: TrainState,
  epoch_of: Callable[[int, frozenset[int]], Iterator[Any]],
  order: Order,
  epochs: float,
  guard: Guard,
  *,
  curves: Sequence[str] = ("loss",),
  tokens_of: Callable[[Sequence[int]], int] = lambda rows: 0,
  budget: int = 0,
  on_step: Callable[[int, int, dict[str, float]], None] | None = None,
  saving: Saving | None = None,
  timers: PhaseTimers | None = None,
) -> Fitted:
  """Updates a state on batch after batch, epoch after epoch.

  Args:
    step: a train step; it may donate its state.
    state: before the first update.
    epoch_of: the batches of an epoch, by its index and the rows that it has seen.
    order: the rows of these batches.
    epochs: over the rows.
    guard: of what is trained; ends the run where its numbers are not finite.
    curves: metrics of which every update's value is kept.
    tokens_of: of the rows of a batch: their tokens in the loss. The host knows; to read
      them from a batch on a mesh would wait for the update.
    budget: ends the run with the update that has brought the tokens to so many, instead
      of after `epochs`; 0 is off.
    on_step: called with (update, updates planned, metrics) after every update. Metrics
      are read while the next update runs, except before a save: what is on record is
      what was saved. Several processes that save wait for every update: they ask each
      other whether to stop.
    saving: saves the state, and goes on with what it has saved; the schedule's horizon
      is that of `state`, so that more or fewer updates can be asked for.
    timers: get the phases "update" and "checkpoint".

  Raises:
    DivergenceError: of the guard, after `on_step` has had the update's metrics.
    StoppedError: `saving` was asked to stop, and the state is saved.
    CheckpointError: `saving` has a run on other rows.
  """
  began, timers = time.perf_counter(), timers or PhaseTimers()
  progress = _Progress({name: [] for name in curves})
  planned = order.planned(epochs)
  found = saving.restore(state) if saving is not None else None
  if found is not None:
    progress, whole = _Progress(**found.meta), planned
    if progress.data or progress.updates < planned:
      progress.go_on(order)
      planned = progress.planned(order, epochs)
    if planned != whole == int(state.horizon):  # else the optimiser's `total_steps`
      state = state.replace(horizon=state.horizon + (planned - whole))
    state = go_on_from(found.arrays, state)
  elif saving is not None:
    progress.data = order.facts()
  earlier = progress.seconds

  def report(update: int, metrics: Mapping[str, Any], batch: Any) -> dict[str, float]:
    with timers.phase("update"):
      metrics = {
        name: float(x)
        for name, x in jax.device_get(metrics).items()
        if not name.startswith(COUNT)
      }
    progress.skipped += int(metrics["skipped"])
    for name, values in progress.curves.items():
      values.append(metrics[name])
    if on_step is not None:
      on_step(update, max(planned, update), metrics)
    guard.add(f"update {update}", metrics, batch)
    guard.check()
    return metrics

  def over() -> bool:
    return progress.tokens >= budget if budget else progress.updates >= planned

  def begin_epoch() -> tuple[list[list[int]], Iterator[Any]]:
    seen = progress.seen_rows()
    rows = order.epoch(progress.epoch, seen)
    progress.of = len(rows)
    batches = epoch_of(progress.epoch, seen)
    return rows, itertools.islice(batches, progress.batches, None)

  (rows, batches), waiting = begin_epoch(), None
  while not over():
    if progress.batches == progress.of:
      progress.epoch, progress.batches, progress.seen = progress.epoch + 1, 0, ""
      rows, batches = begin_epoch()
    batch = next(batches)
    with timers.phase("update"):
      state, metrics = step(state, batch)
    if waiting is not None:
      report(*waiting)
    progress.tokens += tokens_of(rows[progress.batches])
    progress.batches += 1
    progress.updates += 1
    waiting = progress.updates, metrics, batch
    stop = saving is not None and saving.asked_to_stop()
    due = saving is not None and (stop or progress.updates % saving.every == 0)
    if not (due or over()):
      continue
    metrics, waiting = report(*waiting), None
    if saving is not None:
      progress.seconds = earlier + time.perf_counter() - began
      meta = dataclasses.asdict(progress)
      with timers.phase("checkpoint"):
        saving.checkpoints.save(progress.updates, state, meta, metrics)
    if stop and not over():
      saving.end(f"update {progress.updates} of {max(planned, progress.updates)}")
  if saving is not None:
    with timers.phase("checkpoint"):
      saving.checkpoints.wait()
  if progress.skipped:
    log.warning(
      "%d of %d updates had numbers that were not finite, and were skipped",
      progress.skipped,
      progress.updates,
    )
  return Fitted(
    state,
    progress.curves,
    progress.updates,
    progress.tokens,
    progress.skipped,
    earlier,
  )

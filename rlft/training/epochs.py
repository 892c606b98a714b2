"""Updates over epochs of batches: of supervised training, DPO and reward models.

The position in the data is the number of updates: an epoch's order depends on its index
alone, so a run that goes on skips the batches that it has seen.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from rlft.training.divergence import Guard
from rlft.training.metrics import PhaseTimers
from rlft.training.saving import Saving
from rlft.training.step import TrainState, go_on_from

log = logging.getLogger(__name__)


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
  """What a run has done; saved with its state."""

  curves: dict[str, list[float]]
  updates: int = 0
  tokens: int = 0
  skipped: int = 0
  seconds: float = 0.0


def fit(
  step: Callable[[TrainState, Any], tuple[TrainState, Mapping[str, jax.Array]]],
  state: TrainState,
  epoch_of: Callable[[int], Iterator[Any]],
  per_epoch: int,
  planned: int,
  guard: Guard,
  *,
  curves: Sequence[str] = ("loss",),
  tokens_of: Callable[[int], int] = lambda update: 0,
  budget: int = 0,
  on_step: Callable[[int, int, dict[str, float]], None] | None = None,
  saving: Saving | None = None,
  timers: PhaseTimers | None = None,
) -> Fitted:
  """Updates a state on batch after batch, epoch after epoch.

  Args:
    step: a train step; it may donate its state.
    state: before the first update.
    epoch_of: the batches of an epoch, by its index alone.
    per_epoch: batches of an epoch.
    planned: updates to make.
    guard: of what is trained; ends the run where its numbers are not finite.
    curves: metrics of which every update's value is kept.
    tokens_of: of an update, from 0: its batch's tokens in the loss. The host knows;
      to read them from a batch on a mesh would wait for the update.
    budget: ends the run with the update that has brought the tokens to so many, instead
      of `planned` updates; 0 is off.
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
  """
  began, timers = time.perf_counter(), timers or PhaseTimers()
  progress = _Progress({name: [] for name in curves})
  found = saving.restore(state) if saving is not None else None
  if found is not None:
    state = go_on_from(found.arrays, state)
    progress = _Progress(**found.meta)
  earlier = progress.seconds

  def report(update: int, metrics: Mapping[str, Any], batch: Any) -> dict[str, float]:
    with timers.phase("update"):
      metrics = {name: float(x) for name, x in jax.device_get(metrics).items()}
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

  batches, waiting = _from(epoch_of, per_epoch, progress.updates), None
  while not over():
    batch = next(batches)
    with timers.phase("update"):
      state, metrics = step(state, batch)
    if waiting is not None:
      report(*waiting)
    progress.tokens += tokens_of(progress.updates)
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


def _from(
  epoch_of: Callable[[int], Iterator[Any]], per_epoch: int, done: int
) -> Iterator[Any]:
  """The batches of all epochs, from the one after `done` of them."""
  epoch, skip = divmod(done, per_epoch)
  yield from itertools.islice(epoch_of(epoch), skip, None)
  for later in itertools.count(epoch + 1):
    yield from epoch_of(later)

"""Updates over epochs: every row once in each, however often the run is stopped."""

from __future__ import annotations

import collections
import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlft.core.errors import CheckpointError, StoppedError
from rlft.training.data import grouped
from rlft.training.divergence import Guard
from rlft.training.epochs import Order, fit
from rlft.training.optimizer import OptimizerConfig
from rlft.training.saving import Saving
from rlft.training.step import init_state, make_step

CONFIG = OptimizerConfig(learning_rate=0.1, schedule="linear")
LOSS = lambda params, batch: {"loss": (params["w"] * batch["x"].sum(), jnp.float32(1))}
STEP = make_step(LOSS, CONFIG)


class Memory:
  """Checkpoints without a disk."""

  def __init__(self):
    self.newest = None

  def restore(self, like, strict):
    return self.newest

  def save(self, step, arrays, meta, metrics=None):
    arrays = jax.tree.map(np.array, arrays)  # the step donates them
    meta = json.loads(json.dumps(meta))
    self.newest = types.SimpleNamespace(step=step, arrays=arrays, meta=meta)

  def wait(self):
    pass


def run(memory, rows, batch_size, epochs=1, stop_after=None, seed=0, config=CONFIG):
  """(rows of every update, learning rates, what `fit` gave or None when stopped)."""
  lengths = [1 + 20 * (i % 3) for i in range(len(rows))]  # of two buckets
  asked, taken, rates = [], [], []

  def epoch_of(epoch, seen):
    settings = {"batch_size": batch_size, "seed": seed, "epoch": epoch, "seen": seen}
    for _, members in grouped(lengths, **settings):
      yield {"x": np.float32([1.0] * 2), "rows": members}

  def step(state, batch):
    taken.append([rows[i] for i in batch["rows"]])
    return STEP(state, {"x": batch["x"]})

  def stop():
    asked.append(1)
    return stop_after is not None and len(asked) >= stop_after

  order = Order(lengths, batch_size, seed, lambda i: rows[i].encode())
  saving = Saving(memory, every=1, stop=stop) if memory else None
  try:
    found = fit(
      step,
      init_state({"w": jnp.float32(1)}, config, order.planned(epochs)),
      epoch_of,
      order,
      epochs,
      Guard(config),
      tokens_of=len,
      on_step=lambda update, of, metrics: rates.append(metrics["learning_rate"]),
      saving=saving,
    )
  except StoppedError:
    found = None
  return taken, rates, found


def names(count):
  return [f"row {i}" for i in range(count)]


def test_what_is_stopped_and_goes_on_is_the_same_run():
  whole, rates, found = run(None, names(10), 3, epochs=2)
  assert [len(batch) for batch in whole].count(3) == 6 and found.updates == 8
  for stop_after in range(1, 8):
    memory = Memory()
    first, first_rates, _ = run(memory, names(10), 3, epochs=2, stop_after=stop_after)
    rest, rest_rates, again = run(memory, names(10), 3, epochs=2)
    assert first + rest == whole and first_rates + rest_rates == rates
    assert again.updates == 8 and again.tokens == found.tokens == 20


STOP = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(0, 3))


@given(st.lists(STOP, max_size=3), st.integers(1, 5), st.sampled_from([1, 2, 1.5]))
@settings(max_examples=60, deadline=None)
def test_every_row_once_an_epoch(stops, last, epochs):
  """Other batches, and rows added at the end, at any place in the run."""
  memory, count, taken = Memory(), 9, []
  for batch_size, stop_after, more in stops:
    part, _, found = run(memory, names(count), batch_size, epochs, stop_after)
    taken += part
    if found is not None:
      last = batch_size
      break
    count += more
  else:
    part, _, found = run(memory, names(count), last, epochs)
    taken += part
  seen = collections.Counter(row for batch in taken for row in batch)
  assert found.updates == len(taken)
  assert found.tokens == sum(map(len, taken)) == sum(seen.values())
  first = [seen[row] for row in names(9)]
  assert min(first) >= math.floor(epochs) and max(first) <= math.ceil(epochs)
  # A row that came later may have missed epochs that were over; none is taken twice.
  assert all(1 <= seen[row] <= math.ceil(epochs) for row in names(count) if epochs == 1)
  assert int(found.state.horizon) == found.updates == int(found.state.step)
  again = run(memory, names(count), last, epochs)
  assert again[0] == [] and again[2].updates == found.updates


def test_new_rows_of_an_epoch_that_was_over_come_next():
  memory = Memory()
  run(memory, names(6), 3)
  rest, _, found = run(memory, names(8), 3)
  assert sorted(rest[0]) == ["row 6", "row 7"] and found.updates == 3


def test_a_schedule_of_its_own_length_stays():
  config = OptimizerConfig(learning_rate=0.1, schedule="linear", total_steps=50)
  memory = Memory()
  run(memory, names(8), 4, stop_after=1, config=config)
  _, _, found = run(memory, names(8), 2, config=config)
  assert found.updates == 3 and int(found.state.horizon) == 50


@pytest.mark.parametrize("changed", ["edited", "shorter", "reordered"])
def test_rows_that_cannot_be_told_apart_are_refused(changed):
  rows = {
    "edited": ["other", *names(8)[1:]],
    "shorter": names(7),
    "reordered": names(8)[::-1],
  }[changed]
  memory = Memory()
  run(memory, names(8), 3, epochs=2, stop_after=1)
  with pytest.raises(CheckpointError, match=r"within epoch 1, and its 8 rows are not"):
    run(memory, rows, 3, epochs=2)
  memory = Memory()
  run(memory, names(8), 3, epochs=2, stop_after=3)  # between two epochs they may change
  taken, _, _ = run(memory, rows, 3, epochs=2)
  assert sorted(row for batch in taken for row in batch) == sorted(rows)


def test_a_checkpoint_of_an_older_release_is_refused_unless_it_is_over():
  memory = Memory()
  run(memory, names(8), 4, stop_after=1)
  for name in ("epoch", "batches", "of", "seen", "data"):
    del memory.newest.meta[name]
  with pytest.raises(CheckpointError, match="older release"):
    run(memory, names(8), 4)
  memory.newest.meta["updates"] = 2
  assert run(memory, names(8), 4)[0] == []

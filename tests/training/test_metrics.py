"""The record survives kills, odd numbers and broken views; phases add up."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.event_file_writer import EventsWriter

from rlft.training import metrics


def test_a_line_is_strict_json_and_reads_back(tmp_path):
  clock = iter([1.0, 2.5]).__next__
  with metrics.MetricWriter(tmp_path / "run", tensorboard=False, clock=clock) as writer:
    writer.write(3, {"loss": np.float32(0.5), "eos": True}, samples=64)
    assert len(metrics.read(tmp_path / "run")) == 1  # on disk before close
    writer.write(4, {"loss": math.nan, "kl": -math.inf, "lr": math.inf})
  text = (tmp_path / "run" / metrics.RECORD).read_text()

  def refuse(constant):
    raise AssertionError(f"not JSON: {constant}")

  first, second = (json.loads(t, parse_constant=refuse) for t in text.splitlines())
  assert first == {"step": 3, "samples": 64, "time": 1.0, "loss": 0.5, "eos": 1.0}
  assert second["loss"] == "NaN" and second["kl"] == "-Infinity"
  _, back = metrics.read(tmp_path / "run")
  assert math.isnan(back["loss"]) and back["lr"] == math.inf and back["step"] == 4


def test_jax_scalars_are_numbers(tmp_path):
  import jax.numpy as jnp

  with metrics.MetricWriter(tmp_path, tensorboard=False) as writer:
    writer.write(0, {"loss": jnp.float32(2.0), "low": jnp.bfloat16(0.5)})
  assert metrics.read(tmp_path)[0]["loss"] == 2.0
  assert metrics.read(tmp_path)[0]["low"] == 0.5


@pytest.mark.parametrize(
  ("name", "value", "message"),
  [
    ("samples", 1, "the record uses this name"),
    ("loss", np.zeros(3), r"'loss' has shape \(3,\)"),
    ("loss", "low", "'loss' is 'low': write one number"),
    ("loss", None, "'loss' is None"),
  ],
)
def test_a_bad_metric_is_named_and_writes_nothing(tmp_path, name, value, message):
  with metrics.MetricWriter(tmp_path, tensorboard=False) as writer:
    with pytest.raises(ValueError, match=message):
      writer.write(0, {"good": 1.0, name: value})
    writer.write(1, {"good": 1.0})
  assert [line["step"] for line in metrics.read(tmp_path)] == [1]


def test_a_second_run_appends_after_half_a_line(tmp_path, caplog):
  with metrics.MetricWriter(tmp_path, tensorboard=False) as writer:
    writer.write(0, {"loss": 1.0})
  with (tmp_path / metrics.RECORD).open("ab") as file:
    file.write(b'{"step": 1, "lo')
  assert [line["step"] for line in metrics.read(tmp_path)] == [0]
  with metrics.MetricWriter(tmp_path, tensorboard=False) as writer:
    writer.write(1, {"loss": 2.0})
  assert "half a line (15 bytes)" in caplog.text
  assert [line["loss"] for line in metrics.read(tmp_path)] == [1.0, 2.0]
  caplog.clear()
  metrics.MetricWriter(tmp_path, tensorboard=False).close()
  assert not caplog.text and len(metrics.read(tmp_path)) == 2


def test_kill_9_loses_nothing_that_was_written(tmp_path):
  code = (
    "import os, signal, sys; from rlft.training.metrics import MetricWriter\n"
    "writer = MetricWriter(sys.argv[1], tensorboard=False)\n"
    "for step in range(50): writer.write(step, {'loss': step})\n"
    "os.kill(os.getpid(), signal.SIGKILL)"
  )
  args = [sys.executable, "-c", code, str(tmp_path)]
  done = subprocess.run(args, env=os.environ, timeout=60)
  assert done.returncode == -signal.SIGKILL
  assert [line["step"] for line in metrics.read(tmp_path)] == list(range(50))


def test_reading_where_nothing_was_written(tmp_path):
  assert metrics.read(tmp_path) == []


def events(workdir):
  """(step, tag, value) of every event file, decoded by hand: length, crc, data, crc."""
  from tensorboardX.proto.event_pb2 import Event

  for path in sorted((workdir / metrics.TENSORBOARD).glob("events.*")):
    data = path.read_bytes()
    while data:
      length = int.from_bytes(data[:8], "little")
      event = Event.FromString(data[12 : 12 + length])
      for point in event.summary.value:
        yield event.step, point.tag, point.simple_value
      data = data[16 + length :]


def test_tensorboard_gets_the_same_numbers(tmp_path, caplog):
  with metrics.MetricWriter(tmp_path) as writer:
    writer.write(7, {"train/loss": 0.25, "kl": math.inf})
    assert len(list(events(tmp_path))) == 2  # the first points can be seen at once
    writer.write(8, {"train/loss": 0.5})
  assert list(events(tmp_path)) == [
    (7, "train/loss", 0.25),
    (7, "kl", math.inf),
    (8, "train/loss", 0.5),
  ]
  assert not caplog.records


def test_a_view_that_fails_is_dropped_with_one_warning(tmp_path, monkeypatch, caplog):
  calls = []

  def fail(*args):
    calls.append(args)
    raise OSError("no space")

  with metrics.MetricWriter(tmp_path) as writer:
    writer.write(0, {"loss": 1.0})
    monkeypatch.setattr(EventsWriter, "write_event", fail)
    for step in range(1, 30):  # more than any queue holds
      writer.write(step, {"loss": 1.0})
  assert len(calls) == 1 and len(metrics.read(tmp_path)) == 30
  assert [r.levelname for r in caplog.records] == ["WARNING"]
  assert "stopped at step 1 (OSError('no space'))" in caplog.text


def test_a_view_that_cannot_be_imported_is_the_same(tmp_path, monkeypatch, caplog):
  monkeypatch.setitem(sys.modules, "tensorboardX.event_file_writer", None)
  with metrics.MetricWriter(tmp_path) as writer:
    writer.write(0, {"loss": 1.0})
  assert len(metrics.read(tmp_path)) == 1 and len(caplog.records) == 1


def test_phases_do_not_overlap_and_add_up():
  now = [100.0]
  timers = metrics.PhaseTimers(clock=lambda: now[0])

  def wait(seconds):
    now[0] += seconds

  wait(1)
  with timers.phase("rollout"):
    wait(2)
    with timers.phase("reward"):
      wait(4)
    wait(8)
  with timers.phase("rollout"):
    wait(16)
  wait(32)
  seconds = timers.pop()
  assert seconds == {"time/idle": 33, "time/rollout": 26, "time/reward": 4}
  assert sum(seconds.values()) == now[0] - 100
  with pytest.raises(KeyError), timers.phase("update"):
    wait(1)
    raise KeyError
  wait(2)
  assert timers.pop() == {"time/idle": 2, "time/update": 1}


def test_pop_inside_a_phase_loses_no_time():
  now = [0.0]
  timers = metrics.PhaseTimers(clock=lambda: now[0])
  with timers.phase("update"):
    now[0] = 3.0
    assert timers.pop() == {"time/update": 3}
    now[0] = 5.0
  assert timers.pop() == {"time/update": 2}


def test_what_xla_compiles_is_no_time_of_a_phase(tmp_path):
  """It has a phase and a log of its own: a line for each program and shape."""
  fresh = jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x).T)
  timers, path = metrics.PhaseTimers(), tmp_path / "compiles.jsonl"
  began = time.perf_counter()
  with metrics.compiles_logged(path), timers.phase("update"):
    for rows in (3, 5, 3):
      fresh(np.ones((rows, 2), np.float32)).block_until_ready()
  wall, seconds = time.perf_counter() - began, timers.pop()
  fresh(np.ones((7, 2), np.float32))  # the log is closed
  assert 0 < seconds["time/compile"] < wall
  assert sum(seconds.values()) == pytest.approx(wall, abs=0.5)
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  ours = [line for line in lines if "lambda" in line["program"]]
  assert [line["last"] for line in ours] == [["float32[3,2]"], ["float32[5,2]"]]
  assert sum(line["seconds"] for line in lines) == pytest.approx(
    seconds["time/compile"], abs=0.5
  )


def test_goodput_is_the_share_of_what_samples_are_made_and_used_in():
  rows = [
    {"step": 1, "time": 17e8, "time/rollout": 3.0, "ei/time/update": 4, "time/idle": 1},
    {"step": 2, "time": 17e8, "time/rollout": 1.0, "time/checkpoint": 1.0, "loss": 9.0},
  ]
  seconds = metrics.phase_seconds(rows)
  assert seconds == {"rollout": 4, "update": 4, "idle": 1, "checkpoint": 1}
  assert metrics.goodput(seconds) == (
    "goodput 80.0% of 10 s: rollout 40.0%, update 40.0%; the rest: checkpoint 10.0%, "
    "idle 10.0%"
  )
  assert metrics.goodput({}) == ""


def test_tensorboard_forgets_what_is_written_again(tmp_path):
  """A SessionLog START makes it drop what it has of its step and later ones."""
  from tensorboardX.proto.event_pb2 import Event, SessionLog

  seen = []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(EventsWriter, "write_event", lambda self, event: seen.append(event))
    with metrics.MetricWriter(tmp_path) as writer:
      for step in (1, 2, 3):
        writer.write(step, {"loss": step})
      writer.rewind(3)  # nothing is lost
      writer.rewind(1)
      writer.write(2, {"loss": 2})
  assert all(isinstance(event, Event) for event in seen)
  kinds = [(event.step, event.HasField("summary")) for event in seen[1:]]
  assert kinds == [(1, True), (2, True), (3, True), (2, False), (2, True)]
  assert seen[4].session_log.status == SessionLog.START


@pytest.fixture
def kept(tmp_path):
  """This process keeps what it compiles, until the test ends."""
  from jax._src import compilation_cache

  from rlft.core import compiled

  names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
  before = {name: getattr(jax.config, name) for name in names}
  opener = compilation_cache.get_file_cache
  environ = {compiled.VARIABLE: str(tmp_path / "kept")}
  assert compiled.keep_compiled(environ=environ) == tmp_path / "kept"
  assert compiled.keep_compiled(environ=environ) is None, "jax has one already"
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.get_file_cache = opener
  compilation_cache.reset_cache()


def test_the_log_tells_programs_that_were_loaded(tmp_path, kept):
  """And a donated step that was loaded gives the bits of one that was compiled."""

  def train():
    step = jax.jit(lambda w, x: w - 0.1 * jnp.tanh(x @ w).T @ x, donate_argnums=0)
    w, x = np.random.default_rng(0).normal(size=(2, 32, 32)).astype(np.float32)
    w, x = jnp.array(w), jnp.array(x)
    for _ in range(3):
      given, w = w, step(w, x)
    return np.asarray(w).tobytes(), given.is_deleted()

  found = []
  for name in ("first", "second"):
    jax.clear_caches()
    with metrics.compiles_logged(tmp_path / name):
      found.append(train())
    lines = metrics.read_lines(tmp_path / name)
    found.append([one["cache"] for one in lines if "lambda" in one["program"]])
  assert found == [found[0], ["miss"], found[0], ["hit"]]
  assert found[0][1], "donated"

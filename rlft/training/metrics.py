"""The record of a run: metrics by step, and where the time went."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from rlft.core import hosts

RECORD = "metrics.jsonl"
COMPILES = "compiles.jsonl"
TENSORBOARD = "tensorboard"
_FLUSH_SECONDS = 10.0
_RESERVED = ("step", "samples", "time")
_NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

_log = logging.getLogger(__name__)


class MetricWriter:
  """Writes metrics to `metrics.jsonl`, the record, and to tensorboard, a view of it.

  A line is one flat JSON object: `step`, `samples`, `time`, then name -> number. JSON
  has no NaN, and a metric that is NaN must not vanish, so that the strings "NaN",
  "Infinity" and "-Infinity" stand for them: `float()` reads them back, as `read` does.

  Every line is one unbuffered write at the end of the file: a killed run loses nothing
  that was written, and a resumed one goes on in the same file. A tensorboard writer
  that fails is dropped with one warning; a full disk under the record raises.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    *,
    tensorboard: bool = True,
    clock: Callable[[], float] = time.time,
  ):
    """Opens the record.

    Args:
      workdir: the run's directory, made if missing.
      tensorboard: whether to write event files under `workdir`/tensorboard as well.
      clock: seconds since the epoch.
    """
    workdir = Path(workdir).expanduser()
    own = hosts.first()  # of several processes one writes
    self._path = workdir / RECORD if own else Path(os.devnull)
    self._path.parent.mkdir(parents=True, exist_ok=True)
    self._file = self._path.open("ab+", buffering=0)
    _drop_torn_line(self._file)
    self._clock = clock
    self._view: Any = None
    self._viewing = tensorboard and own
    self._next_flush = 0.0

  def write(self, step: int, metrics: Mapping[str, Any], samples: int = 0) -> None:
    """Appends one line.

    Args:
      step: the update that the metrics belong to.
      metrics: name -> scalar. Reading a jax scalar waits for its computation, so write
        the metrics of step n-1 while step n runs.
      samples: solutions sampled from a model since the start of the run.

    Raises:
      ValueError: a name is taken by the record, or a value is not one number.
    """
    line: dict[str, Any] = {"step": int(step), "samples": int(samples)}
    line["time"] = now = round(self._clock(), 3)
    values = {name: _number(name, value) for name, value in metrics.items()}
    for name, value in values.items():
      line[name] = value if math.isfinite(value) else _spell(value)
    self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
    if self._viewing:
      self._show(step, now, values)

  def rewind(self, step: int) -> None:
    """Drops the lines after a step: a run that goes on from it writes them again."""
    self._file.seek(0)
    lines = self._file.read().split(b"\n")[:-1]
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    if len(kept) == len(lines):
      return
    partial = self._path.with_suffix(".tmp")
    partial.write_bytes(b"".join(line + b"\n" for line in kept))
    self._file.close()
    partial.replace(self._path)  # a killed run leaves the old record or the new one
    self._file = self._path.open("ab+", buffering=0)
    if self._viewing:
      self._show(step + 1, round(self._clock(), 3), None)

  def _show(self, step: int, now: float, values: Mapping[str, float] | None) -> None:
    """Writes one event, in this thread; None says that steps from this one on are
    written again, and tensorboard forgets those that it has.

    Not by `SummaryWriter`: it hands events to a thread through a bounded queue, and
    once that thread has died of an error the eleventh event blocks for ever.
    """
    try:
      from tensorboardX.event_file_writer import EventsWriter
      from tensorboardX.proto.event_pb2 import Event, SessionLog
      from tensorboardX.proto.summary_pb2 import Summary

      if self._view is None:
        directory = self._path.parent / TENSORBOARD
        directory.mkdir(exist_ok=True)
        # The name has whole seconds: without the pid two runs could share a file.
        self._view = EventsWriter(str(directory / "events"), f".{os.getpid()}")
      if values is None:
        what = {"session_log": SessionLog(status=SessionLog.START)}
      else:
        points = [Summary.Value(tag=k, simple_value=v) for k, v in values.items()]
        what = {"summary": Summary(value=points)}
      self._view.write_event(Event(wall_time=now, step=int(step), **what))
      if now >= self._next_flush:  # a flush is an fsync: too slow for every step
        self._view.flush()
        self._next_flush = now + _FLUSH_SECONDS
    except Exception as error:  # whatever a view raises, training goes on
      self._viewing = False
      _log.warning(
        "tensorboard stopped at step %d (%r); %s goes on", step, error, self._path
      )

  def close(self) -> None:
    """Closes both files; safe to call twice."""
    self._file.close()
    view, self._view, self._viewing = self._view, None, False
    if view is not None:
      try:
        view.close()
      except Exception as error:
        _log.warning("tensorboard did not close (%r); %s is whole", error, self._path)

  def __enter__(self) -> MetricWriter:
    return self

  def __exit__(self, *exc: object) -> None:
    self.close()


def read(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """The lines that `MetricWriter` wrote, oldest first; a torn last one is left out."""
  return [
    {
      name: _NONFINITE.get(value, value) if isinstance(value, str) else value
      for name, value in line.items()
    }
    for line in read_lines(Path(workdir).expanduser() / RECORD)
  ]


def read_lines(path: Path) -> list[dict[str, Any]]:
  """The whole lines of a file of JSON objects; none where there is no file."""
  lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
  return [json.loads(line) for line in lines]


def _number(name: str, value: Any) -> float:
  if name in _RESERVED:
    raise ValueError(f"metric {name!r}: the record uses this name, choose another")
  if getattr(value, "shape", ()) != ():
    raise ValueError(f"metric {name!r} has shape {value.shape}: write one number")
  try:
    return float(value)
  except (TypeError, ValueError) as error:
    raise ValueError(f"metric {name!r} is {value!r}: write one number") from error


def _spell(value: float) -> str:
  return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _drop_torn_line(file: Any) -> None:
  """Cuts what follows the last newline: half a line, of a run killed as it wrote."""
  end = file.seek(0, os.SEEK_END)
  start = max(0, end - (1 << 20))  # no line is longer
  file.seek(start)
  tail = file.read()
  keep = start + tail.rfind(b"\n") + 1
  if keep < end:
    _log.warning("%s ends in half a line (%d bytes), dropped", file.name, end - keep)
    file.truncate(keep)


_PHASE = "in the phase: "


def phase_of(error: BaseException) -> str | None:
  """The innermost phase of `PhaseTimers` that an error has come from."""
  notes = [note for note in getattr(error, "__notes__", ()) if note.startswith(_PHASE)]
  return notes[0].removeprefix(_PHASE) if notes else None


COMPILED = "/jax/core/compile/backend_compile_duration"
_HIT = "/jax/compilation_cache/cache_hits"


@functools.cache
def _compile_clock() -> Callable[[], float]:
  """Seconds that XLA has compiled in this process since the first call of this."""
  total = [0.0]

  def on_event(event: str, seconds: float, **_: Any) -> None:
    total[0] += seconds if event == COMPILED else 0.0

  jax.monitoring.register_event_duration_secs_listener(on_event)
  return lambda: total[0]


class PhaseTimers:
  """Seconds per phase, without overlap: the phases and `idle` add up to the wall time.

  A phase that is entered inside another one stops the outer clock until it ends. jax
  returns before the device is done: wait for a result inside the phase that made it.
  What XLA compiles in a phase is `compile`, and not of the phase.
  """

  def __init__(self, clock: Callable[[], float] = time.perf_counter):
    self._clock, self._compile_clock = clock, _compile_clock()
    self._compiled = self._compile_clock()
    self._seconds: dict[str, float] = {}
    self._stack = ["idle"]
    self._since = clock()

  @contextlib.contextmanager
  def phase(self, name: str) -> Iterator[None]:
    """Charges the time inside the `with` to `name`; the same name may come again.

    An error that leaves it has the name as a note: see `phase_of`.
    """
    self._charge()
    self._stack.append(name)
    try:
      yield
    except Exception as error:
      if phase_of(error) is None:
        error.add_note(_PHASE + name)
      raise
    finally:
      self._charge()
      self._stack.pop()

  def pop(self) -> dict[str, float]:
    """Seconds per phase since the last call, as `time/NAME`; starts again from 0."""
    self._charge()
    seconds, self._seconds = self._seconds, {}
    return {f"time/{name}": value for name, value in seconds.items()}

  def _charge(self) -> None:
    now, compiled = self._clock(), self._compile_clock()
    spent = max(0.0, now - self._since)
    compiling = min(spent, compiled - self._compiled)
    for name, seconds in (
      ("compile", compiling),
      (self._stack[-1], spent - compiling),
    ):
      if seconds > 0:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
    self._since, self._compiled = now, compiled


GOOD = ("rollout", "reward", "score", "update")


def phase_seconds(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
  """Seconds of each phase, over the lines of a record or the metrics of a run."""
  out: dict[str, float] = {}
  for row in rows:
    for name, value in row.items():
      *before, last = name.split("/")
      if before[-1:] == ["time"]:
        out[last] = out.get(last, 0.0) + float(value)
  return out


def goodput(seconds: Mapping[str, float]) -> str:
  """One line: the share of time that made or used samples, and where the rest went.

  Args:
    seconds: of each phase.
  """
  total = sum(seconds.values())
  if not total:
    return ""
  share = lambda name: f"{name} {seconds[name] / total:.1%}"
  good = [name for name in GOOD if name in seconds]
  rest = sorted(set(seconds) - set(good), key=lambda name: (-seconds[name], name))
  return (
    f"goodput {sum(map(seconds.get, good)) / total:.1%} of {total:,.0f} s: "
    f"{', '.join(map(share, good))}; the rest: {', '.join(map(share, rest)) or 'none'}"
  )


@contextlib.contextmanager
def compiles_logged(path: Path) -> Iterator[None]:
  """Writes a line of JSON for every program that XLA compiles: when, which, how long,
  the shapes that came last among its arguments, where a batch is, and "cache": "hit"
  if it was loaded instead, "miss" if it was not there, "off" without a cache."""
  shapes: dict[str, Any] = {}
  hits = threading.local()  # jax says so just before, in the same thread

  def on_hit(event: str, **_: Any) -> None:
    hits.hit = getattr(hits, "hit", False) or event == _HIT

  def note(record: logging.LogRecord) -> bool:
    if record.msg.startswith("Compiling %s with global shapes") and record.args:
      shapes["args"] = [getattr(x, "str_short", str)() for x in record.args[1]]
    return record.levelno > logging.DEBUG or before <= logging.DEBUG

  def on_event(event: str, seconds: float, **details: Any) -> None:
    if event != COMPILED:
      return
    args = shapes.pop("args", [])
    hit, hits.hit = getattr(hits, "hit", False), False
    missed = "miss" if jax.config.jax_compilation_cache_dir else "off"
    line = {
      "time": round(time.time(), 3),
      "program": str(details.get("fun_name", "")),
      "seconds": round(seconds, 3),
      "cache": "hit" if hit else missed,
      "arguments": len(args),
      "last": args[-12:],
    }
    with path.open("a") as file:
      file.write(json.dumps(line) + "\n")

  # Shapes are in no public event; without this logger the lines have none.
  logger = logging.getLogger("jax._src.interpreters.pxla")
  before, level = logger.getEffectiveLevel(), logger.level
  logger.setLevel(logging.DEBUG)
  logger.addFilter(note)
  jax.monitoring.register_event_duration_secs_listener(on_event)
  jax.monitoring.register_event_listener(on_hit)
  try:
    yield
  finally:
    jax.monitoring.unregister_event_listener(on_hit)
    jax.monitoring.unregister_event_duration_listener(on_event)
    logger.removeFilter(note)
    logger.setLevel(level)

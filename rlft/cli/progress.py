"""What a run does right now: bars for people, lines for the record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rlft.cli import show
from rlft.core import watchdog
from rlft.training.metrics import MetricWriter, PhaseTimers, goodput, phase_seconds


def counting(advance: show.Advance) -> Callable[[int, int], None]:
  """Turns "so many are done" into steps of a progress bar."""
  last = {"done": 0}

  def on_progress(done: int, of: int) -> None:
    advance(done - last["done"])
    last["done"] = done

  return on_progress


def _count(total: dict[str, float], values: Mapping[str, Any]) -> None:
  for name, seconds in phase_seconds([values]).items():
    total[name] = total.get(name, 0.0) + seconds


def _tell_goodput(name: str, seconds: Mapping[str, float]) -> None:
  if line := goodput(seconds):
    print(f"{name}: {line}" if name else line)


class Events:
  """Takes the events of an algorithm: a bar for each phase, and its metrics recorded.

  Used as `with Events(writer, "ei") as on_event`; its `timers` are for the algorithm,
  and what they say is in the next line of the record. Events are ("sample",
  {done, of}), others of that form, ("train", {step, of, **metrics}), ("round",
  statistics) and ("resume", {updates, sampled_solutions, rounds}).
  """

  def __init__(self, writer: MetricWriter, name: str = "", resumes: bool = False):
    """Args: where metrics go, and a name put before titles and metric names; whether
    the first update drops what a killed run has written of it and of later ones."""
    self._writer, self._name, self._rewinds = writer, name, resumes
    self.timers = PhaseTimers()
    self._seconds: dict[str, float] = {}
    self._timed = False
    self._context = self._bar = self._kind = None
    self._before = self._updates = self._samples = 0
    self._round = 1

  def __enter__(self) -> Events:
    return self

  def __exit__(self, *exc: object) -> None:
    self.close()
    if self._timed:
      _count(self._seconds, self.timers.pop())
    _tell_goodput(self._name, self._seconds)

  def __call__(self, kind: str, values: dict[str, Any]) -> None:
    if kind == "resume":
      self.after(values["updates"])
      self._samples = values["sampled_solutions"]
      self._round += values["rounds"]
      return
    if kind == "round":
      self.after(self._updates - self._before)
      self._samples = values["sampled_solutions"]
      self._record({f"round/{k}": v for k, v in values.items()})
      self._round += 1
      return
    if kind != self._kind:
      self.close()
      self._open(kind, values["of"])
    if "done" in values:
      self._count(values["done"], values["of"])
    else:
      update = self._before + values["step"]  # a run that goes on begins later
      if self._rewinds:
        self._writer.rewind(update - 1)
        self._rewinds = False
      self._bar(update - self._updates, loss=values["loss"])
      self._updates = update
      self._record({k: v for k, v in values.items() if k not in ("step", "of")})

  def on_step(self, step: int, of: int, metrics: dict[str, float]) -> None:
    """The `on_step` of supervised training."""
    self("train", {"step": step, "of": of, **metrics})

  def after(self, updates: int) -> None:
    """Ends a training, or takes it as ended: the next update comes after so many."""
    self.close()
    self._before += updates
    self._updates = self._before

  def _record(self, metrics: dict[str, Any]) -> None:
    before = f"{self._name}/" if self._name else ""
    seconds = self.timers.pop()
    self._timed |= bool(set(seconds) - {"time/idle", "time/compile"})
    if self._timed:  # somebody uses them
      _count(self._seconds, seconds)
      metrics |= seconds
    self._writer.write(
      self._updates, {before + k: v for k, v in metrics.items()}, samples=self._samples
    )

  def _open(self, kind: str, of: int) -> None:
    where = f"round {self._round}: " if kind == "sample" or self._samples else ""
    title = f"{self._name} {where}{kind}".strip()
    self._kind = kind
    self._context = show.progress(title, of)
    self._bar = self._context.__enter__()
    self._count = counting(self._bar)

  def close(self) -> None:
    """Ends the bar that is open, if one is."""
    if self._bar is not None:
      self._context.__exit__(None, None, None)
    self._bar = self._kind = None


_SHOWN = {"reward/mean": "reward", "kl/sequence": "kl", "dev": "dev"}


class Iterations:
  """Takes the events of an algorithm that samples and updates in turn: one bar over its
  iterations, and every number of each recorded under its count of sampled solutions.
  """

  def __init__(
    self,
    writer: MetricWriter,
    title: str,
    total: int,
    name: str = "",
    resumes: bool = False,
  ):
    """Args: where metrics go, what the bar says, how many iterations; `name` is put
    before metric names; `resumes` as for `Events`."""
    self._writer, self._before = writer, f"{name}/" if name else ""
    self._rewinds = resumes
    self._context = show.progress(title, total)
    self._done, self._seconds = 0, {}

  def __enter__(self) -> Iterations:
    self._bar = self._context.__enter__()
    return self

  def __exit__(self, *exc: object) -> None:
    self._context.__exit__(None, None, None)
    _tell_goodput(self._before.rstrip("/"), self._seconds)

  def __call__(self, kind: str, values: dict[str, Any]) -> None:
    watchdog.beat(kind)
    if kind == "resume":
      self._done = values["iterations"]
      self._bar(self._done)
    if kind != "iteration":
      return
    if self._rewinds:
      self._writer.rewind(self._done)
      self._rewinds = False
    self._done += 1
    _count(self._seconds, values)
    shown = {short: values[k] for k, short in _SHOWN.items() if k in values}
    self._bar(1, **shown)
    self._writer.write(
      self._done,
      {self._before + name: x for name, x in values.items()},
      samples=values["sampled_solutions"],
    )

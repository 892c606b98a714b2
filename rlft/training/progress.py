"""What a person who waits for a run sees: a line an iteration, and what is under way.

Every `run` takes `on_event`: a function of (kind, values), which sees all of it; False,
for silence; or None, for lines where somebody watches, in a terminal or a notebook.
Output that goes into a file or another program stays as it is; `rlft.Progress()` as
`on_event` writes the lines there too. A training's `on_step` is alike.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, TextIO

OnEvent = Callable[[str, dict[str, Any]], None] | Literal[False] | None
OnStep = Callable[[int, int, dict[str, float]], None] | Literal[False] | None

_SHOWN = {
  "reward/mean": "reward",
  "correct": "correct",
  "accepted": "accepted",
  "dev": "dev",
  "kl/sequence": "kl",
  "groups/equal": "groups without signal",
  "completion/length_mean": "length",
  "completion/truncated": "cut",
  "kept": "kept",
  "train_loss": "loss",
  "loss": "loss",
  "accuracy": "accuracy",
}
_SHARES = ("correct", "accepted", "groups/equal", "completion/truncated")


class Progress:
  """Takes the events of a run and writes them for a person."""

  def __init__(self, total: int = 0, out: TextIO | None = None):
    """Args: how many iterations or rounds there are to be, 0 where nobody knows; and
    where to write, standard error by default."""
    self._total, self._out = total, out
    self._done, self._last, self._tenth = 0, time.perf_counter(), 0

  def __call__(self, kind: str, values: Mapping[str, Any]) -> None:
    if kind == "resume":
      self._done = values.get("iterations", values.get("rounds", 0))
    elif kind in ("iteration", "round"):
      self._done += 1
      self._write_line(kind, self._done, self._total, values)
      self._tenth = 0
    else:
      self._passing(kind, values)

  def _passing(self, kind: str, values: Mapping[str, Any]) -> None:
    """What is under way; of a training that tells its loss, each tenth for good."""
    done, of = values.get("done", values.get("step", 0)), values["of"]
    if "loss" in values and done * 10 // of > self._tenth:
      self._tenth = done * 10 // of
      self._write_line("update", done, of, values)
    elif self._stream().isatty():
      part = _of(kind, done, of)
      print(f"\r\x1b[K{part}", end="", file=self._stream(), flush=True)

  def _write_line(
    self, kind: str, done: int, of: int, values: Mapping[str, Any]
  ) -> None:
    """A surrogate's loss is 0 whatever was learned, so iterations do not show it."""
    now = time.perf_counter()
    shown = [
      f"{name} {_number(key, values[key])}"
      for key, name in _SHOWN.items()
      if values.get(key) is not None and (key, kind) != ("loss", "iteration")
    ]
    line = f"{_of(kind, done, of)}: {', '.join([*shown, f'{now - self._last:.1f} s'])}"
    clear = "\r\x1b[K" if self._stream().isatty() else ""
    print(clear + line, file=self._stream(), flush=True)
    self._last = now

  def _stream(self) -> TextIO:
    return self._out or sys.stderr


def _of(name: str, done: int, of: int) -> str:
  return f"{name} {done}/{of}" if of else f"{name} {done}"


def _number(key: str, value: float) -> str:
  return f"{value:.0%}" if key in _SHARES else f"{value:.4g}"


def listener(on_event: OnEvent, total: int) -> Callable[[str, dict[str, Any]], None]:
  """What a run tells its events: the function given, or see above.

  Args:
    on_event: as it was given.
    total: iterations or rounds.
  """
  if on_event is None and (out := _watched()):
    return Progress(total, out)
  return on_event or (lambda kind, values: None)


def step_listener(on_step: OnStep) -> Callable[[int, int, dict[str, float]], None]:
  """The same for a training, which tells (update, updates planned, metrics)."""
  if on_step is None and (out := _watched()):
    show = Progress(0, out)
    return lambda step, of, metrics: show("train", {"step": step, "of": of, **metrics})
  return on_step or (lambda step, of, metrics: None)


def _watched() -> TextIO | None:
  """Where a person looks, if one does."""
  if "ipykernel" in sys.modules:
    return sys.stdout
  return sys.stderr if sys.stderr is not None and sys.stderr.isatty() else None

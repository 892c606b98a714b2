"""Ctrl-C and SIGTERM: the first one asks a command to end, the second one ends it.

Python runs a signal's handler when the main thread comes back to it, which in a
compilation can be minutes. What Python writes to its wakeup descriptor comes at once,
and a thread reads it here.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from rlft.core.errors import StoppedError

PATIENCE = 1.0  # seconds until somebody who pressed Ctrl-C is told why nothing happens
_FIRST = (
  "rlft: interrupted: it ends when the computation that runs returns; Ctrl-C again "
  "ends it at once"
)
DIRECTORY = "checkpoints"  # of `training.checkpoint`, which is heavy to import
_answers: list[Callable[[], str]] = []  # to a first signal; the last one counts


def _tell(text: str) -> None:
  with contextlib.suppress(OSError):  # whoever reads it may be gone
    os.write(2, f"\n{text}\n".encode())


@contextlib.contextmanager
def listening() -> Iterator[None]:
  """Within it a second Ctrl-C, or SIGTERM where it is handled, ends the process."""
  if threading.current_thread() is not threading.main_thread():
    yield  # signals are the main thread's
    return
  read, write = os.pipe()
  os.set_blocking(write, False)
  before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
  threading.Thread(target=_listen, args=(read,), daemon=True).start()
  try:
    yield
  finally:
    signal.set_wakeup_fd(before)
    os.close(write)  # which ends the thread


def _listen(read: int) -> None:
  first = True
  with os.fdopen(read, "rb", buffering=0) as pipe:
    while number := pipe.read(1):
      if number[0] not in (signal.SIGINT, signal.SIGTERM):
        continue
      if not first:
        shown = "\x1b[?25h" if os.isatty(2) else ""  # the cursor, which a bar hides
        _tell(f"{shown}rlft: ended at once; what was saved stays")
        os._exit(128 + number[0])  # whatever hangs, hangs on purpose of nobody
      first = False
      if _answers:
        _tell(_answers[-1]())
      elif not select.select([pipe], [], [], PATIENCE)[0]:
        _tell(_FIRST)


class Stopping:
  """Whether a run was asked to stop; a Ctrl-C and a SIGTERM are the same question.

  Before `begin` there is nothing to save, and the process ends.
  """

  def __init__(self, unit: str, alone: bool):
    """Args: what is let end, and whether no other process must end with this one."""
    self._unit, self._waits = unit, not alone
    self._asked = threading.Event()
    self._number = signal.SIGTERM

  def __call__(self) -> bool:
    return self._asked.is_set()

  def begin(self) -> None:
    """From here on the run can be saved."""
    self._waits = True

  def _answer(self) -> str:
    if not self._waits:
      return "rlft: asked to stop: training has not begun, there is nothing to save"
    return (
      f"rlft: asked to stop: the {self._unit} under way ends and is saved; a second "
      "time ends it at once"
    )

  def _handle(self, number: int, frame: FrameType | None) -> None:
    self._asked.set()
    self._number = number
    if not self._waits:
      raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(75)

  @contextlib.contextmanager
  def handling(self) -> Iterator[None]:
    """Owns both signals. A `StoppedError` that leaves it knows which one it was.

    Raises:
      StoppedError: also where the run ended just then: what would come after it can
        wait for the next start.
    """
    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, self._handle)}
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # of a background job
      before[signal.SIGINT] = signal.signal(signal.SIGINT, self._handle)
    _answers.append(self._answer)
    try:
      yield
      if self():
        raise StoppedError(
          "asked to stop at the end of training; it is saved, and the same command "
          "goes on with what comes after"
        )
    except StoppedError as error:
      error.interrupted = self._number == signal.SIGINT
      raise
    finally:
      _answers.pop()
      for number, handler in before.items():
        signal.signal(number, handler)


def kept(workdir: Path | None) -> str:
  """What an interrupted command leaves to go on from."""
  if workdir is None:
    return "interrupted"
  found = [*workdir.glob(f"{DIRECTORY}/*"), *workdir.glob(f"*/{DIRECTORY}/*")]
  steps = [path for path in found if path.name.isdigit()]
  if not steps:
    return f"interrupted; there is no checkpoint in {workdir} to go on from"
  newest = max(steps, key=lambda path: path.stat().st_mtime)
  return (
    f"interrupted; {newest.parent} keeps what was saved after step {int(newest.name)}, "
    "and the same command goes on from there"
  )

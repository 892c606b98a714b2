"""Ends a process that has stopped doing anything, and says where it stood.

Processes of one run that wait for each other for ever keep their heartbeat, so nothing
else would end them; a machine that is paid by the minute would wait with them.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

EXIT_STUCK = 70  # EX_SOFTWARE of sysexits.h

_last: list = []  # one entry while a watchdog runs: (time, what was done)


def beat(what: str = "") -> None:
  """Says that work goes on: called wherever progress is shown."""
  if _last:
    _last[0] = (time.monotonic(), what)


@contextlib.contextmanager
def watching(
  seconds: float, who: str = "rlft", leave: Callable[[int], None] = os._exit
) -> Iterator[None]:
  """Watches the body: `seconds` without a `beat` end the process.

  What it did last and the stacks of all its threads go to stderr first. It exits at
  once, with 70: whatever is waited for would be waited for at an orderly end too.

  Args:
    seconds: the deadline; 0 is off.
    who: the process, for the message.
    leave: ends the process.
  """
  if not seconds:
    yield
    return
  over = threading.Event()
  _last[:] = [(time.monotonic(), "the start")]

  def watch() -> None:
    while not over.wait(min(1.0, seconds / 4)):
      since, what = _last[0]
      if time.monotonic() - since > seconds:
        try:
          print(
            f"\n{who}: no progress for {seconds:g} s, the deadline, since {what!r}: "
            "the process is stuck, or checkpoint.step_deadline is too short. Its "
            "stacks:",
            file=sys.stderr,
            flush=True,
          )
          faulthandler.dump_traceback(all_threads=True)
        finally:  # who reads them may be gone
          leave(EXIT_STUCK)
        return

  thread = threading.Thread(target=watch, name="rlft watchdog", daemon=True)
  thread.start()
  try:
    yield
  finally:
    over.set()
    thread.join()
    _last.clear()

"""Ctrl-C and SIGTERM: asked once, told twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlft.cli import interrupts
from rlft.core.errors import StoppedError
from rlft.training.checkpoint import DIRECTORY


@pytest.fixture(autouse=True)
def _python_handles_both():
  """As at the start of a command, whatever started these tests."""
  before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
  signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  for number, handler in before.items():
    signal.signal(number, handler)


def send(number):
  os.kill(os.getpid(), number)
  time.sleep(0.01)  # Python hears it between two of its instructions


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_has_begun_is_asked_and_the_error_knows_by_what(number):
  stop = interrupts.Stopping("update", alone=True)
  with pytest.raises(StoppedError, match="saved") as caught, stop.handling():
    stop.begin()
    assert not stop()
    send(number)
    assert stop()
    raise StoppedError("saved")
  assert caught.value.interrupted == (number == signal.SIGINT)
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_run_that_is_asked_at_its_end_leaves_the_rest_for_the_next_start():
  stop = interrupts.Stopping("update", alone=True)
  with pytest.raises(StoppedError, match="goes on with what comes after"):  # noqa: SIM117
    with stop.handling():
      stop.begin()
      send(signal.SIGTERM)
  with interrupts.Stopping("update", alone=True).handling():
    pass


def test_before_a_run_begins_there_is_nothing_to_wait_for():
  stop = interrupts.Stopping("update", alone=True)
  assert "nothing to save" in stop._answer()
  with pytest.raises(KeyboardInterrupt), stop.handling():
    send(signal.SIGINT)
  stop = interrupts.Stopping("update", alone=True)
  with pytest.raises(SystemExit) as caught, stop.handling():
    send(signal.SIGTERM)
  assert caught.value.code == 75, "launchers start it again"
  stop = interrupts.Stopping("update", alone=False)
  with pytest.raises(StoppedError), stop.handling():
    send(signal.SIGTERM)  # the other processes would wait for this one
    assert stop() and "is saved" in stop._answer()


def test_a_background_job_stays_deaf_to_the_terminal():
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  with interrupts.Stopping("update", alone=True).handling():
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


# The hash lets other threads run and Python's handlers wait, as a compilation does.
BUSY = """
import hashlib, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from rlft.cli import interrupts
with interrupts.listening():
  print("ready", flush=True)
  hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""


def test_the_second_ends_what_python_cannot_interrupt():
  process = subprocess.Popen(
    [sys.executable, "-c", BUSY],
    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
  )  # fmt: skip
  with process:
    _pressed_twice(process)


def _pressed_twice(process):
  assert process.stdout.readline() == "ready\n"
  time.sleep(0.1)
  os.killpg(process.pid, signal.SIGINT)
  said = [process.stderr.readline() for _ in range(2)]
  assert said == ["\n", interrupts._FIRST + "\n"]
  os.killpg(process.pid, signal.SIGINT)
  assert process.wait(timeout=5) == 130
  assert process.stderr.read() == "\nrlft: ended at once; what was saved stays\n"


def test_what_is_kept_is_told(tmp_path):
  assert interrupts.DIRECTORY == DIRECTORY
  assert interrupts.kept(None) == "interrupted"
  assert "no checkpoint" in interrupts.kept(tmp_path)
  for path, when in (("checkpoints/00000009", 1), ("sft/checkpoints/00000040", 2)):
    made = tmp_path / path
    made.mkdir(parents=True)
    os.utime(made, (when, when))
  (tmp_path / "checkpoints" / "00000007.damaged").mkdir()
  said = interrupts.kept(Path(tmp_path))
  assert f"{tmp_path}/sft/checkpoints keeps what was saved after step 40" in said

#!/usr/bin/env python3
"""Several rlft processes on this machine, as on several hosts.

  python launch/local.py --processes=2 --devices=4 -- ppo --config=FILE --workdir=DIR

Each process gets RLFT_COORDINATOR, RLFT_NUM_PROCESSES and RLFT_PROCESS_ID; its output
is shown behind its number, but for what says nothing: that Gloo is connected, and what
the others write when one has failed (--all shows it). --devices gives each that many
virtual CPU devices; without it they see the machine's own. When one process fails the
others are ended, and its exit code is ours. SIGTERM and Ctrl-C are passed on, so that
rlft saves and ends with 75 or 130; a second one ends it at once.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

Hides = Callable[[int, str], bool]  # (process, line) -> whether it is not shown
PREEMPTED, INTERRUPTED = 75, 130  # the exit codes of rlft that mean "saved"


def parse(argv: Sequence[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument("--processes", type=int, required=True)
  parser.add_argument("--devices", type=int, help="virtual CPU devices per process")
  parser.add_argument("--port", type=int, help="the coordinator's; default: a free one")
  parser.add_argument("--program", default="rlft")
  parser.add_argument(
    "--grace", type=float, default=5.0, help="seconds to end in after a failure"
  )
  parser.add_argument(
    "--save", type=float, default=120.0, help="seconds to save in after a signal"
  )
  parser.add_argument(
    "--all", action="store_true", help="show also Gloo's lines, and victims' last ones"
  )
  parser.add_argument("--dry-run", action="store_true")
  parser.add_argument("words", nargs="*", help="for rlft, behind --")
  args = parser.parse_args(argv)
  if args.processes < 1 or (args.devices is not None and args.devices < 1):
    parser.error("--processes and --devices are 1 or more")
  if not args.words:
    parser.error("what shall rlft do? For example: -- ppo --config=FILE --workdir=DIR")
  return args


def commands(args: argparse.Namespace) -> list[list[str]]:
  """One command line per process: `env NAME=VALUE ... rlft ...`."""
  port = args.port
  if port is None:
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      port = free.getsockname()[1]
  shared = [
    f"RLFT_COORDINATOR=127.0.0.1:{port}",
    f"RLFT_NUM_PROCESSES={args.processes}",
  ]
  if args.devices:
    count = f"--xla_force_host_platform_device_count={args.devices}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {count}".strip()  # the last one counts
    shared += [
      "JAX_PLATFORMS=cpu",
      "JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo",
      f"XLA_FLAGS={flags}",
    ]
  return [
    ["env", *shared, f"RLFT_PROCESS_ID={i}", args.program, *args.words]
    for i in range(args.processes)
  ]


def say(text: str) -> None:
  print(f"local.py: {text}", file=sys.stderr, flush=True)


def show(number: int, process: subprocess.Popen[bytes], hides: Hides) -> None:
  """Copies a process's output, line by line, behind its number."""
  assert process.stdout is not None
  with process.stdout as lines:
    for line in lines:
      text = line.decode(errors="replace").rstrip("\n")
      if not hides(number, text):
        print(f"[{number}] {text}\n", end="", flush=True)


def exit_code(process: subprocess.Popen[bytes]) -> int:
  """As a shell gives it: 128 + n for signal n."""
  return 128 - process.returncode if process.returncode < 0 else process.returncode


def cause(process: subprocess.Popen[bytes]) -> str:
  """The signal that it died of."""
  if process.returncode >= 0:
    return ""
  return f": killed by {signal.Signals(-process.returncode).name}"


def kill_group(process: subprocess.Popen[bytes]) -> None:
  """Ends a process, or what one that has ended left behind."""
  with contextlib.suppress(ProcessLookupError, PermissionError):
    os.killpg(process.pid, signal.SIGKILL)


def supervise(
  lines: list[list[str]], grace: float, save: float, everything: bool = False
) -> int:
  """Runs the commands until all have ended.

  Args:
    lines: one command per process.
    grace: seconds from SIGTERM to SIGKILL for the others of a process that failed.
    save: seconds to SIGKILL after a signal, or after the first process that exited 75.
    everything: show every line.

  Returns:
    The exit code of the first process that failed by itself; else 75 if one was
    preempted; else 0.
  """
  processes: list[subprocess.Popen[bytes]] = []
  readers: list[threading.Thread] = []
  early: list[int] = []  # signals that came before all processes were started
  deadline = float("inf")

  def send(number: int) -> None:
    # To the process, not to its group: its reward workers are its own to end.
    for process in processes:
      if process.poll() is None:
        process.send_signal(number)

  def forward(number: int, _frame: object) -> None:
    nonlocal deadline
    if len(processes) < len(lines):
      early.append(number)
      return
    say(f"{signal.Signals(number).name} is passed on to all processes")
    deadline = min(deadline, time.monotonic() + save)
    if number == signal.SIGINT:
      saved.append(INTERRUPTED)
    send(number)

  before = {s: signal.signal(s, forward) for s in (signal.SIGTERM, signal.SIGINT)}
  result, ended, failed = 0, set[int](), False
  saved, guilty = [PREEMPTED], -1

  def hides(number: int, text: str) -> bool:
    victim = failed and number != guilty
    return not everything and (victim or text.startswith("[Gloo] Rank "))

  try:
    for number, line in enumerate(lines):
      # A session of its own: Ctrl-C in the terminal must reach it once, through us.
      process = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
      )
      processes.append(process)
      readers.append(
        threading.Thread(target=show, args=(number, process, hides), daemon=True)
      )
      readers[-1].start()
    for number in early:
      forward(number, None)
    while len(ended) < len(processes):
      for number, process in enumerate(processes):
        if number in ended or process.poll() is None:
          continue
        ended.add(number)
        kill_group(process)
        code = exit_code(process)
        if code == 0 or failed:
          continue  # victims of the first failure are no news
        say(f"process {number} (pid {process.pid}) exited with {code}{cause(process)}")
        if code in saved:
          result = code
          deadline = min(deadline, time.monotonic() + save)
          continue
        guilty, result, failed = number, code, True
        deadline = min(deadline, time.monotonic() + grace)
        say("the others are ended")
        send(signal.SIGTERM)
      if time.monotonic() > deadline:
        left = [i for i in range(len(processes)) if i not in ended]
        say(f"killed, as still alive: processes {left}")
        failed, deadline = True, float("inf")
        result = result or 128 + signal.SIGKILL
        send(signal.SIGKILL)
      time.sleep(0.005)  # faster than victims can complain
  finally:
    for number in set(range(len(processes))) - ended:
      kill_group(processes[number])
    for number, handler in before.items():
      signal.signal(number, handler)
  for reader in readers:
    reader.join(timeout=5)
  return result


def main(argv: Sequence[str] | None = None) -> int:
  args = parse(sys.argv[1:] if argv is None else argv)
  lines = commands(args)
  if args.dry_run:
    for line in lines:
      print(shlex.join(line))
    return 0
  return supervise(lines, args.grace, args.save, args.all)


if __name__ == "__main__":
  sys.exit(main())

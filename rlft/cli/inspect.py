"""Shows a work directory: checkpoints and their health, metrics, time, transcripts.

  rlft inspect runs/ppo
  rlft inspect runs/ppo --verify      # reads every array of every checkpoint

Nothing is written, and a run that is going on is not disturbed.
"""

from __future__ import annotations

import argparse
import re
import textwrap
import time
from pathlib import Path
from typing import Any

from rlft.cli import config as configs
from rlft.cli import show
from rlft.core.errors import CheckpointError, ConfigError
from rlft.training import metrics
from rlft.training.checkpoint import DIRECTORY, LOCK, Checkpointer

SUMMARY = "show a run: checkpoints and their health, last metrics, transcripts"
GROUP = "look and plan"
TRANSCRIPT_LINES = 24
COMPILED_SHOWN = 8
DAMAGE_SHOWN = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("workdir", type=Path)
  parser.add_argument("--verify", action="store_true", help="read every array")


def run(args: argparse.Namespace) -> int:
  workdir = args.workdir.expanduser()
  if not workdir.is_dir():
    raise ConfigError(f"{workdir} is no directory: give that of a run")
  settings, rows = configs.read_resolved(workdir), metrics.read(workdir)
  damaged = False
  if settings is None and not rows and not (workdir / DIRECTORY).is_dir():
    raise ConfigError(f"{workdir} holds no run: no settings, metrics or checkpoints")
  if settings is not None:
    print(f"{workdir}: model {settings.get('model', {}).get('path', 'unknown')}")
  if (workdir / DIRECTORY).is_dir():
    damaged = _checkpoints(workdir, args.verify)
  if rows:
    _metrics(rows)
    if line := metrics.goodput(metrics.phase_seconds(rows)):
      print(line)
  if (workdir / metrics.COMPILES).is_file():
    _compiles(metrics.read_lines(workdir / metrics.COMPILES))
  for path in sorted(workdir.glob("**/transcripts*.txt"))[-1:]:
    lines = path.read_text().splitlines()
    print(f"\n{path}, the first of {len(lines)} lines:\n")
    print("\n".join(lines[:TRANSCRIPT_LINES]))
  return 1 if damaged else 0


def _checkpoints(workdir: Path, verify: bool) -> bool:
  """Prints the table; whether one of them is damaged."""
  body, told, damaged = [], list[str](), False
  checkpoints = Checkpointer(workdir, lock=False)
  for step in checkpoints.steps():
    path = workdir / DIRECTORY / f"{step:08d}"
    try:
      manifest = checkpoints.manifest(step)
      problems = checkpoints.verify(step) if verify else {}
    except CheckpointError as error:
      manifest, problems = None, {"manifest": str(error)}
    damaged |= bool(problems)
    files = [file for file in path.rglob("*") if file.is_file()]
    health = "whole" if verify else "not read (--verify)"
    if problems:
      health = "DAMAGED"
      told += [f"damaged: step {step}:"]
      told += [f"  {name}: {_short_hashes(what)}" for name, what in problems.items()]
    body.append(
      [
        step,
        _ago(path.stat().st_mtime),
        f"{sum(file.stat().st_size for file in files) / 2**20:,.1f} MiB",
        len(manifest["arrays"]) if manifest else None,
        health,
      ]
    )
  checkpoints.close()
  show.table("checkpoints", ["step", "saved", "size", "arrays", "health"], body)
  for line in told[:DAMAGE_SHOWN]:
    print(textwrap.fill(line, 80, subsequent_indent="    ", break_on_hyphens=False))
  if len(told) > DAMAGE_SHOWN:
    print(f"  and {len(told) - DAMAGE_SHOWN} lines more")
  for path in sorted((workdir / DIRECTORY).glob("*.damaged")):
    print(f"put aside as damaged: {path}")
  owner = (workdir / LOCK).read_text().strip() if (workdir / LOCK).is_file() else ""
  if owner:
    print(f"last writer: {owner}")
  return damaged


def _metrics(rows: list[dict[str, Any]]) -> None:
  first, last = rows[0], rows[-1]
  names = [name for name in last if name not in ("step", "time")]
  show.table(
    f"metrics: {len(rows)} lines, the last of {_ago(last['time'])}",
    ["", f"step {first['step']}", f"step {last['step']}"],
    [[name, first.get(name), last[name]] for name in names],
  )


def _compiles(lines: list[dict[str, Any]]) -> None:
  """What XLA compiled; a program with many shapes is one that is compiled again."""
  programs: dict[str, list[dict[str, Any]]] = {}
  for line in lines:
    programs.setdefault(line["program"], []).append(line)
  seconds = lambda name: sum(line["seconds"] for line in programs[name])
  hits = sum(line.get("cache") == "hit" for line in lines)
  loaded = f"; {hits} of them loaded from the cache" if hits else ""
  show.table(
    f"compiled: {len(lines)} times, {sum(map(seconds, programs)):,.1f} s in all"
    f"{loaded}",
    ["program", "times", "seconds", "last arguments of the last time"],
    [
      [name, len(programs[name]), seconds(name), _short(programs[name][-1]["last"])]
      for name in sorted(programs, key=seconds, reverse=True)[:COMPILED_SHOWN]
    ],
  )


def _short(shapes: list[str]) -> str:
  """Of the last ones, as many as a line has room for."""
  text = " ".join(shapes)
  return text if len(text) <= 40 else "... " + text[-40:].partition(" ")[2]


def _short_hashes(text: str) -> str:
  """Two of 64 digits fill a line, and nobody compares them by eye."""
  return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1...", text)


def _ago(then: float) -> str:
  seconds = max(0, int(time.time() - then))
  for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
    if seconds >= 2 * size:
      return f"{seconds // size} {unit} ago"
  return f"{seconds} seconds ago"

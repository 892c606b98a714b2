"""What the kept compiled programs save: a first and a second start of three commands.

  python tests/bench/startup.py --rounds=3

In each round every command starts with an empty directory of compiled programs and with
the one that its first start of this round, or of the last one, has filled: first and
second in even rounds, second and first in odd ones, so that what else the machine does
falls on both alike. Ratios are taken within a round. CPU seconds are of the command and
its workers, and depend least on what else runs; the peak is of the largest process. The
commands are cut short, or their work would hide their start.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMMANDS = {
  "sample": ["sample", "Tom has 3 red pens and 4 blue pens. How many pens has Tom?"],
  "quickstart": [
    "quickstart", "--config.prompts=32", "--config.eval_prompts=8",
    "--config.ei.train.update_tokens=4000",
  ],
  "ppo": [
    "ppo", f"--config={ROOT / 'configs' / 'arithmetic_ppo.py'}",
    "--config.ppo.iterations=3", "--config.eval_prompts=20",
  ],
}  # fmt: skip


def start(words: list[str], kept: Path, workdir: Path) -> tuple[float, float, float]:
  """(wall seconds, CPU seconds, peak MB) of a command with that directory."""
  environ = {k: v for k, v in os.environ.items() if "COMPILATION_CACHE" not in k}
  environ["RLFT_COMPILATION_CACHE"] = str(kept)
  rlft = str(Path(sys.executable).parent / "rlft")
  if words[0] != "sample":
    words = [*words, f"--workdir={workdir}"]
  began = time.perf_counter()
  with tempfile.TemporaryFile() as told:
    child = subprocess.Popen([rlft, *words], env=environ, stdout=told, stderr=told)
    _, status, used = os.wait4(child.pid, 0)
    wall, child.returncode = time.perf_counter() - began, 0
    if status:
      told.seek(0)
      raise SystemExit(f"rlft {' '.join(words)}: {told.read().decode()[-2000:]}")
  unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, bytes
  return wall, used.ru_utime + used.ru_stime, used.ru_maxrss * unit / 1e6


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--only", choices=COMMANDS, nargs="+", default=list(COMMANDS))
  args = parser.parse_args()
  found = {(name, n): [] for name in args.only for n in ("first", "second")}
  with tempfile.TemporaryDirectory() as scratch:
    for name in args.only:
      filled = None
      for round_ in range(args.rounds):
        empty = Path(scratch) / f"{name}{round_}"
        runs = {"first": empty, "second": filled if round_ % 2 else empty}
        for n in sorted(runs, reverse=bool(round_ % 2)):
          workdir = Path(scratch) / f"{name}{round_}{n}"
          found[name, n].append(start(COMMANDS[name], runs[n], workdir))
          print(f"{name} {n}: %.1f s, %.1f s of CPU, %.0f MB" % found[name, n][-1])
        filled = empty
  print("\n| command | start | wall s | CPU s | peak MB | CPU of the first |")
  print("|---|---|---|---|---|---|")
  for (name, n), rows in found.items():
    wall, cpu, peak = (statistics.median(column) for column in zip(*rows))
    ratios = [b[1] / a[1] for a, b in zip(found[name, "first"], rows)]
    share = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    share = share if n == "second" else ""
    print(f"| {name} | {n} | {wall:.1f} | {cpu:.1f} | {peak:.0f} | {share} |")


if __name__ == "__main__":
  main()

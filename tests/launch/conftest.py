"""A recording stub of every outside program that the launchers call."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
PROGRAMS = ["gcloud", "kubectl", "xpk", "sbatch", "srun", "scontrol", "docker"]

# Logs its words and its input as a line of JSON, then answers as told: of the rules
# whose `match` is in its words the first counts, and gives one answer after the other,
# the last for ever. `wait` makes it live until SIGTERM.
_STUB = """#!{python} -SE
import fcntl, json, os, signal, sys, time
name = os.path.basename(sys.argv[0])
words = [name, *sys.argv[1:]]
here = os.path.dirname(sys.argv[0])
answer = [0, "", ""]
with open(here + "/log", "a+") as log:
  fcntl.flock(log, fcntl.LOCK_EX)
  log.seek(0)
  before = [json.loads(line)["words"] for line in log]
  with open(here + "/answers") as file:
    for match, answers in json.load(file):
      if match in " ".join(words):
        count = sum(match in " ".join(other) for other in before)
        answer = answers[min(count, len(answers) - 1)]
        break
  piped = name == "kubectl" and "--filename=-" in words
  entry = {{"words": words, "input": sys.stdin.read() if piped else None}}
  if answer[0] == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(answer[1]))
  log.write(json.dumps(entry) + "\\n")
if answer[0] == "wait":
  time.sleep(30)
print(answer[1], end="", flush=True)
print(answer[2], end="", file=sys.stderr)
sys.exit(answer[0])
"""


class Stage:
  """A directory of stubs on PATH, and what they were called with."""

  def __init__(self, path: Path) -> None:
    self.bin = path / "bin"
    self.bin.mkdir()
    for name in PROGRAMS:
      stub = self.bin / name
      stub.write_text(_STUB.format(python=sys.executable))
      stub.chmod(0o755)
    self.env = {
      "PATH": f"{self.bin}:/usr/bin:/bin",
      "HOME": str(path),
      "TMPDIR": str(path),
    }
    self.tarball = path / "rlft.tar.gz"
    self.tarball.write_bytes(b"a tarball")
    self.cwd = path
    self.answer()

  def answer(self, *rules: tuple[str, list[list[Any]]]) -> None:
    """Sets what the stubs answer from now on, and forgets their calls."""
    (self.bin / "answers").write_text(json.dumps(rules))
    (self.bin / "log").write_text("")

  def entries(self) -> list[dict[str, Any]]:
    lines = (self.bin / "log").read_text().splitlines()
    return [json.loads(line) for line in lines]

  def calls(self) -> list[list[str]]:
    return [entry["words"] for entry in self.entries()]

  @staticmethod
  def printed(output: str) -> list[list[str]]:
    """The outside commands among what --dry-run printed."""
    lines = [line.removesuffix(" <<'END'") for line in output.splitlines()]
    return [shlex.split(line) for line in lines if line.split(" ")[0] in PROGRAMS]

  def run(
    self, script: str, *words: str, **options: Any
  ) -> subprocess.CompletedProcess:
    env = self.env | options.pop("env", {})
    return subprocess.run(
      [str(LAUNCH / script), *words],
      env=env,
      cwd=self.cwd,
      capture_output=True,
      text=True,
      timeout=60,
      stdin=subprocess.DEVNULL,
      **options,
    )


@pytest.fixture
def stage(tmp_path) -> Stage:
  if os.name != "posix":
    pytest.skip("the launchers are shell scripts")
  return Stage(tmp_path)

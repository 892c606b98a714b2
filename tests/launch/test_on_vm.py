"""What runs on a TPU VM, run here: detached, followed, stopped, installed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

ON_VM = Path(__file__).parents[2] / "launch" / "on_vm.sh"

for program in ("flock", "setsid", "tail"):
  if shutil.which(program) is None:
    pytest.skip(f"a TPU VM has {program}, this machine not", allow_module_level=True)

# A tiny rlft: says who it is, then does what its first word says.
RLFT = f"""#!{sys.executable} -SE
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), sys.exit(75)))
print("words", sys.argv[1:], os.environ.get("RLFT_COORDINATOR"), flush=True)
if sys.argv[1] == "wait":
  time.sleep(60)
sys.exit(int(sys.argv[1]))
"""


class Vm:
  def __init__(self, path: Path) -> None:
    self.home = path / "home"
    self.bin = path / "bin"
    self.bin.mkdir()
    (self.bin / "rlft").write_text(RLFT)
    (self.bin / "rlft").chmod(0o755)
    self.env = {
      "PATH": f"{self.bin}:/usr/bin:/bin",
      "HOME": str(path),
      "RLFT_HOME": str(self.home),
      "RLFT_PROGRAM": str(self.bin / "rlft"),
    }

  def start(self, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
      ["bash", ON_VM, *words],
      env=self.env,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      start_new_session=True,
    )

  def __call__(self, *words: str) -> tuple[int, str, str]:
    with self.start(*words) as process:
      out, err = process.communicate(timeout=30)
    return process.returncode, out, err

  def wait_for(self, text: str) -> None:
    deadline = time.monotonic() + 20
    log = self.home / "log"
    while not (log.exists() and text in log.read_text()):
      assert time.monotonic() < deadline, f"{text!r} did not come"
      time.sleep(0.02)


@pytest.fixture
def vm(tmp_path):
  machine = Vm(tmp_path)
  yield machine
  machine("stop")
  pid = machine.home / "supervisor"
  deadline = time.monotonic() + 10
  while pid.exists() and time.monotonic() < deadline:
    try:
      os.kill(int(pid.read_text()), 0)
    except ProcessLookupError:
      break
    time.sleep(0.02)


def test_the_code_of_the_run_is_passed_on_with_its_output(vm):
  code, out, err = vm("run", "3", "a b", "")
  assert code == 3
  assert out == "words ['3', 'a b', ''] auto\n"
  assert err == f"launch: {os.uname().nodename} exited with 3\n"
  assert vm("attach")[:2] == (3, out)  # the same, whenever it is asked for
  assert vm("run", "0") == (0, "words ['0'] auto\n", "")
  assert vm("stop") == (0, "", "")  # nothing is alive


def test_the_run_survives_a_lost_connection_and_is_not_started_twice(vm):
  first = vm.start("run", "wait")
  vm.wait_for("words")
  os.killpg(first.pid, signal.SIGKILL)  # ssh is gone
  first.communicate()
  second = vm.start("run", "wait")  # as gcloud does
  code, _, err = vm("run", "0")
  assert code == 2
  assert "another run is alive here" in err
  assert vm("stop")[0] == 0
  out, err = second.communicate(timeout=30)
  assert second.returncode == 75
  assert out == "words ['wait'] auto\nsaved\n"
  assert err.endswith("exited with 75\n")


def test_of_two_that_start_at_once_one_runs(vm):
  both = {word: vm.start("run", "wait", word) for word in ("a", "b")}
  deadline = time.monotonic() + 20
  while all(p.poll() is None for p in both.values()) and time.monotonic() < deadline:
    time.sleep(0.02)
  vm.wait_for("words")
  vm("stop")
  results = {}
  for word, process in both.items():
    out, err = process.communicate(timeout=30)
    results[process.returncode] = word, out, err
  assert sorted(results) == [2, 75]
  assert "another run is alive here" in results[2][2]
  winner, out, _ = results[75]
  assert out == f"words ['wait', '{winner}'] auto\nsaved\n"


def test_a_shutdown_signals_the_supervisor_too_and_loses_no_code(vm):
  run = vm.start("run", "wait")
  vm.wait_for("words")
  subprocess.run(["kill", "-TERM", (vm.home / "supervisor").read_text().strip()])
  time.sleep(0.1)
  subprocess.run(["kill", "-TERM", (vm.home / "pid").read_text().strip()])
  run.communicate(timeout=30)
  assert run.returncode == 75


def test_a_run_that_was_killed_with_its_supervisor_is_a_failure(vm):
  run = vm.start("run", "wait")
  vm.wait_for("words")
  for name in ("supervisor", "pid"):
    subprocess.run(["kill", "-KILL", (vm.home / name).read_text().strip()])
  run.communicate(timeout=30)
  assert run.returncode == 1
  assert vm("attach")[0] == 1


def test_installs_once_per_version_and_never_under_a_run(vm, tmp_path):
  source = tmp_path / "rlft-0.1.0"
  source.mkdir()
  (source / "pyproject.toml").write_text("[project]")
  with tarfile.open(tmp_path / "rlft.tar.gz", "w:gz") as tar:
    tar.add(source, "rlft-0.1.0")
  uv = vm.bin / "uv"
  uv.write_text('#!/bin/sh\necho "$@" >>"$HOME/uv.log"\n')
  uv.chmod(0o755)
  log, mounts = tmp_path / "uv.log", tmp_path / "mounts"
  tarball, prepare = str(tmp_path / "rlft.tar.gz"), 'echo "a  b" >>"$HOME/mounts"'
  for _ in range(2):
    assert vm("install", "one", tarball, prepare) == (0, "", "")
  assert log.read_text().splitlines() == [
    f"venv --quiet --python 3.12 {vm.home}/venv",
    f"pip install --quiet --python {vm.home}/venv/bin/python {vm.home}/src[tpu]",
  ]
  assert mounts.read_text() == "a  b\n" * 2  # a mount is gone after a reboot
  assert (vm.home / "src" / "pyproject.toml").exists()
  run = vm.start("run", "wait")
  vm.wait_for("words")
  assert vm("install", "one", tarball)[0] == 0
  code, _, err = vm("install", "two", tarball)
  assert code == 2
  assert "a run is alive here" in err
  vm("stop")
  run.communicate(timeout=30)
  uv.write_text("#!/bin/sh\nexit 7\n")
  assert vm("install", "two", tarball)[0] == 7
  assert not (vm.home / "installed").exists()  # half of it is not "installed"

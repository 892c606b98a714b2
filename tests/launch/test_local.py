"""Several processes on this machine, for real."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LOCAL = Path(__file__).parents[2] / "launch" / "local.py"

# Does the word of its number: an exit code; `sleep`; `save`, which exits 75 when told
# to stop; `deaf`, which hears nothing; `kill`, which dies of SIGKILL. None ends before
# all are ready: a deaf one needs a moment to become deaf.
CHILD = """
import os, signal, sys, time
number = int(os.environ["RLFT_PROCESS_ID"])
word = sys.argv[1 + number]
if word == "save":
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
if word == "interrupted":  # saves for a moment, the later the higher its number
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
  signal.signal(signal.SIGINT, lambda *_: (time.sleep(number / 2), sys.exit(130)))
if word == "victim":  # tells of its connection, and at length of its end
  print("[Gloo] Rank", number, "is connected", flush=True)
  signal.signal(signal.SIGTERM, lambda *_: (print("F0000", "x"), sys.exit(1)))
if word == "deaf":
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  signal.signal(signal.SIGINT, signal.SIG_IGN)
print("ready", os.getpid(), flush=True)
name = sys.argv[0] + os.environ["RLFT_COORDINATOR"].split(":")[1] + "-"
open(name + str(number), "w").close()
while not all(os.path.exists(name + str(i)) for i in range(len(sys.argv) - 1)):
  time.sleep(0.01)
if word == "kill":
  os.kill(os.getpid(), signal.SIGKILL)
if word.isdigit():
  sys.exit(int(word))
time.sleep(60)
"""


@pytest.fixture(scope="module")
def child(tmp_path_factory) -> str:
  path = tmp_path_factory.mktemp("child") / "child.py"
  path.write_text(CHILD)
  return str(path)


def launch(child: str, *words: str, options: tuple[str, ...] = ()) -> subprocess.Popen:
  python = ["--program=" + sys.executable, "--", "-SE", child]
  return subprocess.Popen(
    [sys.executable, "-SE", LOCAL, f"--processes={len(words)}", *options, *python]
    + [*words],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def pids(process: subprocess.Popen, count: int) -> list[int]:
  """Waits until every process has said its pid."""
  return [int(process.stdout.readline().split()[-1]) for _ in range(count)]


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
  out, err = process.communicate(timeout=30)
  return process.returncode, out, err


def gone(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return True
  return False


def test_all_that_end_well_are_a_success(child):
  code, out, err = finish(launch(child, "0", "0", "0"))
  assert (code, err) == (0, "")
  assert {line.split()[0] for line in out.splitlines()} == {"[0]", "[1]", "[2]"}


@pytest.mark.parametrize(("word", "code"), [("3", 3), ("kill", 128 + 9)])
def test_the_others_of_a_process_that_dies_are_ended(child, word, code):
  started = time.monotonic()
  process = launch(child, "sleep", word, "deaf", options=("--grace=0.5",))
  others = pids(process, 3)
  result, _, err = finish(process)
  assert result == code
  assert time.monotonic() - started < 10
  assert all(gone(pid) for pid in others)
  first = err.splitlines()[0]
  assert first.startswith("local.py: process 1 (pid ")
  signalled = ": killed by SIGKILL" if word == "kill" else ""
  assert first.endswith(f"exited with {code}{signalled}")
  assert "killed, as still alive: processes [2]" in err  # SIGTERM was not enough


@pytest.mark.parametrize("options", [(), ("--all",)])
def test_what_says_nothing_is_shown_on_request(child, options):
  process = launch(child, "victim", "kill", options=options)
  code, out, err = finish(process)
  assert code == 128 + 9
  assert [("[Gloo]" in out), ("F0000" in out)] == [bool(options)] * 2
  assert sum(line.split()[1] == "ready" for line in out.splitlines()) == 2
  assert len(err.splitlines()) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on_to_all(child, number):
  process = launch(child, "sleep", "sleep")
  pids(process, 2)
  process.send_signal(number)
  code, _, err = finish(process)
  # Python without a handler: dies of SIGTERM, ends with 130 after Ctrl-C.
  assert code == 128 + number
  assert f"{number.name} is passed on to all processes" in err


def test_all_that_saved_are_a_preemption(child):
  process = launch(child, "save", "save")
  pids(process, 2)
  process.send_signal(signal.SIGTERM)
  code, _, err = finish(process)
  assert code == 75
  assert err.count("exited with 75") == 2


def test_all_that_saved_after_ctrl_c_are_an_interruption(child):
  process = launch(child, "interrupted", "interrupted", options=("--grace=0.1",))
  pids(process, 2)
  process.send_signal(signal.SIGINT)
  code, _, err = finish(process)
  assert (code, err.count("exited with 130")) == (130, 2)
  assert "killed" not in err and "the others are ended" not in err


def test_one_that_saved_gives_the_others_time_to(child):
  process = launch(child, "75", "deaf", options=("--save=0.3", "--grace=60"))
  pids(process, 2)
  code, _, err = finish(process)
  assert code == 75
  assert "killed, as still alive: processes [1]" in err


def test_dry_run_prints_the_commands_that_a_run_executes(tmp_path):
  program = tmp_path / "rl ft"
  show = "import json, os, sys; "
  show += "print(json.dumps([dict(os.environ), sys.argv[1:]]))"
  program.write_text(f"#!{sys.executable} -SE\n{show}\n")
  program.chmod(0o755)
  line = [sys.executable, "-SE", LOCAL, "--processes=2", "--devices=3", "--port=4567"]
  line += [f"--program={program}", "--", "ppo", "it's a b", "--config=c.py"]
  env = {**os.environ, "XLA_FLAGS": "--xla_x=1"}
  real = subprocess.run(line, capture_output=True, text=True, env=env, check=True)
  line.insert(3, "--dry-run")
  shown = subprocess.run(line, capture_output=True, text=True, env=env, check=True)
  by_hand = []
  for text in shown.stdout.splitlines():
    assert shlex.split(text)[0] == "env"
    done = subprocess.run(["sh", "-c", text], capture_output=True, text=True, env=env)
    by_hand.append(json.loads(done.stdout))

  def told(env):
    names = ("RLFT_", "JAX_", "XLA_")
    return {name: value for name, value in env.items() if name.startswith(names)}

  results = sorted(text.split(" ", 1) for text in real.stdout.splitlines())
  assert [number for number, _ in results] == ["[0]", "[1]"]
  for i, (_, text) in enumerate(results):
    environment, words = json.loads(text)
    assert words == by_hand[i][1] == ["ppo", "it's a b", "--config=c.py"]
    assert told(environment) == told(by_hand[i][0])
    assert environment["RLFT_COORDINATOR"] == "127.0.0.1:4567"
    assert environment["RLFT_NUM_PROCESSES"] == "2"
    assert environment["RLFT_PROCESS_ID"] == str(i)
    flags = "--xla_x=1 --xla_force_host_platform_device_count=3"
    assert environment["XLA_FLAGS"] == flags


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["--processes=2"], "what shall rlft do?"),
    (["--processes=0", "--", "ppo"], "are 1 or more"),
    (["--processes=2", "--devices=0", "--", "ppo"], "are 1 or more"),
    (["--", "ppo"], "--processes"),
  ],
)
def test_mistakes_are_named(words, message):
  done = subprocess.run([sys.executable, LOCAL, *words], capture_output=True, text=True)
  assert done.returncode == 2
  assert message in done.stderr


DISTRIBUTED = """
import os, sys
import jax
jax.distributed.initialize(
  os.environ["RLFT_COORDINATOR"],
  num_processes=int(os.environ["RLFT_NUM_PROCESSES"]),
  process_id=int(os.environ["RLFT_PROCESS_ID"]),
  cluster_detection_method="deactivate",
)
from jax.experimental import multihost_utils
assert jax.local_device_count() == 2 and jax.device_count() == 4
row = jax.numpy.array([10.0 + jax.process_index()])
print("all", multihost_utils.process_allgather(row).ravel().tolist(), flush=True)
"""


@pytest.mark.slow
def test_jax_finds_the_others(tmp_path):
  path = tmp_path / "child.py"
  path.write_text(DISTRIBUTED)
  done = subprocess.run(
    [sys.executable, LOCAL, "--processes=2", "--devices=2"]
    + [f"--program={sys.executable}", "--", str(path)],
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  for number in (0, 1):
    assert f"[{number}] all [10.0, 11.0]" in done.stdout


def test_a_signal_while_processes_are_started_reaches_all(monkeypatch):
  spec = importlib.util.spec_from_file_location("local", LOCAL)
  local = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(local)
  missed, start = [], subprocess.Popen

  def start_and_signal(*args, **kwargs):
    process = start(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGTERM)
    return process

  before = signal.signal(signal.SIGTERM, lambda *_: missed.append(1))
  try:
    monkeypatch.setattr(local.subprocess, "Popen", start_and_signal)
    assert local.supervise([["sleep", "60"]] * 2, grace=5, save=5) == 128 + 15
  finally:
    signal.signal(signal.SIGTERM, before)
  assert not missed

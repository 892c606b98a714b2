"""Several real processes on loopback, as on several hosts (A14): what they compute, and
what they do when one of them is stopped, killed, missing or stuck."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from rlft.training import metrics

WORKER = Path(__file__).with_name("one_of_several.py")
HEARTBEAT = 12  # seconds
PPO = {
  "task.train": 40,
  "ppo.iterations": 6,
  "ppo.prompts_per_iteration": 4,
  "ppo.samples_per_prompt": 4,
  "ppo.max_new_tokens": 24,
  "ppo.truncated": "score",  # there are many
  "ppo.epochs": 1,
  "ppo.minibatches": 1,
  "ppo.optimizer.learning_rate": 1e-4,
  "checkpoint.every": 2,
  "dev_prompts": 0,
  "eval_prompts": 0,
}


@contextlib.contextmanager
def processes(words, count, devices, workdir, missing=(), **environ):
  """`count` processes that run `words`; killed at the end, whatever happened."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  workdir.mkdir(parents=True, exist_ok=True)
  flags = f"--xla_force_host_platform_device_count={devices}"
  started = []
  with contextlib.ExitStack() as stack:
    for index in range(count):
      if index in missing:
        continue
      env = os.environ | {"XLA_FLAGS": flags, "PYTHONUNBUFFERED": "1"} | environ
      if count > 1:
        env |= {
          "RLFT_COORDINATOR": f"127.0.0.1:{port}",
          "RLFT_NUM_PROCESSES": str(count),
          "RLFT_PROCESS_ID": str(index),
          "RLFT_HEARTBEAT": str(HEARTBEAT),
        }
      log = stack.enter_context((workdir / f"log{index}.txt").open("a"))
      started.append(subprocess.Popen(words, env=env, stdout=log, stderr=log))
    try:
      yield started
    finally:
      for process in started:
        process.kill()
        process.wait()


def wait(started, seconds=300) -> list[int]:
  until = time.monotonic() + seconds
  return [process.wait(max(0.1, until - time.monotonic())) for process in started]


def log(workdir, index) -> str:
  return (workdir / f"log{index}.txt").read_text()


def compute(name, out, count, devices, fsdp=1, tensor=1, **environ):
  words = [sys.executable, str(WORKER), name, str(out), str(fsdp), str(tensor)]
  with processes(words, count, devices, out, **environ) as started:
    codes = wait(started)
  assert codes == [0] * count, log(out, 0) + log(out, count - 1)
  return json.loads((out / "log.json").read_text())


@pytest.mark.parametrize(
  ("devices", "tensor", "parts"),
  [(2, 1, 2), (1, 2, 1)],  # the second: both hold all rows, half of each weight
)
def test_processes_share_rows_and_tell_each_other(tmp_path, devices, tensor, parts):
  found = compute("messages", tmp_path, 2, devices, tensor=tensor)
  assert found == {"parts": parts, "processes": [0, 1]}


def same(a, b, path=""):
  """Equal within 1e-5, but for times; the largest ratio is exp of a difference."""
  if isinstance(a, dict):
    clocks = ("time/", "seconds", "per_second")
    a, b = (
      {k: x for k, x in one.items() if not any(c in k for c in clocks)}
      for one in (a, b)
    )
    assert a.keys() == b.keys(), path
    for key in a:
      same(a[key], b[key], f"{path}/{key}")
  elif isinstance(a, list):
    assert a == b, path
  elif not (a != a and b != b):
    limit = 1e-4 if path.endswith("ratio_max") else 1e-5
    assert abs(a - b) <= limit * max(1, abs(a)), (path, a, b)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "count", "devices", "fsdp", "tensor", "rollouts"),
  [
    ("sft", 2, 2, 2, 1, ""),
    ("ei", 2, 2, 2, 1, ""),
    ("ei", 4, 1, 2, 1, "together"),
    ("ppo", 2, 2, 2, 1, ""),
    ("ppo", 2, 2, 2, 1, "together"),
    ("ppo", 4, 1, 1, 2, ""),  # a row of the mesh is two hosts
    ("ppo", 4, 2, 2, 2, ""),
    ("lora", 2, 2, 2, 1, ""),
    ("grpo", 2, 2, 1, 2, ""),
  ],
)
def test_several_processes_compute_what_one_does(
  tmp_path, name, count, devices, fsdp, tensor, rollouts
):
  sizes = fsdp, tensor
  one = compute(name, tmp_path / "one", 1, count * devices, *sizes)
  out, environ = tmp_path / "several", {"RLFT_ROLLOUTS": rollouts}
  found = compute(name, out, count, devices, *sizes, **environ)
  same(one, found)
  weights, other = (
    load_file(tmp_path / run / "model" / "model.safetensors")
    for run in ("one", "several")
  )
  assert weights.keys() == other.keys()
  for tensor_name in weights:
    np.testing.assert_allclose(other[tensor_name], weights[tensor_name], atol=1e-5)


def ppo(workdir, **changes):
  settings = PPO | changes
  return [
    sys.executable, "-m", "rlft.cli.main", "ppo", f"--workdir={workdir}",
    *(f"--config.{name}={value}" for name, value in settings.items()),
  ]  # fmt: skip


def await_lines(workdir, count, started, seconds=300):
  until = time.monotonic() + seconds
  while len(metrics.read(workdir)) < count:
    assert all(process.poll() is None for process in started), log(workdir, 0)
    assert time.monotonic() < until, log(workdir, 0)
    time.sleep(0.1)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
  """The metrics and weights of a run of two processes that nothing befell."""
  workdir = tmp_path_factory.mktemp("uninterrupted")
  with processes(ppo(workdir), 2, 2, workdir) as started:
    assert wait(started) == [0, 0], log(workdir, 0) + log(workdir, 1)
  return record(workdir)


def record(workdir):
  lines = metrics.read(workdir)
  timed = lambda name: name.startswith("time") or name.endswith("_per_second")
  numbers = [{k: v for k, v in line.items() if not timed(k)} for line in lines]
  return numbers, load_file(workdir / "model" / "model.safetensors")


def assert_same_run(workdir, uninterrupted):
  numbers, weights = record(workdir)
  assert [line["step"] for line in numbers] == list(range(1, 7))
  np.testing.assert_equal(numbers, uninterrupted[0])
  for name, value in uninterrupted[1].items():
    np.testing.assert_array_equal(weights[name], value)


@pytest.mark.slow
@pytest.mark.parametrize("asked", [0, 1])
def test_sigterm_to_one_saves_the_same_step_on_both(tmp_path, uninterrupted, asked):
  with processes(ppo(tmp_path), 2, 2, tmp_path) as started:
    await_lines(tmp_path, 3, started)
    started[asked].send_signal(signal.SIGTERM)
    assert wait(started) == [75, 75], log(tmp_path, 0) + log(tmp_path, 1)
  done = len(metrics.read(tmp_path))
  assert 3 <= done < 6
  said = f"asked to stop after iteration {done} of 6"
  assert said in log(tmp_path, 0) and said in log(tmp_path, 1)
  assert sorted(os.listdir(tmp_path / "checkpoints"))[-1] == f"{done:08d}"
  with processes(ppo(tmp_path), 2, 2, tmp_path) as started:
    assert wait(started) == [0, 0]
  assert_same_run(tmp_path, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_one_is_killed_and_the_other_ends_and_names_it(tmp_path, uninterrupted, killed):
  with processes(ppo(tmp_path), 2, 2, tmp_path) as started:
    await_lines(tmp_path, 3, started)
    started[killed].kill()
    began = time.monotonic()
    other = started[1 - killed].wait(HEARTBEAT + 20)
    assert other != 0 and time.monotonic() - began < HEARTBEAT + 15
  text = log(tmp_path, 1 - killed)
  if killed:
    assert "unhealthy (stopped sending heartbeats):\n1\n" in text
  else:  # the one that they all talk to
    assert "Either the leader task was" in text
  with processes(ppo(tmp_path), 2, 2, tmp_path) as started:
    assert wait(started) == [0, 0], log(tmp_path, 0)
  assert_same_run(tmp_path, uninterrupted)


@pytest.mark.slow
def test_a_missing_process_is_waited_for_and_no_longer(tmp_path):
  environ = {"RLFT_JOIN_TIMEOUT": "5"}
  with processes(ppo(tmp_path), 2, 1, tmp_path, missing=(1,), **environ) as started:
    assert wait(started, 60) != [0]
  assert "waiting up to 5 s for 2 processes at 127.0.0.1" in log(tmp_path, 0)
  assert "DEADLINE_EXCEEDED" in log(tmp_path, 0)


@pytest.mark.slow
def test_fewer_devices_than_expected_end_the_run(tmp_path):
  words = ppo(tmp_path, **{"mesh.devices": 4})
  with processes(words, 2, 1, tmp_path) as started:
    assert wait(started, 60) == [2, 2]
  assert "4 devices are expected (mesh.devices), and there are 2" in log(tmp_path, 1)


@pytest.mark.slow
def test_an_error_of_one_ends_both(tmp_path):
  """It waits for nobody, a save that runs included, and the other one learns of it."""
  words = [sys.executable, str(WORKER), "raises", str(tmp_path), "1", "1"]
  with processes(words, 2, 1, tmp_path) as started:
    assert started[1].wait(60) == 2
    assert started[0].wait(HEARTBEAT + 40) not in (0, 2)
  assert "rlft: error: a reward of process 1" in log(tmp_path, 1)
  assert "one of them has ended or died" in log(tmp_path, 0)


@pytest.mark.slow
def test_a_command_for_one_host_refuses_to_be_one_of_several(tmp_path):
  words = [sys.executable, "-m", "rlft.cli.main", "best-of-n"]
  with processes(words, 2, 1, tmp_path) as started:
    assert wait(started, 60) == [2, 2]
  assert "rlft best-of-n runs on one host" in log(tmp_path, 0)


@pytest.mark.slow
def test_processes_that_wait_for_ever_show_their_stacks_and_end(tmp_path):
  """Their heartbeats go on: without a watchdog nothing would end them."""
  words = [sys.executable, str(WORKER), "stuck", str(tmp_path), "1", "1"]
  with processes(words, 2, 1, tmp_path) as started:
    assert wait(started, 60) == [70, 70]
  for index, stands_at in ((0, "everyone"), (1, "sleeps")):
    text = log(tmp_path, index)
    said = f"process {index}: no progress for 4 s, the deadline, since 'the last step'"
    assert said in text and f"in {stands_at}" in text

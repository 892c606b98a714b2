"""Real processes that are asked to stop, or killed, and started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from rlft.training import metrics

pytestmark = pytest.mark.slow
ITERATIONS = 12


def start(workdir, *more):
  words = [sys.executable, "-m", "rlft.cli.main", "grpo", f"--workdir={workdir}"]
  settings = {
    "task.train": 40,
    "grpo.iterations": ITERATIONS,
    "grpo.prompts_per_iteration": 2,
    "grpo.samples_per_prompt": 4,
    "grpo.max_new_tokens": 24,
    "grpo.optimizer.learning_rate": 1e-4,
    "checkpoint.every": 2,
    "dev_prompts": 0,
    "eval_prompts": 0,
  }
  words += [f"--config.{name}={value}" for name, value in settings.items()]
  return subprocess.Popen(
    [*words, *more],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    env=os.environ | {"XLA_FLAGS": ""},
  )


def finish(process):
  said, _ = process.communicate(timeout=300)
  return process.returncode, said


def lines(workdir):
  return (workdir / "metrics.jsonl").read_text().count("\n") if (
    workdir / "metrics.jsonl"
  ).exists() else 0  # fmt: skip


def until_lines(process, workdir, count):
  while lines(workdir) < count:
    assert process.poll() is None, process.communicate()
    time.sleep(0.02)


def same(one, other):
  """Weights and metrics, but for the clock."""
  due, found = metrics.read(one), metrics.read(other)
  assert [x["step"] for x in found] == list(range(1, ITERATIONS + 1))
  for a, b in zip(due, found, strict=True):
    for name in a:
      if name != "time" and "time/" not in name and "per_second" not in name:
        assert a[name] == b[name], name
  mine, theirs = (
    load_file(path / "model" / "model.safetensors") for path in (one, other)
  )
  assert mine.keys() == theirs.keys()
  for name in mine:
    np.testing.assert_array_equal(mine[name], theirs[name])


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("straight")
  code, said = finish(start(workdir))
  assert code == 0, said
  return workdir


def test_sigterm_saves_and_ends_with_75(straight, tmp_path):
  first = start(tmp_path)
  until_lines(first, tmp_path, 3)
  first.send_signal(signal.SIGTERM)
  code, said = finish(first)
  assert code == 75 and "the same command goes on from there" in said
  done = lines(tmp_path)
  assert 3 <= done < ITERATIONS
  code, said = finish(start(tmp_path))
  assert code == 0 and f"going on after iteration {done}" in said
  same(straight, tmp_path)


def test_kills_at_any_moment_cost_nothing_but_time(straight, tmp_path):
  generator = np.random.default_rng(0)
  for _ in range(4):
    process = start(tmp_path)
    until_lines(process, tmp_path, min(lines(tmp_path) + 2, ITERATIONS))
    time.sleep(generator.uniform(0, 0.5))
    process.kill()
    finish(process)
  code, said = finish(start(tmp_path))
  assert code == 0, said
  same(straight, tmp_path)


def test_two_writers_are_refused(tmp_path):
  first = start(tmp_path)
  until_lines(first, tmp_path, 1)
  code, said = finish(start(tmp_path))
  assert code == 2 and str(first.pid) in said
  first.kill()
  finish(first)


def test_changed_settings_are_named(tmp_path):
  first = start(tmp_path)
  until_lines(first, tmp_path, 2)
  first.send_signal(signal.SIGTERM)
  assert finish(first)[0] == 75
  code, said = finish(start(tmp_path, "--config.grpo.max_new_tokens=16"))
  assert code == 0
  assert "changed setting grpo.max_new_tokens: 24 -> 16" in said
  assert json.loads((tmp_path / "resolved_config.json").read_text())["grpo"][
    "max_new_tokens"
  ] == 16  # fmt: skip

"""Rewards that hang, crash, leak and litter, over many calls; real processes."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rlft.rewards.pool import Failure, PoolConfig, RewardPool

REWARDS = Path(__file__).parents[1] / "rewards"
pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]


@pytest.fixture(scope="module")
def samples():
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(REWARDS))
    yield importlib.import_module("sample_rewards")


def judge(pool, texts, **kwargs):
  return pool.submit({"completions": list(texts)}, **kwargs).result()


def children():
  """Of this process, zombies included."""
  found = set()
  for task in Path("/proc/self/task").iterdir():
    with contextlib.suppress(FileNotFoundError):  # a thread of XLA that just ended
      found |= set(map(int, (task / "children").read_text().split()))
  return found


def state(pid):
  try:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
  except FileNotFoundError:
    return ""


def until(condition, seconds=10.0):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, "it did not happen"
    time.sleep(0.02)


def own_rss_mb():
  pages = int(Path("/proc/self/statm").read_text().split()[1])
  return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_two_hundred_rollouts_leave_no_trace(samples):
  """Some raise, some die: no file handle, process, thread or memory is lost."""
  config = PoolConfig(workers=2, max_calls=20, call_deadline=5.0, chunk_rows=4)
  texts = ["a", "bb", "raise", "ccc", "exit", "dddd" * 1000, "none", "kill"]
  with RewardPool([samples.score, samples.size], config) as pool:
    for index in range(200):
      rough = index % 10 == 0
      scores, sizes = judge(pool, texts if rough else texts[:4] * 2)
      assert sum(isinstance(x, Failure) for x in scores) == (3 if rough else 2)
      assert all(isinstance(x, float) for x in sizes)
      if index == 20:
        files, rss = len(os.listdir("/proc/self/fd")), own_rss_mb()
    # A worker that is being replaced right now may have its pipes open or not.
    assert abs(len(os.listdir("/proc/self/fd")) - files) <= 4
    assert own_rss_mb() < rss + 30
    assert len(children()) <= 3 and pool.restarts > 40
  assert not children()


def test_a_leak_is_replaced(samples):
  """40 MiB a call; no row is lost by it."""
  config = PoolConfig(workers=1, max_rss_mb=150, chunk_rows=4)
  with RewardPool([samples.score], config) as pool:
    for _ in range(12):
      assert judge(pool, ["leak"]) == [[4.0]]
    assert 2 <= pool.restarts <= 6


def test_memory_without_end_is_stopped_during_the_call(samples):
  config = PoolConfig(workers=1, max_rss_mb=100, call_deadline=30.0, deadline=60.0)
  with RewardPool([samples.score], config) as pool:
    began = time.perf_counter()
    (outcomes,) = judge(pool, ["a", "eat", "bb"])
    assert outcomes[0] == 1.0 and outcomes[2] == 2.0
    assert outcomes[1].kind == "crash" and "max_rss_mb=100" in outcomes[1].message
    assert time.perf_counter() - began < 10


def test_forks_that_come_back_do_not_answer_twice(samples):
  with RewardPool([samples.forks], PoolConfig(workers=1)) as pool:
    for _ in range(10):
      assert judge(pool, ["a", "b"]) == [[1.0, 1.0]]


def test_orphans_are_reaped_with_their_process(samples):
  config = PoolConfig(workers=1, max_calls=1)
  with RewardPool([samples.orphans], config) as pool:
    orphans = {int(judge(pool, ["a"])[0][0]) for _ in range(5)}
  until(lambda: not any(state(pid) in ("R", "S", "D") for pid in orphans))


def test_hangs_cost_the_deadline_and_no_more(samples):
  """Ten rollouts in which a row hangs, with a good row beside it each time."""
  config = PoolConfig(workers=2, call_deadline=0.3, deadline=1.0)
  times = []
  with RewardPool([samples.score], config) as pool:
    for _ in range(10):
      began = time.perf_counter()
      (outcomes,) = judge(pool, ["a", "hang", "bb", "ccc"])
      times.append(time.perf_counter() - began)
      assert [x for x in outcomes if isinstance(x, float)] == [1.0, 2.0, 3.0]
  assert max(times) < 1.0 + 0.5


def test_order_of_completion_changes_nothing(samples):
  rng = np.random.default_rng(0)
  texts = ["slow" + "x" * int(n) if n % 3 == 0 else "y" * int(n)
           for n in rng.integers(1, 40, 24)]  # fmt: skip
  for config in (PoolConfig(workers=1), PoolConfig(workers=4, chunk_rows=1)):
    with RewardPool([samples.score], config) as pool:
      assert judge(pool, texts) == [[float(len(t)) for t in texts]]


TRAINER = """
import os, sys, time
from rlft.rewards.pool import PoolConfig, RewardPool
import sample_rewards
pool = RewardPool([sample_rewards.score], PoolConfig(workers=2))
pool.submit({"completions": ["hang", "hang"]})
time.sleep(0.3)
print([child.pid for child in __import__("gc").get_objects()
       if type(child).__name__ == "Popen"], flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_worker_outlives_its_trainer(tmp_path, signum):
  """Even one that hangs in C, under a trainer that could not clean up."""
  path = tmp_path / "trainer.py"
  path.write_text(TRAINER)
  trainer = subprocess.Popen(
    [sys.executable, str(path)],
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    text=True,
    env={**os.environ, "PYTHONPATH": os.pathsep.join([str(REWARDS), *sys.path])},
  )
  with trainer:
    pids = [int(pid) for pid in trainer.stdout.readline().strip("[]\n").split(",")]
    assert len(pids) == 2 and all(state(pid) == "R" for pid in pids)
    trainer.send_signal(signum)
  until(lambda: not any(state(pid) in ("R", "S", "D") for pid in pids))

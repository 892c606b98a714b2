"""The pool: real processes that raise, hang and die; what a row costs and who pays."""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import os
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from rlft.core.errors import ConfigError, RewardError
from rlft.core.types import Example
from rlft.rewards.contract import RewardConfig, RewardFunction, compose
from rlft.rewards.pool import MOST_SHOWN, Failure, PoolConfig, RewardPool
from rlft.rewards.worker import describe, resolve

EXAMPLES = [Example(7, "p7", "s7", "1"), Example(9, "p9", "s9", "2")]
# A hang costs a chunk's call and the row's own.
QUICK = PoolConfig(call_deadline=0.5, deadline=20.0)


def judge(pool, texts, **kwargs):
  return pool.submit({"completions": list(texts)}, **kwargs).result()


def kinds(outcomes):
  return [x.kind if isinstance(x, Failure) else x for x in outcomes]


def alive(pid):
  """Whether a process runs; one that is dead and not waited for does not."""
  try:
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
  except FileNotFoundError:
    return False
  return state != "Z"


def open_files():
  """Of this process: descriptor and what it is open on."""
  found = set()
  for file in Path("/proc/self/fd").iterdir():
    with contextlib.suppress(FileNotFoundError):  # the listing's own, closed since
      found.add((file.name, os.readlink(file)))
  return found


def children():
  """Of this process, zombies included."""
  found = set()
  for task in Path("/proc/self/task").iterdir():
    with contextlib.suppress(FileNotFoundError):  # a thread of XLA that just ended
      found |= set(map(int, (task / "children").read_text().split()))
  return found


def until(condition, seconds=10.0):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, "it did not happen"
    time.sleep(0.01)


@pytest.fixture(scope="module")
def pool(samples):
  """Two workers; functions 0 to 4."""
  scaled = functools.partial(samples.size, scale=3)
  functions = [
    samples.size,
    samples.later,
    functools.partial(samples.weigh, function=scaled),
    samples.heavy_modules,
    samples.noisy,
  ]
  with RewardPool(functions) as pool:
    yield pool


# ------------------------------------------------------------------ what goes well


def test_values_come_back_in_order(pool):
  texts = ["x" * n for n in range(1, 60)]
  got = judge(pool, texts)
  sizes = [float(len(text)) for text in texts]
  assert got[0] == got[1] == sizes
  assert got[2] == [6 * size for size in sizes]
  assert all(type(x) is float for outcomes in got for x in outcomes)


def test_any_text_gets_there(pool):
  texts = ["", "\0", "\ud800", "🙂é\n", '{"values": 1}', "x" * (3 << 20)]
  assert judge(pool, texts)[0] == [float(len(text)) for text in texts]


def test_no_rows(pool):
  assert judge(pool, []) == [[]] * 5


def test_children_import_nothing_heavy(pool):
  assert judge(pool, ["a"])[3] == [0.0]


def test_prints_do_not_garble_answers(pool):
  assert judge(pool, ["a", "b", "c"])[4] == [0.0] * 3


def test_many_rollouts_at_once(pool):
  judgings = [pool.submit({"completions": ["x" * n] * 3}) for n in range(8)]
  for n in reversed(range(8)):  # in any order
    assert judgings[n].result()[0] == [float(n)] * 3


def test_judging_overlaps_the_callers_work(samples):
  with RewardPool([samples.score], PoolConfig(chunk_rows=1)) as pool:
    began = time.perf_counter()
    judging = pool.submit({"completions": ["slow"] * 2})
    assert time.perf_counter() - began < 0.2  # it does not wait
    until(lambda: judging.over)  # it is done without anyone who asks
    assert judging.result() == [[4.0, 4.0]] and judging.seconds >= 0.3


def test_the_same_values_as_without_a_pool(samples, rollout_of):
  rollout = rollout_of([7, 9], ["a", "bb", "none", "raise"], finished=[1, 0, 1, 1])
  functions = [samples.score, RewardFunction(samples.echo, 0.001)]
  here = compose(functions)(rollout, EXAMPLES)
  with compose(functions, pool=PoolConfig(workers=1)) as reward:
    pending = reward.submit(rollout, EXAMPLES)
    there = pending()
  assert here.each["echo"].tolist() == [7011, 7010, 9021, 9021]
  np.testing.assert_array_equal(here.value, there.value)
  np.testing.assert_array_equal(here.judged, there.judged)
  assert here.counts == there.counts
  assert there.judged.tolist() == [True, True, False, False]
  assert there.seconds > 0


# ------------------------------------------------------------------ what fails


def test_one_failure_masks_one_row(samples):
  """An exception, a hang in C, a crash and a kill in one rollout, beside good rows."""
  texts = ["a", "raise", "bb", "hang", "none", "exit", "nan", "ccc", "kill", "stop"]
  with RewardPool([samples.score], QUICK) as pool:
    (outcomes,) = judge(pool, texts)
    assert kinds(outcomes) == [
      1.0, "raised", 2.0, "timeout", None, "crash", "value", 3.0, "crash", "raised",
    ]  # fmt: skip
    assert "ZeroDivisionError" in outcomes[1].message
    assert "sample_rewards.py" in outcomes[1].traceback
    assert "0.5 s" in outcomes[3].message
    assert "exit code 0" in outcomes[5].message  # an exit code is no verdict
    assert "gave nan" in outcomes[6].message
    assert "SIGKILL" in outcomes[8].message
    assert "SystemExit" in outcomes[9].message
    assert pool.restarts >= 3
    assert judge(pool, ["a"] * 4) == [[1.0] * 4]  # it does not shrink


def test_a_hang_cannot_stall_longer_than_the_deadline(samples):
  """Whatever the number of rows that hang, and with one call as long as it likes."""
  config = PoolConfig(workers=2, call_deadline=0.4, deadline=0.6, chunk_rows=2)
  with RewardPool([samples.score], config) as pool:
    began = time.perf_counter()
    (outcomes,) = judge(pool, ["ok", *["hang"] * 9])
    assert time.perf_counter() - began < 0.6 + 0.5
    assert kinds(outcomes)[1:] == ["timeout"] * 9
    assert judge(pool, ["a", "b"]) == [[1.0, 1.0]]  # and the next one is judged


def test_too_many_failures_end_it_early(samples):
  config = PoolConfig(workers=1, call_deadline=0.2, deadline=30, chunk_rows=1)
  with RewardPool([samples.score], config) as pool:
    began = time.perf_counter()
    (outcomes,) = judge(pool, ["hang"] * 50, most_failures=1)
    assert time.perf_counter() - began < 2
    assert kinds(outcomes) == ["timeout"] * 2 + ["dropped"] * 48


def test_a_share_of_failures_stops_the_run_with_its_transcript(samples, rollout_of):
  rollout = rollout_of([7, 9], ["a", "bb", "raise me", "raise"])
  config = RewardConfig(max_failures=0.25)
  with (
    compose([samples.score], config, pool=QUICK) as reward,
    pytest.raises(RewardError) as info,
  ):
    reward(rollout, EXAMPLES)
  text = str(info.value)
  assert "score raised ZeroDivisionError" in text and "example with id 9" in text
  assert "p9" in text and "raise me" in text  # the transcript
  assert 'raise ZeroDivisionError("length 0")' in text  # the traceback


def test_counts(samples, rollout_of):
  texts = ["a", "raise", "hang", "exit"]
  rollout = rollout_of([7, 9], texts, finished=[1, 1, 0, 1])
  functions = [samples.score, RewardFunction(samples.size, 0.5)]
  config = RewardConfig(max_failures=0.75)
  with compose(functions, config, pool=QUICK) as reward:
    got = reward(rollout, EXAMPLES)
  assert got.judged.tolist() == [True, False, False, False]
  assert got.value.tolist() == [1.5, 0, 0, 0]
  assert got.each["size"].tolist() == [1, 5, 4, 4]
  assert got.counts == {
    "not_judged": 3, "failed": 3, "timeouts": 1, "crashes": 1, "truncated": 1,
  }  # fmt: skip


def test_a_wrong_count_is_not_made_right_row_by_row(samples):
  config = PoolConfig(workers=1, chunk_rows=2)
  with RewardPool([samples.too_few], config) as pool:
    (outcomes,) = judge(pool, ["a", "b", "c"])
  assert kinds(outcomes) == ["count", "count", 1.0]  # the last one was alone


# ------------------------------------------------------------------ processes


def test_a_process_is_replaced_after_some_calls(samples):
  config = PoolConfig(workers=1, max_calls=3)
  with RewardPool([samples.process], config) as pool:
    pids = [judge(pool, ["a"])[0][0] for _ in range(7)]
    assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [3, 3, 1]
    assert pool.restarts == 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_nothing_is_left_behind(samples):
  """No process (what a function started included), no file handle, no thread."""
  # Sets, not counts: what another test left may end meanwhile.
  left = lambda: (open_files(), set(threading.enumerate()), children())
  before = left()
  pool = RewardPool([samples.orphans, samples.process], QUICK)
  orphan, own = (int(outcomes[0]) for outcomes in judge(pool, ["a"]))
  assert alive(orphan) and alive(own)
  judging = pool.submit({"completions": ["a"]})
  pool.close()
  assert [new - old for new, old in zip(left(), before, strict=True)] == [set()] * 3
  until(lambda: not alive(orphan) and not alive(own))
  with pytest.raises(RewardError, match="closed"):
    judging.result()
  with pytest.raises(RewardError, match="closed"):
    judge(pool, ["a"])
  pool.close()  # twice is fine


def test_what_functions_print_is_shown_up_to_a_bound(samples, capsys):
  with RewardPool([samples.chatty], PoolConfig(workers=2, chunk_rows=1)) as pool:
    assert judge(pool, ["a", "b"]) == [[1.0, 1.0]]
  shown = capsys.readouterr().err
  assert MOST_SHOWN <= len(shown) < MOST_SHOWN + 100
  assert shown.count("print more, which is not shown") == 1


def test_a_crash_is_reported_with_what_was_printed(samples):
  with RewardPool([samples.last_words], QUICK) as pool:
    ((failure,),) = judge(pool, ["a"])
  assert failure.kind == "crash" and "about to end" in failure.traceback


def test_a_function_can_only_remove_a_directory_of_its_own(
  samples, tmp_path, monkeypatch
):
  """Each call begins in one that is there; none is left."""
  (tmp_path / "mine").touch()
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
  (tmp_path / "temporary").mkdir()
  with RewardPool([samples.removes_its_directory], PoolConfig(workers=1)) as pool:
    for _ in range(2):
      assert judge(pool, ["a"]) == [[0.0]]
  assert (tmp_path / "mine").exists()
  assert not list((tmp_path / "temporary").iterdir())


def test_closing_does_not_wait_for_a_hang(samples):
  pool = RewardPool([samples.score], PoolConfig(workers=1))
  pool.submit({"completions": ["hang"]})
  time.sleep(0.1)
  began = time.perf_counter()
  pool.close()
  assert time.perf_counter() - began < 1


def test_a_pool_that_is_dropped_ends(samples):
  before = children()
  pool = RewardPool([samples.size], PoolConfig(workers=1))
  judge(pool, ["a"])
  assert children() != before
  del pool
  gc.collect()
  assert children() == before


def test_secrets_and_devices_stay_with_the_trainer(samples, monkeypatch):
  monkeypatch.setenv("HF_TOKEN", "hf_1")
  monkeypatch.setenv("MY_API_KEY", "key")
  with RewardPool([samples.secret], PoolConfig(workers=1)) as pool:
    assert judge(pool, ["a"]) == [[0.0]]
  config = PoolConfig(workers=1, keep_environment=("MY_API_KEY",))
  with RewardPool([samples.secret], config) as pool:
    assert judge(pool, ["a"]) == [[1.0]]


# ------------------------------------------------------------------ functions by name


def test_functions_travel_by_name(samples):
  scaled = functools.partial(samples.size, scale=3)
  nested = functools.partial(samples.weigh, function=scaled)
  again = resolve(describe(nested))
  assert again.func is samples.weigh and again.keywords["function"].func is samples.size
  assert again(completions=["ab"]) == [12]
  assert describe(math.sqrt) == {"path": "math:sqrt"}


@pytest.mark.parametrize("kind", ["lambda", "closure", "method", "partial", "argument"])
def test_what_has_no_name_says_so(samples, kind):
  def closure(**_):
    return []

  function = {
    "lambda": lambda **_: [],
    "closure": closure,
    "method": Example(1, "", "", "").__repr__,
    "partial": functools.partial(closure),
    "argument": functools.partial(samples.size, scale=object()),
  }[kind]
  match = "cannot be given" if kind == "argument" else "top level of a module"
  with pytest.raises(ConfigError, match=match):
    RewardPool([function])


def test_a_module_that_cannot_be_imported_there(samples, tmp_path, monkeypatch):
  """Before any device work: when the pool is made."""
  (tmp_path / "only_here.py").write_text(
    "import sys\nif 'rlft.rewards.pool' not in sys.modules:\n"
    "  raise ImportError('not twice')\ndef f(**_): return []\n"
  )
  monkeypatch.syspath_prepend(str(tmp_path))
  import only_here

  threads = threading.active_count()
  with pytest.raises(ConfigError, match=r"(?s)cannot be started.*not twice"):
    RewardPool([only_here.f])
  assert threading.active_count() == threads


SCRIPT = """
import sys
print("the script runs")
from rlft.rewards.pool import PoolConfig, RewardPool
import {module} as rewards
{guard}
  with RewardPool([rewards.size], PoolConfig(workers=2)) as pool:
    print(pool.submit({{"completions": ["abc"]}}).result())
  pool = RewardPool([rewards.score], PoolConfig(workers=1))
  pool.submit({{"completions": ["hang"]}})  # never collected, never closed
"""


@pytest.mark.parametrize("guard", ["if __name__ == '__main__':", "if True:"])
def test_a_script_is_not_run_again(samples, tmp_path, guard):
  """With and without the guard that multiprocessing asks for."""
  path = tmp_path / "train.py"
  path.write_text(SCRIPT.format(guard=guard, module=samples.__name__))
  folder = str(Path(samples.__file__).parent)
  env = {**os.environ, "PYTHONPATH": os.pathsep.join([folder, *sys.path])}
  done = subprocess.run(
    [sys.executable, "-W", "error", str(path)],
    capture_output=True, text=True, timeout=60, env=env,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert done.stdout == "the script runs\n[[3.0]]\n" and not done.stderr


def test_a_function_of_the_script_says_where_to_put_it(tmp_path):
  path = tmp_path / "train.py"
  path.write_text(
    textwrap.dedent("""
    from rlft.rewards.pool import RewardPool
    def mine(**columns): return []
    RewardPool([mine])
    """)
  )
  done = subprocess.run(
    [sys.executable, str(path)], capture_output=True, text=True, timeout=60
  )
  assert "ConfigError: mine is defined in the script that runs" in done.stderr
  assert "move it to a file of its own" in done.stderr


@pytest.mark.parametrize(
  "bad",
  [
    {"workers": 0}, {"chunk_rows": 0}, {"max_calls": 0}, {"max_rss_mb": 0},
    {"deadline": 0.0}, {"deadline": math.inf}, {"start_deadline": -1.0},
    {"call_deadline": 61.0},
  ],
)  # fmt: skip
def test_settings_that_make_no_sense(bad):
  with pytest.raises(ConfigError, match=next(iter(bad))):
    PoolConfig(**bad)

"""The contract of reward functions, and what several of them give for a rollout."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import itertools
import logging
import math
import os
import signal
import time

import numpy as np
import pytest

from rlft.core.errors import ConfigError, DataError, RewardError
from rlft.core.types import Example
from rlft.rewards.contract import (
  RewardConfig,
  RewardFunction,
  call_reward,
  compose,
  settle,
)

EXAMPLES = [Example(7, "p7", "s7", "a7"), Example(9, "p9", "s9", "a9")]
TEXTS = ["a", "bb", "ccc", "dddd"]


@pytest.fixture(scope="module")
def rollout(rollout_of):
  return rollout_of([7, 9], TEXTS, finished=[True, False, True, True])


@pytest.fixture
def call(rollout):
  return lambda function: call_reward(function, rollout, EXAMPLES)


def gives(*values, name="gives"):
  """A function of these values."""

  def function(*, completions, **_):
    return [values[TEXTS.index(text)] for text in completions]

  function.__qualname__ = name
  return function


# ------------------------------------------------------------------ one function


def test_functions_get_the_columns(call):
  got = {}

  def reward(*, prompts, completions, completion_ids, **columns):
    got.update(locals())
    return [0, 1, 2, 3]

  assert call(reward) == [0.0, 1.0, 2.0, 3.0]
  assert got["prompts"] == ["p7", "p7", "p9", "p9"]
  assert got["completions"] == TEXTS
  # EOS included; the second was cut.
  assert got["completion_ids"] == [[5, 0], [5, 6], [5, 6, 7, 0], [5, 6, 7, 8, 0]]
  assert got["columns"] == {
    "id": [7, 7, 9, 9],
    "answer": ["a7", "a7", "a9", "a9"],
    "solution": ["s7", "s7", "s9", "s9"],
    "finished": [True, False, True, True],
  }


@pytest.mark.parametrize(
  "values", [[True, False, True, True], np.arange(4.0), (x for x in (0, 1, 2, 3.5))]
)
def test_numbers_of_any_kind(call, values):
  got = call(lambda **_: values)
  assert len(got) == 4 and all(type(x) is float for x in got)


def test_none_stays_none(call):
  assert call(lambda **_: [None, 1, None, 0]) == [None, 1.0, None, 0.0]


def test_an_async_function(call):
  async def reward(*, completions, **_):
    await asyncio.sleep(0)
    return [len(text) for text in completions]

  assert call(reward) == [1.0, 2.0, 3.0, 4.0]

  async def notebook():  # a loop is running already
    return call(reward)

  assert asyncio.run(notebook()) == [1.0, 2.0, 3.0, 4.0]

  async def rude(**_):
    raise OSError("gone")

  async def rude_notebook():
    return call(rude)

  for run in (lambda: call(rude), lambda: asyncio.run(rude_notebook())):
    with pytest.raises(RewardError, match="rude raised OSError"):
      run()


@pytest.mark.parametrize("count", [0, 3, 5])
def test_wrong_number_of_values_names_the_function(call, count):
  def short_reward(**_):
    return [1.0] * count

  with pytest.raises(RewardError, match=rf"short_reward returned {count} values for 4"):
    call(short_reward)


BAD = [math.nan, math.inf, -math.inf, 1e39, 10**5000, "1", "1,0", [1], 1j, object()]
BAD.append(np.ones(2))


@pytest.mark.parametrize("value", BAD, ids=lambda x: type(x).__name__)
def test_what_is_no_finite_number_is_an_error_with_its_row(call, value):
  def bad_reward(**_):
    return [1.0, 1.0, 1.0, value]

  with pytest.raises(RewardError, match=r"bad_reward gave .* sample 1 .* id 9"):
    call(bad_reward)


def test_function_that_raises_is_named_with_its_row_and_transcript(call):
  def rude_reward(*, completions, **_):
    return [1 / (len(text) - 3) for text in completions]

  with pytest.raises(RewardError) as info:
    call(rude_reward)
  text = str(info.value)
  assert "rude_reward raised ZeroDivisionError" in text
  assert "sample 0 of the example with id 9" in text
  assert "p9" in text and "ccc" in text and "Traceback" in text
  assert "1 / (len(text) - 3)" in text
  assert isinstance(info.value.__cause__, ZeroDivisionError)


def test_function_that_returns_nothing(call):
  with pytest.raises(RewardError, match="lambda"):
    call(lambda **_: None)


def test_functions_cannot_change_the_rollout(rollout):
  def reward(*, completions, completion_ids, **_):
    completions.clear()
    completion_ids[0].clear()
    return [0] * 4

  def last(*, completions, completion_ids, **_):
    assert completions == TEXTS and completion_ids[0] == [5, 0]
    return [0] * 4

  functions = [RewardFunction(reward), RewardFunction(last)]
  compose(functions, RewardConfig(max_failures=0))(rollout, EXAMPLES)
  assert rollout.completions == TEXTS


@dataclasses.dataclass(frozen=True)
class Task(Example):
  tests: tuple[str, ...] = ()


def test_columns_of_the_data_set_reach_functions_by_name(rollout):
  examples = [
    Task(7, "p7", "s7", "a7", tests=("x", "y"), columns={"rubric": {"be": "kind"}}),
    Task(9, "p9", "s9", "a9", tests=("z",)),
  ]
  got = {}

  def reward(*, completions, tests, **columns):
    got.update(columns)
    return [len(one) for one in tests]

  assert compose([reward])(rollout, examples).value.tolist() == [2, 2, 1, 1]
  assert got["rubric"] == [{"be": "kind"}, {"be": "kind"}, None, None]
  assert got["id"] == [7, 7, 9, 9] and "columns" not in got


def test_a_function_without_stars_gets_what_it_names(call):
  def reward(completions, answer, scale=2.0):
    return [scale * (a == "a9") for a in answer]

  assert call(reward) == [0, 0, 2, 2]


def test_a_column_does_not_change_a_setting(rollout):
  examples = [dataclasses.replace(e, columns={"scale": 9.0}) for e in EXAMPLES]

  def reward(*, completions, scale, **_):
    return [scale] * len(completions)

  settled = functools.partial(reward, scale=0.5)
  settled = RewardFunction(settled, name="settled")
  assert compose([settled])(rollout, examples).value.tolist() == [0.5] * 4


def test_a_column_that_is_missing_names_those_there_are(rollout):
  examples = [dataclasses.replace(e, columns={"rubric": 1}) for e in EXAMPLES]

  def strict(*, completions, tests, weight=1.0, **_):
    return [1.0] * 4

  functions = [gives(1, 1, 1, 1), RewardFunction(strict, 0.0, "unit tests")]
  match = r"unit tests needs tests, and the columns are .*rubric.*completions.*answer"
  with pytest.raises(DataError, match=match):
    compose(functions)(rollout, examples)
  with pytest.raises(DataError, match="needs tests"):
    call_reward(strict, rollout, examples)


def test_a_column_with_a_name_of_the_contract_is_refused(rollout):
  examples = [dataclasses.replace(e, columns={"finished": 1}) for e in EXAMPLES]
  with pytest.raises(DataError, match=r"columns \['finished'\].* other names"):
    compose([gives(1, 1, 1, 1)])(rollout, examples)


@pytest.mark.parametrize(
  "error", [KeyboardInterrupt, SystemExit("enough"), GeneratorExit, BaseException("x")]
)
def test_whatever_a_function_raises_costs_its_row(rollout, error):
  def rude(*, completions, **_):
    if "bb" in completions:
      raise error
    return [1.0] * len(completions)

  class Rude:  # a value that raises when it is read, or printed
    def __float__(self):
      raise error

    __repr__ = __float__

  gives = lambda *, completions, **_: [Rude() if c == "bb" else 1 for c in completions]
  for function in (rude, gives):
    reward = compose([function])(rollout, EXAMPLES)
    assert reward.judged.tolist() == [True, False, True, True]
    assert reward.counts["failed"] == 1


@pytest.mark.parametrize("swallows", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_run_and_no_row(call, swallows, number):
  """Ctrl-C, or a handler that exits, while a function has the thread."""

  def ends(*_):
    raise KeyboardInterrupt("asked to stop")

  def reward(*, completions, **_):
    try:
      os.kill(os.getpid(), number)
      time.sleep(5)
    except BaseException:
      if not swallows:
        raise
    return [1.0] * len(completions)

  before = signal.signal(number, ends)
  try:
    with pytest.raises(KeyboardInterrupt, match="asked to stop"):
      call(reward)
    assert signal.getsignal(number) is ends
    asked = []
    signal.signal(number, lambda *_: asked.append(number))  # sets a flag, as ours do
    sets = lambda *, completions, **_: [os.kill(os.getpid(), number) or 1.0] * 4
    assert call(sets) == [1.0] * 4 and asked
  finally:
    signal.signal(number, before)


def test_examples_that_are_not_the_rollouts(rollout):
  with pytest.raises(DataError, match=r"4 rows, 4 texts and 2 samples .* 1 ex"):
    call_reward(gives(0, 0, 0, 0), rollout, EXAMPLES[:1])
  with pytest.raises(DataError, match=r"prompt_ids .*7.* are not those"):
    call_reward(gives(0, 0, 0, 0), rollout, EXAMPLES[::-1])
  silent = dataclasses.replace(rollout, completions=[])
  with pytest.raises(DataError, match="0 texts"):
    call_reward(gives(0, 0, 0, 0), silent, EXAMPLES)


# ------------------------------------------------------------------ several


def test_weighted_sum(rollout):
  functions = [
    RewardFunction(gives(1, 0, 1, 0), 1.0, "right"),
    RewardFunction(gives(0.5, 0.25, 0.75, 0.125), 2.0, "shape"),
    RewardFunction(gives(9, None, 9, 9), 0.0, "seen"),
  ]
  reward = compose(functions)(rollout, EXAMPLES)
  assert reward.value.dtype == np.float32 and reward.step is None
  assert reward.value.tolist() == [2.0, 0.5, 2.5, 0.25]
  # A function without weight decides nothing, not even who was judged.
  assert reward.judged.tolist() == [True] * 4
  assert list(reward.each) == ["right", "shape", "seen"]
  assert reward.each["shape"].tolist() == [0.5, 0.25, 0.75, 0.125]  # before weighting
  np.testing.assert_array_equal(reward.each["seen"], np.float32([9, np.nan, 9, 9]))
  assert reward.each["seen"].dtype == np.float32
  assert reward.seconds > 0
  assert reward.counts == {
    "not_judged": 0, "failed": 0, "timeouts": 0, "crashes": 0, "truncated": 1,
  }  # fmt: skip


def test_fractional_and_huge_rewards_survive(rollout):
  values = (0.75, -1e-30, 3e38, 16777216.5)  # an int32 has none of them
  reward = compose([gives(*values)])(rollout, EXAMPLES)
  np.testing.assert_array_equal(reward.value, np.float32(values))


def test_a_sum_that_overflows_is_an_error(rollout):
  functions = [RewardFunction(gives(1, 0, 3e38, 0), 2.0)]
  with pytest.raises(RewardError, match=r"id 9 is 6e\+38"):
    compose(functions, RewardConfig(bad_values="raise"))(rollout, EXAMPLES)
  reward = compose(functions)(rollout, EXAMPLES)
  assert reward.value.tolist() == [2, 0, 0, 0]
  assert reward.judged.tolist() == [True, True, False, True]
  clipped = compose(functions, RewardConfig(score_clip=5.0))(rollout, EXAMPLES)
  assert clipped.value.tolist() == [2, 0, 5, 0]


def test_none_of_one_function_is_a_row_not_judged(rollout):
  functions = [gives(1, 1, 1, None, name="a"), gives(1, 1, None, 1, name="b")]
  reward = compose(functions)(rollout, EXAMPLES)
  assert reward.judged.tolist() == [True, True, False, False]
  assert reward.value.tolist() == [2, 2, 0, 0]
  assert reward.counts["not_judged"] == 2 and reward.counts["failed"] == 0


def test_all_rewards_none(rollout):
  reward = compose([gives(None, None, None, None)])(rollout, EXAMPLES)
  assert not reward.judged.any() and not reward.value.any()
  assert np.isnan(reward.each["gives"]).all()
  assert reward.counts["not_judged"] == 4 and reward.counts["failed"] == 0


@pytest.mark.parametrize(
  ("rule", "value", "expected"),
  [
    ("score", None, [4, -5, 5, 1]),
    ("penalty", 3.0, [4, -8, 5, 1]),  # not clipped away again
    ("replace", -1.0, [4, -1, 5, 1]),
    ("replace", -9.0, [4, -9, 5, 1]),
    ("mask", None, [4, 0, 5, 1]),
  ],
)
def test_clip_then_missing_eos(rollout, rule, value, expected):
  config = RewardConfig(missing_eos=rule, missing_eos_value=value, score_clip=5.0)
  reward = compose([gives(4, -7, 8, 1)], config)(rollout, EXAMPLES)
  assert reward.value.tolist() == expected
  assert reward.judged.tolist() == [True, rule != "mask", True, True]
  assert reward.each["gives"].tolist() == [4, -7, 8, 1]  # as it was
  assert reward.counts["truncated"] == 1


def test_replacing_judges_nothing(rollout):
  config = RewardConfig(missing_eos="replace", missing_eos_value=-1.0)
  reward = compose([gives(1, None, 1, 1)], config)(rollout, EXAMPLES)
  assert reward.judged.tolist() == [True, False, True, True]
  assert reward.value[1] == 0


def test_steps(rollout):
  step = np.arange(4 * 7, dtype=np.float32).reshape(4, 7)
  reward = compose([gives(1, None, 1, 1)], step=lambda *_: step)(rollout, EXAMPLES)
  assert reward.step.dtype == np.float32
  np.testing.assert_array_equal(reward.step, np.where([[1], [0], [1], [1]], step, 0))
  np.testing.assert_array_equal(reward.each["steps"], reward.step.sum(1))


# ------------------------------------------------------------------ failures


def test_one_bad_row_masks_one_row(rollout, caplog):
  def picky(*, completions, **_):
    return [1 / (len(text) - 3) for text in completions]

  functions = [RewardFunction(picky), RewardFunction(gives(1, 1, 1, 1))]
  with caplog.at_level(logging.WARNING):
    reward = compose(functions)(rollout, EXAMPLES)
  assert reward.judged.tolist() == [True, True, False, True]
  assert reward.value.tolist() == [0.5, 0.0, 0.0, 2.0]
  assert reward.each["gives"][2] == 1  # the other function was right
  assert reward.counts["failed"] == 1 and reward.counts["not_judged"] == 1
  assert "1 of 4 rows" in caplog.text and "picky raised Zero" in caplog.text


@pytest.mark.parametrize(
  ("share", "rows", "stops"),
  [(0.0, 1, True), (0.1, 1, False), (0.1, 2, True), (0.5, 2, False), (1.0, 4, False)],
)
def test_more_failures_than_may_stop_the_run(rollout, share, rows, stops):
  calls = []

  def rude(*, completions, **_):
    calls.append(completions)
    if any(len(text) <= rows for text in completions):
      raise OSError("no such file")
    return [1] * len(completions)

  reward = compose([rude], RewardConfig(max_failures=share))
  if stops:
    with pytest.raises(RewardError, match=r"rude raised OSError.*id 7; \d of 4 rows"):
      reward(rollout, EXAMPLES)
    assert len(calls) < 5 or rows > share * 4, "it went on after it had to stop"
  else:
    assert reward(rollout, EXAMPLES).counts["failed"] == rows


def test_a_run_that_stops_asks_no_more(rollout):
  calls = []

  def rude(*, completions, **_):
    calls.append(completions)
    raise OSError

  second = lambda **_: calls.append("asked for nothing")
  reward = compose([rude, second], RewardConfig(max_failures=0))
  with pytest.raises(RewardError, match="1 of 4 rows failed, and 0 may"):
    reward(rollout, EXAMPLES)
  assert calls == [TEXTS, ["a"]]


def test_rollouts_that_fail_as_a_whole_end_the_run(rollout, caplog):
  works = iter([False, False, True, False, False, False])

  def down(*, completions, **_):
    if len(completions) > 1 and not next(works):
      raise OSError("no route to the judge")
    if len(completions) == 1:  # of the rollout that has just failed
      raise OSError("no route to the judge")
    return [1.0] * len(completions)

  logged = RewardFunction(gives(*[math.nan] * 4), 0.0)  # ends nothing
  reward = compose([down, logged])
  judged = [reward(rollout, EXAMPLES).judged.tolist() for _ in range(5)]
  dead, fine = [False] * 4, [True] * 4
  assert judged == [dead, dead, fine, dead, dead]
  assert "4 of 4 rows could not be judged" in caplog.text
  match = r"(?s)no row of 3 rollouts in a row .*no route to the judge.*Traceback"
  with pytest.raises(RewardError, match=match) as info:
    reward(rollout, EXAMPLES)
  assert isinstance(info.value.__cause__, OSError)


@pytest.mark.parametrize("value", BAD, ids=lambda x: type(x).__name__)
def test_bad_values_are_masked_or_stop_the_run(rollout, value):
  function = gives(1, 1, value, 1, name="odd")
  with pytest.raises(RewardError, match=r"odd gave .* sample 0 .* id 9"):
    compose([function], RewardConfig(bad_values="raise"))(rollout, EXAMPLES)
  reward = compose([function])(rollout, EXAMPLES)
  assert reward.judged.tolist() == [True, True, False, True]
  assert reward.value.tolist() == [1, 1, 0, 1] and reward.counts["failed"] == 1


def test_a_wrong_count_is_not_made_right_row_by_row(rollout):
  """Which value belongs to which row is anyone's guess; alone, each row would pass."""

  def unique(*, completions, **_):
    return [1.0] * min(3, len(completions))

  with pytest.raises(RewardError, match="unique returned 3 values for 4"):
    compose([unique], RewardConfig(bad_values="raise"))(rollout, EXAMPLES)
  reward = compose([unique])(rollout, EXAMPLES)
  assert not reward.judged.any() and reward.counts["failed"] == 4


@pytest.mark.parametrize(
  ("answer", "what"),
  [
    (1.0, "returned 1.0, and not a list"),
    ("abcd", "returned 'abcd', and not a list"),
    ({0: 1, 1: 1, 2: 1, 3: 1}, "and not a list"),
    ({1, 2, 3, 4}, "and not a list"),
    (itertools.repeat(1.0), "returned 5 values for 4"),
    (np.float32(1), "and not a list"),
  ],
)
def test_an_answer_that_is_no_list_is_named(rollout, answer, what, caplog):
  reward = compose([lambda **_: answer])(rollout, EXAMPLES)
  assert not reward.judged.any() and what in caplog.text


# ------------------------------------------------------------------ settings


@pytest.mark.parametrize(
  ("settings", "match"),
  [
    ({"missing_eos": "ignore"}, "missing_eos='ignore'"),
    ({"missing_eos": "penalty"}, "needs missing_eos_value"),
    ({"missing_eos": "replace", "missing_eos_value": math.nan}, "needs"),
    ({"missing_eos": "penalty", "missing_eos_value": -1.0}, "subtracted"),
    ({"missing_eos_value": 1.0}, "has no use"),
    ({"score_clip": 0.0}, "score_clip=0"),
    ({"score_clip": math.nan}, "score_clip=nan"),
    ({"max_failures": 10}, "max_failures=10"),
    ({"bad_values": "drop"}, "bad_values='drop'"),
    ({"max_failed_rollouts": 0}, "max_failed_rollouts=0"),
  ],
)
def test_settings_that_make_no_sense(settings, match):
  with pytest.raises(ConfigError, match=match):
    RewardConfig(**settings)


def test_functions_that_make_no_sense():
  with pytest.raises(ConfigError, match="at least one"):
    compose([])
  with pytest.raises(ConfigError, match="two reward functions are called 'gives'"):
    compose([gives(1), gives(2)])
  with pytest.raises(ConfigError, match="weight 0"):
    compose([RewardFunction(gives(1), 0.0)])
  with pytest.raises(ConfigError, match="is nan"):
    RewardFunction(gives(1), math.nan)
  with pytest.raises(ConfigError, match="'len' is not a reward function"):
    compose(["len"])


def test_a_clip_covers_what_steps_are_paid():
  """Of a row together, by one factor; also where a step alone is beyond it."""
  total, judged = np.array([1.0, 6.0, -1.0, 8.0]), np.ones(4, bool)
  step = np.array([[1, 2], [3, 3], [-9, 0], [-4, -3]], np.float32)
  value, paid, _ = settle(total, step, judged, judged, RewardConfig(score_clip=5.0))
  np.testing.assert_allclose(value + paid.sum(1), [4, 5, -5, 1], rtol=1e-6)
  np.testing.assert_array_equal(paid[0], step[0])
  np.testing.assert_allclose(paid[1] / value[1], step[1] / total[1], rtol=1e-6)
  alone, none, _ = settle(total, None, judged, judged, RewardConfig(score_clip=5.0))
  assert alone.tolist() == [1, 5, -1, 5] and none is None

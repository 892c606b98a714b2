"""The contract of judges and reward functions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlft.core.errors import ConfigError, DataError, RewardError
from rlft.core.types import Example, Verdict
from rlft.rewards.verifiable import call_reward, judge_all, verdict_reward

EXAMPLES = [Example(7, "p7", "s7", "a7"), Example(9, "p9", "s9", "a9")]
COMPLETIONS = ["a", "b", "c", "d"]
IDS = [[1], [2, 3], [4], [5]]


def call(reward):
  return call_reward(reward, COMPLETIONS, IDS, EXAMPLES)


@pytest.mark.parametrize(
  ("correct", "consistent", "final", "strict"),
  [
    (True, True, 1, 1),
    (True, None, 1, 1),  # the task cannot tell
    (True, False, 1, 0),  # lucky
    (False, True, 0, 0),
    (False, None, 0, 0),
    (False, False, 0, 0),
  ],
)
def test_verdict_reward(correct, consistent, final, strict):
  verdict = Verdict("1", correct, consistent)
  assert verdict_reward(verdict, "final") == final
  assert verdict_reward(verdict, "consistent") == strict


def test_unknown_acceptance_is_not_the_lenient_one():
  with pytest.raises(ConfigError, match="accept='strict'"):
    verdict_reward(Verdict("1", True, False), "strict")


def test_judge_sees_the_samples_own_example():
  seen = []
  judge = lambda text, example: seen.append((text, example.id)) or Verdict(None, False)
  assert len(judge_all(judge, COMPLETIONS, EXAMPLES)) == 4
  assert seen == [("a", 7), ("b", 7), ("c", 9), ("d", 9)]


@pytest.mark.parametrize("examples", [[], EXAMPLES + EXAMPLES[:1]])
def test_completions_that_do_not_divide(examples):
  with pytest.raises(DataError, match=r"4 completions .* examples"):
    judge_all(lambda text, example: None, COMPLETIONS, examples)


def test_judge_that_raises_is_named_with_its_row():
  def picky_judge(text, example):
    raise KeyError("no such unit")

  with pytest.raises(RewardError, match=r"picky_judge .*KeyError.* sample 0 .* id 7"):
    judge_all(picky_judge, COMPLETIONS, EXAMPLES)


def test_reward_gets_the_columns():
  got = {}

  def reward(*, prompts, completions, completion_ids, **columns):
    got.update(locals())
    return [0, 1, 2, 3]

  assert call(reward) == [0.0, 1.0, 2.0, 3.0]
  assert got["prompts"] == ["p7", "p7", "p9", "p9"]
  assert got["completions"] == COMPLETIONS and got["completion_ids"] == IDS
  assert got["columns"] == {
    "answer": ["a7", "a7", "a9", "a9"],
    "solution": ["s7", "s7", "s9", "s9"],
  }


@pytest.mark.parametrize(
  "values", [[True, False, True, True], np.arange(4.0), (x for x in (0, 1, 2, 3.5))]
)
def test_numbers_of_any_kind(values):
  got = call(lambda **_: values)
  assert len(got) == 4 and all(type(x) is float for x in got)


def test_none_stays_none():
  assert call(lambda **_: [None, 1, None, 0]) == [None, 1.0, None, 0.0]


@pytest.mark.parametrize("count", [0, 3, 5])
def test_wrong_number_of_values_names_the_function(count):
  def short_reward(**_):
    return [1.0] * count

  with pytest.raises(ConfigError, match=rf"short_reward returned {count} values for 4"):
    call(short_reward)


@pytest.mark.parametrize("value", [math.nan, math.inf, "1,0", [1], object()])
def test_what_is_no_finite_number_is_an_error_with_its_row(value):
  def bad_reward(**_):
    return [1.0, 1.0, 1.0, value]

  with pytest.raises(RewardError, match=r"bad_reward gave .* sample 1 .* id 9"):
    call(bad_reward)


def test_reward_that_raises_is_named():
  def rude_reward(**_):
    raise ZeroDivisionError("length 0")

  with pytest.raises(
    RewardError, match=r"rude_reward raised ZeroDivisionError"
  ) as info:
    call(rude_reward)
  assert isinstance(info.value.__cause__, ZeroDivisionError)


def test_reward_that_returns_nothing():
  with pytest.raises(RewardError, match="lambda"):
    call(lambda **_: None)


def test_a_reward_cannot_change_the_completions():
  completions = list(COMPLETIONS)

  def reward(*, completions, completion_ids, **_):
    completions.clear()
    completion_ids[0].clear()
    return [0] * 4

  call_reward(reward, completions, IDS, EXAMPLES)
  assert completions == COMPLETIONS and IDS[0] == [1]


def test_interrupts_pass():
  def reward(**_):
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    call(reward)

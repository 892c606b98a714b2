"""One reward contract: every form gives the same `Reward`; what fits none is named."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from rlft.core.errors import ConfigError, DataError
from rlft.core.types import Example, Reward, Verdict
from rlft.rewards.contract import RewardFunction, compose
from rlft.rewards.forms import as_judge, as_reward, judge_and_reward, verdicts_by
from rlft.tasks import arithmetic

EXAMPLES = [Example(i, "p", "s", str(i), columns={"bonus": 10 * i}) for i in range(2)]
TEXTS = ["a", "bb", "ccc", "dddd"]


@pytest.fixture
def rollout(rollout_of):
  return rollout_of([0, 1], TEXTS)


def keyword_only(*, prompts, completions, completion_ids, **columns):
  return [float(len(t)) for t in completions]


def as_in_trl(prompts, completions, **kwargs):
  return [float(len(t)) for t in completions]


def bare(completions):
  return [len(t) for t in completions]


async def later(completions, **_):
  return [float(len(t)) for t in completions]


def whole(rollout, examples):
  value = np.array([len(t) for t in rollout.completions], np.float32)
  return Reward(value=value, judged=np.ones(len(value), bool))


class Callable:
  def __call__(self, completions, **_):
    return [float(len(t)) for t in completions]


@pytest.mark.parametrize(
  "reward",
  [
    keyword_only, as_in_trl, bare, later, whole, Callable(),
    functools.partial(lambda scale, completions, **_: bare(completions), 1.0),
    RewardFunction(bare), [bare], (bare,), (bare, 1.0), compose([bare]),
  ],
)  # fmt: skip
def test_every_form_gives_the_same(rollout, reward):
  given = as_reward(reward, EXAMPLES)(rollout, EXAMPLES)
  assert given.value.tolist() == [1, 2, 3, 4] and given.judged.all()


def bonus(bonus, **_):
  return bonus


def test_weights_and_columns(rollout):
  for reward in (
    [(bare, 0.5), RewardFunction(bonus, 2.0)],
    ((bare, 0.5), (bonus, 2)),
  ):
    given = as_reward(reward, EXAMPLES)(rollout, EXAMPLES)
    assert given.value.tolist() == [0.5, 1, 21.5, 22]
    assert given.each["bonus"].tolist() == [0, 0, 10, 10]


def test_a_judge_is_a_reward(rollout):
  def judge(text, example):
    return Verdict(text, correct=len(text) > 1, consistent=example.id == 1)

  given = as_reward(judge, EXAMPLES)(rollout, EXAMPLES)
  assert given.value.tolist() == [0, 0, 1, 1]
  assert as_reward(judge, EXAMPLES, "final")(rollout, EXAMPLES).value[1] == 1
  both = as_reward([judge, (bare, 0.0)], EXAMPLES)(rollout, EXAMPLES)
  assert both.value.tolist() == [0, 0, 1, 1] and "bare" in both.each


@pytest.mark.parametrize(
  "reward, message",
  [
    (None, "reward=None is no function.*completions"),
    ("accuracy", "reward='accuracy' is no function"),
    ([], "at least one"),
    ([bare, 3], "reward=3 is no function"),
    (len, "wants obj by position"),
    (lambda *texts: texts, "wants \\*texts by position"),
    ([whole], "takes a whole rollout"),
    (Callable, "is no function"),
  ],
)
def test_what_is_no_reward_is_named(reward, message):
  with pytest.raises(ConfigError, match=message):
    as_reward(reward, EXAMPLES)


def test_what_a_function_lacks_is_named():
  for wrong in (lambda texts, answers: 0, lambda completions, rubric, **_: 0):
    with pytest.raises(DataError, match=r"needs (texts, answers|rubric).*bonus"):
      as_reward(wrong, EXAMPLES)


def test_judges_and_rewards_are_told_apart():
  judge = arithmetic.judge
  assert as_judge(judge) is judge and as_judge(None) is None
  assert all(as_judge(f) is None for f in (bare, as_in_trl, later, whole, [bare], 3))
  odd = lambda t, e: Verdict(t, True)
  assert as_judge(odd) is odd
  assert judge_and_reward(judge, None, EXAMPLES) == (judge, None)
  assert judge_and_reward(None, judge, EXAMPLES) == (judge, None)
  for pair in ((bare, None), (None, bare)):
    found, reward = judge_and_reward(*pair, EXAMPLES)
    assert found is None and callable(reward)
  found, reward = judge_and_reward(judge, bare, EXAMPLES)
  assert found is judge and reward is not None
  for wrong in ((None, None), (judge, judge), (bare, bare)):
    with pytest.raises(ConfigError, match="give a judge, a reward or one"):
      judge_and_reward(*wrong, EXAMPLES)


def test_verdicts_without_a_judge():
  verdicts = verdicts_by([None, 0.2, 0.5], 0.5)
  assert [v.correct for v in verdicts] == [False, False, True]
  assert [v.answer for v in verdicts] == [None, "0.2", "0.5"]

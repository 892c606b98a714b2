"""Rewards in any form that people have them in, as algorithms take them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal

from rlft.core.errors import ConfigError
from rlft.core.types import Example, Reward, Rollout, Verdict
from rlft.rewards.contract import (
  OWN,
  ComposedReward,
  RewardConfig,
  RewardFunction,
  check_columns,
  compose,
  further_columns,
)
from rlft.rewards.verifiable import Judge, answer_reward, make_reward
from rlft.rewards.worker import name_of

RewardOf = Callable[[Rollout, Sequence[Example]], Reward]
# Of methods that sample once, or a few times: when all rows have failed, none is left.
ONCE = RewardConfig(max_failed_rollouts=1)
_CONTRACT = (
  "a reward function is f(*, prompts, completions, completion_ids, **columns) -> a "
  "number or None for each completion"
)


def as_reward(
  reward: Any,
  examples: Sequence[Example],
  accept: Literal["final", "consistent"] = "consistent",
  config: RewardConfig | None = None,
) -> RewardOf:
  """One reward out of any that fits these examples.

  Args:
    reward: a function of the contract in `rewards.contract`, sync or async; a
      `RewardFunction`, or (function, weight); a list of these; what `compose` gave, or
      any function of (rollout, examples) that gives a `Reward`; or a task's
      judge(text, example) -> Verdict.
    examples: that are going to be sampled; their columns are what functions may ask
      for.
    accept: what of a judge's verdict pays 1, see `verifiable.verdict_reward`.
    config: of what is composed here.

  Raises:
    ConfigError: it is none of these, or cannot be called by keyword; says why.
    DataError: a function asks for what is no column; names those there are.
  """
  if is_judge(reward):
    reward = make_reward(reward, accept, config)
  elif not _takes_rollout(reward):
    many = isinstance(reward, list) or (isinstance(reward, tuple) and not _pair(reward))
    functions = reward if many else [reward]
    reward = compose([_function(one, accept) for one in functions], config)
  if isinstance(reward, ComposedReward):
    check_columns(reward.functions, [*OWN, *further_columns(examples)])
  return reward


def is_judge(function: Any) -> bool:
  """Whether this is judge(text, example): its second parameter is called so."""
  names = _positional(function)
  return len(names) >= 2 and names[1] == "example"


def verdicts_by(rewards: Sequence[float | None], threshold: float) -> list[Verdict]:
  """Verdicts where there is no judge: right is what reaches the threshold."""
  return [
    Verdict(None if x is None else f"{x:g}", x is not None and bool(x >= threshold))
    for x in rewards
  ]


def as_judge(judge: Any) -> Judge | None:
  """The judge that this is; None where it is a reward.

  Anything that takes two arguments by position is a judge here, whatever they are
  called, unless they are called as those of a reward are.
  """
  if judge is None or is_judge(judge):
    return judge
  names = _positional(judge)
  return None if len(names) != 2 or {*names} & {*OWN, "rollout"} else judge


def judge_and_reward(
  judge: Any, reward: Any, examples: Sequence[Example]
) -> tuple[Judge | None, RewardOf | None]:
  """What a method that looks at verdicts was given: either may be in either place.

  Args:
    judge: a task's judge, a reward in any form, or None.
    reward: the same.
    examples: see `as_reward`.

  Returns:
    (judge, reward): one of them at most is None.
  """
  given = [x for x in (judge, reward) if x is not None]
  judges = [x for x in (as_judge(judge), reward if is_judge(reward) else None) if x]
  rewards = [x for x in given if not any(x is one for one in judges)]
  if not given or len(judges) > 1 or len(rewards) > 1:
    raise ConfigError(
      f"{len(judges)} judges and {len(rewards)} rewards: give a judge, a reward or one "
      "of each"
    )
  return (
    judges[0] if judges else None,
    as_reward(rewards[0], examples, config=ONCE) if rewards else None,
  )


def _takes_rollout(reward: Any) -> bool:
  return isinstance(reward, ComposedReward) or _positional(reward)[:1] == ["rollout"]


def _pair(value: tuple) -> bool:
  """Whether this is (function, weight)."""
  return len(value) == 2 and callable(value[0]) and isinstance(value[1], int | float)


def _function(one: Any, accept: Literal["final", "consistent"]) -> RewardFunction:
  if isinstance(one, tuple) and _pair(one):
    one = RewardFunction(*one)
  if isinstance(one, RewardFunction):
    _check_keywords(one.function)
    return one
  if is_judge(one):
    return RewardFunction(answer_reward(one, accept), name=name_of(one))
  if _takes_rollout(one):
    raise ConfigError(
      f"{one!r:.200} takes a whole rollout, and cannot stand in a list: {_CONTRACT}"
    )
  if not callable(one) or isinstance(one, type):
    raise ConfigError(f"reward={one!r:.200} is no function: {_CONTRACT}")
  _check_keywords(one)
  return RewardFunction(one)


def _check_keywords(function: Callable) -> None:
  """Raises `ConfigError` where a function wants arguments by position."""
  try:
    every = inspect.signature(function).parameters.values()
  except (TypeError, ValueError):  # some that are written in C have none
    return
  wrong = [
    x.name for x in every if x.kind is x.POSITIONAL_ONLY and x.default is x.empty
  ]
  starred = [f"*{x.name}" for x in every if x.kind is x.VAR_POSITIONAL]
  if wrong or (starred and len(every) == 1):
    raise ConfigError(
      f"the reward function {name_of(function)} wants {', '.join(wrong or starred)} by "
      f"position, and gets everything by keyword: {_CONTRACT}"
    )


def _positional(function: Any) -> list[str]:
  """Names of the parameters that can be given by position, without defaults."""
  try:
    every = inspect.signature(function).parameters.values()
  except (TypeError, ValueError):
    return []
  named = (x for x in every if x.kind in (x.POSITIONAL_ONLY, x.POSITIONAL_OR_KEYWORD))
  return [x.name for x in named if x.default is x.empty]

"""Rewards that a program can check.

A reward function is `f(*, prompts, completions, completion_ids, **columns)` and returns
a number, or None, for each completion. None means "could not be judged": it is never
the same as 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

from rlft.core.errors import ConfigError, DataError, RewardError
from rlft.core.types import Example, Verdict

Judge = Callable[[str, Example], Verdict]


def judge_all(
  judge: Judge, completions: Sequence[str], examples: Sequence[Example]
) -> list[Verdict]:
  """Verdicts of B completions; B is a multiple of the number of examples.

  The samples of one prompt are adjacent, as in a `Rollout`.

  Raises:
    DataError: the numbers do not fit.
    RewardError: the judge raised; names it and the example.
  """
  if not examples or len(completions) % len(examples):
    raise DataError(
      f"{len(completions)} completions are not the same number for each of "
      f"{len(examples)} examples"
    )
  samples = len(completions) // len(examples)
  out = []
  for i, text in enumerate(completions):
    example = examples[i // samples]
    try:
      out.append(judge(text, example))
    except Exception as error:
      raise RewardError(
        f"the judge {name_of(judge)} raised {error!r} on sample {i % samples} of the "
        f"example with id {example.id}: {text!r:.200}"
      ) from error
  return out


def call_reward(
  reward: Callable[..., Sequence[float | None]],
  completions: Sequence[str],
  completion_ids: Sequence[Sequence[int]],
  examples: Sequence[Example],
) -> list[float | None]:
  """Calls a reward function and holds it to its contract.

  Args:
    reward: gets, by keyword, `prompts`, `completions`, `completion_ids`, and the
      columns `answer` and `solution`: lists of B.
    completions: B texts; B is a multiple of the number of examples, as above.
    completion_ids: the token ids of each.
    examples: the prompts.

  Returns:
    B finite numbers, or None where the function could not judge.

  Raises:
    RewardError: it raised, or gave something that is neither a finite number nor None;
      names the function and the example.
    ConfigError: it returned another number of values.
  """
  samples = len(completions) // len(examples)
  each = [example for example in examples for _ in range(samples)]
  name = name_of(reward)
  try:
    values = list(
      reward(
        prompts=[e.prompt for e in each],
        completions=list(completions),
        completion_ids=[list(ids) for ids in completion_ids],
        answer=[e.answer for e in each],
        solution=[e.solution for e in each],
      )
    )
  except Exception as error:
    raise RewardError(
      f"the reward function {name} raised {error!r} on {len(each)} completions of the "
      f"examples {each[0].id} to {each[-1].id}"
    ) from error
  if len(values) != len(each):
    raise ConfigError(
      f"the reward function {name} returned {len(values)} values for {len(each)} "
      "completions; it returns one for each, None for what it cannot judge"
    )
  for i, value in enumerate(values):
    if value is None:
      continue
    try:
      values[i] = float(value)
    except (TypeError, ValueError):
      values[i] = math.nan
    if not math.isfinite(values[i]):
      raise RewardError(
        f"the reward function {name} gave {value!r} for sample {i % samples} of the "
        f"example with id {each[i].id}; it returns finite numbers, or None for what it "
        "cannot judge"
      )
  return values


def name_of(function: Callable) -> str:
  """What a message calls a function."""
  return getattr(function, "__qualname__", None) or repr(function)


def verdict_reward(verdict: Verdict, accept: Literal["final", "consistent"]) -> float:
  """1 for a right answer, else 0 (arXiv 2403.04642, the sparse reward).

  Args:
    verdict: what the task says.
    accept: "final" asks for the answer only; "consistent" also for a valid chain of
      steps, where the task can tell (a verdict of None passes).
  """
  if accept not in ("final", "consistent"):
    raise ConfigError(f"accept={accept!r}: choose 'final' or 'consistent'")
  if not verdict.correct:
    return 0.0
  return 0.0 if accept == "consistent" and verdict.consistent is False else 1.0

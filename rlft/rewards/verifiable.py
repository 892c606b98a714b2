"""Rewards that a program can check.

A reward function is `f(*, prompts, completions, completion_ids, **columns)` and returns
a number, or None, for each completion. None means "could not be judged": it is never
the same as 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from rlft.core.types import Example, Verdict

Judge = Callable[[str, Example], Verdict]


def judge_all(
  judge: Judge, completions: Sequence[str], examples: Sequence[Example]
) -> list[Verdict]:
  """Verdicts of B completions; B is a multiple of the number of examples.

  The samples of one prompt are adjacent, as in a `Rollout`.
  """
  samples, rest = divmod(len(completions), len(examples))
  if rest:
    raise ValueError(
      f"{len(completions)} completions are not the same number for each of "
      f"{len(examples)} examples"
    )
  return [judge(text, examples[i // samples]) for i, text in enumerate(completions)]


def verdict_reward(verdict: Verdict, accept: Literal["final", "consistent"]) -> float:
  """1 for a right answer, else 0 (arXiv 2403.04642, the sparse reward).

  Args:
    verdict: what the task says.
    accept: "final" asks for the answer only; "consistent" also for a valid chain of
      steps, where the task can tell (a verdict of None passes).
  """
  if not verdict.correct:
    return 0.0
  return 0.0 if accept == "consistent" and verdict.consistent is False else 1.0

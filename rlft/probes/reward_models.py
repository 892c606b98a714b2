"""How well reward models order pairs, and outcome models tell right from wrong.

Letters: T tokens, N items that are measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from rlft.core.errors import ConfigError, DataError
from rlft.models.scalar import ScalarModel
from rlft.rewards.learned import row_values
from rlft.tasks.preferences import Preference
from rlft.training.outcomes import Outcome, check_outcomes, encode_outcomes
from rlft.training.pairs import TokenPair, check_pair_ids, encode_pairs


def accuracy(
  scalar: ScalarModel,
  preferences: Sequence[Preference],
  *,
  max_length: int = 1 << 30,
  chat: bool = False,
  seed: int = 0,
) -> dict[str, Any]:
  """Share of pairs whose chosen side has the higher value; equal values count half.

  Args:
    scalar: the reward model.
    preferences: a split, in or out of the training distribution.
    max_length: longer pairs are dropped and counted.
    chat: as in training.
    seed: of the bootstrap, which resamples prompts: pairs of one depend on each other.

  Returns:
    "accuracy": (share, low, high), with a 95 % interval; "pairs": how many were read.
  """
  limit = min(max_length, scalar.config.max_positions)
  pairs = encode_pairs(
    scalar.tokenizer, scalar.eos_ids, preferences, max_length=limit, chat=chat
  )
  check_pair_ids(pairs, scalar)
  gap_N = pair_gaps(scalar, pairs)
  prompts = [str(preferences[pair.source].prompt) for pair in pairs]
  wins_N = (np.sign(gap_N) + 1) / 2
  share = _interval(np.mean, (wins_N,), prompts, seed)
  return {"accuracy": share, "pairs": len(pairs)}


def pair_gaps(scalar: ScalarModel, pairs: Sequence[TokenPair]) -> np.ndarray:
  """Normalised value of the chosen side minus that of the rejected one, float32 [N]."""
  sides = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
  values = row_values(scalar, [side.tokens for side in sides])
  last_N = np.array([value_T[-1] for value_T in values], np.float32)
  return last_N[: len(pairs)] - last_N[len(pairs) :]


def auc(
  orm: ScalarModel,
  outcomes: Sequence[Outcome],
  at: Literal["steps", "final"] = "steps",
  *,
  chat: bool = False,
  seed: int = 0,
) -> tuple[float, float, float]:
  """Probability that a right solution scores above a wrong one; ties count half.

  Args:
    orm: the outcome model.
    outcomes: labelled solutions of prompts that it was not trained on; labels above 1/2
      count as right.
    at: "steps" compares prefixes, read at the ends of steps before the last token;
      "final" whole solutions.
    chat: as in training.
    seed: of the bootstrap, which resamples prompts.

  Returns:
    (area under the ROC curve, low, high), a 95 % interval; NaN where all labels are
    equal.
  """
  if at not in ("steps", "final"):
    raise ConfigError(f"at={at!r}: choose 'steps' or 'final'")
  outcomes = check_outcomes(outcomes)
  rows = encode_outcomes(orm, outcomes, at if at == "final" else "ends", chat)
  values = row_values(orm, [row.tokens for row in rows])
  score, label, prompt = [], [], []
  for value_T, row, outcome in zip(values, rows, outcomes):
    here = value_T[np.array(row.weight) > 0]
    score.extend(here)
    label.extend([outcome.label > 0.5] * len(here))
    prompt.extend([outcome.prompt_id] * len(here))
  if not score:
    raise DataError(f"no step ends in {len(outcomes)} outcomes: nothing to compare")
  return _interval(_auc, (np.array(score), np.array(label)), prompt, seed)


def _auc(score_N: np.ndarray, label_N: np.ndarray) -> float:
  """Mann-Whitney's statistic over the number of pairs; NaN without both labels."""
  right, wrong = score_N[label_N], np.sort(score_N[~label_N])
  if not len(right) or not len(wrong):
    return math.nan
  below = np.searchsorted(wrong, right, "left")
  equal = np.searchsorted(wrong, right, "right") - below
  return float((below + 0.5 * equal).mean() / len(wrong))


def _interval(
  statistic: Callable[..., float],
  columns: tuple[np.ndarray, ...],
  prompts: Sequence[Any],
  seed: int,
  reps: int = 1000,
) -> tuple[float, float, float]:
  """A statistic of N items, with its 95 % percentile bootstrap over their prompts."""
  _, group_N = np.unique(np.array([str(p) for p in prompts]), return_inverse=True)
  order = np.argsort(group_N, kind="stable")
  groups = np.split(order, np.cumsum(np.bincount(group_N))[:-1])
  rng = np.random.default_rng(seed)
  draws = []
  for _ in range(reps):
    chosen = rng.integers(0, len(groups), len(groups))
    items = np.concatenate([groups[g] for g in chosen])
    draws.append(statistic(*(column[items] for column in columns)))
  low, high = np.nanquantile(draws, [0.025, 0.975])
  return float(statistic(*columns)), float(low), float(high)

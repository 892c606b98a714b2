"""Learned rewards: reward models and outcome models (ORMs), scored on the mesh.

What was sampled is what is read: token ids, never the text again. Programs are compiled
for bucketed shapes, so that no batch of a run compiles anew.

Letters: B rows, T tokens, C completion columns.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import numpy as np

from rlft.core.errors import ConfigError, RewardError
from rlft.core.types import Example, Reward, Rollout
from rlft.models.hub import Policy
from rlft.models.scalar import (
  ScalarModel,
  check_same_tokenizer,
  last_value,
  token_values,
)
from rlft.rewards.contract import RewardConfig, settle
from rlft.rewards.verifiable import Steps, step_ends
from rlft.sampling.buckets import bucket
from rlft.sampling.score import check_rows, in_blocks
from rlft.sampling.stops import by_stop

_jit_last_value = jax.jit(last_value, static_argnums=0)
_jit_token_values = jax.jit(token_values, static_argnums=0)


def final_values(
  scalar: ScalarModel, tokens, mask, max_tokens: int = 16384
) -> np.ndarray:
  """The normalised value at the last real token of each row.

  (raw - mean) / std

  Args:
    scalar: the model.
    tokens: int [B, T]; padding may stand anywhere.
    mask: bool [B, T], True on real tokens.
    max_tokens: rows are taken so many tokens at a time.

  Returns:
    float32 [B].

  Raises:
    DataError: the rows are not what the model can read.
  """
  raw_B = _run(_jit_last_value, scalar, tokens, mask, max_tokens)
  return (raw_B - np.float32(scalar.mean)) / np.float32(scalar.std)


def every_value(
  scalar: ScalarModel, tokens, mask, max_tokens: int = 16384
) -> np.ndarray:
  """The normalised value at every token, float32 [B, T]; see `final_values`.

  What stands under a pad means nothing.
  """
  raw_BT = _run(_jit_token_values, scalar, tokens, mask, max_tokens)
  raw_BT = raw_BT[:, : np.shape(tokens)[1]]
  return (raw_BT - np.float32(scalar.mean)) / np.float32(scalar.std)


def _run(program, scalar: ScalarModel, tokens, mask, max_tokens) -> np.ndarray:
  tokens, mask = check_rows(tokens, mask, scalar)
  run = functools.partial(program, scalar.model, scalar.params)
  return in_blocks(run, scalar.model.mesh, tokens, mask, max_tokens)


def row_values(
  scalar: ScalarModel, rows: Sequence[Sequence[int]], max_tokens: int = 16384
) -> list[np.ndarray]:
  """The normalised value at every token of rows of ids, of which each has its length.

  Rows of one length bucket are taken together, so that short ones cost little.
  """
  by_bucket: dict[int, list[int]] = {}
  for i, row in enumerate(rows):
    by_bucket.setdefault(bucket(len(row)), []).append(i)
  out: list[np.ndarray] = [np.zeros(0, np.float32)] * len(rows)
  for length, members in by_bucket.items():
    tokens = np.zeros((len(members), length), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for at, i in enumerate(members):
      tokens[at, : len(rows[i])], mask[at, : len(rows[i])] = rows[i], True
    for i, value_T in zip(members, every_value(scalar, tokens, mask, max_tokens)):
      out[i] = value_T[: len(rows[i])]
  return out


def probability(logit: np.ndarray) -> np.ndarray:
  """sigmoid(logit), float32, without overflow."""
  return (0.5 * (1 + np.tanh(0.5 * logit))).astype(np.float32)


# -------------------------------------------------------------- rewards of algorithms


def ended_rows(
  scalar: ScalarModel, rollout: Rollout, policy: Policy | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """A rollout's rows (tokens, mask) as a model was trained to read them.

  Its score stands at the token that ends a completion, which rows that a stop string
  ended do not have: they get it. Rows that the length limit cut stay as they are.
  """
  tokens, mask = rollout.tokens, rollout.mask
  ends = (*scalar.eos_ids, *(policy.eos_ids if policy is not None else ()))
  rows = by_stop(rollout, ends) & (mask.sum(1) < scalar.config.max_positions)
  if not scalar.eos_ids or not rows.any():
    return tokens, mask
  tokens, mask = (np.pad(x, ((0, 0), (0, 1))) for x in (tokens, mask))
  at = np.flatnonzero(rows), _last(mask)[rows] + 1
  tokens[at], mask[at] = scalar.eos_ids[0], True
  return tokens, mask


def score_rows(scalar: ScalarModel) -> Callable[[Sequence[Sequence[int]]], list[float]]:
  """Scores of rows of ids, to rerank and to vote by: an outcome model's probabilities
  (a vote that is weighted by logits would weigh it against the lowest of its prompt), a
  reward model's values."""
  read = probability if scalar.kind == "outcome" else lambda value: value
  return lambda ids: [float(read(value[-1])) for value in row_values(scalar, ids)]


def _last(mask_BT: np.ndarray) -> np.ndarray:
  return mask_BT.shape[1] - 1 - np.argmax(mask_BT[:, ::-1], axis=1)


def reward_model_reward(
  scalar: ScalarModel,
  policy: Policy | None = None,
  config: RewardConfig | None = None,
  name: str = "reward_model",
  max_tokens: int = 16384,
) -> Callable[[Rollout, Sequence[Example]], Reward]:
  """A reward model as the reward of an algorithm: its value at a completion's end.

  Args:
    scalar: the reward model, normalised; it must have been trained on prompts as they
      are sampled (chat template or none).
    policy: that samples; its tokenizer is checked now. Without it, only ids outside the
      vocabulary are found.
    config: clipping of the score, and the rule for completions that did not end.
    name: in the logs.
    max_tokens: of a block of rows.

  Returns:
    A callable of (rollout, examples); `value` is on the host, and `each` has the scores
    as the model gave them.

  Raises:
    ConfigError: another tokenizer, or the model is no reward model.
  """
  _check_model(scalar, policy, "reward")

  def reward(rollout: Rollout, examples: Sequence[Example]) -> Reward:
    began = time.perf_counter()
    rows = ended_rows(scalar, rollout, policy)
    value_B = final_values(scalar, *rows, max_tokens)
    return _reward(rollout, value_B, None, config, name, began)

  return reward


def orm_reward(
  orm: ScalarModel,
  mode: Literal["final", "step"] = "final",
  steps: Steps | None = None,
  policy: Policy | None = None,
  config: RewardConfig | None = None,
  name: str = "orm",
  max_tokens: int = 16384,
) -> Callable[[Rollout, Sequence[Example]], Reward]:
  """An outcome model as the reward of an algorithm: the probability of being right.

  "final" pays p(right | whole completion) at the last chosen token. "step" pays
  p(right | prefix) at the end of every step as well, what Havrilla et al. 2024 (arXiv
  2403.04642) call Dense-ORM.

  Args:
    orm: an outcome model.
    mode: "final" or "step".
    steps: of "step": the task's, such as `arithmetic.steps`.
    policy, config, name, max_tokens: as for `reward_model_reward`.

  Returns:
    A callable of (rollout, examples): `value` [B], and with "step" also `step` [B, C];
    nothing is paid twice at the last token. Host float32.

  Raises:
    ConfigError: another tokenizer, no outcome model, or a mode that does not exist.
  """
  _check_model(orm, policy, "outcome")
  if mode not in ("final", "step"):
    raise ConfigError(f"mode={mode!r}: choose 'final' or 'step'")
  if mode == "step" and steps is None:
    raise ConfigError("mode='step' needs steps, such as arithmetic.steps")
  if mode == "step" and orm.tokenizer is None:
    raise ConfigError("mode='step' needs a tokenizer: steps are read from texts")

  def reward(rollout: Rollout, examples: Sequence[Example]) -> Reward:
    began = time.perf_counter()
    tokens, mask = ended_rows(orm, rollout, policy)
    if mode == "final":
      logit_B = final_values(orm, tokens, mask, max_tokens)
      return _reward(rollout, probability(logit_B), None, config, name, began)
    ends_BC = step_ends(rollout, orm.tokenizer, steps)
    first = rollout.mask.shape[1] - ends_BC.shape[1]
    value_BT = probability(every_value(orm, tokens, mask, max_tokens))
    rows = np.arange(len(mask))
    step_BC = value_BT[:, first : rollout.mask.shape[1]]
    step_BC = np.where(ends_BC, step_BC, np.float32(0))
    step_BC[rows, _last(rollout.mask) - first] = 0  # `value` pays there
    value_B = value_BT[rows, _last(mask)]
    return _reward(rollout, value_B, step_BC, config, name, began)

  return reward


def _check_model(scalar: ScalarModel, policy: Policy | None, kind: str) -> None:
  if scalar.kind != kind:
    raise ConfigError(f"this is a model of kind {scalar.kind!r}; give one of {kind!r}")
  if policy is not None:
    check_same_tokenizer(policy, scalar)


def _reward(
  rollout: Rollout,
  score_B: np.ndarray,
  step_BC: np.ndarray | None,
  config: RewardConfig | None,
  name: str,
  began: float,
) -> Reward:
  finite_B = np.isfinite(score_B)
  if step_BC is not None:
    finite_B &= np.isfinite(step_BC).all(1)
  if not finite_B.all():
    row = int(np.argmin(finite_B))
    raise RewardError(
      f"the reward {name} of row {row} (prompt {rollout.prompt_ids[row]}) is not "
      "finite: the model's weights or its normalisation are damaged"
    )
  finished_B = np.asarray(rollout.finished, bool)
  known_B = np.ones(score_B.shape, bool)
  value_B, step_BC, judged_B = settle(
    score_B, step_BC, known_B, finished_B, config or RewardConfig()
  )
  each = {name: score_B}
  if step_BC is not None:
    step_BC = np.where(judged_B[:, None], step_BC, np.float32(0))
    each["steps"] = step_BC.sum(1)
  return Reward(
    value=value_B.astype(np.float32),
    judged=judged_B,
    step=step_BC,
    each=each,
    seconds=time.perf_counter() - began,
    counts={
      "not_judged": int((~judged_B).sum()),
      "truncated": int((~finished_B).sum()),
    },
  )

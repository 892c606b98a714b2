"""Outcomes: sampled solutions that are known to be right or wrong, to train on.

Letters: B rows, T tokens, N outcomes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Literal

import numpy as np
from flax import struct
from jax.sharding import Mesh

from rlft.core.errors import ConfigError, DataError
from rlft.core.rng import Purpose
from rlft.models.hub import Policy
from rlft.models.scalar import ScalarModel
from rlft.models.tokens import check_ids
from rlft.rewards.verifiable import Judge, Steps, judge_all, step_ends
from rlft.sampling.stops import by_stop
from rlft.tasks.prompts import Prompts, as_examples, opened
from rlft.training.data import (
  TokenRow,
  collate,
  encode_rows,
  grouped,
  place,
)
from rlft.training.rollouts import sample, usable


@dataclasses.dataclass(frozen=True)
class Outcome:
  """A sampled solution with what became of it.

  Attributes:
    prompt_id: of its example.
    prompt: the text that was continued.
    tokens: the sampled ids, with EOS where it ended; after a stop string as well.
    ends: indices into `tokens` at which a step ends.
    label: 1 for a right final answer, 0 for a wrong one; between them, a probability.
  """

  prompt_id: int
  prompt: str
  tokens: tuple[int, ...]
  ends: tuple[int, ...]
  label: float


@struct.dataclass
class OutcomeBatch:
  """One batch of labelled rows.

  Attributes:
    tokens: int32 [B, T].
    mask: bool [B, T], True on real tokens.
    weight: float32 [B, T], 1 where the loss reads a value.
    label: float32 [B].
  """

  tokens: Any
  mask: Any
  weight: Any
  label: Any


def sample_outcomes(
  policy: Policy,
  examples: Prompts,
  judge: Judge,
  steps: Steps,
  samples: int,
  *,
  max_new_tokens: int,
  temperature: float = 1.0,
  stop: Sequence[str] = (),
  few_shot: str = "",
  chat: bool = False,
  seed: int = 0,
  step: int = 0,
  max_rows: int = 128,
  on_progress: Callable[[int, int], None] | None = None,
) -> list[Outcome]:
  """Samples solutions and labels them: data for an outcome model.

  Args:
    policy: samples; K Havrilla et al. is the SFT policy.
    examples: the prompts.
    judge: of the task; its `correct` is the label.
    steps: of the task, such as `arithmetic.steps`.
    samples: K of each prompt.
    max_new_tokens, temperature, stop, max_rows, on_progress: as for `generate`.
    few_shot: text before every prompt while sampling; the outcomes are without it.
    chat: put prompts into the chat template.
    seed, step: address the noise.

  Returns:
    K outcomes of each example, samples of a prompt adjacent; those that the length
    limit cut are among them, those that could not be judged are not. Prompts without
    room for a completion are left out.
  """
  if few_shot and chat:
    raise ConfigError("few_shot is for base models, chat for chat models: choose one")
  examples = usable(policy, as_examples(examples), max_new_tokens, chat, few_shot)
  shown = [
    dataclasses.replace(e, prompt=prompt)
    for e, prompt in zip(examples, opened(examples, few_shot))
  ]
  rollout = sample(
    policy,
    shown,
    samples=samples,
    temperature=temperature,
    max_new_tokens=max_new_tokens,
    stop=stop,
    seed=seed,
    step=step,
    chat=chat,
    # Not a rollout's: an outcome model would reward the samples that it was trained on.
    purpose=Purpose.OUTCOME,
    max_rows=max_rows,
    on_progress=on_progress,
  )
  verdicts = judge_all(judge, rollout.completions, examples)
  ends_BC = step_ends(rollout, policy.tokenizer, steps)
  stopped_B = by_stop(rollout, policy.eos_ids)
  return [
    Outcome(
      prompt_id=examples[row // samples].id,
      prompt=examples[row // samples].prompt,
      tokens=(
        *rollout.tokens[row][rollout.completion_mask[row]].tolist(),
        *policy.eos_ids[: int(stopped_B[row])],
      ),
      ends=tuple(np.flatnonzero(ends_BC[row]).tolist()),
      label=float(verdict.correct),
    )
    for row, verdict in enumerate(verdicts)
    if verdict.judged
  ]


def check_outcomes(outcomes: Sequence[Outcome]) -> list[Outcome]:
  """Raises `DataError` for rows that cannot be trained on; names the first."""
  outcomes = list(outcomes)
  if not outcomes:
    raise DataError("no outcomes")
  for i, row in enumerate(outcomes):
    where = f"outcome {i} (prompt {row.prompt_id})"
    number = isinstance(row.label, int | float | np.number)
    if not number or not 0 <= row.label <= 1:
      raise DataError(f"{where} has the label {row.label!r}: give a number, 0 to 1")
    if not row.tokens:
      raise DataError(f"{where} has no tokens")
    if any(not 0 <= end < len(row.tokens) for end in row.ends):
      raise DataError(f"{where} has {len(row.tokens)} tokens, and step ends {row.ends}")
  return outcomes


def encode_outcomes(
  model: Policy | ScalarModel,
  outcomes: Sequence[Outcome],
  read: Literal["steps", "all", "final", "ends"],
  chat: bool = False,
) -> list[TokenRow]:
  """Rows of tokens, prompt included, with weight 1 where a value is read.

  Args:
    model: whose tokenizer sampled.
    outcomes: checked by `check_outcomes`.
    read: "all" tokens of the completion, the "final" one, the ends of "steps" and the
      final one, or the "ends" of steps before the final one.
    chat: put prompts into the chat template.
  """
  encoded = encode_rows(
    model.tokenizer,
    model.eos_ids,
    [(row.prompt, row.tokens) for row in outcomes],
    max_length=1 << 30,
    chat=chat,
  )
  check_ids([row.tokens for row in encoded], model, "outcome")
  if read == "all":
    return encoded
  out = []
  for row, outcome in zip(encoded, outcomes, strict=True):
    size, last = len(row.tokens), len(row.tokens) - 1
    ends = {size - len(outcome.tokens) + end for end in outcome.ends}
    at = {"final": {last}, "steps": ends | {last}, "ends": ends - {last}}[read]
    out.append(TokenRow(row.tokens, tuple(float(t in at) for t in range(size))))
  return out


def outcome_batches(
  rows: Sequence[TokenRow],
  label_N: np.ndarray,
  *,
  batch_size: int,
  seed: int,
  epoch: int,
  seen: Collection[int] = (),
  mesh: Mesh | None = None,
) -> Iterator[OutcomeBatch]:
  """One epoch: every row once, in the order and buckets of `training.data.batches`."""
  for length, members in grouped(
    [len(row.tokens) for row in rows],
    batch_size=batch_size,
    seed=seed,
    epoch=epoch,
    seen=seen,
  ):
    batch = collate([rows[i] for i in members], batch_size, length)
    label_B = np.zeros(batch_size, np.float32)
    label_B[: len(members)] = label_N[members]
    yield place(OutcomeBatch(batch.tokens, batch.mask, batch.weight, label_B), mesh)

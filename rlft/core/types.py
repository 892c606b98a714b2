"""What flows between the stages: one dataclass for each arrow of an RL iteration.

Shape letters: B rows (prompts x samples), T tokens (prompt bucket + completion).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Example:
  """One row of a task.

  Attributes:
    id: index of the row in its data set; it addresses the row's randomness, so it
      must not depend on how rows are batched.
    prompt: the text that the model continues.
    solution: the worked reference solution, the target of supervised fine-tuning.
    answer: the normalised final answer.
    columns: what else its row holds, by name: reward functions get it by keyword, as
      they get the fields of a subclass.
  """

  id: int
  prompt: str
  solution: str
  answer: str
  columns: Mapping[str, Any] = dataclasses.field(
    default_factory=dict, kw_only=True, hash=False
  )


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What a task says of one completion.

  Attributes:
    answer: the normalised answer that was found, None when there is none.
    correct: whether the answer is the reference's.
    consistent: whether every worked step is valid and leads to the answer; None when
      the task cannot tell. Correct but not consistent is a "lucky" solution.
    chain: the canonical sequence of operations; None when it cannot be read.
    judged: False where it could not be judged: no method trains on it, and an
      evaluation counts it as wrong, beside how many there are.
  """

  answer: str | None
  correct: bool
  consistent: bool | None = None
  chain: tuple[str, ...] | None = None
  judged: bool = True


@dataclasses.dataclass(frozen=True)
class Rollout:
  """Sampled completions with everything that training needs to know of them.

  The K samples of one prompt are adjacent rows: row = prompt * K + sample.

  Attributes:
    tokens: int32 [B, T], the left-padded prompt, then the completion with its EOS,
      then padding.
    mask: bool [B, T], True on real tokens; only the mask says what is padding.
    completion_mask: bool [B, T], True where the policy chose the token.
    logp: float32 [B, T], log-probability in nats of the token at t under the
      distribution it was sampled from (under temperature 1 where temperature is 0);
      0 off the completion.
    raw_logp: float32 [B, T], the same under temperature only, without filtering: what
      training compares with.
    finished: bool [B], True when the row ended by EOS or a stop string; False when it
      was cut by the length limit (truncated).
    prompt_lengths: int32 [B], real prompt tokens.
    lengths: int32 [B], real completion tokens (EOS included).
    prompt_ids: int32 [B], the data set index that addressed the row's noise.
    completions: the B texts, cut before a stop string, without special tokens; empty
      when the policy has no tokenizer.
    samples: K, completions per prompt.
  """

  tokens: np.ndarray
  mask: np.ndarray
  completion_mask: np.ndarray
  logp: np.ndarray
  raw_logp: np.ndarray
  finished: np.ndarray
  prompt_lengths: np.ndarray
  lengths: np.ndarray
  prompt_ids: np.ndarray
  completions: list[str]
  samples: int = 1
  stats: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Reward:
  """What the rewards of a rollout are; C is the completion region, T - prompt bucket.

  Attributes:
    value: float32 [B], the weighted sum, paid at the last chosen token; 0 where the row
      was not judged.
    judged: bool [B], False where no judgement could be made: such a row is in no
      baseline and in no loss, and is counted.
    step: float32 [B, C], rewards paid on the way (the ends of steps); None when there
      are none.
    each: for each reward function, by name, its own values before weighting, float32
      [B], NaN where it did not judge.
    seconds: wall clock of judging.
    counts: rows by what befell them, for the logs: "not_judged", "failed" (of those
      "timeouts" and "crashes"), "truncated".
  """

  value: np.ndarray
  judged: np.ndarray
  step: np.ndarray | None = None
  each: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  seconds: float = 0.0
  counts: dict[str, int] = dataclasses.field(default_factory=dict)

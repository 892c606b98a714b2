"""Rewards that a program can check.

Ready-made reward functions of the contract in `rewards.contract`: each maker returns a
`functools.partial` of a function of this module, which worker processes can import.
And the dense reward: what a worked step is worth, paid at the token that ends it.

Shape letters: B rows, C completion columns, T = prompt columns + C.
"""

from __future__ import annotations

import codecs
import functools
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from rlft.core import hosts
from rlft.core.errors import ConfigError, DataError, RewardError
from rlft.core.types import Example, Rollout, Verdict
from rlft.rewards import worker
from rlft.rewards.contract import (
  ComposedReward,
  Function,
  RewardConfig,
  RewardFunction,
  StepFunction,
  compose,
)
from rlft.rewards.pool import PoolConfig
from rlft.rewards.worker import name_of
from rlft.sampling.stops import token_bytes

if TYPE_CHECKING:
  import transformers
  from jax.sharding import Mesh

log = logging.getLogger(__name__)

Judge = Callable[[str, Example], Verdict]
# A task's worked steps: (offset after its last character, its result) of each.
Steps = Callable[[str], Sequence[tuple[int, str]]]


def title_of(judge: Judge) -> str:
  """What a report calls a judge: gsm8k.judge(check='strict')."""
  settled = judge.keywords if isinstance(judge, functools.partial) else {}
  module = getattr(getattr(judge, "func", judge), "__module__", None) or ""
  title = f"{module.rpartition('.')[2]}.{name_of(judge)}".lstrip(".")
  values = ", ".join(f"{name}={value!r}" for name, value in settled.items())
  return f"{title}({values})" if values else title


def judge_all(
  judge: Judge, completions: Sequence[str], examples: Sequence[Example]
) -> list[Verdict]:
  """Verdicts of B completions; B is a multiple of the number of examples.

  The samples of one prompt are adjacent, as in a `Rollout`. A judge that raises
  (`sys.exit` too), or gives no verdict, costs its row, which is then not judged.

  Raises:
    DataError: the numbers do not fit.
    RewardError: no row could be judged; names the judge and the first one's example.
  """
  if not examples or len(completions) % len(examples):
    raise DataError(
      f"{len(completions)} completions are not the same number for each of "
      f"{len(examples)} examples"
    )
  samples = len(completions) // len(examples)
  out, failed = [], []
  with worker.own_stops() as stopping:
    for i, text in enumerate(completions):
      example = examples[i // samples]
      try:
        verdict = judge(text, example)
        if not isinstance(verdict, Verdict):
          raise TypeError(
            f"gave {verdict!r:.200}: give an rlft.core.types.Verdict(answer, correct)"
          )
      except BaseException as error:
        if stopping:  # a Ctrl-C is for the run
          raise
        where = (
          f"sample {i % samples} of the example with id {example.id}: {text!r:.200}"
        )
        failed.append(f"{error!r:.400} on {where}")
        verdict = Verdict(None, False, judged=False)
      out.append(verdict)
  if failed:
    many = (
      f"the judge {name_of(judge)} failed on {len(failed)} of {len(out)} completions"
    )
    if len(failed) == len(out):
      raise RewardError(f"{many}, first with {failed[0]}")
    log.warning("%s, which are not judged; first with %s", many, failed[0])
  return out


def verdicts_of_all(verdicts: Sequence[Verdict], mesh: Mesh | None) -> list[Verdict]:
  """Of several processes: the verdicts of all of them, in the order of the rows."""
  if not hosts.several():
    return list(verdicts)
  plain = [
    [v.answer, bool(v.correct), v.consistent, v.chain, v.judged] for v in verdicts
  ]
  return [
    Verdict(
      answer, correct, consistent, None if chain is None else tuple(chain), judged
    )
    for part in hosts.each_part(plain, mesh)
    for answer, correct, consistent, chain, judged in part
  ]


def verdict_reward(
  verdict: Verdict, accept: Literal["final", "consistent"]
) -> float | None:
  """1 for a right answer, else 0 (arXiv 2403.04642, the sparse reward); None where it
  was not judged.

  Args:
    verdict: what the task says.
    accept: "final" asks for the answer only; "consistent" also for a valid chain of
      steps, where the task can tell (a verdict of None passes).
  """
  if accept not in ("final", "consistent"):
    raise ConfigError(f"accept={accept!r}: choose 'final' or 'consistent'")
  if not verdict.judged:
    return None
  if not verdict.correct:
    return 0.0
  return 0.0 if accept == "consistent" and verdict.consistent is False else 1.0


# ------------------------------------------------------------------ whole completions


def answer_reward(
  judge: Judge, accept: Literal["final", "consistent"] = "final"
) -> Function:
  """1 for a right answer, else 0, as a reward function.

  Args:
    judge: the task's, such as `gsm8k.judge`, or
      `functools.partial(gsm8k.judge, check="strict")`.
    accept: see `verdict_reward`.
  """
  verdict_reward(Verdict(None, False), accept)  # refuses an unknown one now
  return functools.partial(_answer, judge=judge, accept=accept)


def _answer(
  *, judge, accept, prompts, completions, id, answer, solution, finished=(),
  completion_ids=(), **columns,
):  # fmt: skip
  rows = [dict(zip(columns, row)) for row in zip(*columns.values())] or [{}] * len(id)
  return [
    verdict_reward(judge(text, Example(*own, columns=row)), accept)
    for text, row, *own in zip(completions, rows, id, prompts, solution, answer)
  ]


def format_reward(pattern: str) -> Function:
  """1 for a completion that matches a pattern from end to end, else 0.

  Args:
    pattern: a regular expression; "." matches line ends too. One that backtracks
      without end can hang: such rewards belong into a pool.
  """
  try:
    re.compile(pattern, re.DOTALL)
  except (re.error, TypeError) as error:
    raise ConfigError(f"format pattern {pattern!r}: {error}") from error
  return functools.partial(_format, pattern=pattern)


def _format(*, pattern, completions, **_):
  return [float(bool(re.fullmatch(pattern, t, re.DOTALL))) for t in completions]


def length_penalty(max_tokens: int, coef: float = 0.1, power: float = 5.0) -> Function:
  """Costs little until a completion is nearly as long as it may be.

  r = -coef * (tokens / max_tokens)^power

  Args:
    max_tokens: the longest completion.
    coef: what that one costs.
    power: 1 is proportional to the length.

  Source: Kirk et al. 2023, released environment: c 0.1, p 5.
  """
  if max_tokens < 1 or coef < 0 or power <= 0:
    raise ConfigError(
      f"length_penalty(max_tokens={max_tokens}, coef={coef}, power={power}): "
      "max_tokens at least 1, coef not negative, power positive"
    )
  return functools.partial(_length, max_tokens=max_tokens, coef=coef, power=power)


def _length(*, max_tokens, coef, power, completion_ids, **_):
  return [-coef * (len(ids) / max_tokens) ** power for ids in completion_ids]


def overlong_penalty(max_tokens: int, buffer: int) -> Function:
  """0 for short completions, falling to -1 over the last `buffer` tokens.

  r = 0                                        tokens <= max_tokens - buffer
      ((max_tokens - buffer) - tokens)/buffer  up to max_tokens
      -1                                       above

  Args:
    max_tokens: L_max.
    buffer: L_cache.

  Rows that the length limit cut learn it where they train: `mask_truncated=False` of
  GRPO, `truncated="score"` of PPO.

  Source: DAPO (arXiv 2503.14476) equation 13.
  """
  if not 0 < buffer <= max_tokens:
    raise ConfigError(
      f"overlong_penalty(max_tokens={max_tokens}, buffer={buffer}): the buffer is 1 to "
      "max_tokens"
    )
  return functools.partial(_overlong, max_tokens=max_tokens, buffer=buffer)


def _overlong(*, max_tokens, buffer, completion_ids, **_):
  over = [len(ids) - (max_tokens - buffer) for ids in completion_ids]
  return [-min(max(x / buffer, 0.0), 1.0) for x in over]


def make_reward(
  judge: Judge,
  accept: Literal["final", "consistent"] = "final",
  config: RewardConfig | None = None,
  *,
  extra: Sequence[RewardFunction | Function] = (),
  pool: PoolConfig | None = None,
  step: StepFunction | None = None,
) -> ComposedReward:
  """From a task to an algorithm's reward.

  `Reward.each` holds "correct" and "consistent" whatever is accepted; the difference of
  their means is the share of right answers by a wrong chain.

  Args:
    judge: the task's.
    accept: which of the two is the reward, with weight 1.
    config, pool, step: see `contract.compose`.
    extra: more reward functions.
  """
  if accept not in ("final", "consistent"):
    raise ConfigError(f"accept={accept!r}: choose 'final' or 'consistent'")
  functions = [
    RewardFunction(answer_reward(judge, kind), float(kind == accept), name)
    for kind, name in (("final", "correct"), ("consistent", "consistent"))
  ]
  return compose([*functions, *extra], config, pool=pool, step=step)


# ------------------------------------------------------------------ worked steps


def step_match(
  steps: Steps,
  tokenizer: transformers.PreTrainedTokenizerFast,
  weight: float | None = None,
) -> StepFunction:
  """The dense reward: worked steps that the reference takes as well.

  A step pays `weight` when its result is in the multiset of the reference solution's
  results and was not consumed by an earlier step; else 0. Only results are compared:
  another way to them pays the same, and so does a wrong one. What a rollout gains is at
  most weight times the reference's steps.

  Args:
    steps: the task's, such as `arithmetic.steps`.
    tokenizer: the policy's.
    weight: None is 1 / (steps of the row's reference), so that all of them pay 1. A row
      whose reference has no steps is paid nothing.

  Returns:
    A function (rollout, examples) -> float32 [B, C], to be the `step` of
    `contract.compose`.

  Source: the heuristic dense reward of Havrilla et al. 2024 (arXiv 2403.04642), which
  does not define it; the multiset and the default weight are ours.
  """
  if weight is not None and not math.isfinite(weight):
    raise ConfigError(f"step weight {weight}: give a number, or None")

  def reward(rollout: Rollout, examples: Sequence[Example]) -> np.ndarray:
    references = [Counter(value for _, value in steps(e.solution)) for e in examples]
    paid_BC = np.zeros(_chosen(rollout).shape, np.float32)
    for row, found in enumerate(_ended(rollout, tokenizer, steps)):
      left = references[row // rollout.samples].copy()
      one = 1 / max(1, left.total()) if weight is None else weight
      for column, value in found:
        if left[value] > 0:
          left[value] -= 1
          paid_BC[row, column] += one
    return paid_BC

  return reward


def step_ends(
  rollout: Rollout, tokenizer: transformers.PreTrainedTokenizerFast, steps: Steps
) -> np.ndarray:
  """Where the worked steps of completions end.

  A step ends with the token that holds its last byte, whatever else the token holds.
  No step ends at a token that was forced, nor with the last character of a completion
  that was cut: its number may go on. A completion without steps has no ends.

  Args:
    rollout: B completions.
    tokenizer: the policy's.
    steps: the task's.

  Returns:
    bool [B, C].

  Raises:
    DataError: the texts are not what the tokenizer makes of the tokens.
  """
  ends_BC = np.zeros(_chosen(rollout).shape, bool)
  for row, found in enumerate(_ended(rollout, tokenizer, steps)):
    ends_BC[row, [column for column, _ in found]] = True
  return ends_BC


def _chosen(rollout: Rollout) -> np.ndarray:
  """The completion mask's completion region, bool [B, C]."""
  if len(rollout.completions) != len(rollout.tokens) or not len(rollout.tokens):
    raise DataError(
      f"{len(rollout.completions)} texts of {len(rollout.tokens)} rows: steps are read "
      "from texts, which need a policy with a tokenizer"
    )
  start = int(np.argmax(rollout.mask[0])) + int(rollout.prompt_lengths[0])
  return rollout.completion_mask[:, start:]


def _ended(rollout, tokenizer, steps) -> Iterator[list[tuple[int, str]]]:
  """(column, result) of the steps of each row, in order."""
  pieces = token_bytes(tokenizer)
  chosen_BC = _chosen(rollout)
  tokens_BC = rollout.tokens[:, rollout.tokens.shape[1] - chosen_BC.shape[1] :]
  for row, text in enumerate(rollout.completions):
    ids = tokens_BC[row, : rollout.lengths[row]].tolist()
    row_pieces = [pieces[i] if i < len(pieces) else b"" for i in ids]
    data = b"".join(row_pieces)
    whole = data.decode("utf-8", "replace")
    if not whole.startswith(text):
      # Stop strings are cut off between forced tokens too: then the tokens' own text
      # is read. Without forced tokens, the texts are another tokenizer's.
      if chosen_BC[row, : len(ids)].all():
        raise DataError(
          f"row {row} (prompt {rollout.prompt_ids[row]}): the text {text!r:.80} is not "
          f"that of its tokens, {whole!r:.80}: give the tokenizer that sampled it"
        )
      text = whole
    cut = not rollout.finished[row]
    found = [
      (end, value) for end, value in steps(text) if not (cut and end >= len(whole))
    ]
    byte_of = _byte_offsets(data)
    ends = np.cumsum([len(piece) for piece in row_pieces])
    at = [
      (int(np.searchsorted(ends, byte_of(end))), value) for end, value in found if end
    ]
    yield [(column, value) for column, value in at if chosen_BC[row, column]]


def _byte_offsets(data: bytes) -> Callable[[int], int]:
  """From offsets in the text, where what is not UTF-8 is U+FFFD, to those in bytes."""
  try:
    text = data.decode()
  except UnicodeDecodeError:
    # U+FFFD may stand for one byte or for several: only the decoder knows.
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    read = np.cumsum([len(decoder.decode(data[i : i + 1])) for i in range(len(data))])
    return lambda end: int(np.searchsorted(read, end)) + 1
  if len(text) == len(data):
    return lambda end: end
  return lambda end: len(text[:end].encode())

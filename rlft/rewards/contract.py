"""The contract of reward functions, and what several of them give for a rollout.

A reward function is `f(*, prompts, completions, completion_ids, **columns)`, sync or
async, and returns a number, or None, for each completion. None means "could not be
judged": it is never the same as 0. The columns are lists of the same length: the
example's `id`, `answer` and `solution`, `finished`, False where the length limit cut
the completion, and by name the example's `columns` and the fields of its subclass. A
function without `**columns` is given what it names.

    value = rule(clip(sum_i w_i f_i))

where the rule is the one for completions that did not end. An algorithm subtracts its
baseline from this value, so scores are clipped before any baseline.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal

import numpy as np

from rlft.core.errors import ConfigError, DataError, RewardError
from rlft.core.types import Example, Reward, Rollout
from rlft.rewards import worker
from rlft.rewards.pool import (
  Failure,
  Outcome,
  PoolConfig,
  RewardPool,
  read_answer,
  retry,
)
from rlft.rewards.worker import name_of

log = logging.getLogger(__name__)

Function = Callable[..., Sequence[float | None]]
StepFunction = Callable[[Rollout, Sequence[Example]], np.ndarray]
_SHOWN = 2000  # characters of a transcript in an error


@dataclasses.dataclass(frozen=True)
class RewardFunction:
  """One of the functions that make a reward.

  Attributes:
    function: of the contract above.
    weight: its share of the value. With 0 it is logged only, and what it cannot judge
      is judged all the same.
    name: in the logs; by default the function's own.
  """

  function: Function
  weight: float = 1.0
  name: str = ""

  def __post_init__(self):
    if not callable(self.function):
      raise ConfigError(f"{self.function!r} is not a reward function: give a callable")
    if not math.isfinite(self.weight):
      raise ConfigError(f"the weight of {self.title} is {self.weight}: give a number")

  @property
  def title(self) -> str:
    return self.name or name_of(self.function).lstrip("_")


@dataclasses.dataclass(frozen=True)
class RewardConfig:
  """How the values of reward functions become the reward of a row.

  Attributes:
    missing_eos: of a completion that the length limit cut: "score" takes its score as
      it is, "penalty" subtracts `missing_eos_value` from it, "replace" puts
      `missing_eos_value` in its place, "mask" counts the row as not judged. What its
      steps were paid stays, except with "mask".
    missing_eos_value: see above; None where it has no use.
    score_clip: what a row is paid, the weighted sum and its steps together, is clipped
      to [-score_clip, score_clip] before the rule above: score and steps shrink by one
      factor. None does not clip.
    max_failures: share of a rollout's rows that may fail (the function raises, hangs or
      dies) and be masked, rounded up to whole rows; above it the run stops. 0 stops at
      the first.
    bad_values: what is no finite number, or a wrong count of values: "mask" counts it
      among the failures; "raise" stops the run.
    max_failed_rollouts: after so many rollouts in a row of which every row failed the
      run stops: it would train on nothing.
  """

  missing_eos: Literal["score", "penalty", "replace", "mask"] = "score"
  missing_eos_value: float | None = None
  score_clip: float | None = None
  max_failures: float = 1.0
  bad_values: Literal["raise", "mask"] = "mask"
  max_failed_rollouts: int = 3

  def __post_init__(self):
    for name, legal in (
      ("missing_eos", ("score", "penalty", "replace", "mask")),
      ("bad_values", ("raise", "mask")),
    ):
      if getattr(self, name) not in legal:
        raise ConfigError(f"{name}={getattr(self, name)!r}: choose one of {legal}")
    value = self.missing_eos_value
    if self.missing_eos in ("score", "mask"):
      if value is not None:
        raise ConfigError(
          f"missing_eos_value={value} has no use with missing_eos={self.missing_eos!r}"
        )
    elif value is None or not math.isfinite(value):
      raise ConfigError(
        f"missing_eos={self.missing_eos!r} needs missing_eos_value, a number"
      )
    elif self.missing_eos == "penalty" and value < 0:
      raise ConfigError(
        f"missing_eos_value={value}: a penalty is subtracted, so it is not negative"
      )
    if self.score_clip is not None and not 0 < self.score_clip < math.inf:
      raise ConfigError(f"score_clip={self.score_clip}: a positive number, or None")
    if not 0 <= self.max_failures <= 1:
      raise ConfigError(f"max_failures={self.max_failures}: a share, 0 to 1")
    if self.max_failed_rollouts < 1:
      raise ConfigError(f"max_failed_rollouts={self.max_failed_rollouts}: at least 1")


def columns_of(rollout: Rollout, examples: Sequence[Example]) -> dict[str, list]:
  """What reward functions get, by keyword: lists of B.

  Raises:
    DataError: the rollout is not the same number of samples of each example, in order.
  """
  rows, samples = len(rollout.completions), rollout.samples
  if not examples or rows != len(examples) * samples or len(rollout.tokens) != rows:
    raise DataError(
      f"a rollout with {len(rollout.tokens)} rows, {rows} texts and {samples} samples "
      f"of a prompt does not fit {len(examples)} examples"
    )
  ids = [example.id for example in examples for _ in range(samples)]
  if list(rollout.prompt_ids) != ids:
    raise DataError(
      f"the rollout's prompt_ids {list(rollout.prompt_ids)[:8]} are not those of the "
      f"examples, {ids[:8]}: give the examples that were sampled, in their order"
    )
  each = [example for example in examples for _ in range(samples)]
  return further_columns(each) | {
    "prompts": [e.prompt for e in each],
    "completions": list(rollout.completions),
    "completion_ids": [
      row[chosen].tolist()
      for row, chosen in zip(rollout.tokens, rollout.completion_mask)
    ],
    "id": ids,
    "answer": [e.answer for e in each],
    "solution": [e.solution for e in each],
    "finished": [bool(x) for x in rollout.finished],
  }


OWN = (
  "prompts", "completions", "completion_ids", "id", "answer", "solution", "finished",
)  # fmt: skip


def further_columns(examples: Sequence[Example]) -> dict[str, list]:
  """The columns of examples that not every example has: `Example.columns`, and the
  fields of a subclass; None where a row lacks one that others have.

  Raises:
    DataError: a name is one of the contract's own.
  """
  plain = {field.name for field in dataclasses.fields(Example)}

  @functools.cache
  def fields(kind: type) -> list[str]:
    return [f.name for f in dataclasses.fields(kind) if f.name not in plain]

  rows = [
    {**e.columns, **{name: getattr(e, name) for name in fields(type(e))}}
    for e in examples
  ]
  names = list(dict.fromkeys(name for row in rows for name in row))
  if taken := [name for name in names if name in OWN]:
    raise DataError(
      f"the examples have columns {taken}, which reward functions get from elsewhere: "
      "give them other names"
    )
  return {name: [row.get(name) for row in rows] for name in names}


def check_columns(functions: Sequence[RewardFunction], names: Collection[str]) -> None:
  """Raises `DataError` where a function needs what is no column; names those there are.

  Args:
    functions: of a reward.
    names: of the columns.
  """
  for function in functions:
    needed, _ = worker.parameters(function.function)
    if missing := [name for name in needed if name not in names]:
      raise DataError(
        f"the reward function {function.title} needs {', '.join(missing)}, and the "
        f"columns are {', '.join(names)}: name its arguments after columns, give them "
        "defaults, or add to `Example.columns`"
      )


def call_reward(
  function: Function, rollout: Rollout, examples: Sequence[Example]
) -> list[float | None]:
  """Calls one reward function in this process; whatever fails is an error.

  Returns:
    B finite numbers, or None where the function could not judge.

  Raises:
    RewardError: it raised, or gave something that is neither a finite number nor None,
      or another number of values; names the function and the example.
  """
  columns = columns_of(rollout, examples)
  check_columns([RewardFunction(function)], columns)
  (outcomes,) = _judge_here([function], columns, 0)
  strict = RewardConfig(max_failures=0, bad_values="raise")
  _check([name_of(function)], [outcomes], columns, rollout.samples, strict)
  return outcomes


class ComposedReward:
  """Reward functions, with weights, as an algorithm's reward; `compose` makes it.

  Called with a rollout and its examples it gives their `Reward`. `submit` starts the
  judging and returns a function that waits for it. With a pool the processes work
  meanwhile; `close`, or a `with` block, ends them.
  """

  def __init__(
    self,
    functions: Sequence[RewardFunction],
    config: RewardConfig,
    pool: PoolConfig | None,
    step: StepFunction | None,
  ):
    self.functions = tuple(functions)
    self.config = config
    self.step = step
    self._names = [f.title for f in functions]
    self._failed_rollouts = 0  # in a row
    self.pool = RewardPool([f.function for f in functions], pool) if pool else None

  def __call__(self, rollout: Rollout, examples: Sequence[Example]) -> Reward:
    return self.submit(rollout, examples)()

  def submit(
    self, rollout: Rollout, examples: Sequence[Example]
  ) -> Callable[[], Reward]:
    """Starts to judge; the function that it returns waits for the `Reward`.

    Without a pool, judging is done in that function: call it after the device was
    given its work.
    """
    columns = columns_of(rollout, examples)
    check_columns(self.functions, columns)
    if self.pool:
      _check_json(columns)
    most = math.ceil(self.config.max_failures * len(columns["id"]))
    judging = self.pool.submit(columns, most) if self.pool else None
    return functools.partial(self._finish, rollout, examples, columns, most, judging)

  def _finish(self, rollout, examples, columns, most, judging) -> Reward:
    began = time.perf_counter()
    if judging is None:
      each = _judge_here([f.function for f in self.functions], columns, most)
    else:
      each = judging.result()
    failure = _check(self._names, each, columns, rollout.samples, self.config)
    self._check_alive(each, failure)
    step_BC = None if self.step is None else self.step(rollout, examples)
    seconds = time.perf_counter() - began if judging is None else judging.seconds
    return self._combine(rollout, each, step_BC, seconds)

  def _check_alive(self, each, failure: RewardError | None) -> None:
    """Raises where rollout after rollout has failed as a whole."""
    weighted = [x for x, function in zip(each, self.functions) if function.weight]
    if not all(any(isinstance(x, Failure) for x in row) for row in zip(*weighted)):
      self._failed_rollouts = 0
    elif weighted:
      self._failed_rollouts += 1
    if self._failed_rollouts >= self.config.max_failed_rollouts:
      raise RewardError(
        f"no row of {self._failed_rollouts} rollouts in a row could be judged "
        f"(max_failed_rollouts): {failure}"
      ) from failure.__cause__

  def _combine(self, rollout, each, step_BC, seconds) -> Reward:
    finished_B = np.asarray(rollout.finished, bool)
    total_B = np.zeros(finished_B.shape, np.float64)
    judged_B = np.ones(finished_B.shape, bool)
    logged = {}
    for function, outcomes in zip(self.functions, each):
      known = [isinstance(x, float) for x in outcomes]
      value_B = np.array([x if k else np.nan for x, k in zip(outcomes, known)])
      logged[function.title] = value_B.astype(np.float32)
      if function.weight:
        judged_B &= known
        total_B += function.weight * np.where(known, value_B, 0.0)
    total_B, step_BC, judged_B = settle(
      total_B, step_BC, judged_B, finished_B, self.config
    )
    if (large_B := np.abs(total_B) > worker.MAX_FLOAT32).any():
      row = int(np.argmax(large_B))
      what = (
        f"the weighted sum of the rewards of the example with id "
        f"{rollout.prompt_ids[row]} is {total_B[row]:g}, no finite float32: use "
        "smaller weights, or score_clip"
      )
      if self.config.bad_values == "raise":
        raise RewardError(what)
      log.warning("%s; %d rows are not judged", what, large_B.sum())
      total_B, judged_B = np.where(large_B, 0.0, total_B), judged_B & ~large_B
    if step_BC is not None:
      step_BC = np.where(judged_B[:, None], step_BC, np.float32(0))
      logged["steps"] = step_BC.sum(1)
    return Reward(
      value=total_B.astype(np.float32),
      judged=judged_B,
      step=step_BC,
      each=logged,
      seconds=seconds,
      counts=_counts(each, judged_B, finished_B),
    )

  def close(self) -> None:
    """Ends the worker processes."""
    if self.pool:
      self.pool.close()

  def __enter__(self) -> ComposedReward:
    return self

  def __exit__(self, *error: object) -> None:
    self.close()


def settle(
  total_B: np.ndarray,
  step_BC: np.ndarray | None,
  judged_B: np.ndarray,
  finished_B: np.ndarray,
  config: RewardConfig,
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
  """Clips what rows are paid, then applies the rule for completions that did not end.

  Args:
    total_B: float [B], scores.
    step_BC: float [B, C], what is paid on the way; None is nothing.
    judged_B: bool [B], rows that have one.
    finished_B: bool [B], False where the length limit cut the completion.
    config: `score_clip` and `missing_eos`.

  Returns:
    (value [B], 0 where not judged; steps; judged [B]).
  """
  if config.score_clip is not None and step_BC is None:
    total_B = np.clip(total_B, -config.score_clip, config.score_clip)
  elif config.score_clip is not None:
    paid_B = np.abs(total_B + step_BC.sum(1))
    part_B = config.score_clip / np.maximum(paid_B, config.score_clip)
    total_B, step_BC = total_B * part_B, step_BC * part_B[:, None].astype(np.float32)
  if config.missing_eos == "penalty":
    total_B = total_B - np.where(finished_B, 0.0, config.missing_eos_value)
  elif config.missing_eos == "replace":
    total_B = np.where(finished_B, total_B, config.missing_eos_value)
  elif config.missing_eos == "mask":
    judged_B = judged_B & finished_B
  return np.where(judged_B, total_B, 0.0), step_BC, judged_B


def compose(
  functions: Sequence[RewardFunction | Function],
  config: RewardConfig | None = None,
  *,
  pool: PoolConfig | None = None,
  step: StepFunction | None = None,
) -> ComposedReward:
  """One reward of an algorithm out of several functions.

  Args:
    functions: each with a weight, or bare, with weight 1.
    config: clipping, completions without an end, failures.
    pool: judge in worker processes. Without one, functions run in this process: quick
      to start, but nothing can end a call that hangs.
    step: gives float32 [B, C], what is paid at the tokens on the way, such as
      `verifiable.step_match`; in this process.

  Returns:
    A callable of (rollout, examples): a `Reward` with

    - value: the weighted sum, clipped, after the missing-EOS rule;
    - judged: False where any function with a weight gave None or failed;
    - each: the values of every function by name, NaN where it gave none, and "steps",
      what `step` pays a row in all;
    - counts: see `Reward`.

    It raises `RewardError` when more fails than `config` allows, with the first
    failure's traceback and transcript.
  """
  given = [f if isinstance(f, RewardFunction) else RewardFunction(f) for f in functions]
  names = [f.title for f in given] + ["steps"] * (step is not None)
  if not given:
    raise ConfigError("no reward function: give at least one")
  for name in names:
    if names.count(name) > 1:
      raise ConfigError(
        f"two reward functions are called {name!r}: give RewardFunction a name"
      )
  if not any(f.weight for f in given) and step is None:
    raise ConfigError("all reward functions have weight 0: nothing would be rewarded")
  return ComposedReward(given, config or RewardConfig(), pool, step)


# ------------------------------------------------------------------ failures


def _judge_here(
  functions: Sequence[Function], columns: dict[str, list], most: int
) -> list[list[Outcome]]:
  """The outcomes of every function, in this process; see `Judging.result`."""
  rows = len(columns["completions"])
  every = []
  failed: set[int] = set()
  for function in functions:
    outcomes = read_answer(worker.call(function, _part(columns, 0, rows)), rows)
    if rows > 1 and isinstance(outcomes[0], Failure) and retry(outcomes[0]):
      for row in range(rows):
        if len(failed) > most:  # the run stops: no need to try the others
          outcomes[row] = Failure("dropped", "was dropped")
          continue
        one = worker.call(function, _part(columns, row, row + 1))
        (outcomes[row],) = read_answer(one, 1)
        if isinstance(outcomes[row], Failure):
          failed.add(row)
    failed |= {row for row, x in enumerate(outcomes) if isinstance(x, Failure)}
    every.append(outcomes)
    if len(failed) > most:
      every += [[Failure("dropped", "was dropped")] * rows] * (
        len(functions) - len(every)
      )
      break
  return every


def _part(columns: dict[str, list], first: int, end: int) -> dict[str, list]:
  """Rows as lists of their own: a function may change what it is given."""
  part = {name: values[first:end] for name, values in columns.items()}
  part["completion_ids"] = [list(ids) for ids in part["completion_ids"]]
  return part


def _check(
  names: Sequence[str],
  each: Sequence[Sequence[Outcome]],
  columns: dict[str, list],
  samples: int,
  config: RewardConfig,
) -> RewardError | None:
  """Stops the run when more has failed than may; logs what has, and returns it."""
  found = [
    (row, name, outcome)
    for name, outcomes in zip(names, each)
    for row, outcome in enumerate(outcomes)
    if isinstance(outcome, Failure) and outcome.kind != "dropped"
  ]
  if not found:
    return None
  rows = len(columns["id"])
  failed = len({row for row, _, _ in found})
  most = math.ceil(config.max_failures * rows)
  defects = [f for f in found if f[2].kind in ("value", "count")]
  stop = config.bad_values == "raise" and defects
  row, name, failure = defects[0] if stop else found[0]
  what = (
    f"the reward function {name} {failure.message} on sample {row % samples} of the "
    f"example with id {columns['id'][row]}"
  )
  passes = not stop and failed <= most
  if passes:
    log.warning("%d of %d rows could not be judged; the first: %s", failed, rows, what)
  elif not stop:
    what += f"; {failed} of {rows} rows failed, and {most} may (max_failures)"
  error = RewardError(
    f"{what}\n--- prompt\n{columns['prompts'][row][-_SHOWN:]}\n--- completion\n"
    f"{columns['completions'][row][:_SHOWN]}\n---\n{failure.traceback}"
  )
  error.__cause__ = failure.error
  if passes:
    return error
  raise error


def _check_json(columns: Mapping[str, list]) -> None:
  """Raises `DataError` where a column cannot go to a worker process."""
  for name in columns.keys() - set(OWN):
    try:
      json.dumps(columns[name])
    except (TypeError, ValueError, RecursionError) as error:
      raise DataError(
        f"the column {name!r} cannot go to a worker process: {error}; leave it out, "
        "make it text, numbers and lists of them, or judge without the pool"
      ) from error


def _counts(each, judged_B, finished_B) -> dict[str, int]:
  """Rows by what befell them."""

  def rows(*kinds: str) -> int:
    hit = [
      [isinstance(x, Failure) and (not kinds or x.kind in kinds) for x in outcomes]
      for outcomes in each
    ]
    return int(np.any(hit, axis=0).sum())

  return {
    "not_judged": int((~judged_B).sum()),
    "failed": rows(),
    "timeouts": rows("timeout"),
    "crashes": rows("crash"),
    "truncated": int((~finished_B).sum()),
  }

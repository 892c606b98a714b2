"""Return-conditioned RL: learn from good and bad solutions alike, ask for good ones.

  for each sampled solution, each prefix P_i = (S_1 .. S_i):
    l_i = GOOD if value(P_i) >= threshold else BAD
  train cross-entropy on  Q [l_1] S_1 [l_2] S_2 ...   with loss on the S_i only
  sample with [GOOD] before every step

where value(P_i) is the outcome of the whole solution, an outcome model's probability
(ORM), or the mean or any of the outcomes of K continuations that are sampled from P_i.
With labels per solution there is one label, before the first step.

Source: Havrilla et al. 2024 (arXiv 2403.04642), section 3. Offline: one sampling, one
training. A step is what the policy wrote up to a mark (a string such as a line end) and
the mark: the label stands after the token that completes the mark, in training and in
sampling, so that the policy learns to end a step before it is told how good the next
one is to be. Solutions that the length limit cut are left out, and counted.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from rlft.algorithms import sft
from rlft.core import rng
from rlft.core.errors import ConfigError, DataError
from rlft.core.rng import Purpose, check_seed
from rlft.core.types import Example, Rollout
from rlft.models.hub import Policy
from rlft.models.tokens import add_tokens
from rlft.rewards.forms import judge_and_reward, verdicts_by
from rlft.rewards.verifiable import judge_all, verdict_reward
from rlft.sampling.conditioned import BAD, GOOD, generate_conditioned, label_id
from rlft.sampling.generate import generate
from rlft.sampling.stops import compile_stops, decode_completion
from rlft.tasks.prompts import Prompts, as_examples, opened
from rlft.training import prompt_set, rollouts
from rlft.training.data import (
  TokenRow,
  encode_prompts,
  encode_rows,
)
from rlft.training.optimizer import matches
from rlft.training.progress import OnEvent, listener
from rlft.training.rollouts import usable
from rlft.training.saving import Saving

log = logging.getLogger(__name__)

# Rows of ids to the value of every prefix of each: p(right | row[: t + 1]) at t, NaN
# where it cannot tell. Of an outcome model: `rewards.learned.row_values` through
# `rewards.learned.probability`.
ORM = Callable[[Sequence[Sequence[int]]], Sequence[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class RCRLConfig:
  """Return-conditioned RL.

  Attributes:
    train: how the conditioned policy is trained.
    labels: one for each "solution", or one before each "step".
    value: what a label is made of: "outcome", "orm", or "rollouts" (continuations;
      labels per step only).
    threshold: the value from which a label is GOOD.
    accept: of outcomes: "consistent" asks for a right answer and a valid chain of
      steps where the task can tell; "final" for the answer alone. Ignored with a
      reward of your own.
    marks: strings that end a step, of labels per step.
    continuations: K, sampled from every prefix for "rollouts".
    estimate: of continuations: "mean" of the outcomes, or "any" (their maximum).
    good_per_bad: GOOD solutions for each BAD one (with labels per step, GOOD is one
      whose labels all are), reached by leaving out some of the others; 0 keeps all.
    mix_sft: whether the SFT rows are in the data, as GOOD; they come on top of
      `good_per_bad`.
    samples_per_prompt, temperature, max_new_tokens, stop, few_shot, max_rows: of
      sampling, as in Expert Iteration.
    seed: of sampling, of the new tokens' rows and of the row order.
  """

  train: sft.SFTConfig = dataclasses.field(default_factory=sft.SFTConfig)
  labels: Literal["solution", "step"] = "solution"
  value: Literal["outcome", "orm", "rollouts"] = "outcome"
  threshold: float = 0.5
  accept: Literal["consistent", "final"] = "consistent"
  marks: tuple[str, ...] = ("\n",)
  continuations: int = 4
  estimate: Literal["mean", "any"] = "mean"
  good_per_bad: float = 0.0
  mix_sft: bool = True
  samples_per_prompt: int = 16
  temperature: float = 1.0
  max_new_tokens: int = 256
  stop: tuple[str, ...] = ()
  few_shot: str = ""
  seed: int = 0
  max_rows: int = 128

  def __post_init__(self):
    for name in ("continuations", "samples_per_prompt", "max_new_tokens", "max_rows"):
      if getattr(self, name) < 1:
        raise ConfigError(f"{name}={getattr(self, name)}: at least 1")
    for name, legal in (
      ("labels", ("solution", "step")),
      ("value", ("outcome", "orm", "rollouts")),
      ("accept", ("consistent", "final")),
      ("estimate", ("mean", "any")),
    ):
      if getattr(self, name) not in legal:
        raise ConfigError(f"{name}={getattr(self, name)!r}: choose one of {legal}")
    if not self.temperature > 0:
      raise ConfigError(
        f"temperature={self.temperature}: samples must differ, so it must be positive"
      )
    if not math.isfinite(self.threshold):
      raise ConfigError(f"threshold={self.threshold}: give a number")
    if not 0 <= self.good_per_bad < math.inf:
      raise ConfigError(f"good_per_bad={self.good_per_bad}: 0 (all) or positive")
    if self.labels == "step" and not self.marks:
      raise ConfigError("labels='step' needs marks, the strings that end a step")
    if self.labels == "solution" and self.value == "rollouts":
      raise ConfigError(
        "value='rollouts' needs labels='step': a whole solution is not continued"
      )
    if self.few_shot and self.train.chat:
      raise ConfigError("few_shot is for base models, chat for chat models: choose one")
    if self.train.loss_on != "completion":
      raise ConfigError("train.loss_on must be 'completion': loss is on steps only")
    if matches({"embedding": 0}, self.train.optimizer.freeze)["embedding"]:
      raise ConfigError(
        f"freeze={self.train.optimizer.freeze} holds the embedding: the control tokens "
        "could not be learned"
      )
    check_seed(self.seed)


@dataclasses.dataclass(frozen=True)
class Labelled:
  """A solution with its labels.

  Attributes:
    prompt_id: the example's id.
    text: the completion.
    prompt, tokens: ids of the prompt and of the completion, without control tokens.
    ends: for each label, where its step ends in `tokens`.
    values: for each label, what it was made of.
    labels: True is GOOD.
  """

  prompt_id: int
  text: str
  prompt: tuple[int, ...]
  tokens: tuple[int, ...]
  ends: tuple[int, ...]
  values: tuple[float, ...]
  labels: tuple[bool, ...]


@dataclasses.dataclass
class RCRLResult:
  """What return-conditioned RL gave.

  Attributes:
    policy: conditioned; it knows GOOD and BAD. Sample it with `sampler`.
    stats: counts and shares of what was sampled, labelled and trained on.
    solutions: the labelled data set, without the SFT rows.
    sampled_solutions: completions sampled for training, continuations included.
    update_tokens: tokens in the losses.
    seconds: wall clock.
  """

  policy: Policy
  stats: dict[str, Any]
  solutions: list[Labelled]
  sampled_solutions: int
  update_tokens: int
  seconds: float


# ------------------------------------------------------------------ sampling


def sampler(config: RCRLConfig, label: str = GOOD) -> Callable[..., Rollout]:
  """How a policy trained so is sampled; `probes.evaluate` takes it as its sampler."""
  marks = config.marks if config.labels == "step" else ()
  return functools.partial(generate_conditioned, label=label, marks=marks)


# ------------------------------------------------------------------ data


def step_ends(policy: Policy, tokens: Sequence[int], marks: Sequence[str]) -> list[int]:
  """Where the steps of a completion end: after each token that completes a mark.

  It reads what the sampler's automaton reads, so that labels stand where sampling will
  put them. The last step ends with the completion.
  """
  table = compile_stops(marks, policy.tokenizer, policy.config.vocab_size)
  ends, state = [], 0
  for i, token in enumerate(tokens, 1):
    state = int(table.next_state[state, token])
    if state == table.terminal:
      ends.append(i)
      state = 0
  return ends if ends and ends[-1] == len(tokens) else [*ends, len(tokens)]


def labelled_row(solution: Labelled, good: int, bad: int) -> TokenRow:
  """Q [l_1] S_1 [l_2] S_2 ..., with weight 1 on the steps only."""
  tokens, weight = list(solution.prompt), [0.0] * len(solution.prompt)
  start = 0
  for end, label in zip(solution.ends, solution.labels):
    tokens += [good if label else bad, *solution.tokens[start:end]]
    weight += [0.0] + [1.0] * (end - start)
    start = end
  return TokenRow(tuple(tokens), tuple(weight))


def balance(
  solutions: Sequence[Labelled], good_per_bad: float, seed: int
) -> list[Labelled]:
  """Leaves out solutions at random until there are so many GOOD for each BAD one.

  A solution counts as GOOD when all its labels are. At least one of each kind that is
  there is kept; the order stays.
  """
  good = [i for i, s in enumerate(solutions) if all(s.labels)]
  bad = [i for i, s in enumerate(solutions) if not all(s.labels)]
  if not good_per_bad or not good or not bad:
    return list(solutions)
  most_good = max(1, round(len(bad) * good_per_bad))
  most_bad = max(1, round(len(good) / good_per_bad))
  noise = rng.numpy(seed, rng.Stream.BALANCE)
  keep = set()
  for members, most in ((good, most_good), (bad, most_bad)):
    keep |= set(noise.permutation(members)[:most].tolist())
  return [s for i, s in enumerate(solutions) if i in keep]


# ------------------------------------------------------------------ the run


def run(
  policy: Policy,
  examples: Prompts,
  judge: Any = None,
  config: RCRLConfig | None = None,
  *,
  base: Policy | None = None,
  sft_rows: Sequence[tuple[str, str]] = (),
  reward: Any = None,
  orm: ORM | None = None,
  on_event: OnEvent = None,
  saving: Saving | None = None,
  labels: Saving | None = None,
) -> RCRLResult:
  """Samples, labels and trains.

  Args:
    policy: samples the data, without labels (the paper: the best policy of EI).
    examples: the training prompts, see `tasks.prompts`.
    judge: the task's; or a reward in any form (see `rewards.forms`): then "correct" is
      what reaches the threshold.
    config: see `RCRLConfig`.
    base: the checkpoint that is trained, of the same vocabulary; `policy` when None.
    sft_rows: (prompt, solution) texts, GOOD ones; see `config.mix_sft`.
    reward: what an outcome is worth, in any form, beside a judge; by default 1 for what
      `config.accept` accepts, else 0. What it cannot judge is left out, and counted.
    orm: of `value="orm"`.
    on_event: called with ("sample" | "continue" | "train" | "round", values) for
      progress.
    saving, labels: save the training and, in another directory, the labelled solutions;
      and go on with what they have saved.

  Returns:
    `RCRLResult`.

  Raises:
    ConfigError, DataError: before any device work; and `DataError` when nothing can be
      labelled, nothing is GOOD, or no solution has a mark.
    RewardError: the reward or the judge failed on every row that was sampled.
    StoppedError: the run was asked to stop, and what it has done is saved.
  """
  config, examples = config or RCRLConfig(), as_examples(examples)
  if not examples:
    raise DataError("no training prompts")
  judge, reward = judge_and_reward(judge, reward, examples)
  if len({e.id for e in examples}) != len(examples):
    raise DataError("two training prompts have the same id: their noise would be equal")
  if (config.value == "orm") != (orm is not None):
    raise ConfigError(f"value={config.value!r}, and orm is {orm}: give both or none")
  base = base or policy
  for start in (policy, base):
    sft.check(start, config.train)
  if base.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
    raise ConfigError("base has another vocabulary than the policy that samples for it")
  began = time.perf_counter()
  tell = listener(on_event, 1)
  examples = usable(
    policy, examples, config.max_new_tokens, config.train.chat, config.few_shot
  )
  prompts = encode_prompts(
    policy.tokenizer, opened(examples, config.few_shot), config.train.chat
  )

  def sample(kind, prompts, ids, samples, max_new_tokens, step):
    return generate(
      policy,
      prompts,
      samples=samples,
      max_new_tokens=max_new_tokens,
      temperature=config.temperature,
      stop=config.stop,
      seed=config.seed,
      step=step,
      prompt_ids=ids,
      purpose=Purpose.ROLLOUT,
      max_rows=config.max_rows,
      on_progress=lambda done, of: tell(kind, {"done": done, "of": of}),
    )

  def outcomes(rollout, examples, verdicts=None) -> list[float]:
    if reward is None:
      verdicts = verdicts or judge_all(judge, rollout.completions, examples)
      given = [verdict_reward(v, config.accept) for v in verdicts]
    else:
      given = rollouts.values(reward(rollout, examples), rollout)
    return [math.nan if x is None else x for x in given]

  split = functools.partial(_split, base, config)

  def labelled() -> tuple[list[Labelled], dict[str, Any]]:
    ids = [e.id for e in examples]
    count = config.samples_per_prompt
    rollout = sample("sample", prompts, ids, count, config.max_new_tokens, 1)
    if judge is None:
      outcome = outcomes(rollout, examples)
      known = [None if math.isnan(x) else x for x in outcome]
      verdicts = verdicts_by(known, config.threshold)
    else:
      verdicts = judge_all(judge, rollout.completions, examples)
      outcome = outcomes(rollout, examples, verdicts)
    stats = _sample_stats(rollout, verdicts)
    kept = [
      i
      for i, text in enumerate(rollout.completions)
      if rollout.finished[i] and text.strip()
    ]
    if not kept:
      raise DataError(
        f"none of {stats['samples']} samples ended by itself with a text (cut by the "
        f"length limit: {stats['truncated']:.1%}); use a longer max_new_tokens, a stop "
        "string, or SFT first"
      )
    found = split(
      [(examples[i // count].prompt, _target(rollout, i, base)) for i in kept]
    )
    if config.labels == "step":
      _check_marks(found, config, stats)
    if config.value == "orm":
      values = _orm_values(orm, found)
    else:
      values = [[outcome[i]] * len(ends) for i, (_, _, ends) in zip(kept, found)]
    if config.value == "rollouts":
      values = _continue(
        policy, config, examples, prompts, sample, outcomes, kept, found, values, stats
      )

    solutions = []
    for i, (prompt, tokens, ends), value in zip(kept, found, values):
      if any(math.isnan(v) for v in value):
        continue
      labels = tuple(v >= config.threshold for v in value)
      at, text = int(rollout.prompt_ids[i]), rollout.completions[i]
      ends, value = tuple(ends), tuple(map(float, value))
      solutions.append(Labelled(at, text, prompt, tokens, ends, value, labels))
    stats["not_judged"] = len(kept) - len(solutions)
    return solutions, stats | _counts(solutions, "labelled")

  solutions, stats = _once(labelled, labels, examples)
  rows = list(sft_rows) if config.mix_sft else []
  if not rows and not stats["labelled_good"]:
    raise DataError(
      f"none of {len(solutions)} labelled solutions is GOOD, and there are no SFT "
      "rows: nothing to ask for. Lower the threshold, or sample a better policy"
    )
  if len(solutions) == stats["labelled_good"]:
    log.warning("no labelled solution is BAD: labels will mean nothing")
  solutions = balance(solutions, config.good_per_bad, config.seed)
  stats |= _counts(solutions, "kept")

  conditioned = add_tokens(base, (GOOD, BAD), config.seed)
  mixed = [
    Labelled(-1, "", prompt, tokens, tuple(ends), (), (True,) * len(ends))
    for prompt, tokens, ends in (split(rows) if rows else [])
  ]
  good, bad = (label_id(conditioned, label) for label in (GOOD, BAD))
  data = [labelled_row(s, good, bad) for s in [*mixed, *solutions]]
  trained = []

  def on_step(step: int, of: int, metrics: dict[str, float]) -> None:
    tell("train", {"step": step, "of": of, **metrics})
    trained.append(step)

  train = dataclasses.replace(config.train, seed=config.seed)
  result = sft.train(conditioned, data, train, on_step, saving)
  sampled = stats["samples"] + stats["continuations"]
  stats |= {
    "sampled_solutions": sampled,
    "train_rows": len(data),
    "train_loss": result.losses[-1],
    "updates": result.steps,
    "update_tokens": result.update_tokens,
    "train_seconds": result.seconds,
  }
  if not trained:  # all was done
    tell("resume", {"updates": result.steps, "sampled_solutions": sampled, "rounds": 0})
  tell("round", stats)
  seconds = time.perf_counter() - began
  return RCRLResult(
    result.policy, stats, solutions, sampled, result.update_tokens, seconds
  )


def _once(
  labelled: Callable[[], tuple[list[Labelled], dict[str, Any]]],
  saving: Saving | None,
  examples: Sequence[Example],
) -> tuple[list[Labelled], dict[str, Any]]:
  """The labelled solutions and their statistics: made, or those that were saved."""
  same = functools.partial(prompt_set.check, examples=examples)
  found = saving.restore({}, same) if saving is not None else None
  if found is not None:
    plain = lambda x: tuple(x) if isinstance(x, list) else x  # JSON has no tuples
    rows = [{k: plain(x) for k, x in one.items()} for one in found.meta["solutions"]]
    return [Labelled(**row) for row in rows], found.meta["stats"]
  solutions, stats = labelled()
  if saving is not None:
    rows = [dataclasses.asdict(one) for one in solutions]
    meta = {"solutions": rows, "stats": stats, "prompts": prompt_set.facts(examples)}
    saving.checkpoints.save(1, {}, meta)
    saving.checkpoints.wait()
    if saving.asked_to_stop():
      saving.end("sampling and labelling")
  return solutions, stats


def _target(rollout: Rollout, row: int, base: Policy) -> str | tuple[int, ...]:
  """The sampled tokens; the text where a stop string, inside a token say, ended it."""
  ids = tuple(rollout.tokens[row][rollout.completion_mask[row]].tolist())
  return ids if ids[-1] in base.eos_ids else rollout.completions[row]


def _split(base: Policy, config: RCRLConfig, rows):
  """(prompt ids, completion ids, step ends) of each row."""
  encoded = encode_rows(
    base.tokenizer,
    base.eos_ids,
    rows,
    max_length=sys.maxsize,  # `sft.train` drops and counts what is too long
    chat=config.train.chat,
  )
  out = []
  for row in encoded:
    start = row.weight.index(1.0)
    prompt, tokens = row.tokens[:start], row.tokens[start:]
    ends = [len(tokens)]
    if config.labels == "step":
      ends = step_ends(base, tokens, config.marks)
    out.append((prompt, tokens, ends))
  return out


def _check_marks(found, config: RCRLConfig, stats: dict[str, Any]) -> None:
  without = sum(len(ends) == 1 for *_, ends in found)
  stats["without_marks"] = without
  if without == len(found):
    raise DataError(
      f"none of {len(found)} solutions has one of marks={config.marks}, so each would "
      "be a single step; give the strings that end a step of this task, or "
      "labels='solution'"
    )


def _orm_values(orm: ORM, found) -> list[list[float]]:
  """The outcome model's value at the end of every step."""
  rows = [[*prompt, *tokens] for prompt, tokens, _ in found]
  given = orm(rows)
  if [len(value) for value in given] != [len(row) for row in rows]:
    raise ConfigError("the orm must give one value for each token of each row")
  return [
    [float(value[len(prompt) + end - 1]) for end in ends]
    for value, (prompt, _, ends) in zip(given, found)
  ]


def _continue(
  policy, config, examples, prompts, sample, outcomes, kept, found, values, stats
) -> list[list[float]]:
  """Values of prefixes by continuations; of whole solutions by their own outcome.

  Equal prefixes of a prompt are continued once.
  """
  places: dict[tuple[int, tuple[int, ...]], int] = {}
  for i, (_, tokens, ends) in zip(kept, found):
    for end in ends[:-1]:
      key = (i // config.samples_per_prompt, tuple(tokens[:end]))
      places.setdefault(key, len(places))
  k = config.continuations
  rollout = sample(
    "continue",
    [[*prompts[at], *prefix] for at, prefix in places],
    range(len(places)),
    k,
    [max(1, config.max_new_tokens - len(prefix)) for _, prefix in places],
    2,
  )
  stats["continuations"] = len(rollout.completions)
  # What is judged is the whole: the prefix, and what was written after it.
  prefixes = [prefix for _, prefix in places for _ in range(k)]
  sizes = np.array([len(prefix) for prefix in prefixes], np.int32)
  opening = [decode_completion(policy.tokenizer, prefix) for prefix in prefixes]
  start_B1 = np.argmax(rollout.completion_mask, axis=1)[:, None]
  column_T = np.arange(rollout.tokens.shape[1])
  within_BT = (column_T >= start_B1 - sizes[:, None]) & (column_T < start_B1)
  each = [examples[at] for at, _ in places]
  whole = dataclasses.replace(
    rollout,
    completions=[a + b for a, b in zip(opening, rollout.completions)],
    completion_mask=rollout.completion_mask | within_BT,
    prompt_ids=np.repeat([e.id for e in each], k).astype(np.int32),
    prompt_lengths=rollout.prompt_lengths - sizes,
    lengths=rollout.lengths + sizes,
  )
  # A continuation that was cut has not ended: it is no solution.
  worth_NK = np.where(rollout.finished, outcomes(whole, each), 0.0).reshape(-1, k)
  judged_NK = np.isfinite(worth_NK)
  if config.estimate == "any":
    worth_N = np.where(judged_NK, worth_NK, -np.inf).max(1)
  else:
    total_N = np.where(judged_NK, worth_NK, 0.0).sum(1)
    worth_N = total_N / np.maximum(judged_NK.sum(1), 1)
  worth_N = np.where(judged_NK.any(1), worth_N, np.nan)
  value_of = {key: float(worth_N[n]) for key, n in places.items()}
  at = lambda i: i // config.samples_per_prompt
  return [
    [*(value_of[at(i), tuple(tokens[:end])] for end in ends[:-1]), value[-1]]
    for i, (_, tokens, ends), value in zip(kept, found, values)
  ]


def _sample_stats(rollout: Rollout, verdicts) -> dict[str, Any]:
  count = len(verdicts)
  correct = [v for v in verdicts if v.correct]
  lucky = sum(v.consistent is False for v in correct)
  return {
    "round": 1,
    "samples": count,
    "continuations": 0,
    "answered": sum(v.answer is not None for v in verdicts) / count,
    "correct": len(correct) / count,
    "lucky_of_correct": lucky / len(correct) if correct else 0.0,
    "truncated": float(1 - rollout.finished.mean()),
    "empty": sum(not text.strip() for text in rollout.completions),
    "completion_tokens": float(rollout.lengths.mean()),
    "sample_seconds": rollout.stats["seconds"],
    "sample_tokens_per_second": rollout.stats["tokens_per_second"],
  }


def _counts(solutions: Sequence[Labelled], name: str) -> dict[str, int]:
  good = sum(all(s.labels) for s in solutions)
  labels = [label for s in solutions for label in s.labels]
  return {
    f"{name}_good": good,
    f"{name}_bad": len(solutions) - good,
    f"{name}_good_labels": sum(labels),
    f"{name}_bad_labels": len(labels) - sum(labels),
  }

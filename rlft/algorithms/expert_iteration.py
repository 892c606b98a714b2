"""Expert Iteration: sample, keep what a checker accepts, train on it, repeat.

  pi_0 = SFT checkpoint, or a pretrained base with a few-shot prompt
  D_0  = {}
  for i in 1..n:
    R   = {(q, a): q in prompts, a ~ pi_{i-1}(. | q), reward(q, a) >= threshold}
    D_i = dedupe(D_{i-1} + R)
    pi_i = train(start, D_i + SFT data if they are mixed in)

Source: Havrilla et al. 2024 (arXiv 2403.04642), section 3; Anthony et al. 2017. We
differ in what is accepted: a right answer with a wrong chain ("lucky") passes the
paper's checker. De-duplication amplifies those, for nearly every wrong chain is unique;
so where the task can tell, the default accepts consistent chains only, and the lucky
share is reported in every round, before and after de-duplication.

Only completions that ended by themselves are accepted: one that the length limit cut
would teach to stop in the middle. What is trained on are the sampled tokens, never the
text tokenised again (except after a stop string, which may end inside a token).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from rlft.algorithms import sft
from rlft.core import hosts
from rlft.core.errors import ConfigError, DataError
from rlft.core.rng import Purpose, check_seed
from rlft.core.types import Rollout, Verdict
from rlft.models.hub import Policy
from rlft.rewards.forms import judge_and_reward, verdicts_by
from rlft.rewards.verifiable import (
  judge_all,
  verdict_reward,
  verdicts_of_all,
)
from rlft.sampling.generate import generate
from rlft.tasks.prompts import Prompts, as_examples, opened
from rlft.training import prompt_set, rollouts
from rlft.training.data import encode_prompts
from rlft.training.metrics import PhaseTimers
from rlft.training.progress import OnEvent, listener
from rlft.training.saving import Saving

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class EIConfig:
  """Expert Iteration.

  Attributes:
    train: how each round trains.
    rounds: n.
    samples_per_prompt: K.
    temperature: of sampling; no filter is used, so all the policy's mass is explored.
    max_new_tokens: longest completion.
    threshold: the reward from which a sample is accepted.
    accept: "consistent" asks for a right answer and a valid chain of steps where the
      task can tell; "final" for the answer alone. Ignored with a reward function of
      your own.
    dedupe: what makes two solutions of a prompt the same: "chain" (the canonical
      sequence of operations; text where it cannot be read), "text", or "none".
    start: the checkpoint that each round trains: "base" (the pretrained one, the
      paper's and STaR's choice), "sft" (where this run began), "previous".
    mix_sft: whether the SFT rows are in every round's data.
    max_per_prompt: most solutions kept of one prompt; 0 is no limit. Rare chains are
      kept first.
    patience: rounds without a better dev score before stopping; 0 never stops.
    stop: strings that end a completion, for a base model that does not end by itself.
    few_shot: text put before every prompt while sampling with the first policy (a base
      model learns the format from it); training rows do not have it.
    seed: of sampling and of the row order.
    max_rows: completions in flight.
  """

  train: sft.SFTConfig = dataclasses.field(default_factory=sft.SFTConfig)
  rounds: int = 2
  samples_per_prompt: int = 16
  temperature: float = 1.0
  max_new_tokens: int = 256
  threshold: float = 1.0
  accept: Literal["consistent", "final"] = "consistent"
  dedupe: Literal["chain", "text", "none"] = "chain"
  start: Literal["base", "sft", "previous"] = "base"
  mix_sft: bool = True
  max_per_prompt: int = 0
  patience: int = 0
  stop: tuple[str, ...] = ()
  few_shot: str = ""
  seed: int = 0
  max_rows: int = 128

  def __post_init__(self):
    for name in ("rounds", "samples_per_prompt", "max_new_tokens", "max_rows"):
      if getattr(self, name) < 1:
        raise ConfigError(f"{name}={getattr(self, name)}: at least 1")
    for name in ("max_per_prompt", "patience"):
      if getattr(self, name) < 0:
        raise ConfigError(f"{name}={getattr(self, name)}: 0 (off) or positive")
    if not self.temperature > 0:
      raise ConfigError(
        f"temperature={self.temperature}: samples must differ, so it must be positive"
      )
    if self.few_shot and self.train.chat:
      raise ConfigError("few_shot is for base models, chat for chat models: choose one")
    for name, legal in (
      ("accept", ("consistent", "final")),
      ("dedupe", ("chain", "text", "none")),
      ("start", ("base", "sft", "previous")),
    ):
      if getattr(self, name) not in legal:
        raise ConfigError(f"{name}={getattr(self, name)!r}: choose one of {legal}")
    if not np.isfinite(self.threshold):
      raise ConfigError(f"threshold={self.threshold}: give a number")
    check_seed(self.seed)


@dataclasses.dataclass(frozen=True)
class Solution:
  """An accepted completion.

  Attributes:
    prompt_id: the example's id.
    text: the completion.
    chain: its operations, None when they cannot be read.
    lucky: a right answer by an inconsistent chain.
    round: in which it was found first.
    tokens: the sampled ids with their EOS; empty when a stop string ended it.
  """

  prompt_id: int
  text: str
  chain: tuple[str, ...] | None
  lucky: bool
  round: int
  tokens: tuple[int, ...] = ()


@dataclasses.dataclass
class EIResult:
  """What Expert Iteration gave.

  Attributes:
    policy: of the best round by dev score (the start, when no round beat it), or of
      the last one without a dev split.
    rounds: one dict of statistics a round.
    solutions: the accepted, de-duplicated data set.
    sampled_solutions: completions sampled for training, exactly.
    update_tokens: tokens in the losses of all rounds.
    seconds: wall clock.
  """

  policy: Policy
  rounds: list[dict[str, Any]]
  solutions: list[Solution]
  sampled_solutions: int
  update_tokens: int
  seconds: float


def collect(
  rollout: Rollout,
  verdicts: Sequence[Verdict],
  rewards: Sequence[float | None],
  threshold: float,
  round_index: int,
  eos_ids: Sequence[int],
) -> list[Solution]:
  """The accepted samples of a rollout, with a verdict and a reward for each row."""
  out = []
  for i, (text, verdict, reward) in enumerate(
    zip(rollout.completions, verdicts, rewards)
  ):
    if reward is None or not reward >= threshold:  # neither is NaN
      continue
    if not rollout.finished[i] or not text.strip():
      continue  # cut, or empty: it teaches nothing, whatever it was worth
    tokens = _completion_ids(rollout, i)
    out.append(
      Solution(
        prompt_id=int(rollout.prompt_ids[i]),
        text=text,
        chain=verdict.chain,
        lucky=verdict.correct and verdict.consistent is False,
        round=round_index,
        tokens=tokens if tokens[-1] in eos_ids else (),
      )
    )
  return out


def _completion_ids(rollout: Rollout, row: int) -> tuple[int, ...]:
  return tuple(rollout.tokens[row][rollout.completion_mask[row]].tolist())


def _target(solution: Solution, start: Policy) -> str | tuple[int, ...]:
  """The sampled tokens, where they end as completions of the trained model end."""
  ends = solution.tokens[-1:]
  return solution.tokens if ends and ends[0] in start.eos_ids else solution.text


def dedupe(
  solutions: Sequence[Solution], by: Literal["chain", "text", "none"]
) -> list[Solution]:
  """Keeps the first of equal solutions; those of different prompts are never equal."""
  if by == "none":
    return list(solutions)
  seen, out = set(), []
  for solution in solutions:
    # A lucky chain is no chain: two of them are the same only letter by letter.
    by_text = by == "text" or solution.chain is None or solution.lucky
    key = (solution.prompt_id, solution.text.strip() if by_text else solution.chain)
    if key not in seen:
      seen.add(key)
      out.append(solution)
  return out


def cap(solutions: Sequence[Solution], most: int) -> list[Solution]:
  """At most so many solutions a prompt; those whose chain is rarest over all first.

  Lucky and unreadable chains come last: nearly all of them are unique, and rarity would
  choose them before every valid one.
  """
  if not most:
    return list(solutions)
  counts = collections.Counter(s.chain for s in solutions)
  by_prompt = collections.defaultdict(list)
  for i, solution in enumerate(solutions):
    last = solution.lucky or solution.chain is None
    by_prompt[solution.prompt_id].append((last, counts[solution.chain], i))
  keep = {i for ranked in by_prompt.values() for *_, i in sorted(ranked)[:most]}
  return [s for i, s in enumerate(solutions) if i in keep]


def lucky_share(solutions: Sequence[Solution]) -> float:
  """Share of right answers by an inconsistent chain; 0 of none."""
  return sum(s.lucky for s in solutions) / len(solutions) if solutions else 0.0


def run(
  policy: Policy,
  examples: Prompts,
  judge: Any = None,
  config: EIConfig | None = None,
  *,
  base: Policy | None = None,
  sft_rows: Sequence[tuple[str, str]] = (),
  reward: Any = None,
  dev_score: Callable[[Policy], float] | None = None,
  on_event: OnEvent = None,
  saving: Saving | None = None,
  timers: PhaseTimers | None = None,
) -> EIResult:
  """Runs Expert Iteration.

  Args:
    policy: pi_0, which samples the first round (an SFT checkpoint, or the base itself).
    examples: the training prompts, see `tasks.prompts`; their reference solutions are
      not looked at.
    judge: the task's; gives answers, chains and consistency. Or a reward in any form
      (see `rewards.forms`): then "correct" is what reaches the threshold, and there are
      no chains.
    config: see `EIConfig`.
    base: the pretrained checkpoint that `start="base"` trains; `policy` when None (a
      run without SFT).
    sft_rows: (prompt, completion) texts, mixed in when `config.mix_sft`.
    reward: in any form, beside a judge; by default 1 for what `config.accept` accepts,
      else 0.
    dev_score: of a policy, larger is better; chooses the round that is returned.
    on_event: called with ("sample" | "train" | "round", values) for progress, and with
      ("resume", values) where a run goes on; see `training.progress` for None.
    saving: saves the run after the sampling of round i (step 2 i - 1) and after its
      training (step 2 i), whatever its `every`; and goes on with what it has saved.
    timers: get the phases "rollout", "reward", "update", "evaluation", "checkpoint".

  Returns:
    `EIResult`.

  Raises:
    ConfigError, DataError: before any device work; and `DataError` when the first round
      accepts nothing and there are no SFT rows to train on.
    RewardError: the reward or the judge failed on every row that was sampled.
    StoppedError: `saving` was asked to stop: when what is under way is sampled, or at
      the next update, of a training that will be made again.
  """
  config, examples = config or EIConfig(), as_examples(examples)
  if not examples:
    raise DataError("no training prompts")
  judge, reward = judge_and_reward(judge, reward, examples)
  if len({e.id for e in examples}) != len(examples):
    raise DataError("two training prompts have the same id: their noise would be equal")
  base = base or policy
  for start in (policy, base):  # not after hours of sampling
    sft.check(start, config.train)
  shared = config.max_new_tokens, config.train.chat
  examples = rollouts.usable(policy, examples, *shared)
  if base.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
    raise ConfigError("base has another vocabulary than the policy that samples for it")
  began, timers = time.perf_counter(), timers or PhaseTimers()
  tell = listener(on_event, config.rounds)
  rows = list(sft_rows) if config.mix_sft else []
  trained = base if config.start == "base" else policy  # what every round's result is
  opened(examples, config.few_shot)
  prompt_of = {e.id: e.prompt for e in examples}
  progress, current, best = _Progress(), policy, policy

  def arrays() -> dict[str, Any]:
    """Their shapes and types never change: where there is no result of a round yet (the
    policy given may be another architecture, in bfloat16) the weights are fillers."""
    out = {"current": (current if progress.rounds else trained).params}
    if dev_score is not None:
      out["best"] = (best if progress.best_round else trained).params
    return jax.tree.map(lambda x: x.astype(np.float32), out)

  def save(step: int, done: str) -> None:
    if saving is None:
      return
    stop = saving.asked_to_stop()
    progress.seconds = earlier + time.perf_counter() - began
    with timers.phase("checkpoint"):
      saving.checkpoints.save(step, arrays(), dataclasses.asdict(progress))
    if stop and not progress.over(config):
      saving.end(done)

  same = functools.partial(prompt_set.check, examples=examples, grows=True)
  found = saving.restore(arrays(), same) if saving is not None else None
  if found is not None:
    progress = _Progress.of(found.meta)
    if progress.rounds:
      current = dataclasses.replace(trained, params=found.arrays["current"])
    if dev_score is None:
      best = current
    elif progress.best_round:
      best = dataclasses.replace(trained, params=found.arrays["best"])
    counts = {"updates": progress.total("updates"), "rounds": len(progress.rounds)}
    tell("resume", counts | {"sampled_solutions": progress.total("samples")})
  elif dev_score is not None:
    with timers.phase("evaluation"):
      progress.best_score = dev_score(policy)
  earlier = progress.seconds
  progress.prompts = {} if saving is None else prompt_set.facts(examples)
  while not progress.over(config):
    index = len(progress.rounds) + 1
    name = f"round {index} of {config.rounds}"
    if progress.half is None:
      mesh = current.model.mesh
      first = examples
      if config.few_shot and index == 1:
        first = rollouts.usable(policy, examples, *shared, config.few_shot)
      own, real = hosts.own_evenly(first, mesh)
      with timers.phase("rollout"):
        rollout = _sample(current, own, config, index, tell)
      with timers.phase("reward"):
        if reward is not None:
          rewards = rollouts.values(reward(rollout, own), rollout)
        if judge is None:
          verdicts = verdicts_by(rewards, config.threshold)
        else:
          verdicts = judge_all(judge, rollout.completions, own)
        if reward is None:
          rewards = [verdict_reward(v, config.accept) for v in verdicts]
      rows_own = real * config.samples_per_prompt  # what is behind them is not ours
      accepted = collect(
        rollout, verdicts[:rows_own], rewards, config.threshold, index, current.eos_ids
      )
      accepted = _of_all(accepted, mesh)
      verdicts = verdicts_of_all(verdicts[:rows_own], mesh)
      progress.solutions = dedupe([*progress.solutions, *accepted], config.dedupe)
      kept = cap(progress.solutions, config.max_per_prompt)
      sampled = _sampled_stats(rollout, rewards, rows_own, mesh)
      progress.half = _round_stats(index, verdicts, accepted, kept, config) | sampled
      _warn(progress, bool(rows))
      save(2 * index - 1, f"sampling {name}")
    kept = cap(progress.solutions, config.max_per_prompt)
    start = {"base": base, "sft": policy, "previous": current}[config.start]
    data = rows + [(prompt_of[s.prompt_id], _target(s, start)) for s in kept]
    result = _train(start, data, config, tell, saving, f"sampling {name}", timers)
    current = result.policy
    stats = progress.half | {
      "train_rows": len(data),
      "train_loss": result.losses[-1],
      "update_tokens": result.update_tokens,
      "updates": result.steps,
      "train_seconds": result.seconds,
      "sampled_solutions": progress.total("samples") + progress.half["samples"],
    }
    if dev_score is None:
      best = current
    else:
      with timers.phase("evaluation"):
        stats["dev"] = score = dev_score(current)
      if score > progress.best_score:
        best, progress.best_score, progress.best_round = current, score, index
    progress.rounds.append(stats)
    progress.half = None
    tell("round", stats)
    save(2 * index, name)
  if saving is not None:
    with timers.phase("checkpoint"):
      saving.checkpoints.wait()
  return EIResult(
    policy=best,
    rounds=progress.rounds,
    solutions=cap(progress.solutions, config.max_per_prompt),
    sampled_solutions=progress.total("samples"),
    update_tokens=progress.total("update_tokens"),
    seconds=earlier + time.perf_counter() - began,
  )


@dataclasses.dataclass
class _Progress:
  """What a run has done; saved with its weights.

  Attributes:
    solutions: the data set, not capped.
    rounds: statistics of the rounds that are done.
    half: those of a round that is sampled and judged, and not trained yet.
    best_score, best_round: by dev score; round 0 is the start.
    seconds: wall clock.
    prompts: facts of those that are sampled; {} where nothing is saved.
  """

  solutions: list[Solution] = dataclasses.field(default_factory=list)
  rounds: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  half: dict[str, Any] | None = None
  best_score: float | None = None
  best_round: int = 0
  seconds: float = 0.0
  prompts: dict[str, Any] = dataclasses.field(default_factory=dict)

  @classmethod
  def of(cls, meta: Mapping[str, Any]) -> _Progress:
    """From JSON, which has no tuples."""
    progress = cls(**meta)
    progress.solutions = _solutions(progress.solutions)
    return progress

  def total(self, name: str) -> int:
    """Of all rounds that are done."""
    return sum(one[name] for one in self.rounds)

  def over(self, config: EIConfig) -> bool:
    done = len(self.rounds)
    tired = bool(config.patience) and done - self.best_round >= config.patience
    return done >= config.rounds or (self.best_score is not None and tired)


def _solutions(plain: Sequence[Mapping[str, Any]]) -> list[Solution]:
  """From JSON."""
  return [
    Solution(**one | {"chain": _tuple(one["chain"]), "tokens": _tuple(one["tokens"])})
    for one in plain
  ]


def _of_all(own: Sequence[Solution], mesh: Any) -> list[Solution]:
  """The solutions that all processes have accepted, in the order of the prompts."""
  if not hosts.several():
    return list(own)
  parts = hosts.each_part([dataclasses.asdict(one) for one in own], mesh)
  return _solutions([one for part in parts for one in part])


def _tuple(values: Sequence[Any] | None) -> tuple[Any, ...] | None:
  return None if values is None else tuple(values)


def _warn(progress: _Progress, has_rows: bool) -> None:
  """Of a round that accepted nothing, or whose data set is luckier than before."""
  stats = progress.half
  index, rounds = stats["round"], progress.rounds
  if not stats["accepted"]:
    message = (
      f"round {index}: none of {stats['samples']} samples was accepted (answers found: "
      f"{stats['answered']:.1%}, correct: {stats['correct']:.1%}, cut by the length "
      f"limit: {stats['truncated']:.1%})"
    )
    if not stats["kept"] and not has_rows:
      raise DataError(
        f"{message}, and there are no SFT rows: nothing to train on. Use a few_shot "
        "prompt or SFT so that answers parse, more samples_per_prompt, or easier "
        "prompts; where most are cut, a longer max_new_tokens or a stop string"
      )
    log.warning("%s; training goes on with what there was", message)
  if rounds and stats["lucky_of_kept"] > rounds[-1]["lucky_of_kept"]:
    log.warning(
      "round %d: the lucky share of the training set grew from %.1f%% to %.1f%%",
      index,
      100 * rounds[-1]["lucky_of_kept"],
      100 * stats["lucky_of_kept"],
    )


def _train(
  start, data, config: EIConfig, tell, saving, saved: str, timers
) -> sft.SFTResult:
  """A round's training; what it is made of is saved, so a stop need not wait for it."""

  def on_step(step: int, of: int, metrics: dict[str, float]) -> None:
    tell("train", {"step": step, "of": of, **metrics})
    if saving is not None and step < of and saving.asked_to_stop():
      saving.end(saved)

  config = dataclasses.replace(config.train, seed=config.seed)
  return sft.train(start, data, config, on_step, timers=timers)


def _sample(policy, examples, config: EIConfig, index: int, tell) -> Rollout:
  prompts = opened(examples, config.few_shot if index == 1 else "")
  chat = config.train.chat
  return generate(
    policy,
    encode_prompts(policy.tokenizer, prompts, chat),
    samples=config.samples_per_prompt,
    max_new_tokens=config.max_new_tokens,
    temperature=config.temperature,
    stop=config.stop,
    seed=config.seed,
    step=index,
    prompt_ids=[e.id for e in examples],
    purpose=Purpose.ROLLOUT,
    max_rows=config.max_rows,
    on_progress=lambda done, of: tell("sample", {"done": done, "of": of}),
  )


def _round_stats(index, verdicts, found, kept, config: EIConfig) -> dict[str, Any]:
  """What people look at after a round: of its verdicts and solutions."""
  count = len(verdicts)
  correct = [v for v in verdicts if v.correct]
  unlucky = [v for v in correct if v.consistent is not False]
  solved = {s.prompt_id for s in found}
  prompts = count // config.samples_per_prompt
  return {
    "round": index,
    "samples": count,
    "answered": sum(v.answer is not None for v in verdicts) / count,
    "correct": len(correct) / count,
    "accepted": len(found) / count,
    "prompts_solved": len(solved) / prompts,
    # Of right answers, of what was accepted, and of what is left without duplicates.
    "lucky_of_correct": 1 - len(unlucky) / len(correct) if correct else 0.0,
    "lucky_of_accepted": lucky_share(found),
    "lucky_of_kept": lucky_share(kept),
    "kept": len(kept),
    "new": sum(s.round == index for s in kept),
    "unique_chains": len({(s.prompt_id, s.chain) for s in kept if s.chain}),
  }


def _sampled_stats(rollout: Rollout, rewards, rows: int, mesh: Any) -> dict[str, float]:
  """Of the first `rows` of every process's rollout."""
  own = [
    rows,
    sum(r is None for r in rewards[:rows]),
    int((~rollout.finished[:rows]).sum()),
    int(rollout.lengths[:rows].sum()),
    rollout.stats["tokens_per_second"],
  ]
  parts = np.array(hosts.each_part([*own, rollout.stats["seconds"]], mesh), float)
  count, missing, cut, tokens, speed, _ = parts.sum(0).tolist()
  return {
    "not_judged": missing / count,
    "truncated": cut / count,
    "completion_tokens": tokens / count,
    "sample_seconds": float(parts[:, -1].max()),
    "sample_tokens_per_second": speed,
  }

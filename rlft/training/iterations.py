"""The policy's side of an on-policy run: what PPO and GRPO do alike.

  check_run before any device work; then for every iteration: (sample,) start_logps,
  (judge, advantages,) update; `loop` counts, evaluates and keeps the best.

A config here is that of the method: settings of one name mean one thing in all of them.

Letters: B rows, C completion columns.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from rlft.core import hosts
from rlft.core.errors import ConfigError, DataError, StoppedError
from rlft.core.types import Example
from rlft.models.hub import Policy, check_policy
from rlft.models.scalar import ScalarModel, check_same_tokenizer
from rlft.training import advice, facts, prompt_set, rollouts
from rlft.training.divergence import Guard
from rlft.training.metrics import PhaseTimers
from rlft.training.optimizer import check_patterns
from rlft.training.rollouts import Region
from rlft.training.saving import Saving
from rlft.training.trainee import Trainee

log = logging.getLogger(__name__)


@dataclasses.dataclass
class RLResult:
  """What an on-policy run gave.

  Attributes:
    policy: of the best dev score, or the last one without a dev split; adapters are
      merged.
    iterations: one dict of metrics an iteration.
    history: (sampled solutions, dev score) pairs, the start first.
    sampled_solutions: completions sampled for training, exactly.
    update_tokens: tokens in the policy's losses, epochs counted.
    seconds: wall clock.
    value: the last value model, where the method has one of its own.
  """

  policy: Policy
  iterations: list[dict[str, float]]
  history: list[tuple[int, float]]
  sampled_solutions: int
  update_tokens: int
  seconds: float
  value: ScalarModel | None = None


def check_run(
  policy: Policy, examples: Sequence[Example], config: Any, reference: Policy | None
) -> list[Example]:
  """The examples that can be sampled; no device work.

  Raises:
    DataError: there are none, or two have the same id.
    ConfigError: the policy cannot end a completion, an iteration's rows cannot be
      divided, or the reference does not fit.
  """
  check_policy(policy)
  if not examples:
    raise DataError("no training prompts")
  if len({e.id for e in examples}) != len(examples):
    raise DataError("two training prompts have the same id: their noise would be equal")
  if not policy.eos_ids:
    raise ConfigError("the policy has no eos_ids: nothing could end a completion")
  examples = rollouts.usable(policy, examples, config.max_new_tokens, config.chat)
  rollouts.prompts_of(examples, 0, config.prompts_per_iteration, config.seed)
  rollouts.check_rows(
    config.prompts_per_iteration,
    config.samples_per_prompt,
    config.minibatches,
    config.micro_batches,
    policy.model.mesh,
  )
  if reference is not None:
    check_same_tokenizer(policy, reference)
    if config.lora is not None:
      raise ConfigError("with lora the reference is the base policy: pass no reference")
  if config.lora is None:
    check_patterns(config.optimizer, {"policy": policy.params})
  return examples


class State(Protocol):
  """What trains, and all that its next iteration depends on but its index."""

  trainee: Trainee
  guards: Sequence[Guard]
  timers: PhaseTimers

  def arrays(self) -> Any:
    """A tree of arrays; its structure never changes."""

  def notes(self) -> dict[str, Any]:
    """What is no array, for JSON."""

  def go_on(self, arrays: Any, notes: Mapping[str, Any]) -> None:
    """Takes over what `arrays` and `notes` gave."""


@dataclasses.dataclass
class _Progress:
  """What a run has done; saved with it."""

  iterations: list[dict[str, float]] = dataclasses.field(default_factory=list)
  history: list[tuple[int, float]] = dataclasses.field(default_factory=list)
  best_score: float | None = None
  sampled: int = 0
  tokens: int = 0
  seconds: float = 0.0


def loop(
  one: Callable[[int], dict[str, float]],
  state: State,
  start: Policy,
  examples: Sequence[Example],
  config: Any,
  dev_score: Callable[[Policy], float] | None,
  tell: Callable[[str, dict[str, Any]], None],
  saving: Saving | None = None,
) -> RLResult:
  """Runs the iterations: counts samples and tokens, and keeps the best by dev score.

  Args:
    one: of the iteration's index; its metrics, with "samples" (completions sampled in
      it) and "update_tokens", which are summed here.
    state: what `one` trains.
    start: the policy before the first iteration, as it was given.
    examples: the prompts of `rollouts.prompts_of`.
    config: gives `iterations`, `eval_every`, and what decides the prompts' order.
    dev_score: of a policy; None keeps the last.
    tell: gets ("iteration", metrics); and ("resume", {"iterations": done}) where a
      checkpoint was found.
    saving: saves the run, and goes on with what it has saved.

  Raises:
    DivergenceError: of a guard, after `tell` has had the iteration's metrics.
    CheckpointError: the saved run has other prompts, or takes them in other numbers.
    StoppedError: `saving` was asked to stop, and the state is saved.
  """
  began, timers = time.perf_counter(), state.timers
  progress, best = _Progress(), start if dev_score is not None else None

  def arrays():
    own = {"run": state.arrays()}
    return own if best is None else own | {"best": best.params}

  order = {"prompts_per_iteration": config.prompts_per_iteration, "seed": config.seed}
  prompts = {} if saving is None else prompt_set.facts(examples, **order)

  def same(meta):
    if not saving.other_prompts:
      prompt_set.check(meta, examples, **order)

  found = saving.restore(arrays(), same) if saving is not None else None
  if found is not None:
    state.go_on(found.arrays["run"], found.meta["run"])
    progress = _Progress(**found.meta["progress"])
    progress.history = [(at, score) for at, score in progress.history]
    if best is not None:
      best = dataclasses.replace(start, params=found.arrays["best"])
    tell("resume", {"iterations": len(progress.iterations)})
  elif dev_score is not None:
    with timers.phase("evaluation"):
      progress.best_score = dev_score(start)
    progress.history.append((0, progress.best_score))
  before = progress.seconds
  for index in range(len(progress.iterations), config.iterations):
    stats = one(index)
    progress.sampled += int(stats.pop("samples"))
    progress.tokens += int(stats.pop("update_tokens"))
    stats["sampled_solutions"] = progress.sampled
    done, last = index + 1, index + 1 == config.iterations
    if dev_score is not None and (last or done % config.eval_every == 0):
      with timers.phase("evaluation"):
        current = state.trainee.export()
        stats["dev"] = score = dev_score(current)
      progress.history.append((progress.sampled, score))
      if score > progress.best_score:
        best, progress.best_score = current, score
    for name, seconds in timers.pop().items():
      stats[name] = stats.get(name, 0.0) + seconds
    progress.iterations.append(stats)
    tell("iteration", stats)
    for text in advice.early(progress.iterations, config):
      log.warning("%s", text)
    for guard in state.guards:
      guard.check()  # its numbers are on record, and nothing of it is saved
    progress.seconds = before + time.perf_counter() - began
    stop = saving is not None and saving.asked_to_stop()
    if saving is not None and (last or stop or done % saving.every == 0):
      meta = {"run": state.notes(), "progress": dataclasses.asdict(progress)}
      meta["prompts"] = prompts
      with timers.phase("checkpoint"):
        saving.checkpoints.save(done, arrays(), meta, stats)
    if stop and not last:
      saving.checkpoints.wait()
      raise StoppedError(
        f"asked to stop after iteration {done} of {config.iterations}; the state is "
        "saved, and the same command goes on from there"
      )
  if saving is not None:
    saving.checkpoints.wait()
  return RLResult(
    policy=state.trainee.export() if best is None else best,
    iterations=progress.iterations,
    history=progress.history,
    sampled_solutions=progress.sampled,
    update_tokens=progress.tokens,
    seconds=progress.seconds,
  )


class Updater:
  """Updates a policy, and knows what its ratios are taken to.

  Attributes:
    reference: what a KL is measured to; the policy at the start when none was given.
    recompute: whether old log-probabilities are the scorer's; with old_logp="auto" the
      measured mismatch decides.
    measured: whether the mismatch of this iteration was measured by the scorer.
    due: whether the next iteration measures it, whatever its index.
    begun: whether the policy has been updated. Before that it is its reference, and
      its ratios are 1: both are asserted.
    guard: of its updates.
  """

  def __init__(self, trainee: Trainee, step, config: Any, reference: Policy | None):
    """Args: what is trained, its train step, the method's config, see above."""
    self.trainee, self.step, self.config = trainee, step, config
    self.reference, self._own_reference = trainee.start, reference is None
    if reference is not None:
      model = reference.model.clone(dtype=trainee.start.model.dtype)
      self.reference = dataclasses.replace(reference, model=model)
    self.recompute = config.old_logp == "recompute"
    self.measured = self.begun = False
    self.due = True
    heat = np.float32(config.temperature)
    self.temperature = hosts.put(heat, trainee.start.model.mesh)
    self.guard = Guard(config.optimizer, trainee.start.tokenizer)

  def notes(self) -> dict[str, Any]:
    """What the next iteration depends on."""
    return {
      "recompute": self.recompute,
      "begun": self.begun,
      "old_logp": self.config.old_logp,
    }

  def go_on(self, notes: Mapping[str, Any]) -> None:
    """Takes over what `notes` gave; another `old_logp` than it was saved with holds."""
    self.begun = notes["begun"]
    before = notes.get("old_logp", self.config.old_logp)
    self.due = before != self.config.old_logp
    if not self.due:
      self.recompute = notes["recompute"]

  def start_logps(
    self, index: int, rows: Region, with_reference: bool = True
  ) -> Callable[[], tuple[np.ndarray, np.ndarray | None, dict[str, float]]]:
    """Starts the scores of an iteration's rows on the device.

    Returns:
      A function that waits for them: (old_logp [B, C], ref_logp [B, C] or None, how
      far sampler and scorer disagree, where that was measured).
    """
    config = self.config
    policy, lora = self.trainee.adapted()
    start = functools.partial(
      rollouts.start_logp,
      rows=rows,
      temperature=config.temperature,
      max_tokens=config.max_tokens,
    )
    due, self.due = self.due or index % 16 == 0, False
    self.measured = self.recompute or (config.old_logp == "auto" and due)
    own = start(policy, lora=lora) if self.measured else None
    ref = start(self.reference) if with_reference else None

    types = lambda one: [x.dtype for x in jax.tree.leaves(one.params)]
    same_path = lora is None and types(policy) == types(self.reference)

    def wait():
      old_logp, gap = rows.logp, {}
      if own is not None:
        scored = own()
        gap = facts.mismatch(rows.logp, scored, rows.chosen)
        if config.old_logp == "auto":
          self.recompute = gap["mismatch/max"] > facts.AGREE
        if self.recompute:
          old_logp = scored
      ref_logp = None if ref is None else ref()
      if ref_logp is not None and self._own_reference and not self.begun:
        facts.check_reference(
          old_logp,
          ref_logp,
          rows.chosen,
          config.compute_dtype,
          config.temperature,
          same_path=self.recompute and same_path,
        )
      return old_logp, ref_logp, gap

    return wait

  def behaviour_logp(self, rows: Region) -> np.ndarray | None:
    """The sampler's log-probs, where ratios to them are to be corrected for."""
    return rows.logp if self.config.loss.importance_cap and self.recompute else None

  def first_mismatch(self, means: rollouts.Means) -> dict[str, float]:
    """Of sampler and trainer, as the first update of the iteration saw it: its ratios
    are to the sampler's, and it changed nothing yet. Costs nothing; {} where the scorer
    measured it on all rows, or nothing was updated."""
    first = {} if self.measured else means.first()
    error = first.get("mult_prob_error")
    return {} if error is None else {"mismatch/token_mult_prob_error": error}

  def update(self, part: rollouts.RLBatch, name: str) -> Mapping[str, Any]:
    """One update of the policy, of this name; its metrics, still on the device."""
    trainee, config = self.trainee, self.config
    trainee.state, metrics = self.step(
      trainee.state, part, trainee.base, self.temperature
    )
    self.guard.add(name, metrics, part)
    if not self.begun and not metrics["skipped"]:
      measured = config.old_logp != "sampler"
      facts.check_first_update(
        metrics, config.compute_dtype, measured, config.temperature
      )
      self.begun = True
    return metrics

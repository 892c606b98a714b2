"""GRPO and its relatives: policy gradients with a baseline from samples of one prompt.

  A_i  = (r_i - baseline of its group) / scale           one number for a completion
  L_pi = -mean min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A) + kl_coef * KL

There is no value model. Dr. GRPO, DAPO, RLOO and REINFORCE are settings of the same
step (see `preset`):

              baseline       scale      mean over  clip       KL    besides
  grpo        group          group std  rows       0.2, 0.2   loss
  dr_grpo     group          none       constant   0.2, 0.2   -
  dapo        group          group std  tokens     0.2, 0.28  -     dynamic sampling
  rloo        leave one out  none       constant   none       reward
  reinforce   batch          none       tokens     none       -

Source: DeepSeekMath (arXiv 2402.03300), section 4.1; Dr. GRPO (2503.20783); DAPO
(2503.14476), whose overlong shaping is `rewards.verifiable.overlong_penalty`; RLOO
(2402.14740), eq. 7, whose action is the whole completion (`importance="sequence"`
gives GSPO's ratio, 2507.18071).

Letters: B rows, T tokens, C completion columns.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rlft.core import hosts, rng
from rlft.core.errors import ConfigError, check_kind, nearest
from rlft.core.types import Reward, Rollout
from rlft.models.decoder import Decoder
from rlft.models.hub import Policy
from rlft.models.lora import LoRAConfig
from rlft.objectives import kl
from rlft.objectives import policy as policies
from rlft.objectives.advantages import group_advantage
from rlft.rewards.forms import as_reward
from rlft.sampling.score import completion_logp
from rlft.tasks.prompts import Prompts, as_examples
from rlft.training import rollouts
from rlft.training.iterations import (
  RLResult,
  Updater,
  check_run,
  loop,
)
from rlft.training.metrics import PhaseTimers
from rlft.training.optimizer import OptimizerConfig
from rlft.training.progress import OnEvent, listener
from rlft.training.rollouts import Means, Region, RewardOf, RLBatch
from rlft.training.saving import Saving
from rlft.training.step import Sums, go_on_from, make_step
from rlft.training.trainee import Trainee

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class GRPOLoss:
  """What is static in the train step.

  Attributes:
    clip_low, clip_high: the ratio is clipped to [1 - low, 1 + high].
    clip: False takes the plain importance-weighted gradient.
    dual_clip: bound on the ratio where the advantage is negative (above 1); 0 is off.
    importance: a ratio for each "token", or one for the "sequence" (GSPO).
    aggregate: what the mean is over: "token", "sequence" or "constant".
    constant_length: of "constant"; 0 takes max_new_tokens.
    kl_coef: weight of the KL to the reference in the loss; 0 needs no reference.
    kl_estimator: "k1", "k2" or "k3"; only k2 has the KL's gradient as a loss.
    entropy_coef: of an entropy bonus.
    importance_cap: cap on pi_old / pi_sampler, where those were measured apart; 0 is
      off.
  """

  clip_low: float = 0.2
  clip_high: float = 0.2
  clip: bool = True
  dual_clip: float = 0.0
  importance: Literal["token", "sequence"] = "token"
  aggregate: Literal["token", "sequence", "constant"] = "sequence"
  constant_length: int = 0
  kl_coef: float = 0.0
  kl_estimator: Literal["k1", "k2", "k3"] = "k3"
  entropy_coef: float = 0.0
  importance_cap: float = 0.0


@dataclasses.dataclass(frozen=True)
class GRPOConfig:
  """GRPO; `preset` gives its relatives.

  Attributes:
    optimizer, loss: see their classes.
    iterations: rollouts.
    prompts_per_iteration, samples_per_prompt: groups, and rows of a group.
    baseline: "group", "leave_one_out", "batch" or "none".
    scale: what advantages are divided by: "group_std", "batch_std" or "none".
    kl_reward: weight of the KL of whole completions, subtracted from the reward.
    temperature: of sampling and of every log-probability; there are no filters.
    max_new_tokens, stop, chat: of sampling.
    epochs, minibatches: updates of an iteration: every epoch takes each row once.
    micro_batches: parts of a minibatch, which changes no number; 0 chooses for
      the memory, see `training.parts`.
    dynamic_sampling: most further draws of prompts in place of groups whose rewards are
      all equal, which carry no gradient; 0 trains on what came first.
    kl_every: without a KL term, iterations between measurements of the KL to the start,
      which cost a pass of scoring each; the last one is always measured, 0 never.
    mask_truncated: leaves rows that the length limit cut out of the loss and of every
      baseline: they have not ended, and may be right by accident. False judges them as
      any other, or by `missing_eos` of the reward.
    old_logp: see `PPOConfig`.
    lora, compute_dtype, remat, max_tokens, max_rows, eval_every, seed: see `PPOConfig`.
  """

  optimizer: OptimizerConfig = dataclasses.field(
    default_factory=lambda: OptimizerConfig(
      learning_rate=1e-6, schedule="linear", eps=1e-5
    )
  )
  loss: GRPOLoss = dataclasses.field(default_factory=GRPOLoss)
  iterations: int = 100
  prompts_per_iteration: int = 16
  samples_per_prompt: int = 8
  baseline: Literal["group", "leave_one_out", "batch", "none"] = "group"
  scale: Literal["group_std", "batch_std", "none"] = "group_std"
  kl_reward: float = 0.0
  temperature: float = 1.0
  max_new_tokens: int = 256
  stop: tuple[str, ...] = ()
  chat: bool = False
  epochs: int = 1
  minibatches: int = 1
  micro_batches: int = 0
  dynamic_sampling: int = 0
  kl_every: int = 10
  mask_truncated: bool = True
  old_logp: Literal["auto", "recompute", "sampler"] = "auto"
  lora: LoRAConfig | None = None
  compute_dtype: Literal["float32", "bfloat16"] = "float32"
  remat: Literal["none", "full", "dots"] = "none"
  max_tokens: int = 16384
  max_rows: int = 128
  eval_every: int = 10
  seed: int = 0

  def __post_init__(self):
    check_kind("loss", self.loss, GRPOLoss, "grpo.GRPOLoss(kl_coef=...) gives one")
    positive = (
      "iterations", "prompts_per_iteration", "samples_per_prompt", "max_new_tokens",
      "epochs", "minibatches", "max_tokens", "max_rows", "eval_every",
    )  # fmt: skip
    for name in positive:
      if getattr(self, name) < 1:
        raise ConfigError(f"{name}={getattr(self, name)}: at least 1")
    for name in ("kl_reward", "dynamic_sampling", "kl_every", "micro_batches"):
      if not 0 <= getattr(self, name) < float("inf"):
        raise ConfigError(f"{name}={getattr(self, name)}: must not be negative")
    if not self.temperature > 0:
      raise ConfigError(
        f"temperature={self.temperature}: samples must differ, so it must be positive"
      )
    if self.samples_per_prompt == 1 and self.baseline in ("group", "leave_one_out"):
      raise ConfigError(
        f"samples_per_prompt=1 with baseline={self.baseline!r}: a sample alone is its "
        "own baseline, and nothing is learned; sample at least 2, or use 'batch'"
      )
    for name, legal in (
      ("baseline", ("group", "leave_one_out", "batch", "none")),
      ("scale", ("group_std", "batch_std", "none")),
      ("old_logp", ("auto", "recompute", "sampler")),
      ("compute_dtype", ("float32", "bfloat16")),
      ("remat", ("none", "full", "dots")),
    ):
      if getattr(self, name) not in legal:
        raise ConfigError(f"{name}={getattr(self, name)!r}: choose one of {legal}")
    rng.check_seed(self.seed)


_PRESETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
  "grpo": ({}, {"kl_coef": 0.04}),
  "dr_grpo": ({"scale": "none"}, {"aggregate": "constant"}),
  "dapo": ({"dynamic_sampling": 4}, {"clip_high": 0.28, "aggregate": "token"}),
  "rloo": (
    {"baseline": "leave_one_out", "scale": "none", "kl_reward": 0.05},
    {"clip": False, "aggregate": "constant"},
  ),
  "reinforce": (
    {"baseline": "batch", "scale": "none"},
    {"clip": False, "aggregate": "token"},
  ),
}


def _meant(name: str, names: list[str]) -> str:
  """What an unknown setting may have meant: a part's field, or one of like name."""
  for part, owner in (("loss", GRPOLoss), ("optimizer", OptimizerConfig)):
    if any(name == field.name for field in dataclasses.fields(owner)):
      return f"; it is one of {part}={owner.__name__}({name}=...)"
  return nearest(name, names, "settings")


def preset(name: str, **changes: Any) -> GRPOConfig:
  """The settings of "grpo", "dr_grpo", "dapo", "rloo" or "reinforce".

  Args:
    name: of the method.
    changes: further settings; `loss` replaces the preset's whole.
  """
  if name not in _PRESETS:
    raise ConfigError(f"preset {name!r}: choose one of {tuple(_PRESETS)}")
  names = [field.name for field in dataclasses.fields(GRPOConfig)]
  for one in changes:
    if one not in names:
      raise ConfigError(f"GRPO has no setting {one!r}{_meant(one, names)}")
  settings, loss = _PRESETS[name]
  return GRPOConfig(**{"loss": GRPOLoss(**loss), **settings, **changes})


# ------------------------------------------------------------------------ the loss


def grpo_sums(
  model: Decoder,
  loss: GRPOLoss,
  params: dict,
  batch: RLBatch,
  base: dict | None,
  temperature: jax.Array,
) -> Sums:
  """Sums of the loss; pure.

  Args:
    model: the decoder.
    loss: static settings.
    params: {"policy": ...}, or {"lora": ...} over `base`.
    batch: rows of an iteration; `ref_logp` is read where `loss.kl_coef` is not 0.
    base: frozen parameters under the adapters, else None.
    temperature: scalar, the one that sampled.
  """
  logp_BC, entropy_BC = completion_logp(
    model,
    params.get("policy", base),
    batch.tokens,
    batch.mask,
    batch.start,
    batch.loss_mask.shape[1],
    temperature,
    params.get("lora"),
  )
  mask_BC = batch.loss_mask
  (total, denominator), stats = _surrogate(
    loss, logp_BC, batch.old_logp, batch.advantage, mask_BC, batch.behaviour_logp
  )
  stats["policy_loss"] = total, denominator
  if loss.kl_coef:
    extra, _ = _kl(loss, logp_BC, batch.ref_logp, mask_BC)
    total += loss.kl_coef * extra
    stats["kl_loss"] = extra, denominator
  if loss.entropy_coef:
    bonus, _ = policies.entropy_loss(
      entropy_BC, mask_BC, loss.aggregate, loss.constant_length
    )
    total -= loss.entropy_coef * bonus
  entropy_BC = jnp.where(mask_BC, jax.lax.stop_gradient(entropy_BC), 0.0)
  stats["entropy"] = jnp.sum(entropy_BC), jnp.sum(mask_BC, dtype=jnp.float32)
  return {"loss": (total, denominator), **stats}


def _surrogate(loss: GRPOLoss, logp_BC, old_logp_BC, advantage_BC, mask_BC, sampler_BC):
  return policies.policy_loss(
    logp_BC,
    old_logp_BC,
    advantage_BC,
    mask_BC,
    clip_low=loss.clip_low,
    clip_high=loss.clip_high,
    dual_clip=loss.dual_clip,
    aggregate=loss.aggregate,
    constant_length=loss.constant_length,
    importance=loss.importance,
    behaviour_logp_BC=sampler_BC,
    importance_cap=loss.importance_cap,
    clip=loss.clip,
  )


def _kl(loss: GRPOLoss, logp_BC, ref_logp_BC, mask_BC):
  return kl.kl_loss(
    logp_BC,
    ref_logp_BC,
    mask_BC,
    loss.kl_estimator,
    loss.aggregate,
    loss.constant_length,
  )


def _static_loss(config: GRPOConfig) -> GRPOLoss:
  """The loss's settings, whole; `ConfigError` here, not after the first rollout."""
  loss = config.loss
  if loss.aggregate == "constant" and not loss.constant_length:
    loss = dataclasses.replace(loss, constant_length=config.max_new_tokens)
  x = jax.ShapeDtypeStruct((1, 1), jnp.float32)
  mask = jax.ShapeDtypeStruct((1, 1), bool)
  jax.eval_shape(functools.partial(_surrogate, loss), x, x, x, mask, x)
  jax.eval_shape(functools.partial(_kl, loss), x, x, mask)
  return loss


@functools.lru_cache(maxsize=16)
def make_train_step(
  model: Decoder, loss: GRPOLoss, optimizer: OptimizerConfig, micro_batches: int = 1
):
  """`step(state, RLBatch, base, temperature)`; pure, jitted, donated.

  Equal arguments give the same function, so that runs compile once.
  """
  sums = functools.partial(grpo_sums, model, loss)
  return make_step(
    sums, optimizer, micro_batches=micro_batches, mesh=model.mesh, model=model
  )


# ------------------------------------------------------------------------ the run


def run(
  policy: Policy,
  examples: Prompts,
  reward: Any,
  config: GRPOConfig,
  *,
  reference: Policy | None = None,
  dev_score: Callable[[Policy], float] | None = None,
  on_event: OnEvent = None,
  saving: Saving | None = None,
) -> RLResult:
  """Runs GRPO.

  Args:
    policy: where to start; its parameters are not changed.
    examples: the training prompts, see `tasks.prompts`.
    reward: in any form, see `rewards.forms`; rewards of steps are added to that of
      their row.
    config: see `GRPOConfig`.
    reference: what the KL is measured to; the policy at the start when None.
    dev_score: of a policy, larger is better; chooses what is returned.
    on_event: called with ("sample" | "train" | "iteration" | "resume", values); see
      `training.progress` for None and False.
    saving: saves the run, and goes on with what it has saved.

  Raises:
    ConfigError, DataError: before any device work.
    RewardError: of the reward.
    DivergenceError: the first update contradicts what must hold of a first update, or
      losses are not finite.
    CheckpointError, StoppedError: see `training.saving`.
  """
  check_kind("config", config, GRPOConfig, "grpo.preset('grpo', ...) gives one")
  examples = check_run(policy, as_examples(examples), config, reference)
  reward = as_reward(reward, examples)
  _static_loss(config)
  tell = listener(on_event, config.iterations)
  run_ = _Run(policy, examples, config, reference)
  one = lambda index: run_.iterate(index, reward, tell)
  return loop(one, run_, policy, examples, config, dev_score, tell, saving)


_advantages = jax.jit(group_advantage, static_argnums=(2, 3, 4))


class _Run:
  """The state of a run, and one iteration of it."""

  def __init__(self, policy: Policy, examples, config: GRPOConfig, reference):
    self.config, self.examples = config, examples
    self.trainee = Trainee(
      policy,
      config.optimizer,
      config.iterations * config.epochs * config.minibatches,
      lora=config.lora,
      dtype=config.compute_dtype,
      remat=config.remat,
      seed=config.seed,
    )
    start = self.trainee.start
    self.mesh = start.model.mesh
    self.needs_reference = bool(config.loss.kl_coef or config.kl_reward)
    self.step = make_train_step(
      start.model, _static_loss(config), config.optimizer, config.micro_batches
    )
    self.updater = Updater(self.trainee, self.step, config, reference)
    self.guards, self.timers = [self.updater.guard], PhaseTimers()
    self.draws = 0

  def arrays(self) -> dict[str, Any]:
    """See `iterations.State`."""
    return {"policy": self.trainee.state}

  def notes(self) -> dict[str, Any]:
    """See `iterations.State`."""
    return {"draws": self.draws, "updater": self.updater.notes()}

  def go_on(self, arrays: dict[str, Any], notes: Mapping[str, Any]) -> None:
    """See `iterations.State`."""
    self.trainee.state = go_on_from(arrays["policy"], self.trainee.state)
    self.draws = notes["draws"]
    self.updater.go_on(notes["updater"])

  def iterate(self, index: int, reward: RewardOf, tell) -> dict[str, float]:
    """Rollout and rewards, scores, advantages, updates."""
    config, timers = self.config, self.timers
    before = self.draws
    rollout, judged, seen = self._collect(reward, tell, timers)
    rows = rollouts.region(rollout)
    with timers.phase("score"):
      logps = self.updater.start_logps(index, rows, self._measures_kl(index))
      old_logp, ref_logp, gap = logps()
    with timers.phase("advantages"):
      batch, stats = self._batch(rollout, judged, rows, old_logp, ref_logp)
    stats |= gap | seen
    with timers.phase("update"):
      stats |= self._update(index, batch, tell)
    counts = hosts.each_part(int(batch.loss_mask.sum()), self.mesh)
    tokens = sum(counts) * config.epochs
    seconds = timers.pop()
    stats["update/tokens_per_second"] = tokens / max(
      seconds.get("time/update", 0.0), 1e-9
    )
    stats["update_tokens"] = tokens
    rows_drawn = config.prompts_per_iteration * config.samples_per_prompt
    stats["samples"] = (self.draws - before) * rows_drawn
    return stats | seconds

  def _collect(
    self, reward: RewardOf, tell, timers: PhaseTimers
  ) -> tuple[Rollout, Reward, dict[str, float]]:
    """Rows with their rewards, and the numbers of all that was sampled.

    With dynamic sampling the rows are of groups that differ. The numbers are of the
    others too: those of groups that were chosen say little about the policy.
    """
    config = self.config
    need, size = config.prompts_per_iteration, config.samples_per_prompt
    own = need // hosts.share(self.mesh).of
    kept, spare, first_equal = [], [], 0.0
    for attempt in range(config.dynamic_sampling + 1):
      with timers.phase("rollout"):
        prompts = rollouts.prompts_of(self.examples, self.draws, need, config.seed)
        prompts = hosts.own_part(prompts, self.mesh)
        rollout = rollouts.sample(
          self.trainee.merged(),
          prompts,
          samples=size,
          temperature=config.temperature,
          max_new_tokens=config.max_new_tokens,
          stop=config.stop,
          chat=config.chat,
          seed=config.seed,
          step=self.draws,
          max_rows=config.max_rows,
          on_progress=lambda done, of: tell("sample", {"done": done, "of": of}),
        )
      self.draws += 1
      with timers.phase("reward"):
        judged = rollouts.judge(reward, rollout, prompts, self.mesh)
        judged = rollouts.with_steps_added(judged, rollout)
      equal_G = _equal_groups(judged, self._counted(rollout, judged), size)
      if attempt == 0:
        first_equal = float(hosts.together(equal_G, self.mesh).mean())
      for group, equal in enumerate(equal_G):
        (spare if equal else kept).append((rollout, judged, group))
      if all(hosts.everyone(len(kept) >= own)):
        break
    groups = kept + spare
    drawn = {"groups/equal": first_equal, "groups/draws": float(attempt + 1)}
    if attempt:
      rollout, judged = rollouts.join_groups(groups, size)
    ends = self.trainee.start.eos_ids
    seen = rollouts.rollout_metrics(rollout, judged, self.mesh, ends) | drawn
    # Where too few groups differ the rest is filled up: they have no gradient.
    if attempt:
      rollout, judged = rollouts.join_groups(groups[:own], size)
    return rollout, judged, seen

  def _measures_kl(self, index: int) -> bool:
    """Whether the reference scores this iteration's rows."""
    every, last = self.config.kl_every, index + 1 == self.config.iterations
    return self.needs_reference or bool(every and (last or index % every == 0))

  def _counted(self, rollout: Rollout, judged: Reward) -> np.ndarray:
    """bool [B]: rows that train, and that baselines are made of."""
    if self.config.mask_truncated:
      return judged.judged & rollout.finished
    return judged.judged

  def _batch(self, rollout, judged: Reward, rows: Region, old_logp, ref_logp):
    """The rows with their advantages, and the numbers that go with them."""
    config = self.config
    counted_B = self._counted(rollout, judged)
    mask_BC = rows.chosen & counted_B[:, None]
    value_B = np.where(counted_B, judged.value, 0.0).astype(np.float32)
    stats = {}
    if ref_logp is not None:
      # Of all that was sampled, rows that were cut as well.
      kl_B = np.where(rows.chosen, old_logp - ref_logp, 0.0).sum(1)
      value_B = value_B - config.kl_reward * kl_B
      stats["kl/sequence"] = float(hosts.together(kl_B, self.mesh).mean())
    value_B, judged_B, trained_B = hosts.together(
      (value_B, counted_B, mask_BC.any(1)), self.mesh
    )
    advantage_B, found = jax.device_get(
      _advantages(
        *jax.device_put((value_B, judged_B)),
        config.samples_per_prompt,
        config.baseline,
        config.scale,
      )
    )
    stats |= {
      f"advantage/{name}": float(total) / max(float(count), 1.0)
      for name, (total, count) in found.items()
    }
    some_B = advantage_B[trained_B] if trained_B.any() else np.zeros(1)
    stats["advantage/mean"] = float(some_B.mean(dtype=np.float64))
    stats["advantage/std"] = float(some_B.std(dtype=np.float64))
    advantage_B = hosts.own_part(advantage_B, self.mesh)
    batch = RLBatch(
      tokens=rows.tokens,
      mask=rows.mask,
      start=rows.start,
      loss_mask=mask_BC,
      old_logp=old_logp,
      behaviour_logp=self.updater.behaviour_logp(rows),
      ref_logp=ref_logp if config.loss.kl_coef else None,
      advantage=np.where(mask_BC, advantage_B[:, None], 0.0).astype(np.float32),
    )
    return batch, stats

  def _update(self, index: int, batch: RLBatch, tell) -> dict[str, float]:
    config, means = self.config, Means()
    of, done = config.epochs * config.minibatches, 0
    if not any(hosts.everyone(bool(batch.loss_mask.any()))):
      log.warning(
        "iteration %d: every row was cut by the length limit or not judged; nothing "
        "is updated",
        index,
      )
      return {"update/skipped": float(of)}
    for epoch in range(config.epochs):
      parts = rollouts.minibatches(
        batch, config.minibatches, config.seed, index, epoch, self.mesh
      )
      for part in parts:
        done += 1
        name = f"iteration {index}, update {done} of {of}"
        means.add(self.updater.update(part, name))
        tell("train", {"step": done, "of": of})
    stats = means.read() | self.updater.first_mismatch(means)
    stats["update/skipped"] = stats.pop("skipped")
    return stats


def _equal_groups(judged: Reward, counted_B: np.ndarray, size: int) -> np.ndarray:
  """bool [groups]: all rewards of the group that count are equal, or there are none."""
  value_GK = judged.value.reshape(-1, size)
  known_GK = counted_B.reshape(-1, size)
  low = np.where(known_GK, value_GK, np.inf).min(1)
  high = np.where(known_GK, value_GK, -np.inf).max(1)
  return ~(high > low)

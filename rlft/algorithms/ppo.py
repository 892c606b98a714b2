"""PPO: clipped policy gradient with a learned value function and a KL reward.

  r_t    = r_env,t - kl_coef * kl_t                    kl_t of policy and reference
  A_t    = GAE(r, V; gamma, lambda) over the tokens that the policy chose, whitened
  L_pi   = -mean min(rho A, clip(rho, 1 - eps, 1 + eps) A)
  L_V    = 1/2 mean max((V - R)^2, (clip(V, V_old +- eps_V) - R)^2)

Source: Schulman et al. 2017 (arXiv 1707.06347); for language models Ziegler et al.
2019 (1909.08593) and Stiennon et al. 2020 (2009.01325), in the details that Huang et
al. 2024 (2403.17031) found to matter; on reasoning Havrilla et al. 2024 (2403.04642).

Policy, reference, value and reward model lie on one mesh. The reference costs nothing
beside a LoRA policy (it is the base without its adapters), and the value model little
with a shared trunk (it is a second head).

Letters: B rows, T tokens, C completion columns.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rlft.core import hosts, rng
from rlft.core.errors import ConfigError, check_kind
from rlft.core.types import Example, Reward
from rlft.models import scalar as scalars
from rlft.models.decoder import Decoder
from rlft.models.hub import Policy
from rlft.models.lora import LoRAConfig
from rlft.models.scalar import ScalarModel
from rlft.objectives import advantages as adv
from rlft.objectives import kl
from rlft.objectives import policy as policies
from rlft.objectives import value as values
from rlft.rewards.forms import as_reward
from rlft.sampling.score import completion_hidden, hidden_logp
from rlft.tasks.prompts import Prompts, as_examples
from rlft.training import rollouts
from rlft.training.divergence import Guard
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
from rlft.training.step import Sums, go_on_from, init_state, make_step
from rlft.training.trainee import Trainee

log = logging.getLogger(__name__)


def _rl_optimizer(rate: float) -> OptimizerConfig:
  return OptimizerConfig(learning_rate=rate, schedule="linear", eps=1e-5)


@dataclasses.dataclass(frozen=True)
class PPOLoss:
  """What is static in the train step.

  Attributes:
    clip_range: eps of the policy's ratio.
    dual_clip: bound on -A times the ratio for negative advantages (above 1); 0 is off.
    value_clip: eps_V; 0 is off.
    value_coef: weight of L_V beside L_pi, where they share a trunk.
    entropy_coef: of an entropy bonus.
    aggregate: what a mean is over: "token" (all tokens of the batch alike), "sequence"
      (rows alike) or "constant" (a sum over `constant_length`, as in Dr. GRPO).
    constant_length: see above; 0 takes max_new_tokens.
    importance_cap: cap on pi_old / pi_sampler, where those were measured apart
      (truncated importance weights); 0 is off.
  """

  clip_range: float = 0.2
  dual_clip: float = 0.0
  value_clip: float = 0.2
  value_coef: float = 0.1
  entropy_coef: float = 0.0
  aggregate: Literal["token", "sequence", "constant"] = "token"
  constant_length: int = 0
  importance_cap: float = 0.0


@dataclasses.dataclass(frozen=True)
class PPOConfig:
  """PPO.

  Attributes:
    optimizer, value_optimizer: of the policy, and of a separate value model.
    loss: see `PPOLoss`.
    iterations: rollouts.
    prompts_per_iteration, samples_per_prompt: B is their product.
    temperature: of sampling and of every log-probability; there are no filters.
    max_new_tokens, stop, chat: of sampling.
    epochs, minibatches: updates of an iteration: every epoch takes each row once.
    micro_batches: parts of a minibatch, which changes no number; 0 chooses for
      the memory, see `training.parts`.
    gamma, gae_lambda: of GAE.
    kl_coef: weight of the KL reward, and the start of an adaptive one.
    kl_estimator: "k1", "k2" or "k3", see `objectives.kl`.
    kl_target: adapts kl_coef to hold the KL of a sequence there (nats); 0 keeps it.
    kl_horizon: episodes over which it adapts.
    whiten_advantages: whether advantages get mean 0 and variance 1 over an iteration.
    scale_rewards: whether rows' rewards, those of their steps included, get standard
      deviation 1 over an iteration; their mean stays.
    truncated: what a row is whose completion the length limit cut, which has not ended
      and may be right by accident ("#### 1" of "#### 12"): "mask" leaves it out,
      "bootstrap" takes the value of its last state in place of its score, "score"
      judges it as any other, or by `missing_eos` of the reward.
    value: "separate" model, or a head on a "shared" trunk.
    critic_warmup: first iterations that train the (separate) value model only.
    old_logp: where old log-probabilities come from: "recompute" them, take the
      "sampler"'s, or "auto": the sampler's while they agree within 1e-4, measured in
      the first iteration and every 16th. What an iteration's first update sees of it
      is always logged.
    lora: trains adapters, the reference being the base without them; None trains all.
    compute_dtype, remat: of the models; masters stay float32.
    max_tokens: of a block of rows that is scored at once.
    max_rows: completions in flight.
    eval_every: iterations between dev scores.
    seed: of sampling, prompt order and minibatches.
  """

  optimizer: OptimizerConfig = dataclasses.field(
    default_factory=lambda: _rl_optimizer(1e-6)
  )
  value_optimizer: OptimizerConfig = dataclasses.field(
    default_factory=lambda: _rl_optimizer(1e-5)
  )
  loss: PPOLoss = dataclasses.field(default_factory=PPOLoss)
  iterations: int = 100
  prompts_per_iteration: int = 32
  samples_per_prompt: int = 4
  temperature: float = 1.0
  max_new_tokens: int = 256
  stop: tuple[str, ...] = ()
  chat: bool = False
  epochs: int = 4
  minibatches: int = 4
  micro_batches: int = 0
  gamma: float = 1.0
  gae_lambda: float = 0.95
  kl_coef: float = 0.05
  kl_estimator: Literal["k1", "k2", "k3"] = "k1"
  kl_target: float = 0.0
  kl_horizon: int = 10_000
  whiten_advantages: bool = True
  scale_rewards: bool = False
  truncated: Literal["score", "mask", "bootstrap"] = "mask"
  value: Literal["separate", "shared"] = "separate"
  critic_warmup: int = 0
  old_logp: Literal["auto", "recompute", "sampler"] = "auto"
  lora: LoRAConfig | None = None
  compute_dtype: Literal["float32", "bfloat16"] = "float32"
  remat: Literal["none", "full", "dots"] = "none"
  max_tokens: int = 16384
  max_rows: int = 128
  eval_every: int = 10
  seed: int = 0

  def __post_init__(self):
    check_kind("loss", self.loss, PPOLoss, "ppo.PPOLoss(...) gives one")
    positive = (
      "iterations", "prompts_per_iteration", "samples_per_prompt", "max_new_tokens",
      "epochs", "minibatches", "kl_horizon", "max_tokens", "max_rows",
      "eval_every",
    )  # fmt: skip
    for name in positive:
      if getattr(self, name) < 1:
        raise ConfigError(f"{name}={getattr(self, name)}: at least 1")
    for name in ("kl_coef", "kl_target", "critic_warmup", "micro_batches"):
      if not 0 <= getattr(self, name) < float("inf"):
        raise ConfigError(f"{name}={getattr(self, name)}: must not be negative")
    for name in ("gamma", "gae_lambda"):
      if not 0 <= getattr(self, name) <= 1:
        raise ConfigError(f"{name}={getattr(self, name)}: from 0 to 1")
    if not self.temperature > 0:
      raise ConfigError(
        f"temperature={self.temperature}: samples must differ, so it must be positive"
      )
    if self.value == "shared" and self.loss.aggregate != "token":
      raise ConfigError(
        f"value='shared' adds two means over tokens; loss.aggregate="
        f"{self.loss.aggregate!r} needs value='separate'"
      )
    if self.value == "shared" and self.critic_warmup:
      raise ConfigError(
        f"critic_warmup={self.critic_warmup} trains a value model alone: it needs "
        "value='separate'"
      )
    if self.kl_target and not self.kl_coef:
      raise ConfigError("kl_target adapts kl_coef by factors: start above 0")
    for name, legal in (
      ("kl_estimator", ("k1", "k2", "k3")),
      ("truncated", ("score", "mask", "bootstrap")),
      ("value", ("separate", "shared")),
      ("old_logp", ("auto", "recompute", "sampler")),
      ("compute_dtype", ("float32", "bfloat16")),
      ("remat", ("none", "full", "dots")),
    ):
      if getattr(self, name) not in legal:
        raise ConfigError(f"{name}={getattr(self, name)!r}: choose one of {legal}")
    rng.check_seed(self.seed)


# ------------------------------------------------------------------------ the losses


def policy_sums(
  model: Decoder,
  loss: PPOLoss,
  params: dict,
  batch: RLBatch,
  base: dict | None,
  temperature: jax.Array,
) -> tuple[Sums, jax.Array]:
  """Sums of the policy's loss, and the hidden states that a value head may read; pure.

  Args:
    model: the decoder.
    loss: static settings.
    params: {"policy": ...}, or {"lora": ...} over `base`.
    batch: rows of an iteration.
    base: frozen parameters under the adapters, else None.
    temperature: scalar, the one that sampled.

  Returns:
    ({"loss": (sum, denominator), ...}, hidden_BCE).
  """
  weights = params.get("policy", base)
  columns = batch.loss_mask.shape[1]
  rows = batch.tokens, batch.mask, batch.start
  hidden_BCE = completion_hidden(model, weights, *rows, columns, params.get("lora"))
  logp_BC, entropy_BC = hidden_logp(model, weights, hidden_BCE, *rows, temperature)
  (total, denominator), stats = _surrogate(
    loss,
    logp_BC,
    batch.old_logp,
    batch.advantage,
    batch.loss_mask,
    batch.behaviour_logp,
  )
  stats["policy_loss"] = total, denominator
  if loss.entropy_coef:
    bonus, _ = policies.entropy_loss(
      entropy_BC, batch.loss_mask, loss.aggregate, loss.constant_length
    )
    total -= loss.entropy_coef * bonus
  entropy_BC = jnp.where(batch.loss_mask, jax.lax.stop_gradient(entropy_BC), 0.0)
  stats["entropy"] = jnp.sum(entropy_BC), jnp.sum(batch.loss_mask, dtype=jnp.float32)
  return {"loss": (total, denominator), **stats}, hidden_BCE


def _surrogate(loss: PPOLoss, logp_BC, old_logp_BC, advantage_BC, mask_BC, sampler_BC):
  return policies.policy_loss(
    logp_BC,
    old_logp_BC,
    advantage_BC,
    mask_BC,
    clip_low=loss.clip_range,
    clip_high=loss.clip_range,
    dual_clip=loss.dual_clip,
    aggregate=loss.aggregate,
    constant_length=loss.constant_length,
    behaviour_logp_BC=sampler_BC,
    importance_cap=loss.importance_cap,
  )


def _static_loss(config: PPOConfig) -> PPOLoss:
  """The loss's settings, whole; `ConfigError` here, not after the first rollout."""
  loss = config.loss
  if loss.aggregate == "constant" and not loss.constant_length:
    loss = dataclasses.replace(loss, constant_length=config.max_new_tokens)
  x = jax.ShapeDtypeStruct((1, 1), jnp.float32)
  mask = jax.ShapeDtypeStruct((1, 1), bool)
  jax.eval_shape(functools.partial(_surrogate, loss), x, x, x, mask, x)
  value_loss = functools.partial(values.value_loss, clip_range=loss.value_clip)
  jax.eval_shape(value_loss, x, x, x, mask)
  return loss


def value_sums(value_BC: jax.Array, loss: PPOLoss, batch: RLBatch) -> Sums:
  """Sums of the value loss of values [B, C]; pure."""
  pair, stats = values.value_loss(
    value_BC, batch.old_value, batch.returns, batch.loss_mask, loss.value_clip
  )
  return {"loss": pair, "value_loss": pair, **stats}


@functools.lru_cache(maxsize=16)
def make_policy_step(
  model: Decoder, loss: PPOLoss, optimizer: OptimizerConfig, micro_batches: int = 1
):
  """`step(state, RLBatch, base, temperature)`: updates the policy, and with it a value
  head that shares its trunk; pure, jitted, donated. Equal arguments, one compilation.
  """

  def sums(params, batch, base, temperature):
    out, hidden_BCE = policy_sums(model, loss, params, batch, base, temperature)
    if "head" not in params:
      return out
    value_BC = scalars.scalar_head(params["head"], hidden_BCE)
    critic = value_sums(value_BC, loss, batch)
    # Both means are over the same tokens (see PPOConfig), so their sums can be added.
    total, denominator = out["loss"]
    out["loss"] = total + loss.value_coef * critic.pop("loss")[0], denominator
    return out | critic

  return make_step(
    sums, optimizer, micro_batches=micro_batches, mesh=model.mesh, model=model
  )


@functools.lru_cache(maxsize=16)
def make_value_step(
  model: Decoder, loss: PPOLoss, optimizer: OptimizerConfig, micro_batches: int = 1
):
  """`step(state, RLBatch)` of a separate value model; pure, jitted, donated."""

  def sums(params, batch):
    hidden_BCE = completion_hidden(
      model,
      params["trunk"],
      batch.tokens,
      batch.mask,
      batch.start,
      batch.loss_mask.shape[1],
    )
    return value_sums(scalars.scalar_head(params["head"], hidden_BCE), loss, batch)

  return make_step(
    sums, optimizer, micro_batches=micro_batches, mesh=model.mesh, model=model
  )


# ------------------------------------------------------------------- the advantages


@functools.partial(jax.jit, static_argnames=("estimator", "whiten"))
def estimate_advantages(
  reward_BC: jax.Array,
  value_BC: jax.Array,
  logp_BC: jax.Array,
  ref_logp_BC: jax.Array,
  mask_BC: jax.Array,
  bootstrap_B: jax.Array,
  kl_coef: jax.Array,
  gamma: jax.Array,
  gae_lambda: jax.Array,
  *,
  estimator: str,
  whiten: bool,
) -> dict[str, jax.Array]:
  """KL reward, GAE, whitening; the numbers that go with them.

  Args:
    reward_BC: of the environment, on the tokens where it is paid.
    value_BC: of the state before each token.
    logp_BC, ref_logp_BC: of policy and reference.
    mask_BC: bool, tokens that the policy chose, of rows that train.
    bootstrap_B: value after the last token; 0 where the row has ended.
    kl_coef, gamma, gae_lambda: scalars.
    estimator: of the KL, static.
    whiten: static.

  Returns:
    advantage, returns [B, C]; and scalars by the name they are logged under.
  """
  kl_BC = jnp.where(mask_BC, kl.kl_token(logp_BC, ref_logp_BC, estimator), 0.0)
  # k1 of the sampled tokens, whatever is paid: summed over a row it estimates the KL of
  # whole completions, which is what the controller holds.
  sequence_kl = kl.sequence_kl(logp_BC, ref_logp_BC, mask_BC)
  total_BC = jnp.where(mask_BC, reward_BC, 0.0) - kl_coef * kl_BC
  advantage_BC, returns_BC = adv.gae(
    total_BC, value_BC, mask_BC, gamma, gae_lambda, bootstrap_B
  )
  count = jnp.maximum(jnp.sum(mask_BC), 1)
  rows = jnp.maximum(jnp.sum(jnp.any(mask_BC, axis=1)), 1)
  mean = jnp.sum(jnp.where(mask_BC, advantage_BC, 0.0)) / count
  variance = jnp.sum(jnp.where(mask_BC, (advantage_BC - mean) ** 2, 0.0)) / count
  out = {
    "kl/sequence": sequence_kl,
    "kl/token": jnp.sum(kl_BC) / count,
    "reward/with_kl": jnp.sum(total_BC) / rows,
    "advantage/mean": mean,
    "advantage/std": jnp.sqrt(variance),
    "value/mean": jnp.sum(jnp.where(mask_BC, value_BC, 0.0)) / count,
    "value/explained_variance": values.explained_variance(
      value_BC, returns_BC, mask_BC
    ),
    "returns": returns_BC,
  }
  if whiten:
    advantage_BC = adv.whiten(advantage_BC, mask_BC)
  return out | {"advantage": advantage_BC}


# ------------------------------------------------------------------------ the run


def run(
  policy: Policy,
  examples: Prompts,
  reward: Any,
  config: PPOConfig,
  *,
  value: ScalarModel | None = None,
  reference: Policy | None = None,
  dev_score: Callable[[Policy], float] | None = None,
  on_event: OnEvent = None,
  saving: Saving | None = None,
) -> RLResult:
  """Runs PPO.

  Args:
    policy: where to start; its parameters are not changed.
    examples: the training prompts, see `tasks.prompts`.
    reward: in any form, see `rewards.forms`; or a learned one, see `rewards.learned`.
    config: see `PPOConfig`.
    value: a separate value model to start from, such as `scalar.as_value` of the reward
      model; a zero head on a copy of the policy when None.
    reference: what the KL is measured to; the policy at the start when None.
    dev_score: of a policy, larger is better; chooses what is returned.
    on_event: called with ("sample" | "train" | "iteration" | "resume", values); see
      `training.progress` for None and False.
    saving: saves the run, and goes on with what it has saved.

  Returns:
    `RLResult`.

  Raises:
    ConfigError, DataError: before any device work.
    RewardError: of the reward.
    DivergenceError: the first update contradicts what must hold of a first update, or
      losses are not finite.
    CheckpointError, StoppedError: see `training.saving`.
  """
  check_kind("config", config, PPOConfig, "ppo.PPOConfig(...) gives one")
  examples = check_run(policy, as_examples(examples), config, reference)
  reward = as_reward(reward, examples)
  _check(policy, config, value)
  tell = listener(on_event, config.iterations)
  run_ = _Run(policy, config, value, reference)

  def one(index: int) -> dict[str, float]:
    prompts = rollouts.prompts_of(
      examples, index, config.prompts_per_iteration, config.seed
    )
    return run_.iterate(index, prompts, reward, tell)

  result = loop(one, run_, policy, examples, config, dev_score, tell, saving)
  if config.value == "separate":
    result.value = run_.value_model()
  return result


def _check(policy: Policy, config: PPOConfig, value: ScalarModel | None) -> None:
  """Raises `ConfigError` where losses or value model do not fit; no device work."""
  _static_loss(config)
  if value is None:
    return
  if config.value == "shared":
    raise ConfigError("value='shared' is a head on the policy: pass no value model")
  if value.kind != "value":
    raise ConfigError(
      f"value is a model of kind {value.kind!r}, whose values are not normalised: pass "
      "scalar.as_value of it"
    )
  scalars.check_same_tokenizer(policy, value)


def _scaled(score_B, step_BC, scored_B, mesh) -> tuple[np.ndarray, np.ndarray]:
  """Rewards of rows over the deviation of their sums, whose mean over what was scored
  stays; steps are divided, and the score takes the rest."""
  own_B = score_B + step_BC.sum(1)
  sum_B, of_B = hosts.together((own_B, scored_B), mesh)
  white_B = hosts.own_part(np.asarray(adv.whiten(sum_B, of_B, shift_mean=False)), mesh)
  std = float(sum_B[of_B].std()) if of_B.any() else 0.0
  step_BC = step_BC / (std if std > 1e-4 else 1.0)
  return np.where(scored_B, white_B - step_BC.sum(1), score_B), step_BC


class _Run:
  """The state of a run, and one iteration of it."""

  def __init__(self, policy: Policy, config: PPOConfig, value, reference):
    self.config = config
    shared = config.value == "shared"
    per_iteration = config.epochs * config.minibatches
    head = scalars.init_scalar(policy, init="zero").params["head"]
    self.trainee = Trainee(
      policy,
      config.optimizer,
      max(1, (config.iterations - config.critic_warmup) * per_iteration),
      lora=config.lora,
      head=head if shared else None,
      dtype=config.compute_dtype,
      remat=config.remat,
      seed=config.seed,
    )
    start = self.trainee.start
    loss = _static_loss(config)
    self.step = make_policy_step(
      start.model, loss, config.optimizer, config.micro_batches
    )
    self.updater = Updater(self.trainee, self.step, config, reference)
    self.guards, self.timers = [self.updater.guard], PhaseTimers()
    self.value = self.value_state = None
    if not shared:
      value = value or scalars.init_scalar(policy, init="zero")
      value = scalars.place(value, start.model.mesh)
      model = value.model.clone(dtype=start.model.dtype, remat=config.remat)
      self.value = dataclasses.replace(value, model=model)
      updates = config.iterations * per_iteration
      self.value_state = init_state(value.params, config.value_optimizer, updates)
      self.value_step = make_value_step(
        model, loss, config.value_optimizer, config.micro_batches
      )
      self.critic_guard = Guard(config.value_optimizer, policy.tokenizer, "value model")
      self.guards.append(self.critic_guard)
    self.kl_coef = config.kl_coef

  def arrays(self) -> dict[str, Any]:
    """See `iterations.State`."""
    own = {"policy": self.trainee.state}
    return own if self.value_state is None else own | {"value": self.value_state}

  def notes(self) -> dict[str, Any]:
    """See `iterations.State`."""
    return {
      "kl_coef": float(self.kl_coef),
      "kl_start": self.config.kl_coef,
      "updater": self.updater.notes(),
    }

  def go_on(self, arrays: dict[str, Any], notes: Mapping[str, Any]) -> None:
    """See `iterations.State`."""
    self.trainee.state = go_on_from(arrays["policy"], self.trainee.state)
    if self.value_state is not None:
      self.value_state = go_on_from(arrays["value"], self.value_state)
    # What a controller has found holds until it is given another start.
    start = self.config.kl_coef
    if self.config.kl_target and notes.get("kl_start", start) == start:
      self.kl_coef = notes["kl_coef"]
    self.updater.go_on(notes["updater"])

  def value_model(self) -> ScalarModel:
    """What estimates values now: the separate model, or trunk and head."""
    if self.value_state is not None:
      return dataclasses.replace(self.value, params=self.value_state.params)
    model = scalars.init_scalar(self.trainee.merged(), init="zero")
    params = model.params | {"head": self.trainee.state.params["head"]}
    return dataclasses.replace(model, params=params)

  def iterate(
    self, index: int, prompts: Sequence[Example], reward: RewardOf, tell
  ) -> dict[str, float]:
    """Rollout, scores and rewards, advantages, updates."""
    config, timers = self.config, self.timers
    mesh = self.trainee.start.model.mesh
    prompts = hosts.own_part(prompts, mesh)
    with timers.phase("rollout"):
      rollout = rollouts.sample(
        self.trainee.merged(),
        prompts,
        samples=config.samples_per_prompt,
        temperature=config.temperature,
        max_new_tokens=config.max_new_tokens,
        stop=config.stop,
        chat=config.chat,
        seed=config.seed,
        step=index,
        max_rows=config.max_rows,
        on_progress=lambda done, of: tell("sample", {"done": done, "of": of}),
      )
      rows = rollouts.region(rollout)
    # Programs are started, then the host judges while the device computes.
    with timers.phase("score"):
      logps = self.updater.start_logps(index, rows)
      value = rollouts.start_values(self.value_model(), rows, config.max_tokens)
    with timers.phase("reward"):
      judged = rollouts.judge(reward, rollout, prompts, mesh)
    with timers.phase("score"):
      old_logp, ref_logp, gap = logps()
      value_BC = value()
    with timers.phase("advantages"):
      batch, stats = self._batch(rollout, judged, rows, old_logp, ref_logp, value_BC)
    ends = self.trainee.start.eos_ids
    stats |= rollouts.rollout_metrics(rollout, judged, mesh, ends) | gap
    with timers.phase("update"):
      updates = self._update(index, batch, tell)
    trained = "ratio_mean" in updates
    trained_BC = batch.loss_mask
    counts = [int(trained_BC.sum()), int(trained_BC.any(1).sum()), len(trained_BC)]
    tokens, rows_trained, rows_sampled = np.sum(hosts.each_part(counts, mesh), axis=0)
    tokens = int(tokens) * config.epochs
    stats |= updates
    stats["kl/coef"] = self.kl_coef
    # A policy that stood still (warm-up, no judgement) says nothing of the coefficient.
    if config.kl_target and trained and np.isfinite(stats["kl/sequence"]):
      self.kl_coef = float(
        kl.adaptive_kl_coef(
          self.kl_coef,
          stats["kl/sequence"],
          config.kl_target,
          config.kl_horizon,
          int(rows_trained),  # the rows that the KL is a mean of
        )
      )
    seconds = timers.pop()
    stats["update/tokens_per_second"] = tokens / max(
      seconds.get("time/update", 0.0), 1e-9
    )
    stats["update_tokens"] = tokens if trained else 0
    stats["samples"] = int(rows_sampled)
    return stats | seconds

  def _batch(self, rollout, judged: Reward, rows: Region, old_logp, ref_logp, value_BC):
    """The rows with their advantages, and the numbers that go with them."""
    config, mesh = self.config, self.trainee.start.model.mesh
    columns = rows.columns
    scored_B = judged.judged
    if config.truncated != "score":
      scored_B = scored_B & rollout.finished
    trained_B = scored_B if config.truncated == "mask" else judged.judged
    mask_BC = rows.chosen & trained_B[:, None]
    score_B = np.where(scored_B, judged.value, 0.0).astype(np.float32)
    step_BC = np.zeros(mask_BC.shape, np.float32)
    if judged.step is not None:
      step_BC = np.where(mask_BC, judged.step[:, :columns], np.float32(0))
    if config.scale_rewards:
      score_B, step_BC = _scaled(score_B, step_BC, scored_B, mesh)
    reward_BC = rollouts.final_rewards(score_B, rows.chosen) + step_BC
    bootstrap_B = np.zeros(len(score_B), np.float32)
    if config.truncated == "bootstrap":
      after_B = np.take_along_axis(value_BC, rollout.lengths[:, None], axis=1)[:, 0]
      bootstrap_B = np.where(rollout.finished, 0.0, after_B).astype(np.float32)
    value_BC = np.where(rows.chosen, value_BC[:, :columns], np.float32(0))
    rows_of_all = reward_BC, value_BC, old_logp, ref_logp, mask_BC, bootstrap_B
    numbers = self.kl_coef, config.gamma, config.gae_lambda
    numbers = tuple(map(np.float32, numbers))
    where = mesh if hosts.several() else None  # one process has all rows on the host
    rows_of_all = hosts.place_own(rows_of_all, where)
    numbers = hosts.put(numbers, where)
    found = estimate_advantages(
      *rows_of_all,
      *numbers,
      estimator=config.kl_estimator, whiten=config.whiten_advantages,
    )  # fmt: skip
    found = {name: hosts.own_rows(x, mesh) for name, x in found.items()}
    batch = RLBatch(
      tokens=rows.tokens,
      mask=rows.mask,
      start=rows.start,
      loss_mask=mask_BC,
      old_logp=old_logp,
      behaviour_logp=self.updater.behaviour_logp(rows),
      advantage=found.pop("advantage"),
      returns=found.pop("returns"),
      old_value=value_BC,
    )
    return batch, {name: float(x) for name, x in found.items()}

  def _update(self, index: int, batch: RLBatch, tell) -> dict[str, float]:
    config, means, critic = self.config, Means(), Means()
    mesh = self.trainee.start.model.mesh
    of = config.epochs * config.minibatches
    if not any(hosts.everyone(bool(batch.loss_mask.any()))):
      log.warning(
        "iteration %d: every row was cut by the length limit or not judged; nothing "
        "is updated",
        index,
      )
      return {"update/skipped": float(of)}
    done = 0
    for epoch in range(config.epochs):
      parts = rollouts.minibatches(
        batch, config.minibatches, config.seed, index, epoch, mesh
      )
      for part in parts:
        done += 1
        name = f"iteration {index}, update {done} of {of}"
        if self.value_state is not None:
          self.value_state, metrics = self.value_step(self.value_state, part)
          critic.add(metrics)
          self.critic_guard.add(name, metrics, part)
        if index >= config.critic_warmup:
          means.add(self.updater.update(part, name))
        tell("train", {"step": done, "of": of})
    stats = means.read() | self.updater.first_mismatch(means)
    if "skipped" in stats:
      stats["update/skipped"] = stats.pop("skipped")
    stats |= {
      name if name.startswith("value") else f"value/{name}": x
      for name, x in critic.read().items()
    }
    return stats

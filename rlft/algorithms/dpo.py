"""DPO and IPO: a policy from preferences, without a reward model and without sampling.

  h    = (log pi(y_w|x) - log ref(y_w|x)) - (log pi(y_l|x) - log ref(y_l|x))
  dpo    -log sigmoid(beta h)
  ipo    (h - 1 / (2 beta))^2, log-probabilities averaged over tokens

y_w is the chosen side, y_l the rejected one; a log-probability is that of the
completion's tokens, its EOS included. The reference does not move, so its
log-probabilities are computed once, before the first update, and it needs no memory
while the policy trains. beta times a log-ratio is the policy's implicit reward.

Source: DPO Rafailov et al. 2023 (arXiv 2305.18290), eq. 7. IPO Azar et al. 2023
(2310.12036), eq. 17, which sums over tokens; the mean is TRL's: one goal, 1 / (2 beta),
then fits completions of any length.

Letters: B pairs of a batch, N pairs, T tokens; the axis of 2 holds (chosen, rejected).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from rlft.core.errors import ConfigError, DivergenceError, check_kind
from rlft.core.mesh import batch_shards
from rlft.core.rng import check_seed
from rlft.models.decoder import Decoder
from rlft.models.hub import Policy, check_policy
from rlft.models.lora import LoRAConfig
from rlft.models.scalar import check_same_tokenizer
from rlft.objectives import preference
from rlft.objectives.estimates import bootstrap_interval
from rlft.sampling.score import token_logp
from rlft.tasks.preferences import Rows, as_preferences
from rlft.training.data import encode_prompts, grouped, place
from rlft.training.divergence import Guard
from rlft.training.epochs import Order, fit
from rlft.training.metrics import PhaseTimers
from rlft.training.optimizer import OptimizerConfig, check_patterns
from rlft.training.pairs import (
  PairBatch,
  TokenPair,
  check_pair_ids,
  collate_pairs,
  encode_pairs,
)
from rlft.training.progress import OnStep, step_listener
from rlft.training.saving import Saving
from rlft.training.step import Sums, make_step
from rlft.training.trainee import Trainee

# How far the first loss may be from that of h = 0, as a share of it. In bfloat16 a
# long completion's sum is off by tenths of a nat between two programs.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}


@dataclasses.dataclass(frozen=True)
class DPOConfig:
  """Preference optimisation.

  Attributes:
    optimizer: see `OptimizerConfig`.
    beta: strength of the tie to the reference.
    kind: "dpo" or "ipo".
    label_smoothing: probability that a label is wrong, below 1/2; of "dpo".
    batch_size: pairs of an update.
    micro_batches: parts that an update is taken in, which changes no number; 0 chooses
      for the memory, see `training.parts`.
    epochs: passes over the pairs.
    max_length: longest side in tokens; longer pairs are dropped and counted.
    lora: trains adapters in place of all weights.
    chat: put prompts into the tokenizer's chat template.
    compute_dtype: of the forward and backward pass; the masters stay float32.
    remat: what the backward pass recomputes: "none", "full" or "dots".
    seed: of the order of the pairs, and of the adapters.
  """

  optimizer: OptimizerConfig = dataclasses.field(
    default_factory=lambda: OptimizerConfig(
      learning_rate=1e-6, schedule="linear", eps=1e-5
    )
  )
  beta: float = 0.1
  kind: Literal["dpo", "ipo"] = "dpo"
  label_smoothing: float = 0.0
  batch_size: int = 32
  micro_batches: int = 0
  epochs: int = 1
  max_length: int = 512
  lora: LoRAConfig | None = None
  chat: bool = False
  compute_dtype: Literal["float32", "bfloat16"] = "float32"
  remat: Literal["none", "full", "dots"] = "none"
  seed: int = 0

  def __post_init__(self):
    for name in ("batch_size", "epochs", "max_length"):
      if getattr(self, name) < 1:
        raise ConfigError(f"{name}={getattr(self, name)}: at least 1")
    for name, legal in (
      ("compute_dtype", ("float32", "bfloat16")),
      ("remat", ("none", "full", "dots")),
    ):
      if getattr(self, name) not in legal:
        raise ConfigError(f"{name}={getattr(self, name)!r}: choose one of {legal}")
    preference.check_dpo(self.beta, self.kind, self.label_smoothing)
    if self.micro_batches < 0:
      raise ConfigError(f"micro_batches={self.micro_batches}: 0 (chosen) or positive")
    check_seed(self.seed)


Interval = tuple[float, float, float]  # mean, and its 95 % interval


@dataclasses.dataclass(frozen=True)
class HeldOut:
  """How a policy orders pairs that it was not trained on; each prompt counts once.

  Attributes:
    accuracy: share of pairs whose chosen side has the higher implicit reward; equal
      ones count half, so that a policy which is its own reference has 1/2.
    margin: implicit reward of the chosen side minus that of the rejected one.
    likelier: share of pairs whose chosen side is the more probable one, whatever the
      reference says (for IPO, more probable a token).
    pairs: that were read.
  """

  accuracy: Interval
  margin: Interval
  likelier: Interval
  pairs: int


@dataclasses.dataclass
class DPOResult:
  """What training gave.

  Attributes:
    policy: the trained policy, adapters merged in.
    losses: mean loss of every update, before it.
    accuracies: share of an update's pairs in the right order by implicit reward, before
      it; equal rewards count half.
    margins: mean difference of the implicit rewards, before every update.
    before, after: of each held-out set, by name.
    steps: updates.
    pairs, dropped: pairs that were trained on, and that were not.
    seconds: wall clock, compilation included.
    reference_seconds: of those, for the reference's log-probabilities.
  """

  policy: Policy
  losses: list[float]
  accuracies: list[float]
  margins: list[float]
  before: dict[str, HeldOut]
  after: dict[str, HeldOut]
  steps: int
  pairs: int
  dropped: int
  seconds: float
  reference_seconds: float


# ------------------------------------------------------------------------- the loss


@struct.dataclass
class DPOBatch:
  """Pairs, with the log-probabilities [B, 2] of their sides under the reference."""

  pairs: PairBatch
  ref_logp: Any


def side_logp(
  model: Decoder,
  kind: str,
  params: dict,
  batch: PairBatch,
  lora: dict | None = None,
) -> jax.Array:
  """Log-probabilities of the completions of both sides, which pass through together.

  Args:
    model: the decoder.
    kind: "dpo" sums over the completion's tokens, "ipo" takes their mean.
    params: its parameters.
    batch: B pairs.
    lora: adapters, see `models.lora`.

  Returns:
    float32 [B, 2], nats; 0 for pairs that only fill the batch.
  """
  rows = lambda x: x.reshape(-1, x.shape[-1])
  logp_RT = token_logp(model, params, rows(batch.tokens), rows(batch.mask), lora=lora)
  chosen_RT = rows(batch.weight) > 0
  logp_R = jnp.sum(jnp.where(chosen_RT, logp_RT, 0.0), axis=1)
  if kind == "ipo":
    logp_R /= jnp.maximum(jnp.sum(chosen_RT, axis=1), 1)
  return logp_R.reshape(-1, 2)


def dpo_sums(
  model: Decoder,
  beta: float,
  kind: str,
  label_smoothing: float,
  params: dict,
  batch: DPOBatch,
  base: dict | None,
) -> Sums:
  """Sums of the loss; pure.

  Args:
    model: the decoder.
    beta, kind, label_smoothing: see `DPOConfig`.
    params: {"policy": ...}, or {"lora": ...} over `base`.
    batch: B pairs.
    base: frozen parameters under the adapters, else None.

  Returns:
    {"loss": (sum, pairs)}, and "accuracy", "margin", "chosen_reward" and
    "rejected_reward" likewise.
  """
  weights = params.get("policy", base)
  logp_B2 = side_logp(model, kind, weights, batch.pairs, params.get("lora"))
  loss, stats = preference.dpo(
    logp_B2[:, 0],
    logp_B2[:, 1],
    batch.ref_logp[:, 0],
    batch.ref_logp[:, 1],
    beta,
    kind,
    label_smoothing,
    batch.pairs.valid,
  )
  return {"loss": loss, **stats}


@functools.lru_cache(maxsize=16)
def make_train_step(
  model: Decoder,
  optimizer: OptimizerConfig,
  beta: float = 0.1,
  kind: str = "dpo",
  label_smoothing: float = 0.0,
  micro_batches: int = 1,
):
  """`step(state, DPOBatch, base) -> (state, metrics)`; pure, jitted, donated.

  Equal arguments give the same function, so that runs compile once.
  """
  return make_step(
    functools.partial(dpo_sums, model, beta, kind, label_smoothing),
    optimizer,
    micro_batches=micro_batches,
    mesh=model.mesh,
    model=model,
  )


# -------------------------------------------------------------------------- scoring

_jit_side_logp = jax.jit(side_logp, static_argnums=(0, 1))


def pair_logp(
  policy: Policy,
  pairs: Sequence[TokenPair],
  kind: str = "dpo",
  *,
  lora: dict | None = None,
  batch_size: int = 32,
  on_progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
  """Log-probabilities of both sides of encoded pairs, in the buckets of training.

  Args:
    policy: the model.
    pairs: N of them.
    kind: see `side_logp`.
    lora: adapters of the policy.
    batch_size: pairs at a time.
    on_progress: called with (pairs done, pairs to do).

  Returns:
    float32 [N, 2], nats.
  """
  out_N2 = np.zeros((len(pairs), 2), np.float32)
  waiting, done = None, 0

  def read(members, logp_B2):
    nonlocal done
    out_N2[members] = np.asarray(logp_B2)[: len(members)]
    done += len(members)
    if on_progress is not None:
      on_progress(done, len(pairs))

  lengths = [pair.length for pair in pairs]
  for length, members in grouped(lengths, batch_size=batch_size, seed=0, epoch=0):
    batch = collate_pairs([pairs[i] for i in members], batch_size, length)
    batch = place(batch, policy.model.mesh)
    logp_B2 = _jit_side_logp(policy.model, kind, policy.params, batch, lora)
    if waiting is not None:
      read(*waiting)  # while this batch is computed
    waiting = members, logp_B2
  read(*waiting)
  return out_N2


# ----------------------------------------------------------------------- the run


def run(
  policy: Policy,
  preferences: Rows,
  config: DPOConfig,
  reference: Policy | None = None,
  dev: Mapping[str, Rows] | None = None,
  on_step: OnStep = None,
  on_progress: Callable[[int, int], None] | None = None,
  saving: Saving | None = None,
  timers: PhaseTimers | None = None,
) -> DPOResult:
  """Trains a policy on preferences.

  Args:
    policy: where to start; its parameters are not changed.
    preferences: the pairs, see `tasks.preferences.as_preferences`; margins are not
      used.
    config: see `DPOConfig`.
    reference: of the same tokenizer; the policy at the start when None (with adapters:
      their base).
    dev: held-out sets by name, looked at before and after.
    on_step: called with (update, updates planned, metrics) after every update; the
      metrics are those of the update before, so that reading them waits for nothing.
    on_progress: called with (pairs done, pairs to do) of the reference's pass.
    saving: saves the run, and goes on with what it has saved (the reference's pass is
      made again); see `training.epochs`.
    timers: see `training.epochs`.

  Raises:
    ConfigError, DataError: before any device work.
    StoppedError: `saving` was asked to stop, and the state is saved.
    DivergenceError: the first loss is not that of a policy which is its reference, or
      losses are not finite.
  """
  began = time.perf_counter()
  check(policy, config, reference)
  preferences, on_step = as_preferences(preferences), step_listener(on_step)
  limits = [p.config.max_positions for p in (policy, reference or policy)]
  encode = functools.partial(
    encode_pairs,
    policy.tokenizer,
    policy.eos_ids,
    max_length=min(config.max_length, *limits),
    chat=config.chat,
  )
  pairs = encode(preferences)
  dev = {name: as_preferences(rows) for name, rows in (dev or {}).items()}
  held = {name: encode(rows) for name, rows in dev.items()}
  asked = [pair for rows in held.values() for pair in rows]
  for model in (policy, reference or policy):
    check_pair_ids([*pairs, *asked], model)
  lengths = [pair.length for pair in pairs]
  order = Order(lengths, config.batch_size, config.seed, lambda i: pairs[i].content)
  trainee = Trainee(
    policy,
    config.optimizer,
    order.planned(config.epochs),
    lora=config.lora,
    dtype=config.compute_dtype,
    remat=config.remat,
    seed=config.seed,
  )
  start = trainee.start
  other = start
  if reference is not None:
    model = reference.model.clone(dtype=start.model.dtype)
    other = dataclasses.replace(reference, model=model)
  logp = functools.partial(pair_logp, kind=config.kind, batch_size=config.batch_size)
  ref_N2 = logp(other, [*pairs, *asked], on_progress=on_progress)
  reference_seconds = time.perf_counter() - began
  ref_N2, asked_ref_N2 = ref_N2[: len(pairs)], ref_N2[len(pairs) :]

  def look(logp_N2) -> dict[str, HeldOut]:
    out, at = {}, 0
    for name, rows in held.items():
      own = slice(at, at + len(rows))
      prompts = [str(dev[name][pair.source].prompt) for pair in rows]
      out[name] = _held_out(prompts, config.beta, asked_ref_N2[own], logp_N2[own])
      at += len(rows)
    return out

  before = after = {}
  if held:
    before = look(asked_ref_N2 if reference is None else logp(start, asked))

  step = make_train_step(
    start.model,
    config.optimizer,
    config.beta,
    config.kind,
    config.label_smoothing,
    config.micro_batches,
  )

  def epoch_of(epoch: int, seen: frozenset[int]) -> Iterator[DPOBatch]:
    size, seed = config.batch_size, config.seed
    for length, members in grouped(
      lengths, batch_size=size, seed=seed, epoch=epoch, seen=seen
    ):
      batch = collate_pairs([pairs[i] for i in members], config.batch_size, length)
      ref_B2 = np.zeros((config.batch_size, 2), np.float32)
      ref_B2[: len(members)] = ref_N2[members]
      yield place(DPOBatch(batch, ref_B2), start.model.mesh)

  def report(update: int, of: int, metrics: dict[str, float]) -> None:
    if update == 1 and reference is None and not metrics["skipped"]:
      check_first_update(metrics["loss"], config)
    on_step(update, of, metrics)

  fitted = fit(
    lambda state, batch: step(state, batch, trainee.base),
    trainee.state,
    epoch_of,
    order,
    config.epochs,
    Guard(config.optimizer, policy.tokenizer),
    curves=("loss", "accuracy", "margin"),
    on_step=report,
    saving=saving,
    timers=timers,
  )
  trainee.state = fitted.state
  if held:
    trained, lora = trainee.adapted()
    after = look(logp(trained, asked, lora=lora))
  return DPOResult(
    policy=trainee.export(),
    losses=fitted.curves["loss"],
    accuracies=fitted.curves["accuracy"],
    margins=fitted.curves["margin"],
    before=before,
    after=after,
    steps=fitted.updates,
    pairs=len(pairs),
    dropped=len(preferences) - len(pairs),
    seconds=fitted.earlier + time.perf_counter() - began,
    reference_seconds=reference_seconds,
  )


train = run  # another name


def check(policy: Policy, config: DPOConfig, reference: Policy | None = None) -> None:
  """Raises `ConfigError` when this policy cannot be trained so; no device work."""
  check_policy(policy)
  check_kind("config", config, DPOConfig, "dpo.DPOConfig(...) gives one")
  if policy.tokenizer is None:
    raise ConfigError("the policy has no tokenizer: it cannot be trained on texts")
  if not policy.eos_ids:
    raise ConfigError("the policy has no eos_ids: nothing could end a completion")
  if reference is not None:
    check_same_tokenizer(policy, reference)
  if config.chat:
    encode_prompts(policy.tokenizer, ["."], chat=True)  # the template's own errors
  shards = batch_shards(policy.model.mesh)
  need = max(1, config.micro_batches) * shards
  if config.batch_size % need:
    raise ConfigError(
      f"batch_size={config.batch_size} must be a multiple of micro_batches x batch "
      f"shards = {max(1, config.micro_batches)} x {shards} = {need}"
    )
  if config.lora is None:
    check_patterns(config.optimizer, {"policy": policy.params})


def check_first_update(loss: float, config: DPOConfig) -> None:
  """Raises `DivergenceError` where a policy is not the reference it starts from.

  Before any update h = 0: the loss is log 2 (DPO) or 1 / (4 beta^2) (IPO).
  """
  expected = math.log(2) if config.kind == "dpo" else 1 / (4 * config.beta**2)
  if not abs(loss / expected - 1) <= TOLERANCE[config.compute_dtype]:
    raise DivergenceError(
      f"before the first update the loss is {loss:.6f}, not {expected:.6f}, that of a "
      "policy which is its own reference: reference pass and loss disagree on dtype, "
      "padding or which tokens count"
    )


def _held_out(
  prompts: Sequence[str], beta: float, ref_N2: np.ndarray, logp_N2: np.ndarray
) -> HeldOut:
  """What the log-probabilities of policy and reference say of held-out pairs."""
  gap_N = logp_N2[:, 0] - logp_N2[:, 1]
  h_N = gap_N - (ref_N2[:, 0] - ref_N2[:, 1])
  _, prompt_N = np.unique(prompts, return_inverse=True)

  def interval(value_N) -> Interval:
    value_P = np.bincount(prompt_N, value_N) / np.bincount(prompt_N)
    return bootstrap_interval(value_P, seed=0)

  return HeldOut(
    accuracy=interval((np.sign(h_N) + 1) / 2),
    margin=interval(beta * h_N),
    likelier=interval((np.sign(gap_N) + 1) / 2),
    pairs=len(prompts),
  )

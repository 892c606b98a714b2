"""Reward models: pairwise (Bradley-Terry) and outcome (ORM), from a policy checkpoint.

  pairs    loss = -log sigmoid(r(chosen) - r(rejected) - margin), r at the last token
  outcome  loss = binary cross-entropy of v_t with correct(final), at the ends of steps,
           at all tokens of the completion, or at the last one

Source: Stiennon et al. 2020 (arXiv 2009.01325) in the details of Huang et al. 2024
(2403.17031); outcome models Cobbe et al. 2021 (2110.14168) and Havrilla et al. 2024
(2403.04642), where every prefix of a sample carries the label of the whole.

Letters: B pairs or rows, T tokens, N reference responses or outcomes.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from rlft.core.errors import ConfigError, DataError
from rlft.core.mesh import batch_shards
from rlft.core.rng import check_seed
from rlft.models.decoder import Decoder
from rlft.models.hub import Policy
from rlft.models.scalar import ScalarModel, init_scalar, last_value, token_values
from rlft.models.tokens import check_ids
from rlft.objectives.preference import bradley_terry
from rlft.objectives.supervised import binary_cross_entropy
from rlft.rewards.learned import row_values
from rlft.tasks.preferences import Rows, as_preferences
from rlft.training.data import encode_prompts, encode_rows
from rlft.training.divergence import Guard
from rlft.training.epochs import Fitted, Order, fit
from rlft.training.metrics import PhaseTimers
from rlft.training.optimizer import OptimizerConfig, check_patterns
from rlft.training.outcomes import (
  Outcome,
  OutcomeBatch,
  check_outcomes,
  encode_outcomes,
  outcome_batches,
)
from rlft.training.pairs import PairBatch, check_pair_ids, encode_pairs, pair_batches
from rlft.training.progress import OnStep, step_listener
from rlft.training.saving import Saving
from rlft.training.step import Sums, init_state, make_step

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RewardModelConfig:
  """Training of a reward or outcome model.

  Attributes:
    optimizer: see `OptimizerConfig`; parameters are under "trunk/" and "head/".
    batch_size: pairs, or labelled rows, of an update.
    micro_batches: parts that an update is taken in, which changes no number; 0 chooses
      for the memory, see `training.parts`.
    epochs: passes over the data.
    max_length: longest row in tokens; longer ones are dropped and counted.
    loss_on: of outcome models: "steps" (ends of steps, and the last token), "all"
      (tokens of the completion) or "final" (the last token).
    normalise: of reward models: whether values get mean 0 and std 1 on the reference
      responses after training.
    chat: put prompts into the tokenizer's chat template.
    compute_dtype: of the forward and backward pass; the masters stay float32.
    remat: what the backward pass recomputes: "none", "full" or "dots".
    seed: of the head, and of the order of the rows.
  """

  optimizer: OptimizerConfig = dataclasses.field(
    default_factory=lambda: OptimizerConfig(learning_rate=1e-5, eps=1e-5)
  )
  batch_size: int = 32
  micro_batches: int = 0
  epochs: int = 1
  max_length: int = 512
  loss_on: Literal["steps", "all", "final"] = "steps"
  normalise: bool = True
  chat: bool = False
  compute_dtype: Literal["float32", "bfloat16"] = "float32"
  remat: Literal["none", "full", "dots"] = "none"
  seed: int = 0

  def __post_init__(self):
    for name in ("batch_size", "epochs", "max_length"):
      if getattr(self, name) < 1:
        raise ConfigError(f"{name}={getattr(self, name)}: at least 1")
    for name, legal in (
      ("loss_on", ("steps", "all", "final")),
      ("compute_dtype", ("float32", "bfloat16")),
      ("remat", ("none", "full", "dots")),
    ):
      if getattr(self, name) not in legal:
        raise ConfigError(f"{name}={getattr(self, name)!r}: choose one of {legal}")
    if self.micro_batches < 0:
      raise ConfigError(f"micro_batches={self.micro_batches}: 0 (chosen) or positive")
    check_seed(self.seed)


@dataclasses.dataclass
class RewardModelResult:
  """What training gave.

  Attributes:
    model: the trained model, normalised where that was asked for.
    losses: mean loss of every update, nats.
    accuracies: share of pairs in the right order, or of positions on the right side of
      1/2, in every update, before it.
    steps: updates.
    rows, dropped: pairs or rows that were trained on, and that were not.
    seconds: wall clock, compilation included.
  """

  model: ScalarModel
  losses: list[float]
  accuracies: list[float]
  steps: int
  rows: int
  dropped: int
  seconds: float


# ------------------------------------------------------------------------- the losses


def pair_loss(model: Decoder, params: Any, batch: PairBatch) -> Sums:
  """Sums of the Bradley-Terry loss; pure. Both sides go through the trunk together."""
  rows = lambda x: x.reshape(-1, x.shape[-1])
  value_B2 = last_value(model, params, rows(batch.tokens), rows(batch.mask))
  value_B2 = value_B2.reshape(-1, 2)
  loss, stats = bradley_terry(value_B2[:, 0], value_B2[:, 1], batch.margin, batch.valid)
  return {"loss": loss, **stats}


def outcome_loss(model: Decoder, params: Any, batch: OutcomeBatch) -> Sums:
  """Sums of the binary cross-entropy of an outcome model; pure."""
  logit_BT = token_values(model, params, batch.tokens, batch.mask)
  label_BT = jnp.broadcast_to(batch.label[:, None], logit_BT.shape)
  loss, stats = binary_cross_entropy(logit_BT, label_BT, batch.weight)
  return {"loss": loss, **stats}


@functools.lru_cache(maxsize=16)
def make_train_step(
  loss: Callable[[Decoder, Any, Any], Sums],
  model: Decoder,
  optimizer: OptimizerConfig,
  micro_batches: int = 1,
):
  """The pure, jitted, donated `train_step(state, batch)` of one of the losses."""
  return make_step(
    functools.partial(loss, model),
    optimizer,
    micro_batches=micro_batches,
    mesh=model.mesh,
    model=model,
  )


def run(
  policy: Policy | ScalarModel, rows: Any, config: RewardModelConfig, **how: Any
) -> RewardModelResult:
  """Trains on `Outcome`s (see `train_outcome`), or else on preferences (`train_pairs`).

  Args:
    policy: where the trunk starts.
    rows: what to train on, and so which kind of model.
    config: see `RewardModelConfig`.
    how: what that function takes besides.
  """
  labelled = isinstance(rows, Sequence) and isinstance(next(iter(rows), None), Outcome)
  return (train_outcome if labelled else train_pairs)(policy, rows, config, **how)


# ----------------------------------------------------------------------------- pairs


def train_pairs(
  policy: Policy | ScalarModel,
  preferences: Rows,
  config: RewardModelConfig,
  *,
  references: Sequence[tuple[str, str]] = (),
  on_step: OnStep = None,
  saving: Saving | None = None,
  timers: PhaseTimers | None = None,
) -> RewardModelResult:
  """Trains a reward model on preferences.

  Args:
    policy: where its trunk starts, or a reward model to train on; not changed.
    preferences: the pairs, see `tasks.preferences.as_preferences`.
    config: see `RewardModelConfig`.
    references: (prompt, completion) texts on which values get mean 0 and std 1; by
      default the chosen sides.
    on_step: called with (update, updates planned, metrics) after every update; the
      metrics ("loss", "accuracy", "reward_gap" ...) are those of the update before.
    saving, timers: see `training.epochs`.

  Raises:
    ConfigError, DataError: before any device work.
    StoppedError: `saving` was asked to stop, and the state is saved.
  """
  began = time.perf_counter()
  check(policy, config)
  preferences = as_preferences(preferences)
  limit = min(config.max_length, policy.config.max_positions)
  pairs = encode_pairs(
    policy.tokenizer,
    policy.eos_ids,
    preferences,
    max_length=limit,
    chat=config.chat,
  )
  check_pair_ids(pairs, policy)
  if references:
    rows = encode_rows(
      policy.tokenizer,
      policy.eos_ids,
      references,
      max_length=limit,
      chat=config.chat,
    )
  else:
    rows = [pair.chosen for pair in pairs]
  check_ids([row.tokens for row in rows], policy, "reference")
  start = _start(policy, "reward", config)
  epoch_of = lambda epoch, seen: pair_batches(
    pairs,
    batch_size=config.batch_size,
    seed=config.seed,
    epoch=epoch,
    seen=seen,
    mesh=start.model.mesh,
  )
  lengths = [pair.length for pair in pairs]
  order = Order(lengths, config.batch_size, config.seed, lambda i: pairs[i].content)
  trained, fitted = _fit(
    start, pair_loss, epoch_of, order, config, on_step, saving, timers
  )
  if config.normalise:
    trained = normalise(trained, [row.tokens for row in rows])
  return _result(trained, fitted, len(pairs), len(preferences), began)


def normalise(scalar: ScalarModel, rows: Sequence[Sequence[int]]) -> ScalarModel:
  """The model with mean 0 and std 1 on rows of ids, measured at their last tokens."""
  bare = dataclasses.replace(scalar, mean=0.0, std=1.0)
  raw_N = np.array([value_T[-1] for value_T in row_values(bare, rows)], np.float64)
  mean, std = float(raw_N.mean()), float(raw_N.std())
  if not math.isfinite(mean + std):
    raise DataError("the trained model gives values that are not finite")
  if not std:
    log.warning("all %d reference values are equal: std is left at 1", len(raw_N))
  return dataclasses.replace(scalar, mean=mean, std=std or 1.0)


# -------------------------------------------------------------------------- outcomes


def train_outcome(
  policy: Policy | ScalarModel,
  outcomes: Sequence[Outcome],
  config: RewardModelConfig,
  *,
  on_step: OnStep = None,
  saving: Saving | None = None,
  timers: PhaseTimers | None = None,
) -> RewardModelResult:
  """Trains an outcome model: the logit that a prefix ends in a right answer.

  Args:
    policy: where its trunk starts, or an outcome model to train on; not changed.
    outcomes: labelled solutions, of `sample_outcomes`.
    config: see `RewardModelConfig`; nothing is normalised, for a probability has a
      scale of its own.
    on_step, saving, timers: as for `train_pairs`.

  Raises:
    ConfigError, DataError: before any device work.
    StoppedError: `saving` was asked to stop, and the state is saved.
  """
  began = time.perf_counter()
  check(policy, config)
  outcomes = check_outcomes(outcomes)
  if config.loss_on == "steps" and not any(row.ends for row in outcomes):
    raise DataError(
      f"none of {len(outcomes)} outcomes has a step end: give the steps of their task, "
      "or loss_on='all' or 'final'"
    )
  labels = {row.label for row in outcomes}
  if len(labels) == 1:
    raise DataError(
      f"all {len(outcomes)} outcomes have the label {labels.pop():g}: nothing tells "
      "right from wrong; sample prompts of another difficulty, or another policy"
    )
  rows = encode_outcomes(policy, outcomes, config.loss_on, config.chat)
  limit = min(config.max_length, policy.config.max_positions)
  kept = [i for i, row in enumerate(rows) if len(row.tokens) <= limit]
  if not kept:
    raise DataError(f"all {len(rows)} outcomes are longer than {limit} tokens")
  if len(kept) < len(rows):
    log.warning(
      "%d of %d outcomes are longer than %d tokens and were dropped",
      len(rows) - len(kept),
      len(rows),
      limit,
    )
  start = _start(policy, "outcome", config)
  label_N = np.array([outcomes[i].label for i in kept], np.float32)
  shown = [rows[i] for i in kept]
  epoch_of = lambda epoch, seen: outcome_batches(
    shown,
    label_N,
    batch_size=config.batch_size,
    seed=config.seed,
    epoch=epoch,
    seen=seen,
    mesh=start.model.mesh,
  )
  order = Order(
    [len(row.tokens) for row in shown],
    config.batch_size,
    config.seed,
    lambda i: shown[i].content + label_N[i].tobytes(),
  )
  trained, fitted = _fit(
    start, outcome_loss, epoch_of, order, config, on_step, saving, timers
  )
  return _result(trained, fitted, len(kept), len(rows), began)


# ---------------------------------------------------------------------------- shared


def check(policy: Policy | ScalarModel, config: RewardModelConfig) -> None:
  """Raises `ConfigError` when this model cannot be trained so; no device work."""
  if policy.tokenizer is None:
    raise ConfigError("the model has no tokenizer: it cannot be trained on texts")
  if not policy.eos_ids:
    raise ConfigError("the model has no eos_ids: nothing could end a completion")
  if config.chat:
    encode_prompts(policy.tokenizer, ["."], chat=True)  # the template's own errors
  shards = batch_shards(policy.model.mesh)
  need = max(1, config.micro_batches) * shards
  if config.batch_size % need:
    raise ConfigError(
      f"batch_size={config.batch_size} must be a multiple of micro_batches x batch "
      f"shards = {max(1, config.micro_batches)} x {shards} = {need}"
    )
  params = policy.params
  if isinstance(policy, Policy):
    params = {"trunk": params, "head": {"kernel": 0, "bias": 0}}
  check_patterns(config.optimizer, params)


def _start(
  policy: Policy | ScalarModel, kind: Literal["reward", "outcome"], config
) -> ScalarModel:
  if isinstance(policy, Policy):
    return init_scalar(policy, config.seed, kind=kind)
  if policy.kind != kind:
    raise ConfigError(f"this is a model of kind {policy.kind!r}, not {kind!r}")
  return dataclasses.replace(policy, mean=0.0, std=1.0)  # training changes the scale


def _fit(
  start: ScalarModel,
  loss: Callable[[Decoder, Any, Any], Sums],
  epoch_of: Callable[[int, frozenset[int]], Iterator[Any]],
  order: Order,
  config: RewardModelConfig,
  on_step: OnStep,
  saving: Saving | None,
  timers: PhaseTimers | None,
) -> tuple[ScalarModel, Fitted]:
  """Runs the updates; (trained model, what they gave)."""
  model = start.model.clone(dtype=jnp.dtype(config.compute_dtype), remat=config.remat)
  fitted = fit(
    make_train_step(loss, model, config.optimizer, config.micro_batches),
    init_state(start.params, config.optimizer, order.planned(config.epochs)),
    epoch_of,
    order,
    config.epochs,
    Guard(config.optimizer, start.tokenizer),
    curves=("loss", "accuracy"),
    on_step=step_listener(on_step),
    saving=saving,
    timers=timers,
  )
  return dataclasses.replace(start, params=fitted.state.params), fitted


def _result(
  trained: ScalarModel, fitted: Fitted, rows: int, given: int, began: float
) -> RewardModelResult:
  return RewardModelResult(
    model=trained,
    losses=fitted.curves["loss"],
    accuracies=fitted.curves["accuracy"],
    steps=fitted.updates,
    rows=rows,
    dropped=given - rows,
    seconds=fitted.earlier + time.perf_counter() - began,
  )

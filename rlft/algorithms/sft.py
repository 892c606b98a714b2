"""Supervised fine-tuning: cross-entropy on worked solutions.

  loss = sum over completion tokens of -log pi(token | what stands before) / tokens

Letters: B rows, T tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from typing import Any, Literal

import jax

from rlft.core.errors import ConfigError, DataError, check_kind
from rlft.core.mesh import batch_shards
from rlft.core.rng import check_seed
from rlft.models.decoder import Decoder
from rlft.models.hub import Policy, check_policy
from rlft.models.tokens import check_ids
from rlft.objectives.supervised import cross_entropy
from rlft.sampling.score import token_logp
from rlft.tasks.prompts import Prompts, as_rows
from rlft.training.data import (
  TokenRow,
  TrainBatch,
  batches,
  encode_prompts,
  encode_rows,
)
from rlft.training.divergence import Guard
from rlft.training.epochs import Order, fit
from rlft.training.metrics import PhaseTimers
from rlft.training.optimizer import OptimizerConfig, check_patterns
from rlft.training.progress import OnStep, step_listener
from rlft.training.saving import Saving
from rlft.training.step import Sums, init_state, make_step

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class SFTConfig:
  """Supervised fine-tuning.

  Attributes:
    optimizer: see `OptimizerConfig`.
    batch_size: rows of an update.
    micro_batches: parts that an update is taken in, which changes no number; 0 chooses
      for the memory, see `training.parts`.
    epochs: passes over the rows; ignored when `update_tokens` is set.
    update_tokens: stop once so many tokens have been in the loss; 0 is off. This is
      how two arms of a study get the same budget.
    max_length: longest row in tokens; longer ones are dropped and counted.
    loss_on: "completion", or "all" to train on prompts too.
    chat: put prompts into the tokenizer's chat template.
    compute_dtype: of the forward and backward pass; the masters stay float32.
    remat: what the backward pass recomputes: "none", "full" or "dots".
    seed: decides the order of the rows.
  """

  optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
  batch_size: int = 32
  micro_batches: int = 0
  epochs: int = 1
  update_tokens: int = 0
  max_length: int = 512
  loss_on: Literal["completion", "all"] = "completion"
  chat: bool = False
  compute_dtype: Literal["float32", "bfloat16"] = "float32"
  remat: Literal["none", "full", "dots"] = "none"
  seed: int = 0

  def __post_init__(self):
    for name in ("batch_size", "epochs", "max_length"):
      if getattr(self, name) < 1:
        raise ConfigError(f"{name}={getattr(self, name)}: at least 1")
    if self.update_tokens < 0:
      raise ConfigError(f"update_tokens={self.update_tokens}: 0 (off) or positive")
    for name, legal in (
      ("loss_on", ("completion", "all")),
      ("compute_dtype", ("float32", "bfloat16")),
      ("remat", ("none", "full", "dots")),
    ):
      if getattr(self, name) not in legal:
        raise ConfigError(f"{name}={getattr(self, name)!r}: choose one of {legal}")
    if self.micro_batches < 0:
      raise ConfigError(f"micro_batches={self.micro_batches}: 0 (chosen) or positive")
    check_seed(self.seed)


@dataclasses.dataclass
class SFTResult:
  """What training gave.

  Attributes:
    policy: the trained policy.
    losses: mean loss of every update, nats per token.
    steps, update_tokens: updates, and tokens that were in their losses.
    seconds: wall clock, compilation included.
  """

  policy: Policy
  losses: list[float]
  steps: int
  update_tokens: int
  seconds: float


def sft_loss(model: Decoder, params: Any, batch: TrainBatch) -> Sums:
  """Sums of the supervised loss; pure.

  Args:
    model: the decoder.
    params: its parameters.
    batch: tokens [B, T] with their mask and weight.

  Returns:
    {"loss": (sum, tokens)}; see `training.step.Sums`.
  """
  logp_BT = token_logp(model, params, batch.tokens, batch.mask)
  return {"loss": cross_entropy(logp_BT, batch.weight)}


@functools.lru_cache(maxsize=16)
def make_train_step(model: Decoder, optimizer: OptimizerConfig, micro_batches: int = 1):
  """The pure, jitted, donated `train_step(state, TrainBatch) -> (state, metrics)`.

  Equal arguments give the same function, so that rounds of training compile once.
  """
  return make_step(
    lambda params, batch: sft_loss(model, params, batch),
    optimizer,
    micro_batches=micro_batches,
    mesh=model.mesh,
    model=model,
  )


def check(policy: Policy, config: SFTConfig) -> None:
  """Raises `ConfigError` when this policy cannot be trained so; no device work."""
  check_policy(policy)
  check_kind("config", config, SFTConfig, "sft.SFTConfig(...) gives one")
  if policy.tokenizer is None:
    raise ConfigError("the policy has no tokenizer: it cannot be trained on texts")
  if not policy.eos_ids:
    raise ConfigError("the policy has no eos_ids: nothing could end a completion")
  if config.chat:
    encode_prompts(policy.tokenizer, ["."], chat=True)  # the template's own errors
  shards = batch_shards(policy.model.mesh)
  need = max(1, config.micro_batches) * shards
  if config.batch_size % need:
    raise ConfigError(
      f"batch_size={config.batch_size} must be a multiple of micro_batches x batch "
      f"shards = {max(1, config.micro_batches)} x {shards} = {need}"
    )
  check_patterns(config.optimizer, policy.params)


def run(
  policy: Policy,
  rows: Prompts,
  config: SFTConfig,
  on_step: OnStep = None,
  saving: Saving | None = None,
  timers: PhaseTimers | None = None,
) -> SFTResult:
  """Trains a policy on (prompt, completion) rows.

  Args:
    policy: where to start; its parameters are not changed.
    rows: pairs, examples, dicts, a data set or a file, see `tasks.prompts.as_rows`; of
      a pair the completion may also be the token ids that were sampled. Or rows that
      are encoded and have their weights, whatever `loss_on` says.
    config: see `SFTConfig`.
    on_step: called with (update, updates planned, metrics) after every update; the
      metrics are those of the update before, so that reading them waits for nothing.
    saving, timers: see `training.epochs`.

  Returns:
    `SFTResult`.

  Raises:
    ConfigError, DataError: before any device work.
    StoppedError: `saving` was asked to stop, and the state is saved.
  """
  began = time.perf_counter()
  check(policy, config)
  rows, on_step = as_rows(rows), step_listener(on_step)
  model = policy.model.clone(
    dtype=jax.numpy.dtype(config.compute_dtype), remat=config.remat
  )
  limit = min(config.max_length, model.config.max_positions)
  encoded = _encode(policy, rows, config, limit)
  per_epoch = sum(sum(row.weight) for row in encoded)
  if not per_epoch:
    raise DataError("no token is in the loss: each row is one token long")
  epochs = config.update_tokens / per_epoch if config.update_tokens else config.epochs
  order = Order(
    [len(row.tokens) for row in encoded],
    config.batch_size,
    config.seed,
    lambda i: encoded[i].content,
  )
  fitted = fit(
    make_train_step(model, config.optimizer, config.micro_batches),
    init_state(policy.params, config.optimizer, order.planned(epochs)),
    lambda epoch, seen: batches(
      encoded,
      batch_size=config.batch_size,
      seed=config.seed,
      epoch=epoch,
      seen=seen,
      mesh=model.mesh,
    ),
    order,
    epochs,
    Guard(config.optimizer, policy.tokenizer),
    tokens_of=lambda rows: int(sum(sum(encoded[i].weight) for i in rows)),
    budget=config.update_tokens,
    on_step=on_step,
    saving=saving,
    timers=timers,
  )
  return SFTResult(
    policy=dataclasses.replace(policy, params=fitted.state.params),
    losses=fitted.curves["loss"],
    steps=fitted.updates,
    update_tokens=fitted.tokens,
    seconds=fitted.earlier + time.perf_counter() - began,
  )


train = run  # another name


def _encode(policy: Policy, rows, config: SFTConfig, limit: int) -> list[TokenRow]:
  if not rows or not isinstance(rows[0], TokenRow):
    encoded = encode_rows(
      policy.tokenizer,
      policy.eos_ids,
      rows,
      max_length=limit,
      chat=config.chat,
      loss_on=config.loss_on,
    )
    check_ids([row.tokens for row in encoded], policy, "training row")
    return encoded
  check_ids([row.tokens for row in rows], policy, "training row")
  fitting = [row for row in rows if len(row.tokens) <= limit]
  if not fitting:
    raise DataError(f"all {len(rows)} rows are longer than max_length={limit} tokens")
  if len(fitting) < len(rows):
    dropped = len(rows) - len(fitting)
    log.warning(
      "%d of %d training rows are longer than max_length=%d tokens and were dropped",
      dropped,
      len(rows),
      limit,
    )
  return fitting

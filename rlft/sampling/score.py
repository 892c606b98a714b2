"""Log-probabilities of given tokens, by one full forward pass.

Letters: B rows, T tokens, E hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rlft.core import hosts
from rlft.core.errors import ConfigError, DataError
from rlft.core.mesh import batch_shards
from rlft.models.decoder import Decoder, positions_from_mask
from rlft.models.heads import lm_logp
from rlft.models.tokens import check_ids
from rlft.sampling.buckets import bucket
from rlft.sampling.logits import MIN_TEMPERATURE

if TYPE_CHECKING:
  from rlft.models.hub import Policy
  from rlft.models.scalar import ScalarModel


def token_logp(
  model: Decoder,
  params: dict,
  tokens_BT: jax.Array,
  mask_BT: jax.Array,
  temperature: jax.Array | float = 1.0,
  lora: dict | None = None,
) -> jax.Array:
  """Log-probability of the token at t given the real tokens before it.

  logp[b, t] = log softmax(logits(tokens before t) / temperature)[tokens[b, t]]

  Pads may lie anywhere; the state that predicts a token is that of the real token
  before it. Pure and differentiable: losses are built on it.

  Args:
    model: the decoder.
    params: its parameters.
    tokens_BT: int32; anything may lie under a pad, also what is no id.
    mask_BT: bool, True on real tokens.
    temperature: scalar or [B], positive.
    lora: adapters of its linears (see `models.lora`); None is the base.

  Returns:
    float32 [B, T], nats; 0 for a row's first real token and where masked.
  """
  chex.assert_rank([tokens_BT, mask_BT], 2)
  chex.assert_equal_shape([tokens_BT, mask_BT])
  length = tokens_BT.shape[1]
  tokens_BT = jnp.where(mask_BT, tokens_BT, 0)
  index_T = jnp.arange(length)
  # The next real token after t, and the last one before it (length and -1: none).
  place_BT = jnp.where(mask_BT, index_T, length)
  next_BT = jax.lax.cummin(place_BT, axis=1, reverse=True)
  next_BT = jnp.pad(next_BT[:, 1:], ((0, 0), (0, 1)), constant_values=length)
  before_BT = jax.lax.cummax(jnp.where(mask_BT, index_T, -1), axis=1)
  before_BT = jnp.pad(before_BT[:, :-1], ((0, 0), (1, 0)), constant_values=-1)

  variables = {"params": params} | ({} if lora is None else {"lora": lora})
  hidden_BTE = model.apply(
    variables, tokens_BT, positions_from_mask(mask_BT), mask_BT
  ).hidden
  targets_BT = jnp.take_along_axis(tokens_BT, jnp.minimum(next_BT, length - 1), axis=1)
  ahead_BT = lm_logp(
    params,
    model.config,
    hidden_BTE,
    targets_BT,
    temperature,
    shards=batch_shards(model.mesh),
  )
  logp_BT = jnp.take_along_axis(ahead_BT, jnp.maximum(before_BT, 0), axis=1)
  return jnp.where(mask_BT & (before_BT >= 0), logp_BT, 0.0)


def completion_hidden(
  model: Decoder,
  params: dict,
  tokens_BT: jax.Array,
  mask_BT: jax.Array,
  start_B: jax.Array,
  columns: int,
  lora: dict | None = None,
) -> jax.Array:
  """Hidden states from which the `columns` tokens from `start` on were chosen.

  A row is a prompt, then at once its completion: the state before a token is that of
  the token to its left. So the heads of a loss are computed on completions only.

  Args:
    model: the decoder.
    params: its parameters.
    tokens_BT: int32; anything may lie under a pad.
    mask_BT: bool, True on real tokens.
    start_B: int32, index of each row's first completion token, at least 1.
    columns: C, static; a row may end before `start + columns`.
    lora: see `models.lora`.

  Returns:
    [B, C, E], in the model's dtype.
  """
  chex.assert_rank([tokens_BT, mask_BT, start_B], [2, 2, 1])
  chex.assert_equal_shape([tokens_BT, mask_BT])
  variables = {"params": params} if lora is None else {"params": params, "lora": lora}
  hidden_BTE = model.apply(
    variables,
    jnp.where(mask_BT, tokens_BT, 0),
    positions_from_mask(mask_BT),
    mask_BT,
  ).hidden
  return _from(hidden_BTE, start_B - 1, columns)


def _from(x_BT: jax.Array, start_B: jax.Array, columns: int) -> jax.Array:
  """x[b, start[b] : start[b] + columns], 0 beyond the end of a row."""
  # Slices, not a gather of single elements, whose gradient would be a slow scatter.
  grow = ((0, 0), (0, columns)) + ((0, 0),) * (x_BT.ndim - 2)
  take = lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, columns)
  return jax.vmap(take)(jnp.pad(x_BT, grow), start_B)


def completion_logp(
  model: Decoder,
  params: dict,
  tokens_BT: jax.Array,
  mask_BT: jax.Array,
  start_B: jax.Array,
  columns: int,
  temperature: jax.Array | float = 1.0,
  lora: dict | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Log-probabilities of completions, and entropies; differentiable.

  The same numbers as `token_logp` from each row's `start` on, where only the completion
  passes through the head.

  Args:
    model, params, tokens_BT, mask_BT, start_B, columns, lora: see `completion_hidden`.
    temperature: scalar or [B], positive: the one that sampled.

  Returns:
    (logp_BC, entropy_BC), float32, nats; 0 where masked.
  """
  hidden_BCE = completion_hidden(
    model, params, tokens_BT, mask_BT, start_B, columns, lora
  )
  return hidden_logp(
    model, params, hidden_BCE, tokens_BT, mask_BT, start_B, temperature
  )


def hidden_logp(
  model: Decoder,
  params: dict,
  hidden_BCE: jax.Array,
  tokens_BT: jax.Array,
  mask_BT: jax.Array,
  start_B: jax.Array,
  temperature: jax.Array | float = 1.0,
) -> tuple[jax.Array, jax.Array]:
  """`completion_logp` of the states that `completion_hidden` gave."""
  columns = hidden_BCE.shape[1]
  mask_BC = _from(mask_BT, start_B, columns)
  targets_BC = jnp.where(mask_BC, _from(tokens_BT, start_B, columns), 0)
  logp_BC, entropy_BC = lm_logp(
    params,
    model.config,
    hidden_BCE,
    targets_BC,
    temperature,
    with_entropy=True,
    shards=batch_shards(model.mesh),
  )
  return jnp.where(mask_BC, logp_BC, 0.0), jnp.where(mask_BC, entropy_BC, 0.0)


@functools.partial(jax.jit, static_argnums=0)
def _jit_token_logp(model, params, tokens_BT, mask_BT, temperature):
  return token_logp(model, params, tokens_BT, mask_BT, temperature)


def score(
  policy: Policy,
  tokens,
  mask,
  temperature: float = 1.0,
  max_tokens: int = 16384,
) -> np.ndarray:
  """Log-probabilities under the policy of tokens that are already there.

  Args:
    policy: the model.
    tokens: int [B, T]; padding may stand on either side.
    mask: bool [B, T], True on real tokens.
    temperature: positive; use the one that sampled the tokens to compare with
      `Rollout.raw_logp`.
    max_tokens: rows are taken so many tokens at a time.

  Returns:
    float32 [B, T], nats: log-prob of the token at t given the real tokens before it;
    0 for a row's first token and where masked.

  Raises:
    DataError: shapes differ, or a token id is outside the vocabulary.
    ConfigError: the temperature is not positive.
  """
  if not (np.isfinite(temperature) and temperature >= MIN_TEMPERATURE):
    raise ConfigError(
      f"temperature={temperature}: log-probabilities need a positive temperature, at "
      f"least {MIN_TEMPERATURE} (score greedy samples at temperature 1)"
    )
  tokens, mask = check_rows(tokens, mask, policy)
  if not tokens.size:
    return np.zeros(tokens.shape, np.float32)
  run = lambda *block: _jit_token_logp(
    policy.model, policy.params, *block, np.float32(temperature)
  )
  return in_blocks(run, policy.model.mesh, tokens, mask, max_tokens)[
    :, : tokens.shape[1]
  ]


def check_rows(
  tokens, mask, model: Policy | ScalarModel
) -> tuple[np.ndarray, np.ndarray]:
  """Rows that a model can read, as int32 and bool [B, T]; 0 under the pads.

  Raises:
    DataError: shapes differ, ids are outside the vocabulary, or a row is too long.
  """
  tokens, mask = np.asarray(tokens), np.asarray(mask).astype(bool)
  if tokens.ndim != 2 or tokens.shape != mask.shape:
    raise DataError(
      f"tokens {tokens.shape} and mask {mask.shape} must both be [rows, tokens]"
    )
  if not np.issubdtype(tokens.dtype, np.integer):
    raise DataError(f"tokens have dtype {tokens.dtype}; give integer token ids")
  check_ids((row[real] for row, real in zip(tokens, mask)), model, "row")
  longest, most = int(mask.sum(1).max(initial=0)), model.config.max_positions
  if longest > most:
    raise DataError(f"a row has {longest} tokens, the model at most {most}; cut it")
  return np.where(mask, tokens, 0).astype(np.int32), mask


def in_blocks(
  run: Callable[[Any, Any], Any],
  mesh: Mesh | None,
  tokens: np.ndarray,
  mask: np.ndarray,
  max_tokens: int,
) -> np.ndarray:
  """Runs a program over rows, in blocks whose shapes are buckets: few are compiled.

  Args:
    run: jitted; (tokens [R, W], mask [R, W]) -> an array of R rows.
    mesh: where the rows are sharded.
    tokens, mask: [B, T], see `check_rows`; neither B nor T is 0. Of several processes
      each gives rows of its own, and all of them must call.
    max_tokens: about how many tokens a block holds.

  Returns:
    The results of the B rows; a time axis is as wide as the bucket.
  """
  rows, length = tokens.shape
  most, longest = np.max(hosts.everyone([rows, length]), axis=0).tolist()
  of = hosts.share(mesh).of
  wide = bucket(longest)
  shards = batch_shards(mesh) // of
  step = min(bucket(most, 1), max(1, max_tokens // of // wide))
  step = -(-step // shards) * shards
  padded = -(-most // step) * step
  grow = ((0, padded - rows), (0, wide - length))
  tokens, mask = np.pad(tokens, grow), np.pad(mask, grow)
  out = []
  for start in range(0, padded, step):
    part = tokens[start : start + step], mask[start : start + step]
    out.append(hosts.paced(run(*hosts.place_own(part, mesh))))
  return np.concatenate([hosts.own_rows(x, mesh) for x in out])[:rows]

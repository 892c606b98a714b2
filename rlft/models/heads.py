"""Heads: functions on the trunk's hidden states.

Letters: B rows, T tokens, E hidden size, V vocabulary.

`[B, T, V]` is never held: log-probabilities are made a chunk of tokens at a time, and
the backward pass makes each chunk again.
"""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp

from rlft.models.decoder import DecoderConfig
from rlft.models.linear import matmul

# Of a chunk: 2,048 tokens of a vocabulary of 32,768. Beyond it chunks have fewer,
# so that logits take the same memory whatever the vocabulary.
MOST_LOGITS = 2**26


def lm_logits(params: dict, config: DecoderConfig, hidden: jax.Array) -> jax.Array:
  """Logits of the next token in float32, before any temperature.

  Args:
    params: the decoder's parameters.
    config: its architecture.
    hidden: [..., E].

  Returns:
    float32 [..., V].
  """
  if hidden.dtype == jnp.float32 and not config.tie_embeddings:
    logits = matmul(hidden, params["head"].astype(hidden.dtype))
  else:
    name, contract = ("embedding", 1) if config.tie_embeddings else ("head", 0)
    logits = jax.lax.dot_general(
      hidden,
      params[name].astype(hidden.dtype),
      (((hidden.ndim - 1,), (contract,)), ((), ())),
      preferred_element_type=jnp.float32,
    )
  if config.final_softcap:
    logits = config.final_softcap * jnp.tanh(logits / config.final_softcap)
  return logits


def lm_logp(
  params: dict,
  config: DecoderConfig,
  hidden_BTE: jax.Array,
  targets_BT: jax.Array,
  temperature: jax.Array | float = 1.0,
  chunk_tokens: int = 2048,
  with_entropy: bool = False,
  shards: int = 1,
) -> Any:
  """Log-probability of each target: log softmax(logits / temperature)[target].

  With `with_entropy` also the entropy of the whole distribution,
  H = log Z - sum_v softmax_v * logit_v, for the cost of one more sum.

  Args:
    params: the decoder's parameters.
    config: its architecture.
    hidden_BTE: the state that predicts each target.
    targets_BT: int32, the token that each state predicts.
    temperature: scalar or [B], positive.
    chunk_tokens: about how many tokens' logits a device holds at once, at most; see
      `MOST_LOGITS`.
    with_entropy: whether the entropy is wanted.
    shards: how many devices share the batch. A matrix that is sharded over them is
      gathered for every chunk: chunks of the whole batch's tokens would have a pod
      gather it dozens of times for a few tokens each.

  Returns:
    float32 [B, T], nats; or (logp_BT, entropy_BT).
  """
  chex.assert_rank([hidden_BTE, targets_BT], [3, 2])
  chex.assert_equal_shape_prefix([hidden_BTE, targets_BT], 2)
  batch, length, _ = hidden_BTE.shape
  # Chunks run along time, so that a sharded batch axis stays as it is.
  chunk_tokens = min(chunk_tokens, MOST_LOGITS // config.vocab_size)
  span = max(1, min(length, chunk_tokens * shards // batch))
  chunks = -(-length // span)
  pad = chunks * span - length
  temperature_B1 = jnp.broadcast_to(
    jnp.asarray(temperature, jnp.float32).reshape(-1, 1), (batch, 1)
  )

  def split(x):
    x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(batch, chunks, span, *x.shape[2:]), 1, 0)

  @jax.checkpoint
  def one(hidden_BSE, targets_BS):
    logits_BSV = lm_logits(params, config, hidden_BSE)
    # Centred before the division, as in `sampling.logits.choose`.
    top_BS1 = jax.lax.stop_gradient(jnp.max(logits_BSV, axis=-1, keepdims=True))
    scaled_BSV = (logits_BSV - top_BS1) / temperature_B1[..., None]
    chosen_BS = jnp.take_along_axis(scaled_BSV, targets_BS[..., None], axis=-1)[..., 0]
    weight_BSV = jnp.exp(scaled_BSV)
    total_BS = jnp.sum(weight_BSV, axis=-1)
    log_total_BS = jnp.log(total_BS)
    logp_BS = chosen_BS - log_total_BS
    if not with_entropy:
      return logp_BS
    # exp underflows to 0 long before the logit is infinite: no 0 * inf.
    mean_BS = jnp.sum(weight_BSV * scaled_BSV, axis=-1) / total_BS
    return logp_BS, log_total_BS - mean_BS

  if chunks == 1:
    return one(hidden_BTE, targets_BT)
  out = jax.lax.map(lambda xs: one(*xs), (split(hidden_BTE), split(targets_BT)))
  join = lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, chunks * span)[:, :length]
  return jax.tree.map(join, out)

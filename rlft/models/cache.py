"""The key-value cache of decoding: shared prompts, own completions.

Letters: S slots (prompts), K samples of a prompt, B = S * K rows (the samples of a
prompt are adjacent), P prompt bucket, C completion capacity, N key-value heads,
G query heads per key-value head, H head size, L layers.

A prompt's keys are stored once and its K rows attend to [shared prompt | own
completion], so nothing is copied K times and one matrix product serves the K rows.
Every row writes at its own cursor and leaves no holes; causality and windows compare
positions, not places in the cache.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

NEGATIVE = -1e30  # finite: a row whose keys are all masked must not make a NaN


@struct.dataclass
class Cache:
  """Keys and values of all layers.

  Attributes:
    prompt_k, prompt_v: [S, N, H, P] and [S, N, P, H], for each layer: a tuple of L
      arrays, or one array with a leading axis L (see `stacked`). Keys lie as the
      product reads them: else a CPU transposes them again for every token.
    k, v: [B, N, C, H], for each layer, as above.
    prompt_mask_SP: bool, real prompt tokens.
    prompt_position_SP: int32, their positions.
    start_B: int32, the position of a row's first completion token.
    cursor_B: int32, completion tokens written so far: the next write goes there.
  """

  prompt_k: Any
  prompt_v: Any
  k: Any
  v: Any
  prompt_mask_SP: jax.Array
  prompt_position_SP: jax.Array
  start_B: jax.Array
  cursor_B: jax.Array

  @property
  def stacked(self) -> bool:
    """Whether layers lie in one array: carried by a scan, for accelerators.

    On CPU each layer has arrays of its own, since a slice of a stacked array is a copy
    there; an accelerator's compiler fuses that slice into the product that reads it.
    """
    return not isinstance(self.k, tuple)


def empty_cache(
  *,
  layers: int,
  slots: int,
  samples: int,
  prompt: int,
  completion: int,
  kv_heads: int,
  head_dim: int,
  dtype: Any,
  stacked: bool,
) -> Cache:
  """A cache without tokens; shapes as in `Cache`."""
  rows = slots * samples

  def zeros(*shape):
    if stacked:
      return jnp.zeros((layers, *shape), dtype)
    return tuple(jnp.zeros(shape, dtype) for _ in range(layers))

  return Cache(
    prompt_k=zeros(slots, kv_heads, head_dim, prompt),
    prompt_v=zeros(slots, kv_heads, prompt, head_dim),
    k=zeros(rows, kv_heads, completion, head_dim),
    v=zeros(rows, kv_heads, completion, head_dim),
    prompt_mask_SP=jnp.zeros((slots, prompt), bool),
    prompt_position_SP=jnp.zeros((slots, prompt), jnp.int32),
    start_B=jnp.zeros((rows,), jnp.int32),
    cursor_B=jnp.zeros((rows,), jnp.int32),
  )


def write(cache: Cache, layer: Any, k_BNH: jax.Array, v_BNH: jax.Array) -> Cache:
  """Writes one token of every row at the row's cursor, in place.

  A row whose cursor is at the capacity writes nothing.
  """
  rows_B = jnp.arange(k_BNH.shape[0])

  def put(store, token_BNH):
    if cache.stacked:
      # Heads are indexed too: a scatter whose window spans them makes the TPU compiler
      # keep the cache in a layout of its own, and copy each layer for the product.
      heads_N = jnp.arange(token_BNH.shape[1])
      place = store.at[layer, rows_B[:, None], heads_N, cache.cursor_B[:, None]]
    else:
      place = store.at[rows_B, :, cache.cursor_B]
    return place.set(
      token_BNH.astype(store.dtype),
      mode="drop",
      unique_indices=True,
      indices_are_sorted=True,
    )

  if cache.stacked:
    return cache.replace(k=put(cache.k, k_BNH), v=put(cache.v, v_BNH))
  k, v = list(cache.k), list(cache.v)
  k[layer], v[layer] = put(k[layer], k_BNH), put(v[layer], v_BNH)
  return cache.replace(k=tuple(k), v=tuple(v))


def attend(
  cache: Cache,
  layer: Any,
  q_BNGH: jax.Array,
  window: jax.Array | int,
  scale: float,
  softcap: float,
) -> jax.Array:
  """Attention of one new token of each row to its prompt and its completion.

  Args:
    cache: the cache, with the token already written at the cursor.
    layer: which layer (an int, or a traced index when the cache is stacked).
    q_BNGH: queries.
    window: 0, or how many positions a token sees, itself included.
    scale: factor on the scores.
    softcap: 0, or c in c * tanh(score / c).

  Returns:
    float32 [B, N, G, H].
  """
  prompt_k, prompt_v, k, v = (
    store[layer] for store in (cache.prompt_k, cache.prompt_v, cache.k, cache.v)
  )
  slots, prompt = cache.prompt_mask_SP.shape
  rows, kv_heads, groups, head_dim = q_BNGH.shape
  samples = rows // slots
  position_B = cache.start_B + cache.cursor_B  # of the token that asks

  # Shared prompt: the K rows of a slot are columns of one product.
  q_SNMH = (
    q_BNGH.reshape(slots, samples, kv_heads, groups, head_dim)
    .transpose(0, 2, 1, 3, 4)
    .reshape(slots, kv_heads, samples * groups, head_dim)
  )
  shared_SNMP = jnp.einsum(
    "snmh,snhp->snmp", q_SNMH, prompt_k, preferred_element_type=jnp.float32
  )
  shared_BNGP = (
    shared_SNMP.reshape(slots, kv_heads, samples, groups, prompt)
    .transpose(0, 2, 1, 3, 4)
    .reshape(rows, kv_heads, groups, prompt)
  )
  own_BNGC = jnp.einsum(
    "bngh,bnch->bngc", q_BNGH, k, preferred_element_type=jnp.float32
  )
  scores = jnp.concatenate([shared_BNGP, own_BNGC], axis=-1) * scale
  if softcap:
    scores = softcap * jnp.tanh(scores / softcap)

  index_C = jnp.arange(k.shape[2])
  prompt_mask_BP = jnp.repeat(cache.prompt_mask_SP, samples, axis=0)
  prompt_position_BP = jnp.repeat(cache.prompt_position_SP, samples, axis=0)
  mask_BK = jnp.concatenate(
    [prompt_mask_BP, index_C[None] <= cache.cursor_B[:, None]], axis=-1
  )
  key_position_BK = jnp.concatenate(
    [prompt_position_BP, cache.start_B[:, None] + index_C[None]], axis=-1
  )
  near_BK = position_B[:, None] - key_position_BK < window
  mask_BK &= near_BK | (jnp.asarray(window) == 0)
  scores = jnp.where(mask_BK[:, None, None], scores, NEGATIVE)
  weights = jax.nn.softmax(scores, axis=-1)
  # A product with bfloat16 values takes bfloat16 weights, as in the full forward pass.
  weights = weights.astype(v.dtype)

  shared_SNMP = (
    weights[..., :prompt]
    .reshape(slots, samples, kv_heads, groups, prompt)
    .transpose(0, 2, 1, 3, 4)
    .reshape(slots, kv_heads, samples * groups, prompt)
  )
  shared_SNMH = jnp.einsum(
    "snmp,snph->snmh", shared_SNMP, prompt_v, preferred_element_type=jnp.float32
  )
  out = (
    shared_SNMH.reshape(slots, kv_heads, samples, groups, head_dim)
    .transpose(0, 2, 1, 3, 4)
    .reshape(rows, kv_heads, groups, head_dim)
  )
  return out + jnp.einsum(
    "bngc,bnch->bngh", weights[..., prompt:], v, preferred_element_type=jnp.float32
  )

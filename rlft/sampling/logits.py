"""From logits to a token: filters as thresholds, sampling by inverse CDF.

Letters: B rows, V vocabulary.

No `[B, V]` array of noise and no sort: a filter is a cut-off on the logits, found by
bisection over the ordered bits of a float32, and a token is found from one uniform in
two levels, first among block sums, then inside one block.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from flax import struct

# Logits divided by less than this could leave the range of float32.
MIN_TEMPERATURE = 1e-6
BLOCK = 128  # tokens of a block; the width of a TPU lane


@struct.dataclass
class Sampling:
  """Sampling parameters, traced: changing them compiles nothing.

  Attributes:
    temperature_B: float32; 0 is greedy.
    top_k_B: int32; 0 is off.
    top_p_B: float32; 1 is off.
    min_p_B: float32; 0 is off.
    max_new_B: int32, tokens that the policy may choose.
  """

  temperature_B: jax.Array
  top_k_B: jax.Array
  top_p_B: jax.Array
  min_p_B: jax.Array
  max_new_B: jax.Array


def _ordered(x: jax.Array) -> jax.Array:
  """int32 that sort as the float32 do."""
  x = jnp.where(x == 0, 0.0, x)  # -0.0 ties with 0.0
  bits = jax.lax.bitcast_convert_type(x, jnp.int32)
  return bits ^ ((bits >> 31) & jnp.int32(0x7FFFFFFF))


def _largest_cut(order_BV, weight_BV, need_B):
  """The largest cut t of each row with sum(weight where order >= t) >= need.

  32 halvings of the int32 range are exact: ties are kept or dropped together.
  """
  low = jnp.min(order_BV, axis=-1)  # satisfies: everything is kept
  high = jnp.max(order_BV, axis=-1)

  def halve(_, bounds):
    low, high = bounds
    # The midpoint rounded up, without overflow of int32.
    middle = (low >> 1) + (high >> 1) + ((low | high) & 1)
    kept = jnp.where(order_BV >= middle[:, None], weight_BV, 0).sum(-1)
    enough = kept >= need_B
    return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

  low, high = jax.lax.fori_loop(0, 32, halve, (low, jnp.maximum(low, high)))
  return low


def keep_mask(scaled_BV: jax.Array, sampling: Sampling) -> jax.Array:
  """Which tokens the filters leave: top-k, then top-p of what is left, and min-p.

  Tokens that tie with the last one kept are kept too.

  Args:
    scaled_BV: float32, logits / temperature.
    sampling: the filters of each row.

  Returns:
    bool [B, V]; at least the most likely token of each row.
  """
  chex.assert_rank(scaled_BV, 2)
  order_BV = _ordered(scaled_BV)
  top_B = jnp.max(scaled_BV, axis=-1)
  vocab = scaled_BV.shape[-1]

  def cut_k():
    need_B = jnp.where(sampling.top_k_B > 0, sampling.top_k_B, vocab)
    ones = jnp.ones_like(order_BV)
    return _largest_cut(order_BV, ones, jnp.minimum(need_B, vocab))

  def cut_p(at_least_B):
    mass_BV = jnp.exp(scaled_BV - top_B[:, None])
    mass_BV = jnp.where(order_BV >= at_least_B[:, None], mass_BV, 0.0)
    # Bound the need below the total as summed here: rounding must not ask for more.
    total_B = mass_BV.sum(-1)
    need_B = jnp.minimum(sampling.top_p_B * total_B, total_B)
    cut_B = _largest_cut(order_BV, mass_BV, need_B)
    cut_B = jnp.where(sampling.top_p_B < 1.0, cut_B, at_least_B)
    return jnp.maximum(cut_B, at_least_B)

  lowest_B = jnp.min(order_BV, axis=-1)
  cut_B = jax.lax.cond(jnp.any(sampling.top_k_B > 0), cut_k, lambda: lowest_B)
  cut_B = jax.lax.cond(
    jnp.any(sampling.top_p_B < 1.0), cut_p, lambda at_least: at_least, cut_B
  )
  floor_B = top_B + jnp.log(sampling.min_p_B)  # log 0 = -inf keeps everything
  return (order_BV >= cut_B[:, None]) & (scaled_BV >= floor_B[:, None])


def _first_above(mass_BN: jax.Array, uniform_B: jax.Array) -> jax.Array:
  """The index whose share of the cumulative mass contains the uniform.

  An index without mass is never returned, whatever the rounding of the sums.
  """
  sums_BN = jnp.cumsum(mass_BN, axis=-1)
  has_BN = mass_BN > 0
  hit_BN = has_BN & (sums_BN > (uniform_B * sums_BN[:, -1])[:, None])
  index_N = jnp.arange(mass_BN.shape[-1])
  last_B = jnp.max(jnp.where(has_BN, index_N, 0), axis=-1)
  return jnp.where(hit_BN.any(-1), jnp.argmax(hit_BN, axis=-1), last_B)


def inverse_cdf(mass_BV: jax.Array, block_B: jax.Array, inside_B: jax.Array):
  """Draws one index of each row in proportion to its mass.

  Args:
    mass_BV: float32 [B, V], non-negative, not all 0 in a row.
    block_B, inside_B: float32 in [0, 1): the halves of one uniform (`core.rng`).

  Returns:
    int32 [B].
  """
  rows, vocab = mass_BV.shape
  blocks = -(-vocab // BLOCK)
  mass = jnp.pad(mass_BV, ((0, 0), (0, blocks * BLOCK - vocab)))
  mass_BNW = mass.reshape(rows, blocks, BLOCK)
  chosen_B = _first_above(mass_BNW.sum(-1), block_B)
  mass_BW = jnp.take_along_axis(mass_BNW, chosen_B[:, None, None], axis=1)[:, 0]
  return (chosen_B * BLOCK + _first_above(mass_BW, inside_B)).astype(jnp.int32)


def choose(
  logits_BV: jax.Array,
  sampling: Sampling,
  uniform_B: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Chooses a token for each row and says how likely it was.

  Args:
    logits_BV: float32, before temperature.
    sampling: each row's parameters.
    uniform_B: the halves of each row's uniform.

  Returns:
    token int32 [B]; logp float32 [B] under the distribution it was drawn from; raw_logp
    float32 [B] under temperature alone. Where temperature is 0 the token is the most
    likely one, and both are under temperature 1.
  """
  chex.assert_rank(logits_BV, 2)
  greedy_B = sampling.temperature_B == 0
  temperature_B = jnp.where(greedy_B, 1.0, sampling.temperature_B)
  # Centred before it is divided: a low temperature would enlarge the logits, and with
  # them the rounding of their differences.
  top_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
  scaled_BV = (logits_BV - top_B1) / temperature_B[:, None]
  mass_BV = jnp.exp(scaled_BV)
  drawn = sampling.replace(
    top_k_B=jnp.where(greedy_B, 0, sampling.top_k_B),
    top_p_B=jnp.where(greedy_B, 1.0, sampling.top_p_B),
    min_p_B=jnp.where(greedy_B, 0.0, sampling.min_p_B),
  )
  filtered = (drawn.top_k_B > 0) | (drawn.top_p_B < 1.0) | (drawn.min_p_B > 0.0)
  left_BV = jax.lax.cond(
    jnp.any(filtered),
    lambda: jnp.where(keep_mask(scaled_BV, drawn), mass_BV, 0.0),
    lambda: mass_BV,
  )
  best_B = jax.lax.cond(
    jnp.any(greedy_B),
    lambda: jnp.argmax(logits_BV, axis=-1).astype(jnp.int32),
    lambda: jnp.zeros_like(sampling.top_k_B),
  )
  token_B = jnp.where(greedy_B, best_B, inverse_cdf(left_BV, *uniform_B))
  at_B = jnp.take_along_axis(scaled_BV, token_B[:, None], axis=-1)[:, 0]
  raw_logp_B = at_B - jnp.log(mass_BV.sum(-1))
  logp_B = at_B - jnp.log(left_BV.sum(-1))
  return token_B, logp_B, raw_logp_B

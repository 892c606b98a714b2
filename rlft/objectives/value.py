"""Losses and statistics of the value model.

Letters: B rows, C tokens of the completion region.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from rlft.core import masked
from rlft.core.errors import ConfigError

Pair = tuple[jax.Array, jax.Array]


def value_loss(
  value_BC: jax.Array,
  old_value_BC: jax.Array,
  returns_BC: jax.Array,
  mask_BC: jax.Array,
  clip_range: float = 0.2,
) -> tuple[Pair, dict[str, Pair]]:
  """Clipped squared error of the value against the returns.

      0.5 max((V - R)^2, (V_old + clip(V - V_old, -clip_range, clip_range) - R)^2)

  Differentiable in value_BC only.

  Args:
    value_BC, old_value_BC: float [B, C], values now and when the batch was made.
    returns_BC: float [B, C], what they should be.
    mask_BC: bool [B, C]; off it nothing is read.
    clip_range: in units of the reward; 0 is off.

  Returns:
    (sum over tokens, tokens), float32 scalars, and stats: value_clip_fraction, tokens
    without gradient because of the clip.

  Raises:
    ConfigError: a negative clip_range.

  Source: Ziegler et al. 2019 (arXiv:1909.08593), its code.
  """
  chex.assert_rank([value_BC, old_value_BC, returns_BC, mask_BC], 2)
  chex.assert_equal_shape([value_BC, old_value_BC, returns_BC, mask_BC])
  chex.assert_type(mask_BC, bool)
  if clip_range < 0:
    raise ConfigError(f"clip_range is {clip_range}; at least 0, where 0 is off.")

  def kept(x_BC):
    # `where` on the inputs: 0 * NaN would leak into the gradient.
    return jnp.where(mask_BC, x_BC, 0.0).astype(jnp.float32)

  value_BC = kept(value_BC)
  old_BC, returns_BC = jax.lax.stop_gradient((kept(old_value_BC), kept(returns_BC)))
  loss_BC = (value_BC - returns_BC) ** 2
  cut_BC = jnp.zeros_like(mask_BC)
  if clip_range:
    near_BC = old_BC + jnp.clip(value_BC - old_BC, -clip_range, clip_range)
    clipped_BC = (near_BC - returns_BC) ** 2
    # Inside the range both are the same number up to rounding, and nothing is cut.
    cut_BC = (clipped_BC > loss_BC) & (jnp.abs(value_BC - old_BC) > clip_range)
    loss_BC = jnp.where(cut_BC, clipped_BC, loss_BC)
  tokens = masked.count(mask_BC)
  stats = {"value_clip_fraction": (masked.total(cut_BC, mask_BC), tokens)}
  return (0.5 * masked.total(loss_BC, mask_BC), tokens), stats


def explained_variance(
  value_BC: jax.Array, returns_BC: jax.Array, mask_BC: jax.Array
) -> jax.Array:
  """Share of the returns' variance that the value predicts.

      1 - Var(R - V) / Var(R)

  1 is perfect, 0 no better than a constant, negative worse.

  Args:
    value_BC, returns_BC: float [B, C].
    mask_BC: bool [B, C]; off it nothing is read.

  Returns:
    float32 scalar; NaN where the returns do not vary. It is no mean: compute it on the
    whole batch.
  """
  chex.assert_rank([value_BC, returns_BC, mask_BC], 2)
  chex.assert_equal_shape([value_BC, returns_BC, mask_BC])
  chex.assert_type(mask_BC, bool)

  def variance(x_BC):
    return masked.mean((x_BC - masked.mean(x_BC, mask_BC)) ** 2, mask_BC)

  returns_BC = jnp.asarray(returns_BC, jnp.float32)
  spread = variance(returns_BC)
  missed = variance(returns_BC - value_BC)
  return jnp.where(spread > 0, 1.0 - missed / jnp.where(spread > 0, spread, 1), jnp.nan)

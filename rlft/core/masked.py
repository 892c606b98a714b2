"""Reductions that see only the masked-in elements, in float32.

A masked-out element never leaks, not even as `0 * NaN`: it is replaced before it is
used.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp


def total(x: jax.Array, mask: jax.Array, axis=None) -> jax.Array:
  """Sum of x over a mask of the same shape, float32."""
  chex.assert_equal_shape([x, mask])  # broadcast, sum and count would disagree
  return jnp.sum(jnp.where(mask, x, 0.0).astype(jnp.float32), axis=axis)


def count(mask: jax.Array, axis=None) -> jax.Array:
  """Number of masked-in elements, float32."""
  return jnp.sum(mask.astype(jnp.float32), axis=axis)


def mean(x: jax.Array, mask: jax.Array, axis=None) -> jax.Array:
  """Mean of x over the mask, float32; 0 where nothing is masked in."""
  return total(x, mask, axis) / jnp.maximum(count(mask, axis), 1.0)

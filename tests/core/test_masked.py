"""Masked reductions: what is masked out never leaks, not even a NaN."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlft.core import masked

X = np.array([[1.0, np.nan, 3.0], [np.inf, -np.inf, np.nan]], np.float32)
MASK = np.array([[1, 0, 1], [0, 0, 0]], bool)


def test_by_hand():
  assert masked.total(X, MASK) == 4 and masked.count(MASK) == 2
  assert masked.mean(X, MASK) == 2
  np.testing.assert_array_equal(masked.mean(X, MASK, axis=1), [2, 0])  # nothing: 0
  np.testing.assert_array_equal(masked.total(X, MASK, axis=0), [1, 0, 3])
  np.testing.assert_array_equal(masked.mean(X, MASK.astype(np.int32), axis=1), [2, 0])


def test_no_gradient_passes_the_mask():
  grad = jax.grad(lambda x: masked.mean(jnp.exp(x), MASK))(jnp.where(MASK, X, 0.0))
  np.testing.assert_allclose(grad, np.where(MASK, np.exp(X) / 2, 0), rtol=1e-6)
  grad = jax.grad(lambda x: masked.mean(x, MASK))(jnp.asarray(X))
  np.testing.assert_array_equal(grad, MASK / 2)


def test_sums_are_float32():
  many = jnp.ones((4096,), jnp.bfloat16)
  assert masked.total(many, many > 0) == 4096  # bfloat16 would stop at 256
  assert masked.mean(many, many > 0).dtype == jnp.float32


def test_a_mask_of_another_shape_is_refused():
  """Broadcast, its count would be of fewer elements than its sum."""
  with pytest.raises(AssertionError):
    masked.mean(jnp.ones((2, 3)), jnp.ones((2, 1), bool))

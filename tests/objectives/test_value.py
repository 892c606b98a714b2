"""Value loss and explained variance by hand."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from rlft.core.errors import ConfigError
from rlft.objectives.value import explained_variance, value_loss

# Old values 0 and clip .2: the error of the moved value, or of the clipped, if larger.
VALUE = np.array([[1.0, 1.0, 0.1, -1.0], [0.5, np.nan, np.nan, np.nan]], np.float32)
RETURNS = np.array([[2.0, 0.0, 1.0, 1.0], [0.3, np.nan, np.nan, np.nan]], np.float32)
MASK = ~np.isnan(VALUE)
OLD = np.where(MASK, 0, np.nan).astype(np.float32)


def test_by_hand():
  loss = jax.jit(lambda v: value_loss(v, OLD, RETURNS, MASK))
  (total, count), stats = loss(VALUE)
  by_hand = 0.5 * (1.8**2 + 1.0**2 + 0.9**2 + 2.0**2 + 0.2**2)
  assert float(total) == pytest.approx(by_hand, rel=1e-6) and float(count) == 5
  assert tuple(map(float, stats["value_clip_fraction"])) == (1, 5)
  grad = np.asarray(jax.jit(jax.grad(lambda v: loss(v)[0][0]))(VALUE))
  expected = [[0, 1.0, -0.9, -2.0], [0.2, 0, 0, 0]]
  np.testing.assert_allclose(grad, expected, rtol=1e-5)


def test_without_clip_it_is_half_the_squared_error():
  (total, _), stats = value_loss(VALUE, OLD, RETURNS, MASK, clip_range=0)
  by_hand = 0.5 * (1 + 1 + 0.81 + 4 + 0.04)
  assert float(total) == pytest.approx(by_hand, rel=1e-6)
  assert float(stats["value_clip_fraction"][0]) == 0


def test_nothing_but_the_value_gets_a_gradient():
  def loss(arrays):
    return value_loss(*arrays, np.ones((1, 2), bool))[0][0]

  arrays = np.array([[[1.0, 3.0]], [[0.9, 0.0]], [[2.0, 2.0]]], np.float32)
  grads = jax.jit(jax.grad(loss))(arrays)
  assert np.any(grads[0]) and not np.any(grads[1:])


def test_first_step_clips_nothing():
  rng = np.random.default_rng(0)
  value, returns = rng.normal(size=(2, 50, 40)).astype(np.float32)
  mask = rng.random(value.shape) < 0.5
  loss = jax.jit(lambda v: value_loss(v, value, returns, mask))
  assert float(loss(value)[1]["value_clip_fraction"][0]) == 0
  # A thousandth further is inside the range too, whatever rounding says.
  assert float(loss(value + 1e-3)[1]["value_clip_fraction"][0]) == 0


def test_parts_add_up_and_bad_settings():
  whole, _ = value_loss(VALUE, OLD, RETURNS, MASK)
  rows = [[x[i : i + 1] for x in (VALUE, OLD, RETURNS, MASK)] for i in range(2)]
  np.testing.assert_allclose(
    np.sum([value_loss(*x)[0] for x in rows], axis=0), whole, rtol=1e-6
  )
  with pytest.raises(ConfigError, match="clip_range is -1"):
    value_loss(VALUE, OLD, RETURNS, MASK, clip_range=-1)


def test_explained_variance():
  returns = np.array([[1, 2, 3, np.nan]], np.float32)
  mask = ~np.isnan(returns)
  explained = jax.jit(lambda v: explained_variance(v, returns, mask))
  assert explained(returns) == 1
  assert explained(returns + 5) == pytest.approx(1)  # an offset is not variance
  assert explained(np.zeros_like(returns)) == pytest.approx(0)
  assert explained(-returns) == pytest.approx(-3)
  assert explained(returns / 2) == pytest.approx(0.75)
  assert np.isnan(explained_variance(returns, np.ones_like(returns), mask))

"""Cross-entropies as a sum and its denominator."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlft.objectives.supervised import binary_cross_entropy, cross_entropy

LOGP = np.log(np.array([[0.5, 0.25, 0.1], [0.125, 0.2, 1.0]], np.float32))
WEIGHT = np.array([[1.0, 0.0, 2.0], [0.5, 1.0, 0.0]], np.float32)


def test_by_hand():
  total, count = cross_entropy(LOGP, WEIGHT)
  by_hand = np.log(2) + 2 * np.log(10) + 0.5 * np.log(8) + np.log(5)
  assert float(total) == pytest.approx(by_hand, rel=1e-6)
  assert float(count) == 4.5
  assert total.dtype == count.dtype == jnp.float32


def test_mask_as_weight():
  total, count = cross_entropy(LOGP, np.array([[True, False, False], [False] * 3]))
  assert float(total) == pytest.approx(np.log(2)) and float(count) == 1


@pytest.mark.parametrize("leak", [np.nan, np.inf, -np.inf])
def test_nothing_leaks_from_under_weight_zero(leak):
  logp = np.where(WEIGHT > 0, LOGP, leak).astype(np.float32)
  total = lambda x: cross_entropy(x, WEIGHT)[0]
  value, grad = jax.value_and_grad(total)(logp)
  assert float(value) == pytest.approx(float(total(LOGP)))
  np.testing.assert_array_equal(grad, -WEIGHT)


def test_nan_under_weight_is_not_hidden():
  logp = LOGP.copy()
  logp[0, 0] = np.nan
  assert np.isnan(cross_entropy(logp, WEIGHT)[0])


def test_parts_add_up_to_the_whole():
  whole = cross_entropy(LOGP, WEIGHT)
  parts = [cross_entropy(LOGP[i : i + 1], WEIGHT[i : i + 1]) for i in range(2)]
  for k in range(2):
    assert float(sum(part[k] for part in parts)) == pytest.approx(float(whole[k]))


def test_order_of_rows_is_nothing():
  a, b = cross_entropy(LOGP, WEIGHT), cross_entropy(LOGP[::-1], WEIGHT[::-1])
  assert float(a[0]) == pytest.approx(float(b[0]), rel=1e-6) and a[1] == b[1]


def test_no_weight_is_no_loss():
  total, count = cross_entropy(LOGP, np.zeros_like(WEIGHT))
  assert float(total) == 0 and float(count) == 0


def test_bfloat16_is_reduced_in_float32():
  logp, weight = (jnp.full((1, 4097), x, jnp.bfloat16) for x in (-1.0, 1.0))
  for x in cross_entropy(logp, weight):
    assert x.dtype == jnp.float32
    assert float(x) == 4097  # in bfloat16 it would be 4096


def test_shapes_are_checked():
  with pytest.raises(AssertionError):
    cross_entropy(LOGP, WEIGHT[:, :2])
  with pytest.raises(AssertionError):
    cross_entropy(LOGP[0], WEIGHT[0])


LOGIT = np.array([[0.0, 2.0, -1.0], [3.0, -0.5, 0.1]], np.float32)
LABEL = np.array([[1.0, 0.25, 0.0], [0.0, 1.0, 0.0]], np.float32)


def test_binary_cross_entropy_by_hand():
  (total, count), stats = binary_cross_entropy(LOGIT, LABEL, WEIGHT)
  p = 1 / (1 + np.exp(-LOGIT.astype(float)))
  loss = -LABEL * np.log(p) - (1 - LABEL) * np.log(1 - p)
  assert float(total) == pytest.approx(np.sum(WEIGHT * loss), rel=1e-6)
  assert float(count) == 4.5
  # Right are the third of row 0 (weight 2), and nothing of row 1.
  assert tuple(map(float, stats["accuracy"])) == (2, 4.5)
  grad = jax.grad(lambda z: binary_cross_entropy(z, LABEL, WEIGHT)[0][0])(LOGIT)
  np.testing.assert_allclose(grad, WEIGHT * (p - LABEL), atol=1e-6)


@pytest.mark.parametrize("leak", [np.nan, np.inf, -np.inf])
def test_binary_cross_entropy_reads_nothing_under_weight_zero(leak):
  off = WEIGHT == 0
  logit, label = np.where(off, leak, LOGIT), np.where(off, leak, LABEL)
  loss = lambda z, y: binary_cross_entropy(z, y, WEIGHT)[0][0]
  value, grad = jax.value_and_grad(loss)(logit.astype(np.float32), label)
  expected, expected_grad = jax.value_and_grad(loss)(LOGIT, LABEL)
  assert float(value) == float(expected)
  np.testing.assert_array_equal(grad, expected_grad)


@pytest.mark.parametrize(("logit", "label"), [(1e4, True), (1e4, False), (-1e4, True)])
def test_binary_cross_entropy_is_stable(logit, label):
  """A sure and right answer costs nothing, a sure and wrong one its logit."""
  one = np.ones((1, 1), bool)
  loss = lambda z: binary_cross_entropy(z, one & label, one)[0][0]
  value, grad = jax.value_and_grad(loss)(np.full((1, 1), logit, np.float32))
  right = (logit > 0) == label
  assert float(value) == (0 if right else 1e4)
  assert float(grad[0, 0]) == (0 if right else np.sign(logit))

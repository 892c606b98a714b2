"""Labels from returns, and regression weighted by them."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from rlft.objectives.returns import step_labels, weighted_cross_entropy
from rlft.objectives.supervised import cross_entropy


def test_step_labels():
  value = np.array([[0.2, 0.5, 0.9], [1.0, np.nan, 2.0]], np.float32)
  valid = np.array([[True, True, True], [True, False, False]])
  labels = step_labels(value, valid, 0.5)
  np.testing.assert_array_equal(labels, [[False, True, True], [True, False, False]])
  assert labels.dtype == bool


LOGP = np.array([[-1.0, -2.0, np.nan], [-3.0, -4.0, -np.inf], [-7.0, -8.0, -9.0]])
LOGP = LOGP.astype(np.float32)
WEIGHT = np.array([[1, 2, 0], [1, 1, 0], [1, 1, 1]], np.float32)


def test_weighted_cross_entropy_by_hand():
  rows = np.array([2.0, 0.5, 0.0], np.float32)
  total, count = weighted_cross_entropy(LOGP, WEIGHT, rows)
  assert float(total) == pytest.approx(2 * (1 + 4) + 0.5 * (3 + 4))
  assert float(count) == pytest.approx(2 * 3 + 0.5 * 2)
  loss = lambda x: weighted_cross_entropy(x, WEIGHT, rows)[0]
  np.testing.assert_allclose(jax.grad(loss)(LOGP), -WEIGHT * rows[:, None])


def test_equal_rows_are_plain_cross_entropy():
  total, count = weighted_cross_entropy(LOGP, WEIGHT > 0, np.full(3, 3.0, np.float32))
  plain, tokens = cross_entropy(LOGP, WEIGHT > 0)
  assert float(total / count) == pytest.approx(float(plain / tokens))


def test_a_row_weight_of_a_padded_row_is_not_read():
  weight = WEIGHT * np.array([[1], [1], [0]], np.float32)
  rows = np.array([1, 1, np.nan], np.float32)
  total, count = weighted_cross_entropy(LOGP, weight, rows)
  assert float(total) == 12 and float(count) == 5

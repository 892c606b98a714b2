"""Laws that every objective obeys. A new one joins by a line in OBJECTIVES.

An objective takes arrays [B, T] and a mask, and gives (sum, denominator), both float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlft.objectives.supervised import cross_entropy

ROWS, TOKENS = 6, 5

# name -> function of (the log-probabilities that are differentiated, mask).
OBJECTIVES = {
  "cross_entropy": lambda logp, mask: cross_entropy(logp, mask),
}


@pytest.fixture(params=OBJECTIVES)
def objective(request):
  return OBJECTIVES[request.param]


@pytest.fixture
def data():
  rng = np.random.default_rng(0)
  logp = -rng.exponential(size=(ROWS, TOKENS)).astype(np.float32)
  mask = np.arange(TOKENS) < rng.integers(0, TOKENS + 1, ROWS)[:, None]
  mask[0], mask[1] = True, False  # a full row, and an empty one
  return logp, mask


def mean(objective, mask):
  def value(logp):
    total, count = objective(logp, mask)
    return total / jnp.maximum(count, 1.0)

  return value


def test_shapes_and_types(objective, data):
  for x in objective(*data):
    assert x.shape == () and x.dtype == jnp.float32


def test_jit_changes_nothing(objective, data):
  plain, jitted = objective(*data), jax.jit(objective)(*data)
  np.testing.assert_allclose(plain, jitted, rtol=1e-6)


def test_numpy_and_jax_inputs_are_equal(objective, data):
  np.testing.assert_array_equal(objective(*data), objective(*map(jnp.asarray, data)))


def test_gradient_is_that_of_finite_differences(objective, data):
  logp, mask = data
  value = mean(objective, mask)
  grad = np.asarray(jax.grad(value)(logp))
  assert np.any(grad)
  for b, t in np.ndindex(ROWS, TOKENS):
    nudge = np.zeros_like(logp)
    nudge[b, t] = 1e-2
    numeric = (float(value(logp + nudge)) - float(value(logp - nudge))) / 2e-2
    assert numeric == pytest.approx(grad[b, t], abs=2e-4), (b, t)


@pytest.mark.parametrize("under", [0.0, 1e30, np.nan, -np.inf])
def test_masked_tokens_have_no_part(objective, data, under):
  logp, mask = data
  value = mean(objective, mask)
  changed = np.where(mask, logp, np.float32(under))
  assert float(value(changed)) == float(value(logp))
  grad = np.asarray(jax.grad(value)(changed))
  assert not np.any(grad[~mask])
  np.testing.assert_array_equal(grad, jax.grad(value)(logp))


def test_order_of_rows_is_nothing(objective, data):
  order = np.random.default_rng(1).permutation(ROWS)
  np.testing.assert_allclose(
    objective(*data), objective(*(x[order] for x in data)), rtol=1e-6
  )


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_micro_batches_add_up(objective, data, parts):
  split = zip(*(np.split(x, parts) for x in data))
  total = np.sum([objective(*part) for part in split], axis=0)
  np.testing.assert_allclose(total, objective(*data), rtol=1e-6)


def test_padding_adds_nothing(objective, data):
  logp, mask = data
  grown = [np.pad(x, ((0, 2), (0, 3))) for x in (logp, mask)]
  np.testing.assert_allclose(objective(*grown), objective(logp, mask), rtol=1e-6)


def test_nothing_but_padding(objective, data):
  total, count = objective(data[0], np.zeros_like(data[1]))
  assert float(total) == 0 and float(count) == 0

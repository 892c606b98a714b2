"""The policy loss by hand; its laws are in conformance/test_policy_objectives.py."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from rlft.core.errors import ConfigError
from rlft.objectives.policy import aggregate, entropy_loss, policy_loss

X = np.array([[1, 2, 3], [4, np.nan, np.nan], [np.nan] * 3], np.float32)
MASK = ~np.isnan(X)


def row(*x):
  return np.array([x], np.float32)


@pytest.mark.parametrize(
  ("mode", "length", "expected"),
  [("token", 0, (10, 4)), ("sequence", 0, (6, 2)), ("constant", 5, (2, 2))],
)
def test_aggregate_by_hand(mode, length, expected):
  assert tuple(map(float, aggregate(X, MASK, mode, length))) == expected
  assert tuple(map(float, entropy_loss(X, MASK, mode, length))) == expected


RATIO = row(1.5, 1.5, 0.5, 0.5, 5.0, 1.1)
SIGN = row(1, -1, 1, -1, -1, 1)


def losses_and_grads(ratio=RATIO, advantage=SIGN, **options):
  """-rho A etc. of each token, and the derivative by its logp."""
  ones = np.ones(ratio.shape, bool)

  def total(logp):
    (value, _), stats = policy_loss(
      logp, np.zeros_like(ratio), advantage, ones, **options
    )
    return value, stats

  both = jax.jit(jax.value_and_grad(total, has_aux=True))
  (value, stats), grad = both(np.log(ratio))
  return float(value), grad, {n: tuple(map(float, x)) for n, x in stats.items()}


def test_clipping_by_hand():
  value, grad, stats = losses_and_grads()
  assert value == pytest.approx(-1.2 + 1.5 - 0.5 + 0.8 + 5.0 - 1.1, abs=1e-5)
  np.testing.assert_allclose(grad, [[0, 1.5, -0.5, 0, 5, -1.1]], rtol=1e-5)
  assert stats["clip_fraction"] == (2, 6)
  assert stats["ratio_mean"] == pytest.approx((10.1, 6))
  assert stats["ratio_max"] == pytest.approx((5, 1))
  each = np.maximum(RATIO, 1 / RATIO)
  assert stats["mult_prob_error"] == pytest.approx((each.sum(), 6), rel=1e-5)
  k3 = np.sum(RATIO - 1 - np.log(RATIO))
  assert stats["approx_kl"] == pytest.approx((k3, 6), rel=1e-5)


def test_asymmetric_clip_by_hand():
  value, grad, stats = losses_and_grads(clip_low=0.6, clip_high=0.05)
  assert value == pytest.approx(-1.05 + 1.5 - 0.5 + 0.5 + 5.0 - 1.05, abs=1e-5)
  np.testing.assert_allclose(grad, [[0, 1.5, -0.5, 0.5, 5, 0]], rtol=1e-5)
  assert stats["clip_fraction"] == (2, 6)


def test_dual_clip_by_hand():
  value, grad, stats = losses_and_grads(dual_clip=3.0)
  assert value == pytest.approx(-1.2 + 1.5 - 0.5 + 0.8 + 3.0 - 1.1, abs=1e-5)
  np.testing.assert_allclose(grad, [[0, 1.5, -0.5, 0, 0, -1.1]], rtol=1e-5)
  assert stats["clip_fraction"] == (3, 6)


def test_without_a_clip_it_is_the_surrogate():
  value, grad, stats = losses_and_grads(clip=False)
  assert value == pytest.approx(-np.sum(RATIO * SIGN), abs=1e-5)
  np.testing.assert_allclose(grad, -RATIO * SIGN, rtol=1e-5)
  assert stats["clip_fraction"] == (0, 6)


def test_gspo_clips_a_row_as_a_whole():
  """Ratios 2 and .5 are 1 together; .8 and .2 are .4 and, with A < 0, cut."""
  ratio = np.array([[2, 0.5], [0.8, 0.2]], np.float32)
  advantage = np.array([[1, 1], [-1, -1]], np.float32)
  value, grad, stats = losses_and_grads(
    ratio, advantage, importance="sequence", aggregate="sequence"
  )
  assert value == pytest.approx(-1 + 0.8, abs=1e-6)
  np.testing.assert_allclose(grad, [[-0.5, -0.5], [0, 0]], atol=1e-6)
  assert stats["clip_fraction"] == (2, 4)
  assert stats["ratio_max"] == pytest.approx((1, 1))


def test_truncated_importance_by_hand():
  behaviour = -np.log(row(0.5, 2.0, 9.0))  # old log-probs are 0
  value, grad, stats = losses_and_grads(
    row(1, 1, 1), row(1, 1, 1), behaviour_logp_BC=behaviour, importance_cap=3.0
  )
  assert value == pytest.approx(-5.5)
  np.testing.assert_allclose(grad, [[-0.5, -2, -3]], rtol=1e-6)
  assert stats["importance_weight"] == pytest.approx((5.5, 3))


def test_small_kl_survives_rounding():
  """log-ratio 2e-4: k3 is 2e-8, below the rounding of ratio - 1 - log ratio."""
  # Not under jit, where XLA may rewrite exp(x) - 1 into what is written here.
  _, stats = policy_loss(row(2e-4), row(0), row(1), np.ones((1, 1), bool))
  assert float(stats["approx_kl"][0]) == pytest.approx(2e-8, rel=1e-3)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"aggregate": "mean"}, "aggregate is 'mean'"),
    ({"aggregate": "constant"}, "constant_length is 0"),
    ({"importance": "row"}, "importance is 'row'"),
    ({"dual_clip": 0.5}, "dual_clip 0.5"),
    ({"clip_low": -0.1}, "clip_low -0.1"),
    ({"dual_clip": 2.0, "clip": False}, "clip=False"),
  ],
)
def test_wrong_settings_are_named(options, message):
  with pytest.raises(ConfigError, match=message):
    losses_and_grads(**options)


def test_shapes_are_checked():
  ones = np.ones((2, 3), bool)
  x = np.zeros((2, 3), np.float32)
  with pytest.raises(AssertionError):
    policy_loss(x, x, x[:, :1], ones)  # one per row is broadcast by the caller
  with pytest.raises(AssertionError):
    policy_loss(x, x, x, ones.astype(np.float32))

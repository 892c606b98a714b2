"""KL estimators against a categorical that is known exactly."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlft.core.errors import ConfigError
from rlft.objectives import kl

P, Q = np.array([0.7, 0.2, 0.1]), np.array([0.5, 0.3, 0.2])
LOGP, REF = (np.log(x).astype(np.float32)[None] for x in (P, Q))


@pytest.mark.parametrize(
  ("kind", "expected"), [("k1", 0.0851228), ("k2", 0.0800876), ("k3", 0.0851228)]
)
def test_golden_on_a_categorical(kind, expected):
  kl_BC = kl.kl_token(LOGP, REF, kind)
  assert float(np.sum(P * kl_BC)) == pytest.approx(expected, abs=1e-6)
  if kind != "k1":
    assert np.all(kl_BC >= 0)
  assert not np.any(kl.kl_token(REF, REF, kind))


def exact(logits):
  logp = jax.nn.log_softmax(logits)
  return jnp.sum(jnp.exp(logp) * (logp - REF[0]))


def reverse(logits):
  return jnp.sum(Q * (REF[0] - jax.nn.log_softmax(logits)))


@pytest.mark.parametrize(
  ("kind", "meant"), [("k1", None), ("k2", exact), ("k3", reverse)]
)
def test_gradient_as_a_loss(kind, meant):
  """Each outcome once, weighed by its probability: the mean over samples, exactly."""

  def loss(logits):
    logp = jax.nn.log_softmax(logits)[:, None]
    one = np.ones((3, 1, 1), bool)
    total_X, _ = jax.vmap(lambda *x: kl.kl_loss(*x, kind))(
      logp[:, None], REF.T[:, None], one
    )
    return jnp.sum(P * total_X)

  grad_of = lambda f: jax.jit(jax.grad(f))(LOGP[0])
  expected = np.zeros(3) if meant is None else grad_of(meant)
  np.testing.assert_allclose(grad_of(loss), expected, atol=1e-6)
  # The two directions are told apart here: else k3 could pass for k2.
  assert np.abs(grad_of(exact) - grad_of(reverse)).max() > 0.02


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_loss_is_masked_and_aggregated(kind):
  logp = np.array([[-1, -2, np.nan], [-3, np.inf, -np.inf]], np.float32)
  ref = np.array([[-2, -1, np.nan], [-3.5, np.nan, 0]], np.float32)
  mask = np.array([[1, 1, 0], [1, 0, 0]], bool)
  of = {"k1": lambda x: x, "k2": lambda x: x**2 / 2, "k3": lambda x: np.exp(-x) - 1 + x}
  a, b, c = (of[kind](x) for x in (1.0, -1.0, 0.5))
  for mode, length, expected in (
    ("token", 0, (a + b + c, 3)),
    ("sequence", 0, ((a + b) / 2 + c, 2)),
    ("constant", 10, ((a + b + c) / 10, 2)),
  ):
    pair = jax.jit(kl.kl_loss, static_argnums=(3, 4, 5))(
      logp, ref, mask, kind, mode, length
    )
    np.testing.assert_allclose(pair, expected, rtol=1e-6, atol=1e-7)
  by_both = lambda x, y: kl.kl_loss(x, y, mask, kind)[0]
  grad, ref_grad = jax.jit(jax.grad(by_both, argnums=(0, 1)))(logp, ref)
  slope = {"k1": lambda x: 1.0, "k2": lambda x: x, "k3": lambda x: 1 - np.exp(-x)}[kind]
  np.testing.assert_allclose(
    grad, [[slope(1.0), slope(-1.0), 0], [slope(0.5), 0, 0]], rtol=1e-6
  )
  assert not np.any(ref_grad)
  assert float(kl.sequence_kl(logp, ref, mask)) == pytest.approx((0 + 0.5) / 2)


def test_k3_is_exact_near_zero_and_finite_far_away():
  near = kl.kl_token(np.float32(1e-3), np.float32(0), "k3")
  assert float(near) == pytest.approx(4.9983e-7, rel=1e-3)
  assert np.isfinite(kl.kl_token(np.float32(-200), np.float32(0), "k3"))
  assert float(kl.kl_token(np.float32(200), np.float32(0), "k3")) == pytest.approx(199)


def test_sequence_kl_of_rows_without_tokens():
  x = np.ones((2, 3), np.float32)
  mask = np.array([[1, 1, 1], [0, 0, 0]], bool)
  assert float(kl.sequence_kl(x, np.zeros_like(x), mask)) == 3
  assert float(kl.sequence_kl(x, np.zeros_like(x), np.zeros_like(mask))) == 0


@pytest.mark.parametrize(
  ("value", "expected"),
  [(9, 1.01024), (6, 1.0), (6.3, 1 + 0.05 * 0.0512), (0, 1 - 0.2 * 0.0512)],
)
def test_adaptive_controller(value, expected):
  coef = kl.adaptive_kl_coef(1.0, value, target=6, horizon=10_000, episodes=512)
  assert float(coef) == pytest.approx(expected, abs=1e-6)
  doubled = jax.jit(lambda c: kl.adaptive_kl_coef(c, value, 6, 10_000, 512))(2.0)
  assert float(doubled) == pytest.approx(2 * expected, abs=1e-6)


def test_wrong_settings_are_named():
  with pytest.raises(ConfigError, match="'k4'"):
    kl.kl_token(LOGP, REF, "k4")
  with pytest.raises(ConfigError, match="target is 0"):
    kl.adaptive_kl_coef(1.0, 1.0, 0, 10, 1)

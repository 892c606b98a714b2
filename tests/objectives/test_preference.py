"""Losses on pairs by hand, and how they behave far out and under padding."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from rlft.core.errors import ConfigError
from rlft.objectives.preference import bradley_terry, dpo


def f(*x):
  return np.array(x, np.float32)


def floats(result):
  pair, stats = result
  return tuple(map(float, pair)), {n: tuple(map(float, x)) for n, x in stats.items()}


def test_bradley_terry_by_hand():
  pair, stats = floats(bradley_terry(f(1, 0, 2), f(0, 2, 2)))
  by_hand = np.log1p(np.exp(-1)) + np.log1p(np.exp(2)) + np.log(2)
  assert pair == pytest.approx((by_hand, 3))
  # One right, one wrong, one tie: a model that says nothing is right half the time.
  assert stats == {"accuracy": (1.5, 3), "reward_gap": (-1, 3)}


def test_margin_moves_the_loss_and_not_the_accuracy():
  pair, stats = floats(bradley_terry(f(1), f(0), margin_B=f(3)))
  assert pair == pytest.approx((np.log1p(np.exp(2)), 1))
  assert stats == {"accuracy": (1, 1), "reward_gap": (1, 1)}


# h = (-1 + 3) - (-2 + 1) = 3, and (0 - 1) - (0 - 0) = -1
SIDES = f(-1, 0), f(-2, 0), f(-3, 1), f(-1, 0)


def test_dpo_by_hand():
  pair, stats = floats(dpo(*SIDES, beta=0.5))
  by_hand = np.log1p(np.exp(-1.5)) + np.log1p(np.exp(0.5))
  assert pair == pytest.approx((by_hand, 2))
  assert stats == {
    "accuracy": (1, 2),
    "margin": (1.0, 2),
    "chosen_reward": (0.5, 2),
    "rejected_reward": (-0.5, 2),
  }


def test_label_smoothing_by_hand():
  pair, _ = floats(dpo(*SIDES, beta=0.5, label_smoothing=0.1))
  loss = lambda z: 0.9 * np.log1p(np.exp(-z)) + 0.1 * np.log1p(np.exp(z))
  assert pair == pytest.approx((loss(1.5) + loss(-0.5), 2))


def test_ipo_by_hand():
  pair, stats = floats(dpo(*SIDES, beta=0.25, kind="ipo"))
  assert pair == pytest.approx(((3 - 2) ** 2 + (-1 - 2) ** 2, 2))
  assert stats["margin"] == (0.5, 2)


def test_gradient_of_dpo_at_the_reference():
  """beta / 2 up on the chosen and down on the rejected side, the reference fixed."""
  loss = lambda sides: dpo(*sides, beta=0.3)[0][0]
  grads = jax.jit(jax.grad(loss))((f(-2), f(-3), f(-2), f(-3)))
  np.testing.assert_allclose(np.ravel(grads), [-0.15, 0.15, 0, 0], rtol=1e-6)


LOSSES = {
  "bradley_terry": lambda a, b, c, d, v: bradley_terry(a, b, c, v),
  "dpo": lambda a, b, c, d, v: dpo(a, b, c, d, valid_B=v),
  "ipo": lambda a, b, c, d, v: dpo(a, b, c, d, kind="ipo", valid_B=v),
}


@pytest.mark.parametrize("name", LOSSES)
def test_padding_has_no_part(name):
  loss = lambda sides, valid: LOSSES[name](*sides, valid)
  both = jax.jit(jax.value_and_grad(lambda s, v: loss(s, v)[0][0]))
  sides = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
  valid = np.array([True, False, True])
  for under in (np.nan, np.inf, -np.inf):
    padded = np.where(valid, sides, np.float32(under))
    value, grad = both(padded, valid)
    plain, plain_grad = both(sides, valid)
    assert float(value) == float(plain) and np.any(grad)
    np.testing.assert_array_equal(grad, plain_grad)
    assert not np.any(grad[:, 1])
  (_, count), stats = jax.jit(loss)(padded, valid)
  assert float(count) == 2
  short = jax.jit(loss)(sides[:, valid], None)[1]
  for stat, pair in stats.items():
    np.testing.assert_allclose(pair, short[stat], rtol=1e-6, err_msg=stat)


@pytest.mark.parametrize("gap", [1e4, -1e4])
def test_far_out_it_is_finite(gap):
  for loss in (lambda x: bradley_terry(x, f(0)), lambda x: dpo(x, f(0), f(0), f(0))):
    both = jax.jit(jax.value_and_grad(lambda x, loss=loss: loss(x)[0][0]))
    value, grad = both(f(gap))
    assert np.isfinite(value) and np.all(np.isfinite(grad))
    assert (float(value) == 0) == (gap > 0)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"kind": "kto"}, "'kto'"),
    ({"beta": 0.0}, "beta is 0.0"),
    ({"label_smoothing": 0.5}, "label_smoothing 0.5"),
    ({"label_smoothing": 0.1, "kind": "ipo"}, "with 'ipo' it is 0"),
  ],
)
def test_wrong_settings_are_named(options, message):
  with pytest.raises(ConfigError, match=message):
    dpo(*SIDES, **options)

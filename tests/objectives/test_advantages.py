"""Credit assignment against numbers by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlft.core.errors import ConfigError
from rlft.objectives import advantages
from rlft.objectives.policy import policy_loss

gae = jax.jit(advantages.gae)
whiten = jax.jit(advantages.whiten, static_argnums=2, static_argnames="shift_mean")
group_advantage = jax.jit(
  advantages.group_advantage, static_argnums=(2, 3, 4), static_argnames="eps"
)


def row(*x, dtype=np.float32):
  return np.array([x], dtype)


def test_gae_golden():
  ones = np.ones((1, 3), bool)
  advantage, returns = gae(row(0, 0, 1), row(0.1, 0.2, 0.3), ones)
  np.testing.assert_allclose(advantage, [[0.82675, 0.765, 0.7]], rtol=1e-6)
  np.testing.assert_allclose(returns, [[0.92675, 0.965, 1]], rtol=1e-6)


@pytest.mark.parametrize("tool_tokens", [0, 1, 2, 7])
@pytest.mark.parametrize("under", [0.5, np.nan])
def test_credit_is_carried_over_tool_tokens(tool_tokens, under):
  """The same four numbers however long the tool's answer is."""
  mask = row(1, 1, *[0] * tool_tokens, 1, 1, 0, 0, dtype=bool)
  value = np.where(mask, 0.5, np.float32(under)).astype(np.float32)
  reward = np.where(mask, 0, np.float32(under)).astype(np.float32)
  reward[0, -3] = 1.0  # on the last trainable token
  advantage, returns = gae(reward, value, mask)
  golden = [0.4286875, 0.45125, 0.475, 0.5]
  np.testing.assert_allclose(advantage[mask], golden, rtol=1e-6)
  np.testing.assert_allclose(returns[mask], np.array(golden) + 0.5, rtol=1e-6)
  assert not np.any(advantage[~mask]) and not np.any(returns[~mask])


def test_gae_discounts_and_bootstraps():
  """gamma .5, lambda .5: delta = [1 + 1 - 1, 0 + .5 * 4 - 2]; row 2 was cut."""
  mask = np.array([[1, 1, 0], [1, 1, 0]], bool)
  reward = np.array([[1, 0, 9], [1, 0, 9]], np.float32)
  value = np.array([[1, 2, 9], [1, 2, 9]], np.float32)
  bootstrap = np.array([0, 4], np.float32)
  advantage, _ = gae(reward, value, mask, 0.5, 0.5, bootstrap)
  np.testing.assert_allclose(advantage, [[1 - 0.25 * 2, -2, 0], [1, 0, 0]])
  with pytest.raises(AssertionError):
    gae(reward, value, mask, bootstrap_B=bootstrap[:1])


def test_gae_is_the_sum_of_discounted_errors():
  rng = np.random.default_rng(0)
  reward, value = rng.normal(size=(2, 3, 8)).astype(np.float32)
  mask = rng.random((3, 8)) < 0.6
  advantage, _ = gae(reward, value, mask, 0.9, 0.8)
  for b in range(3):
    r, v = reward[b, mask[b]].astype(float), value[b, mask[b]].astype(float)
    delta = r + 0.9 * np.append(v[1:], 0) - v
    expected = [
      sum(0.72**i * d for i, d in enumerate(delta[t:])) for t in range(len(r))
    ]
    np.testing.assert_allclose(advantage[b, mask[b]], expected, atol=1e-5)


def test_discounted_returns():
  mask = row(1, 0, 1, 1, 0, dtype=bool)
  returns = advantages.discounted_returns(row(1, np.nan, 2, 4, 7), mask, 0.5)
  np.testing.assert_allclose(returns, [[3, 0, 4, 4, 0]])


REWARD = np.array([1, 2, 6, 5, 5, 5, 0, 4, np.nan], np.float32)
JUDGED = ~np.isnan(REWARD)


def group(baseline, scale, reward=REWARD, judged=JUDGED, size=3, **options):
  value, stats = group_advantage(reward, judged, size, baseline, scale, **options)
  return np.asarray(value), {n: tuple(map(float, x)) for n, x in stats.items()}


def test_grpo_by_hand():
  value, stats = group("group", "group_std", eps=0.5)
  first = np.array([-2, -1, 3]) / (np.sqrt(7) + 0.5)  # variance 14 / (3 - 1)
  last = np.array([-2, 2]) / (np.sqrt(8) + 0.5)
  np.testing.assert_allclose(value, [*first, 0, 0, 0, *last, 0], rtol=1e-6)
  assert stats == {"equal_groups": (1, 3), "judged": (8, 9)}


def test_dr_grpo_and_rloo_by_hand():
  value, _ = group("group", "none")
  np.testing.assert_allclose(value, [-2, -1, 3, 0, 0, 0, -2, 2, 0], atol=1e-6)
  value, _ = group("leave_one_out", "none")
  rloo = [1 - 8 / 2, 2 - 7 / 2, 6 - 3 / 2, 0, 0, 0, 0 - 4, 4 - 0, 0]
  np.testing.assert_allclose(value, rloo, atol=1e-6)


def test_batch_and_no_baseline_by_hand():
  known = REWARD[JUDGED]  # mean 3.5
  value, _ = group("batch", "batch_std", eps=0.0)
  expected = (known - 3.5) / np.std(known, ddof=1)
  np.testing.assert_allclose(value, [*expected, 0], rtol=1e-5)
  value, _ = group("none", "none", size=1)
  np.testing.assert_array_equal(value, [*known, 0])
  value, _ = group("none", "batch_std", eps=0.0)  # a score's scale, mean kept
  np.testing.assert_allclose(value, [*known / np.std(known, ddof=1), 0], rtol=1e-5)


@pytest.mark.parametrize("scale", ["group_std", "batch_std", "none"])
@pytest.mark.parametrize("baseline", ["group", "leave_one_out"])
def test_a_lonely_judgement_has_no_advantage(baseline, scale):
  judged = np.array([True, False, False, False])
  reward = np.array([3, np.nan, np.inf, 1e30], np.float32)
  value, stats = group(baseline, scale, reward, judged, size=2)
  np.testing.assert_array_equal(value, 0)
  assert stats == {"equal_groups": (1, 1), "judged": (1, 4)}  # one has no judged row
  value, stats = group(baseline, scale, reward, np.zeros(4, bool), size=2)
  np.testing.assert_array_equal(value, 0)
  assert stats == {"equal_groups": (0, 0), "judged": (0, 4)}


def test_equal_rewards_are_never_divided_by_nothing():
  reward, judged = np.full(6, 0.1, np.float32), np.ones(6, bool)
  for baseline in ("leave_one_out", "batch", "none"):
    for scale in ("group_std", "batch_std"):
      value, stats = group(baseline, scale, reward, judged)
      expected = 0.1 if baseline == "none" else 0.0
      np.testing.assert_allclose(value, expected, atol=1e-7)
      assert stats["equal_groups"] == (2, 2)


def test_rloo_is_unbiased_where_the_group_mean_shrinks():
  """Over all pairs of two-armed samples: the exact policy gradient, by enumeration.

  Arms pay 1 and 0 with probability p and 1 - p, so d E[r] / d logit = p (1 - p).
  """
  p = 0.3
  logit = np.log(p / (1 - p))
  pairs = np.array([[1, 1], [1, 0], [0, 1], [0, 0]], np.float32)
  weight = np.prod(np.where(pairs == 1, p, 1 - p), axis=1)

  @jax.jit
  @jax.grad
  def gradient(x, arms, advantage):
    logp = jax.nn.log_sigmoid(jnp.where(arms == 1, 1, -1) * x)[:, None]
    mask = np.ones((2, 1), bool)
    (total, rows), _ = policy_loss(logp, logp, advantage[:, None], mask, clip=False)
    return total / rows

  for baseline, shrink in (("leave_one_out", 1.0), ("group", 0.5)):
    advantage = [group(baseline, "none", x, np.ones(2, bool), size=2)[0] for x in pairs]
    slope = [gradient(logit, *x) for x in zip(pairs, advantage)]
    assert np.sum(-weight * slope) == pytest.approx(shrink * p * (1 - p), abs=1e-6)


def test_wrong_groups_are_named():
  for baseline in ("group", "leave_one_out"):
    with pytest.raises(ConfigError, match="group of one"):
      jax.eval_shape(lambda b=baseline: group(b, "none", size=1))
  with pytest.raises(ConfigError, match="9 rows are no whole number of groups of 4"):
    group("group", "none", size=4)
  with pytest.raises(ConfigError, match="'mean'"):
    group("mean", "none")
  with pytest.raises(ConfigError, match="'std'"):
    group("group", "std")


def test_whitening_is_masked():
  x = np.array([[1, 2, np.nan], [3, np.inf, 6]], np.float32)
  mask = np.isfinite(x)
  white = np.asarray(whiten(x, mask))
  np.testing.assert_allclose(white[mask], (x[mask] - 3) / np.std(x[mask]), rtol=1e-6)
  assert not np.any(white[~mask])
  kept = np.asarray(whiten(x, mask, shift_mean=False))
  np.testing.assert_allclose(kept[mask], white[mask] + 3, rtol=1e-6)
  assert kept[mask].mean() == pytest.approx(3, rel=1e-6) and not np.any(kept[~mask])


def test_whitening_of_a_constant_and_of_nothing():
  x, mask = np.full(4, 2.5, np.float32), np.array([True, True, True, False])
  np.testing.assert_array_equal(whiten(x, mask), 0)
  np.testing.assert_allclose(whiten(x, mask, False), 2.5 * mask)
  np.testing.assert_array_equal(whiten(x, np.zeros(4, bool)), 0)

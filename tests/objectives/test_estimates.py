"""Estimators against published numbers, enumeration and each other."""

from __future__ import annotations

import itertools
import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlft.core.errors import ConfigError
from rlft.objectives import estimates

# answers 7, 7, 8, 8, 9, None with gold 7
ANSWERS = np.array([[7, 7, 8, 8, 9, -1]], np.int32)
GOLD = np.array([7], np.int32)
ALL = np.ones((1, 6), bool)


def pass_of(n: int, c: int, k: int, width: int | None = None) -> float:
  index = np.arange(width or n)[None, :]
  return float(estimates.pass_at_k(index < c, index < n, k)[0])


@pytest.mark.parametrize(
  ("n", "c", "k", "expected"),
  [
    (8, 1, 1, 0.125),
    (8, 1, 4, 0.5),
    (8, 1, 8, 1.0),
    (16, 3, 4, 0.607143),
    (96, 5, 32, 0.875262),
    (96, 48, 4, 0.9414261460),
    (96, 3, 8, 0.2319708847),
    (10, 3, 5, 0.9166666667),
    (200, 10, 100, 0.9992289740),
    (96, 1, 96, 1.0),
    (5, 0, 3, 0.0),
    (5, 5, 5, 1.0),
  ],
)
def test_pass_at_k_golden(n, c, k, expected):
  assert pass_of(n, c, k) == pytest.approx(expected, abs=2e-6)
  # Samples that do not exist change nothing, wherever the array ends.
  assert pass_of(n, c, k, width=n + 7) == pytest.approx(expected, abs=2e-6)


def test_pass_at_k_is_nan_with_too_few_samples():
  assert math.isnan(pass_of(4, 1, 8))
  assert math.isnan(pass_of(0, 0, 1, width=3))
  correct = np.array([[True, True, False], [True, False, False]])
  valid = np.array([[False, True, True], [True, True, True]])
  value = np.asarray(estimates.pass_at_k(correct, valid, 3))
  assert math.isnan(value[0]) and value[1] == 1.0
  # A correct sample that is not valid does not count.
  assert float(estimates.pass_at_k(correct, valid, 1)[0]) == pytest.approx(0.5)


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_pass_at_k_is_the_mean_over_subsets(data):
  n = data.draw(st.integers(1, 9))
  c = data.draw(st.integers(0, n))
  k = data.draw(st.integers(1, n))
  subsets = list(itertools.combinations(range(n), k))
  expected = sum(min(subset) < c for subset in subsets) / len(subsets)
  assert pass_of(n, c, k, width=9) == pytest.approx(expected, abs=1e-6)


def test_maj_at_k_golden_and_ties():
  assert float(estimates.maj_at_k(ANSWERS, GOLD, ALL)[0]) == pytest.approx(0.5)
  answers = np.array(
    [
      [7, 7, 8, 9],  # wins
      [8, 8, 7, 9],  # loses
      [7, 8, 9, 5],  # four tied
      [-1, -1, -1, 7],  # those without an answer never vote
      [-1, -1, -1, -1],  # nobody votes
      [8, 9, 8, 9],  # two others tied
      [7, 7, 7, 7],
    ],
    np.int32,
  )
  valid = np.ones(answers.shape, bool)
  value = estimates.maj_at_k(answers, np.full(7, 7, np.int32), valid)
  np.testing.assert_allclose(value, [1, 0, 0.25, 1, 0, 0, 1])


def test_maj_at_k_ignores_what_is_not_valid():
  valid = np.array([[True, False, True, True, True, True]])
  assert float(estimates.maj_at_k(ANSWERS, GOLD, valid)[0]) == 0.0
  assert math.isnan(float(estimates.maj_at_k(ANSWERS, GOLD, ~ALL)[0]))
  # A gold of -1 (nobody knows it) is never won.
  assert float(estimates.maj_at_k(ANSWERS, np.array([-1], np.int32), ALL)[0]) == 0.0


def test_maj_at_k_holds_no_prompts_by_samples_squared_array():
  p, n = 64, 96
  compiled = estimates.maj_at_k.lower(
    jax.ShapeDtypeStruct((p, n), np.int32),
    jax.ShapeDtypeStruct((p,), np.int32),
    jax.ShapeDtypeStruct((p, n), bool),
  ).compile()
  assert f"{p},{n},{n}" not in compiled.as_text()
  assert compiled.memory_analysis().temp_size_in_bytes < 20 * p * n * 4


@pytest.mark.parametrize(("k", "expected"), [(3, 0.4166667), (1, 0.3333333), (6, 0.5)])
def test_maj_subset_exact_golden(k, expected):
  value = estimates.maj_subset_exact(ANSWERS, GOLD, ALL, k)
  assert value[0] == pytest.approx(expected, abs=1e-6)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_maj_subset_exact_is_maj_at_k_of_every_subset(data):
  n = data.draw(st.integers(1, 7))
  k = data.draw(st.integers(1, n))
  answers = np.array(
    [data.draw(st.lists(st.integers(-1, 3), min_size=n, max_size=n))], np.int32
  )
  gold = np.array([data.draw(st.integers(0, 3))], np.int32)
  values = []
  for subset in itertools.combinations(range(n), k):
    votes = [a for a in answers[0, list(subset)] if a >= 0]
    top = max((votes.count(a) for a in votes), default=0)
    best = {a for a in votes if votes.count(a) == top}
    values.append(gold[0] in best and 1 / len(best))
  value = estimates.maj_subset_exact(answers, gold, np.ones((1, n), bool), k)
  assert value[0] == pytest.approx(np.mean(values))
  if k == n:
    whole = estimates.maj_at_k(answers, gold, np.ones((1, n), bool))
    assert value[0] == pytest.approx(float(whole[0]))


@pytest.mark.parametrize("k", [1, 3, 5])
def test_maj_subset_agrees_with_enumeration(k):
  rng = np.random.default_rng(0)
  answers = rng.integers(-1, 4, (40, 9)).astype(np.int32)
  gold = rng.integers(0, 4, 40).astype(np.int32)
  valid = rng.random((40, 9)) < 0.8
  valid[0] = False
  exact = estimates.maj_subset_exact(answers, gold, valid, k)
  mean, stderr = estimates.maj_subset(
    answers, gold, valid, k, jax.random.key(1), reps=600
  )
  known = ~np.isnan(exact)
  assert 0 < known.sum() < 40
  np.testing.assert_array_equal(np.isnan(mean), ~known)
  np.testing.assert_array_equal(np.isnan(stderr), ~known)
  error = (np.asarray(mean) - exact)[known]
  # 40 prompts: |z| stays under 4.5, and the errors cancel.
  spread = np.asarray(stderr)[known]
  assert np.all(np.abs(error) < 4.5 * spread + 1e-6)
  assert abs(error.mean()) < 4 * np.sqrt(np.sum(spread**2)) / len(spread)
  # The standard error is what the enumeration says it should be.
  if k == 1:
    expected = np.sqrt(exact[known] * (1 - exact[known]) / 600)
    np.testing.assert_allclose(spread, expected, atol=0.002)


def test_random_subsets_have_size_k_and_are_uniform():
  valid = np.array([[True, False, True, True, True]])
  keys = jax.random.split(jax.random.key(0), 4000)
  draw = jax.jit(jax.vmap(lambda key: estimates._random_subset(valid, 2, key)))
  subsets = np.asarray(draw(keys))[:, 0]
  assert np.all(subsets.sum(axis=1) == 2) and not subsets[:, 1].any()
  kinds, counts = np.unique(subsets, axis=0, return_counts=True)
  assert len(kinds) == 6
  chi_square = np.sum((counts - 4000 / 6) ** 2 / (4000 / 6))
  assert chi_square < 20.5  # 5 degrees of freedom, p = .001


def test_bootstrap_interval_of_a_rate():
  values = np.repeat([0.0, 1.0], [60, 40])
  mean, low, high = estimates.bootstrap_interval(values, seed=0, reps=4000)
  half = 1.96 * math.sqrt(0.4 * 0.6 / 100)
  assert mean == pytest.approx(0.4)
  assert low == pytest.approx(0.4 - half, abs=0.015)
  assert high == pytest.approx(0.4 + half, abs=0.015)
  assert (mean, low, high) == estimates.bootstrap_interval(values, seed=0, reps=4000)
  narrow = estimates.bootstrap_interval(values, seed=0, reps=4000, level=0.5)
  assert low < narrow[1] < narrow[2] < high


def test_bootstrap_interval_covers_as_often_as_it_says():
  rng = np.random.default_rng(0)
  covered = 0
  for trial in range(300):
    values = rng.random(80) < 0.3
    _, low, high = estimates.bootstrap_interval(values, seed=trial, reps=400)
    covered += low <= 0.3 <= high
  assert 0.90 < covered / 300 < 0.985  # .95, standard error .013, discrete


def test_bootstrap_leaves_out_nan_and_knows_nothing_of_nothing():
  with_nan = np.array([1.0, np.nan, 0.0, 1.0])
  without = np.array([1.0, 0.0, 1.0])
  assert estimates.bootstrap_interval(with_nan, 3) == estimates.bootstrap_interval(
    without, 3
  )
  assert all(math.isnan(x) for x in estimates.bootstrap_interval([np.nan], 0))
  assert all(math.isnan(x) for x in estimates.bootstrap_interval([], 0))
  assert estimates.bootstrap_interval([0.25], 0) == (0.25, 0.25, 0.25)


def test_paired_interval_is_narrower_and_signed():
  rng = np.random.default_rng(0)
  hardness = rng.random(200)
  first = (hardness < 0.5).astype(float)
  second = (hardness < 0.55).astype(float)
  mean, low, high = estimates.paired_bootstrap_interval(first, second, seed=0)
  assert mean == pytest.approx((second - first).mean()) and mean > 0
  _, low1, high1 = estimates.bootstrap_interval(first, seed=0)
  assert high - low < 0.6 * (high1 - low1)
  back = estimates.paired_bootstrap_interval(second, first, seed=0)
  np.testing.assert_allclose(back, [-mean, -high, -low], atol=1e-6)
  first[0] = np.nan
  assert estimates.paired_bootstrap_interval(first, second, 0)[0] == pytest.approx(
    np.nanmean(second - first)
  )


def test_wrong_requests_are_named():
  with pytest.raises(ConfigError, match="k is 0"):
    estimates.pass_at_k(ALL, ALL, 0)
  with pytest.raises(ConfigError, match="k is 0"):
    estimates.maj_subset_exact(ANSWERS, GOLD, ALL, 0)
  with pytest.raises(ConfigError, match="reps is 1"):
    estimates.maj_subset(ANSWERS, GOLD, ALL, 2, jax.random.key(0), reps=1)
  with pytest.raises(ConfigError, match="use maj_subset"):
    estimates.maj_subset_exact(ANSWERS, GOLD, ALL, 3, max_subsets=19)
  with pytest.raises(ConfigError, match="level"):
    estimates.bootstrap_interval([1.0], 0, level=1.0)
  with pytest.raises(ConfigError, match="cannot be paired"):
    estimates.paired_bootstrap_interval([1.0], [1.0, 2.0], 0)
  with pytest.raises(AssertionError):
    estimates.pass_at_k(ALL, ALL[:, :4], 1)
  with pytest.raises(AssertionError):
    estimates.maj_at_k(ANSWERS, np.zeros(2, np.int32), ALL)


def rerank_of(answers, scores, gold=7, valid=None, mode="best") -> float:
  answers, scores = np.array([answers]), np.array([scores], np.float32)
  valid = np.ones(answers.shape, bool) if valid is None else np.array([valid])
  return float(estimates.rerank(answers, scores, np.array([gold]), valid, mode)[0])


@pytest.mark.parametrize(
  ("answers", "scores", "best", "weighted"),
  [
    ([7, 8, 8], [0.9, 0.4, 0.4], 1, 1),  # one good sample outweighs two middling
    ([7, 8, 8], [0.9, 0.5, 0.5], 1, 0),  # and not two better ones
    ([7, 8, 9], [0.5, 0.5, 0.1], 0.5, 0.5),  # ties
    ([7, 7, 8], [0.5, 0.5, 0.5], 2 / 3, 1),
    ([-1, 7, 8], [0.9, 0.5, 0.4], 0, 1),  # without an answer: best, but no vote
    ([-1, -1, -1], [0.1, 0.2, 0.3], 0, 0),
    ([7, 8, 8], [-1.0, -2.0, -2.0], 1, 1),
    ([7, 7, 7, 8], [-1.0, -1.0, -1.0, -2.0], 1, 1),  # not lost by being frequent
    ([7, 8, 8], [3.0, 1.0, -1.0], 1, 1),
    ([8, 7, 7], [-2.0, -2.0, -2.0], 2 / 3, 1),  # all weights 0: a plain vote
    ([8, 7, 7], [0.0, 0.0, 0.0], 2 / 3, 1),
    ([7, 8, 8], [0.1, np.nan, np.nan], 1, 1),  # not scored, so not there
    ([8, 7, 7, -1], [2.0, 0.9, 0.9, -9.0], 0, 0),  # who does not vote shifts nobody
  ],
)
def test_rerank_by_hand(answers, scores, best, weighted):
  assert rerank_of(answers, scores) == pytest.approx(best)
  assert rerank_of(answers, scores, mode="weighted") == pytest.approx(weighted)


def test_rerank_sees_valid_samples_only():
  answers, scores = [8, 7, 7, 8], [9.0, 1.0, 2.0, np.nan]
  for mode in ("best", "weighted"):
    assert rerank_of(answers, scores, valid=[False, True, True, False], mode=mode) == 1
    assert math.isnan(rerank_of(answers, scores, valid=[False] * 4, mode=mode))
    assert math.isnan(rerank_of(answers, [np.nan] * 4, mode=mode))


def test_equal_sums_tie_in_any_order():
  """.1 + .2 + .4 and .1 + .4 + .2 differ in float32."""
  scores = [0.1, 0.1, 0.2, 0.4, 0.4, 0.2]
  assert rerank_of([7, 8] * 3, scores, mode="weighted") == 0.5


def random_votes(prompts, samples):
  rng = np.random.default_rng(0)
  answers = rng.integers(-1, 4, (prompts, samples))
  return answers, rng.integers(0, 2, prompts), rng.random((prompts, samples)) < 0.8


def test_a_constant_score_is_pass_at_1_and_the_plain_vote():
  answers, gold, valid = random_votes(50, 9)
  constant = np.full(answers.shape, 0.3, np.float32)
  best = estimates.rerank(answers, constant, gold, valid, "best")
  correct = (answers == gold[:, None]) & valid
  np.testing.assert_allclose(best, estimates.pass_at_k(correct, valid, 1), atol=1e-6)
  vote = estimates.rerank(answers, constant, gold, valid, "weighted")
  np.testing.assert_allclose(vote, estimates.maj_at_k(answers, gold, valid), atol=1e-6)


def test_a_score_that_knows_is_pass_at_k():
  answers, gold, valid = random_votes(50, 9)
  correct = (answers == gold[:, None]) & valid
  knows = correct.astype(np.float32)
  for mode in ("best", "weighted"):
    reranked = np.asarray(estimates.rerank(answers, knows, gold, valid, mode))
    assert np.all(reranked[correct.any(axis=1)] == 1)


@pytest.mark.parametrize("mode", ["best", "weighted"])
def test_rerank_of_subsets_is_near_enumeration(mode):
  answers, gold, _ = random_votes(8, 6)
  scores = np.random.default_rng(1).normal(size=answers.shape).astype(np.float32)
  valid = np.ones(answers.shape, bool)
  subsets = np.array(list(itertools.combinations(range(6), 3)))
  each = [
    estimates.rerank(answers[:, s], scores[:, s], gold, valid[:, :3], mode)
    for s in subsets
  ]
  key = jax.random.key(0)
  mean, stderr = estimates.rerank_subset(
    answers, scores, gold, valid, 3, key, reps=512, mode=mode
  )
  exact = np.mean(each, axis=0)
  assert np.ptp(exact) > 0.2  # there is something to estimate
  np.testing.assert_array_less(np.abs(mean - exact), 5 * stderr + 1e-6)
  assert np.all(stderr < 0.03)
  few, _ = estimates.rerank_subset(answers, scores, gold, valid, 7, key, mode=mode)
  assert np.all(np.isnan(few))


def test_wrong_rerank_modes_are_named():
  with pytest.raises(ConfigError, match="'vote'"):
    rerank_of([7], [1.0], mode="vote")


# ---------------------------------------------------------------------- best of n


def best_by_enumeration(reward, value, n):
  """The mean over all subsets; equal rewards share a place."""
  found = []
  for subset in itertools.combinations(range(len(reward)), n):
    top = max(reward[i] for i in subset)
    found.append(np.mean([value[i] for i in subset if reward[i] == top]))
  return np.mean(found)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_is_the_mean_over_subsets(n):
  """With ties, samples that are not valid (NaN under them), and another value."""
  rng = np.random.default_rng(0)
  reward = rng.integers(0, 3, (4, 6)).astype(np.float32)  # ties
  reward[0] = rng.normal(size=6)
  value = rng.normal(size=(4, 6)).astype(np.float32)
  valid = np.ones((4, 6), bool)
  valid[2, [1, 4]] = valid[3] = False
  valid[3, 2] = True
  hidden = np.where(valid, reward, np.float32(np.nan))
  hidden_value = np.where(valid, value, np.float32(np.nan))
  own = np.asarray(estimates.best_of_n_value(hidden, valid, n))
  other = np.asarray(estimates.best_of_n_value(hidden, valid, n, hidden_value))
  for row in range(4):
    r, v = reward[row][valid[row]], value[row][valid[row]]
    if len(r) < n:
      assert math.isnan(own[row]) and math.isnan(other[row])
      continue
    assert own[row] == pytest.approx(best_by_enumeration(r, r, n), abs=1e-5)
    assert other[row] == pytest.approx(best_by_enumeration(r, v, n), abs=1e-5)


@pytest.mark.parametrize("n", [1, 8, 96])
def test_best_of_n_of_right_or_wrong_is_pass_at_n(n):
  correct = np.random.default_rng(1).random((8, 96)) < np.linspace(0, 1, 8)[:, None]
  valid = np.ones(correct.shape, bool)
  value = estimates.best_of_n_value(correct.astype(np.float32), valid, n)
  np.testing.assert_allclose(value, estimates.pass_at_k(correct, valid, n), atol=2e-6)


def test_best_of_n_kl():
  assert estimates.best_of_n_kl(1) == 0
  assert estimates.best_of_n_kl(16) == pytest.approx(2.772589 - 0.9375, abs=1e-6)
  # Four completions of equal probability and different rewards: well below the bound.
  p = np.array([(i / 4) ** 3 - ((i - 1) / 4) ** 3 for i in (1, 2, 3, 4)])
  assert 0.2 < (p * np.log(4 * p)).sum() < estimates.best_of_n_kl(3)
  with pytest.raises(ConfigError):
    estimates.best_of_n_kl(0)

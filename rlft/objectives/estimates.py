"""Estimators of sampled evaluation: pass@k, maj@k, rerank@k, best-of-n, intervals.

Letters: P prompts, N samples of a prompt, K samples of a subset, R bootstrap or
Monte-Carlo repetitions.
"""

from __future__ import annotations

import functools
import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np

from rlft.core.errors import ConfigError

_CHUNK = 256  # bootstrap resamples held at once


@functools.partial(jax.jit, static_argnames="k")
def pass_at_k(correct_PN: jax.Array, valid_PN: jax.Array, k: int) -> jax.Array:
  """Probability that at least one of k samples is correct, unbiased.

      1 - C(n-c, k) / C(n, k) = 1 - prod_{i<k} (n-c-i) / (n-i)

  with n valid samples of which c are correct: the mean over all subsets of size k.
  Cost O(P (N + k)).

  Args:
    correct_PN: bool [P, N].
    valid_PN: bool [P, N], False where there is no sample; a sample that has no answer
      is valid and not correct.
    k: subset size, static, at least 1.

  Returns:
    float32 [P]; NaN where n < k, which no estimator can tell.

  Raises:
    ConfigError: k < 1.

  Source: Chen et al. 2021 (Codex), eq. 1; their code returns 1 where n - c < k even if
  n < k, we return NaN. `1 - (1 - c/n)**k` is biased: n=10, c=3, k=5 gives .832, not
  .917.
  """
  chex.assert_rank([correct_PN, valid_PN], 2)
  chex.assert_equal_shape([correct_PN, valid_PN])
  chex.assert_type([correct_PN, valid_PN], bool)
  _check_k(k)
  n_P1 = jnp.sum(valid_PN, axis=1, dtype=jnp.int32)[:, None]
  c_P1 = jnp.sum(correct_PN & valid_PN, axis=1, dtype=jnp.int32)[:, None]
  i_1k = jnp.arange(k, dtype=jnp.int32)[None, :]
  # Where n - c < k some factor is 0 and the product with it; where n < k it is unused.
  above_Pk = jnp.maximum(n_P1 - c_P1 - i_1k, 0).astype(jnp.float32)
  below_Pk = jnp.maximum(n_P1 - i_1k, 1).astype(jnp.float32)
  missed_P = jnp.prod(above_Pk / below_Pk, axis=1)
  return jnp.where(n_P1[:, 0] < k, jnp.nan, 1.0 - missed_P)


@jax.jit
def maj_at_k(answer_PN: jax.Array, gold_P: jax.Array, valid_PN: jax.Array) -> jax.Array:
  """Probability that a vote of all valid samples gives the gold answer.

      [gold is among the most frequent answers] / (number of most frequent answers)

  which is the expected value when ties are broken at random. Cost O(P N^2) time in a
  loop over the samples, O(P N) memory; nothing is sorted.

  Args:
    answer_PN: int32 [P, N], id of the normalised answer; -1 = no answer, never votes.
    gold_P: int32 [P], id of the gold answer, of the same numbering.
    valid_PN: bool [P, N], False where there is no sample.

  Returns:
    float32 [P]; 0 where nobody votes, NaN where there is no valid sample.

  Source: Havrilla et al. 2024 (maj@96); the tie rule is ours.
  """
  chex.assert_rank([answer_PN, valid_PN, gold_P], [2, 2, 1])
  chex.assert_equal_shape([answer_PN, valid_PN])
  chex.assert_equal_shape_prefix([answer_PN, gold_P], 1)
  chex.assert_type([answer_PN, gold_P], int)
  chex.assert_type(valid_PN, bool)
  ones_PN = jnp.ones(answer_PN.shape, jnp.float32)
  value_P = _vote(answer_PN, gold_P, valid_PN & (answer_PN >= 0), ones_PN)
  return jnp.where(jnp.any(valid_PN, axis=1), value_P, jnp.nan)


@functools.partial(jax.jit, static_argnames=("k", "reps"))
def maj_subset(
  answer_PN: jax.Array,
  gold_P: jax.Array,
  valid_PN: jax.Array,
  k: int,
  key: jax.Array,
  reps: int = 256,
) -> tuple[jax.Array, jax.Array]:
  """maj@k for k < N: the mean of `maj_at_k` over random subsets of size k.

  Subsets are drawn without replacement by selection sampling, one pass and no sort.
  A sample without an answer takes its place in a subset and does not vote. Cost
  O(R P N^2) time, O(P N) memory.

  Args:
    answer_PN, gold_P, valid_PN: as for `maj_at_k`.
    k: subset size, static, at least 1.
    key: a jax.random key.
    reps: R, how many subsets of each prompt, static, at least 2.

  Returns:
    mean_P and its Monte-Carlo standard error stderr_P, float32 [P]; NaN where fewer
    than k samples are valid. The standard error is that of the subsets only: what the
    samples leave open is what `bootstrap_interval` says.

  Raises:
    ConfigError: k < 1 or reps < 2.

  Source: Knuth, TAOCP vol. 2, 3.4.2, algorithm S.
  """
  chex.assert_rank([answer_PN, valid_PN, gold_P], [2, 2, 1])
  value_of = functools.partial(maj_at_k, answer_PN, gold_P)
  return _mean_over_subsets(value_of, valid_PN, k, key, reps)


@functools.partial(jax.jit, static_argnames="mode")
def rerank(
  answer_PN: jax.Array,
  score_PN: jax.Array,
  gold_P: jax.Array,
  valid_PN: jax.Array,
  mode: str = "best",
) -> jax.Array:
  """Probability that the scores pick the gold answer out of all valid samples.

      best      the answer of the sample of the highest score; the mean over exact ties
      weighted  the answer of the largest sum of scores, ties broken at random

  A sample without an answer can be the best one, and is then wrong, but never votes: so
  "best" with a constant score is pass@1, and "weighted" with one is maj@k.

  A vote cannot weigh less than nothing: where voters of a prompt have negative scores
  (a reward model's, a logit), those of the lowest are taken off all, so that its weight
  is 0. Without that an answer would lose by every vote that it gets. Where all weights
  are 0, every vote counts 1. Scores that are never negative (probabilities) are used
  as they are.

  Args:
    answer_PN, gold_P, valid_PN: as for `maj_at_k`.
    score_PN: float [P, N], finite, higher is better; a sample of score NaN is left out.
    mode: "best" or "weighted", static.

  Returns:
    float32 [P]; NaN where there is no valid sample.

  Raises:
    ConfigError: an unknown mode.

  Source: Havrilla et al. 2024 (rerank@96); the vote Cobbe et al. 2021
  (arXiv:2110.14168), section 4.3, weighted as in Li et al. 2022 (arXiv:2206.02336).
  """
  chex.assert_rank([answer_PN, score_PN, valid_PN, gold_P], [2, 2, 2, 1])
  chex.assert_equal_shape([answer_PN, score_PN, valid_PN])
  chex.assert_equal_shape_prefix([answer_PN, gold_P], 1)
  chex.assert_type([answer_PN, gold_P], int)
  chex.assert_type(valid_PN, bool)
  if mode not in ("best", "weighted"):
    raise ConfigError(f"mode is {mode!r}, not 'best' or 'weighted'.")
  score_PN = jnp.asarray(score_PN, jnp.float32)
  valid_PN &= ~jnp.isnan(score_PN)
  voting_PN = valid_PN & (answer_PN >= 0)
  if mode == "best":
    top_P1 = jnp.max(score_PN, axis=1, keepdims=True, where=valid_PN, initial=-jnp.inf)
    tied_PN = valid_PN & (score_PN == top_P1)
    right_PN = tied_PN & voting_PN & (answer_PN == gold_P[:, None])
    value_P = jnp.sum(right_PN, axis=1) / jnp.maximum(jnp.sum(tied_PN, axis=1), 1)
  else:
    lowest_P1 = jnp.min(score_PN, axis=1, keepdims=True, where=voting_PN, initial=0.0)
    weight_PN = jnp.where(voting_PN, score_PN - lowest_P1, 0.0)
    no_weight_P1 = ~jnp.any(weight_PN > 0, axis=1, keepdims=True)
    weight_PN = jnp.where(no_weight_P1, 1.0, weight_PN)
    value_P = _vote(answer_PN, gold_P, voting_PN, weight_PN)
  return jnp.where(jnp.any(valid_PN, axis=1), value_P, jnp.nan)


@functools.partial(jax.jit, static_argnames=("k", "reps", "mode"))
def rerank_subset(
  answer_PN: jax.Array,
  score_PN: jax.Array,
  gold_P: jax.Array,
  valid_PN: jax.Array,
  k: int,
  key: jax.Array,
  reps: int = 256,
  mode: str = "best",
) -> tuple[jax.Array, jax.Array]:
  """rerank@k for k < N: the mean of `rerank` over random subsets of size k.

  Args:
    answer_PN, score_PN, gold_P, valid_PN, mode: as for `rerank`.
    k, key, reps: as for `maj_subset`.

  Returns:
    mean_P and its Monte-Carlo standard error stderr_P, as `maj_subset`.

  Raises:
    ConfigError: an unknown mode, k < 1 or reps < 2.
  """
  chex.assert_rank([answer_PN, score_PN, valid_PN, gold_P], [2, 2, 2, 1])

  def value_of(subset_PN):
    return rerank(answer_PN, score_PN, gold_P, subset_PN, mode)

  return _mean_over_subsets(value_of, valid_PN & ~jnp.isnan(score_PN), k, key, reps)


@functools.partial(jax.jit, static_argnames="n")
def best_of_n_value(
  reward_PM: jax.Array,
  valid_PM: jax.Array,
  n: int,
  value_PM: jax.Array | None = None,
) -> jax.Array:
  """Expected value of the best of n samples, unbiased, from M >= n of them.

      sum_i w_i value_i,  w_i = (C(le_i, n) - C(lt_i, n)) / C(m, n) / (le_i - lt_i)

  with m valid samples, le_i of them of at most sample i's reward and lt_i of less: the
  mean over all subsets of size n, where samples of equal reward share a place. With a
  reward that is 0 or 1 it is pass@n. Cost O(P M (M + n)) time, O(P M) memory.

  Args:
    reward_PM: float [P, M], what chooses; higher is better.
    valid_PM: bool [P, M], False where a sample does not exist or was not judged: it is
      not read, and is in no subset.
    n: static, at least 1.
    value_PM: float [P, M], what is averaged, such as whether the sample is correct; the
      reward itself when None.

  Returns:
    float32 [P]; NaN where m < n, which no estimator can tell.

  Raises:
    ConfigError: n < 1.

  Source: order statistics of a finite population; for the reward itself Nakano et al.
  2021 (WebGPT, arXiv:2112.09332), appendix I. Ties are ours.
  """
  value_PM = reward_PM if value_PM is None else value_PM
  chex.assert_rank([reward_PM, valid_PM, value_PM], 2)
  chex.assert_equal_shape([reward_PM, valid_PM, value_PM])
  chex.assert_type(valid_PM, bool)
  _check_k(n)
  m_P1 = jnp.sum(valid_PM, axis=1, dtype=jnp.int32, keepdims=True)

  def count(sample, carry):
    less_PM, most_PM = carry
    one = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=1, axis=1)
    reward_P1, valid_P1 = one(reward_PM, sample), one(valid_PM, sample)
    less_PM += valid_P1 & (reward_P1 < reward_PM)
    most_PM += valid_P1 & (reward_P1 <= reward_PM)
    return less_PM, most_PM

  zeros_PM = jnp.zeros(reward_PM.shape, jnp.int32)
  less_PM, most_PM = jax.lax.fori_loop(
    0, reward_PM.shape[1], count, (zeros_PM, zeros_PM)
  )

  def share(size_PM):  # C(size, n) / C(m, n)
    def times(j, ratio_PM):
      above_PM = jnp.maximum(size_PM - j, 0).astype(jnp.float32)
      return ratio_PM * above_PM / jnp.maximum(m_P1 - j, 1)

    return jax.lax.fori_loop(0, n, times, jnp.ones(size_PM.shape, jnp.float32))

  weight_PM = (share(most_PM) - share(less_PM)) / jnp.maximum(most_PM - less_PM, 1)
  # `where` on the inputs: what is not valid may be NaN.
  total_P = jnp.sum(
    jnp.where(valid_PM, weight_PM, 0.0) * jnp.where(valid_PM, value_PM, 0.0), axis=1
  )
  return jnp.where(m_P1[:, 0] < n, jnp.nan, total_P)


def best_of_n_kl(n: int) -> float:
  """Most that the best of n samples can be from the policy they come from, in nats.

      KL(best of n || policy) <= log n - (n - 1) / n

  Equal where no two completions have the same reward and none is likely by itself; with
  few distinct completions or rewards it is far less.

  Args:
    n: at least 1.

  Source: Beirami et al. 2024 (arXiv:2401.01879), who show that the formula, long given
  as the KL itself, is an upper bound.
  """
  _check_k(n)
  return math.log(n) - (n - 1) / n


def maj_subset_exact(
  answer_PN: np.ndarray,
  gold_P: np.ndarray,
  valid_PN: np.ndarray,
  k: int,
  max_subsets: int = 20_000,
) -> np.ndarray:
  """maj@k for k < N exactly, by enumeration of all subsets; numpy, on the host.

  Cost O(P C(n, k) k^2): for small N.

  Args:
    answer_PN, gold_P, valid_PN: as for `maj_at_k`.
    k: subset size, at least 1.
    max_subsets: the most subsets of a prompt that are enumerated.

  Returns:
    float64 [P]; NaN where fewer than k samples are valid.

  Raises:
    ConfigError: k < 1, or more than max_subsets subsets.
  """
  chex.assert_rank([answer_PN, valid_PN, gold_P], [2, 2, 1])
  chex.assert_equal_shape([answer_PN, valid_PN])
  _check_k(k)
  subsets = max(math.comb(int(n), k) for n in [0, *np.sum(valid_PN, axis=1)])
  if subsets > max_subsets:
    raise ConfigError(
      f"{subsets} subsets of size k={k} exceed max_subsets={max_subsets};"
      " use maj_subset, which samples them."
    )
  value_P = np.full(len(gold_P), np.nan)
  for prompt, (answer_N, valid_N) in enumerate(zip(answer_PN, valid_PN)):
    answer_n = np.asarray(answer_N)[np.asarray(valid_N)]
    if len(answer_n) < k:
      continue
    answer_SK = answer_n[
      np.array(list(itertools.combinations(range(len(answer_n)), k)))
    ]
    votes_SK = np.zeros(answer_SK.shape, int)
    for sample_S1 in np.split(answer_SK, k, axis=1):
      votes_SK += (answer_SK == sample_S1) & (answer_SK >= 0)
    top_S1 = np.maximum(votes_SK.max(axis=1, keepdims=True), 1)
    tied_SK = votes_SK == top_S1
    # A tied answer stands in top_S1 places.
    winners_S = tied_SK.sum(axis=1) / top_S1[:, 0]
    wins_S = (tied_SK & (answer_SK == gold_P[prompt])).any(axis=1)
    value_P[prompt] = np.mean(wins_S / np.maximum(winners_S, 1))
  return value_P


def bootstrap_interval(
  values_P, seed: int, reps: int = 2000, level: float = 0.95
) -> tuple[float, float, float]:
  """Mean of values over prompts, with its bootstrap percentile interval.

  Prompts are drawn with replacement R times; the interval holds the middle `level` of
  the R means. Prompts whose value is NaN are left out of all. Cost O(R P) time, O(P)
  memory, and a sort of the R means.

  Args:
    values_P: [P], one value a prompt; samples of one prompt depend on each other, so
      the prompt is what is resampled.
    seed: integer; equal seeds and lengths resample equally.
    reps: R, at least 1.
    level: probability that the interval is meant to hold, 0 to 1.

  Returns:
    (mean, low, high); all NaN when no value is left. Where all values are equal the
    interval has no width: n prompts that all fail still allow a rate up to about 3/n.

  Raises:
    ConfigError: reps < 1, or a level outside (0, 1).

  Source: Efron 1979; the percentile method.
  """
  if reps < 1 or not 0 < level < 1:
    raise ConfigError(
      f"reps is {reps} (at least 1), level {level} (0 to 1, exclusive)."
    )
  values_P = np.asarray(values_P, np.float32)
  chex.assert_rank(values_P, 1)
  values_P = values_P[~np.isnan(values_P)]
  if not len(values_P):
    return math.nan, math.nan, math.nan
  # Padded to a power of two, so that few lengths are compiled.
  room = max(64, 1 << (len(values_P) - 1).bit_length())
  padded_P = np.pad(values_P, (0, room - len(values_P)))
  means_R = _resampled_means(padded_P, len(values_P), jax.random.key(seed), reps)
  low, high = np.quantile(np.asarray(means_R), [(1 - level) / 2, (1 + level) / 2])
  return float(values_P.mean(dtype=np.float64)), float(low), float(high)


def paired_bootstrap_interval(
  values_P, values2_P, seed: int, reps: int = 2000, level: float = 0.95
) -> tuple[float, float, float]:
  """Mean of values2 - values over the same prompts, with its bootstrap interval.

  Differences of a prompt are resampled together: what makes a prompt easy for both
  cancels, so the interval is narrower than that of two unpaired means.

  Args:
    values_P, values2_P: [P] each, of the same prompts in the same order; a prompt with
      a NaN in either is left out.
    seed, reps, level: as for `bootstrap_interval`.

  Returns:
    (mean difference, low, high).

  Raises:
    ConfigError: as `bootstrap_interval`, or different lengths.
  """
  values_P, values2_P = np.asarray(values_P), np.asarray(values2_P)
  if values_P.shape != values2_P.shape:
    raise ConfigError(
      f"values of shapes {values_P.shape} and {values2_P.shape} cannot be paired;"
      " evaluate both on the same prompts."
    )
  return bootstrap_interval(values2_P - values_P, seed, reps, level)


def _check_k(k: int) -> None:
  if k < 1:
    raise ConfigError(f"k is {k}; it is at least 1.")


def _vote(answer_PN, gold_P, voting_PN, weight_PN) -> jax.Array:
  """Probability [P] that gold wins a weighted vote with ties broken at random.

  Weights are at least 0. 0 where nobody votes.
  """
  weight_PN = jnp.where(voting_PN, weight_PN, 0.0)

  def add_votes_of(sample, carry):
    votes_PN, is_first_PN = carry
    here_P1, votes_P1, weight_P1 = (
      jax.lax.dynamic_slice_in_dim(x_PN, sample, 1, axis=1)
      for x_PN in (answer_PN, voting_PN, weight_PN)
    )
    same_PN = (answer_PN == here_P1) & votes_P1 & voting_PN
    later_1N = jnp.arange(answer_PN.shape[1])[None, :] > sample
    return votes_PN + same_PN * weight_P1, is_first_PN & ~(same_PN & later_1N)

  start = jnp.zeros(answer_PN.shape, jnp.float32), voting_PN
  votes_PN, is_first_PN = jax.lax.fori_loop(0, answer_PN.shape[1], add_votes_of, start)
  top_P1 = jnp.max(votes_PN, axis=1, keepdims=True, initial=0.0)
  # Each answer is counted once, where it first occurs. Equal sums of fractions may
  # differ by rounding, as their terms come in different orders.
  tied_PN = is_first_PN & (votes_PN >= top_P1 * (1 - 1e-6))
  wins_P = jnp.any(tied_PN & (answer_PN == gold_P[:, None]), axis=1)
  return wins_P / jnp.maximum(jnp.sum(tied_PN, axis=1), 1).astype(jnp.float32)


def _mean_over_subsets(value_of, valid_PN, k: int, key, reps: int):
  """Mean and standard error of value_of(subset_PN) [P] over random subsets of k."""
  _check_k(k)
  if reps < 2:
    raise ConfigError(f"reps is {reps}; a standard error needs at least 2.")

  def once(carry, rep_key):
    sum_P, squares_P = carry
    value_P = value_of(_random_subset(valid_PN, k, rep_key))
    return (sum_P + value_P, squares_P + value_P**2), None

  zeros_P = jnp.zeros(valid_PN.shape[:1], jnp.float32)
  keys = jax.random.split(key, reps)
  (sum_P, squares_P), _ = jax.lax.scan(once, (zeros_P, zeros_P), keys)
  mean_P = sum_P / reps
  variance_P = jnp.maximum(squares_P / reps - mean_P**2, 0.0) * reps / (reps - 1)
  enough_P = jnp.sum(valid_PN, axis=1) >= k
  stderr_P = jnp.sqrt(variance_P / reps)
  return jnp.where(enough_P, mean_P, jnp.nan), jnp.where(enough_P, stderr_P, jnp.nan)


def _random_subset(valid_PN: jax.Array, k: int, key: jax.Array) -> jax.Array:
  """A uniform subset of k of the valid samples (all of them, where they are fewer)."""
  uniform_NP = jax.random.uniform(key, valid_PN.T.shape)
  left_P = jnp.sum(valid_PN, axis=1, dtype=jnp.int32)

  def choose(carry, sample):
    wanted_P, left_P = carry
    valid_P, uniform_P = sample
    chosen_P = valid_P & (uniform_P * left_P < wanted_P)
    return (wanted_P - chosen_P, left_P - valid_P), chosen_P

  start = jnp.full_like(left_P, k), left_P
  _, subset_NP = jax.lax.scan(choose, start, (valid_PN.T, uniform_NP))
  return subset_NP.T


@functools.partial(jax.jit, static_argnames="reps")
def _resampled_means(values_P: jax.Array, size: int, key: jax.Array, reps: int):
  """The means_R of R resamples of the first `size` values."""

  def means_of(chunk_key):
    shape = (_CHUNK, values_P.shape[0])
    index_CP = jax.random.randint(chunk_key, shape, 0, size)
    real_P = jnp.arange(values_P.shape[0]) < size
    return jnp.sum(values_P[index_CP], axis=1, where=real_P) / size

  chunks = -(-reps // _CHUNK)
  return jax.lax.map(means_of, jax.random.split(key, chunks)).ravel()[:reps]

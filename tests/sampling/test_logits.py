"""Choosing a token: against exact distributions and a reference that sorts."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlft.core import rng
from rlft.core.rng import Purpose
from rlft.sampling.logits import BLOCK, Sampling, choose, inverse_cdf, keep_mask

LAST = np.float32(1 - 2**-24)  # the largest uniform


def settings_of(rows: int, **given) -> Sampling:
  fill = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "max_new": 1}
  kind = {"top_k": np.int32, "max_new": np.int32}
  return Sampling(
    **{
      f"{name}_B": np.broadcast_to(
        np.asarray(given.get(name, value), kind.get(name, np.float32)), (rows,)
      )
      for name, value in fill.items()
    }
  )


# ------------------------------------------------------------- inverse CDF


def chi_square_limit(freedom: int) -> float:
  """Exceeded once in about a million tests (Wilson and Hilferty, 1931)."""
  spread = 2 / (9 * freedom)
  return freedom * (1 - spread + 4.75 * spread**0.5) ** 3


@functools.partial(jax.jit, static_argnums=1)
def draw_counts(mass_V, rounds):
  """How often each token comes in rounds x 4096 draws, with the noise of rollouts."""
  keys_B = rng.row_keys(
    rng.key(0, Purpose.ROLLOUT), jnp.arange(64).repeat(64), jnp.tile(jnp.arange(64), 64)
  )
  mass_BV = jnp.broadcast_to(mass_V, (4096, mass_V.size))

  def one(t, counts_V):
    token_B = inverse_cdf(mass_BV, *rng.uniforms(keys_B, jnp.full((4096,), t)))
    return counts_V.at[token_B].add(1)

  return jax.lax.fori_loop(0, rounds, one, jnp.zeros(mass_V.size, jnp.int32))


@pytest.mark.parametrize("vocab", [1, 7, 127, 128, 129, 257, 1000])
def test_draws_follow_the_distribution(vocab):
  """Chi-square of every token, and of every block, over a million draws in all."""
  source = np.random.default_rng(vocab)
  mass = source.gamma(0.5, size=vocab).astype(np.float32)
  mass[source.random(vocab) < 0.2] = 0  # what filters leave
  edges = [i for i in (0, 126, 127, 128, 129, 255, 256, vocab - 1) if i < vocab]
  mass[edges] = 1.0  # block boundaries must be hit and counted
  rounds = 64 if vocab == 1000 else 32  # 262,144 draws, or half of them
  counts = np.asarray(draw_counts(mass, rounds), np.float64)
  draws = rounds * 4096
  assert counts.sum() == draws
  assert not counts[mass == 0].any(), "a token without mass was drawn"
  expected = mass.astype(np.float64) / mass.astype(np.float64).sum() * draws
  blocks = np.arange(vocab) // BLOCK
  for group in (np.arange(vocab), blocks):
    seen, due = np.bincount(group, counts), np.bincount(group, expected)
    often = due >= 10  # the test's condition; the rest is one class
    seen = np.append(seen[often], seen[~often].sum())
    due = np.append(due[often], due[~often].sum())
    keep = due > 0
    statistic = ((seen - due)[keep] ** 2 / due[keep]).sum()
    freedom = max(1, keep.sum() - 1)
    assert statistic < chi_square_limit(freedom), (vocab, statistic, freedom)


def test_rare_blocks_keep_their_inside():
  """A block of mass 1e-5 is entered rarely, but then each of its tokens can come.

  The residue of a single float32 would leave a few of its 128 tokens possible.
  """
  mass = np.full(256, 1e-5, np.float32)
  mass[:128] = 1.0
  inside = (np.arange(128, dtype=np.float32) + 0.5) / 128
  tokens = jax.jit(inverse_cdf)(np.tile(mass, (128, 1)), np.full(128, LAST), inside)
  assert sorted(np.asarray(tokens)) == list(range(128, 256))


@pytest.mark.parametrize("vocab", [1, 128, 129, 3000])
def test_no_token_without_mass_at_the_ends_of_the_uniform(vocab):
  """u = 0 must skip leading zeros, the largest u trailing ones, whatever sums round."""
  source = np.random.default_rng(vocab)
  cases = []
  for place in {0, vocab // 2, vocab - 1, min(127, vocab - 1), min(128, vocab - 1)}:
    mass = np.zeros(vocab, np.float32)
    mass[place] = 1e-30
    cases.append(mass)
  for scale in (1.0, 1e-20, 1e20):
    mass = (source.random(vocab).astype(np.float32) + 1e-3) * np.float32(scale)
    mass[source.random(vocab) < 0.5] = 0
    mass[vocab // 2] = scale
    cases.append(mass)
  mass = np.full(vocab, 1e-7, np.float32)  # sums that round; zeros at both ends
  mass[: vocab // 3] = 0
  mass[vocab - vocab // 3 :] = 0
  mass[vocab // 2] = 1
  cases.append(mass)
  draw = jax.jit(inverse_cdf)
  for block in (0.0, 0.5, LAST):
    for inside in (0.0, 0.5, LAST):
      tokens = draw(
        np.stack(cases),
        np.full(len(cases), block, np.float32),
        np.full(len(cases), inside, np.float32),
      )
      for mass, token in zip(cases, np.asarray(tokens)):
        assert 0 <= token < vocab and mass[token] > 0, (block, inside, token)
        if block == inside == 0:
          assert token == np.flatnonzero(mass)[0]


def test_no_block_without_mass_where_the_sums_are_rounded():
  """Sums of a thousand blocks do not rise evenly: a step may stand at an empty block.

  Found by search: rows and uniforms for which the first sum above is that of a block
  without mass, or none is above although mass is left.
  """
  source = np.random.default_rng(0)
  mass = source.random((2000, 1000), np.float32)
  mass[source.random(mass.shape) < 0.5] = 0
  mass[::2, 500:] = 0
  sums = np.asarray(jax.jit(lambda x: jnp.cumsum(x, axis=-1))(mass))
  total = sums[:, -1:]
  before = np.pad(sums, ((0, 0), (1, 0)))[:, :-1]
  uniform = np.ceil(before / total * 2**24).astype(np.float32) * np.float32(2**-24)
  aim = np.minimum(uniform, LAST) * total
  row, index = np.nonzero((mass == 0) & (before <= aim) & (aim < sums))
  if not row.size:
    pytest.skip("this compiler's sums rise evenly")
  row, index = row[::20][:40], index[::20][:40]
  tokens = np.zeros((row.size, 1000, BLOCK), np.float32)
  tokens[:, :, 5] = mass[row]
  drawn = jax.jit(inverse_cdf)(
    tokens.reshape(row.size, -1), uniform[row, index], np.zeros(row.size, np.float32)
  )
  block, inside = np.divmod(np.asarray(drawn), BLOCK)
  assert (mass[row, block] > 0).all() and (inside == 5).all()
  assert np.abs(block - index).max() < 40  # and it is near the empty one


def test_block_boundaries_are_exact():
  """Equal masses: the uniform (i + 1/2) / V falls on token i, on both sides of 128."""
  mass = np.ones((384, 384), np.float32)
  index = np.arange(384)
  block = ((index // 128 + 0.5) / 3).astype(np.float32)
  inside = ((index % 128 + 0.5) / 128).astype(np.float32)
  draw = jax.jit(inverse_cdf)
  np.testing.assert_array_equal(draw(mass, block, inside), index)
  first = draw(mass, (index // 128 / np.float32(3)) + 1e-7, index * 0.0)
  np.testing.assert_array_equal(first, index // 128 * 128)


# ------------------------------------------------------------- filters


def kept_by_sorting(scaled, top_k, top_p, min_p):
  """Which tokens must, and which may be kept: those within rounding of top-p's edge."""
  order = np.argsort(-scaled, kind="stable")
  probability = np.exp(scaled.astype(np.float64) - scaled.max())
  keep = np.ones(scaled.size, bool)
  if 0 < top_k < scaled.size:
    keep &= scaled >= scaled[order[top_k - 1]]  # ties are kept
  may = keep.copy()
  if top_p < 1:
    left = np.where(keep, probability, 0)
    share = left[order].cumsum() / left.sum()
    for slack, out in ((-1e-5, keep), (1e-5, may)):
      last = min(int(np.searchsorted(share, top_p + slack)), scaled.size - 1)
      out &= scaled >= scaled[order[last]]
  for out in (keep, may):
    out &= probability >= min_p * (1 + (1e-5 if out is keep else -1e-5))
  keep[order[0]] = may[order[0]] = True
  keep |= scaled == scaled.max()
  may |= scaled == scaled.max()
  return keep, may


def logits_of(kind: str, vocab: int) -> np.ndarray:
  source = np.random.default_rng(vocab)
  if kind == "normal":
    return source.normal(0, 3, vocab).astype(np.float32)
  if kind == "ties":
    return source.integers(-2, 3, vocab).astype(np.float32)
  if kind == "equal":
    return np.full(vocab, 0.25, np.float32)
  if kind == "zeros":  # -0.0 ties with 0.0
    return np.where(source.random(vocab) < 0.5, -0.0, 0.0).astype(np.float32)
  if kind == "adjacent":  # neighbours among the float32
    steps = source.permutation(vocab).astype(np.int32)
    return (np.float32(1).view(np.int32) + steps).view(np.float32)
  if kind == "wide":
    return source.normal(0, 1000, vocab).astype(np.float32)
  out = source.normal(0, 3, vocab).astype(np.float32)  # "banned"
  out[source.random(vocab) < 0.5] = -np.inf
  out[vocab // 2] = 1
  return out


FILTERS = [
  (k, p, m)
  for k in (0, 1, 2, 5, 100, 1000, 2**31 - 1)
  for p in (1.0, 0.9, 0.5, 0.1, 1e-6, 1e-38)
  for m in (0.0, 0.05, 0.5, 0.999)
]


@pytest.mark.parametrize("vocab", [5, 130])
@pytest.mark.parametrize(
  "kind", ["normal", "ties", "equal", "zeros", "adjacent", "wide", "banned"]
)
def test_filters_match_a_sort(kind, vocab):
  """top-k, then top-p of what is left, and min-p: all combinations at once."""
  logits = logits_of(kind, vocab)
  top_k, top_p, min_p = (np.array(column) for column in zip(*FILTERS))
  sampling = settings_of(len(FILTERS), top_k=top_k, top_p=top_p, min_p=min_p)
  kept = np.asarray(jax.jit(keep_mask)(np.tile(logits, (len(FILTERS), 1)), sampling))
  for row, setting in zip(kept, FILTERS):
    must, may = kept_by_sorting(logits, *setting)
    if kind == "banned":
      must &= np.isfinite(logits) | row  # no mass: kept or not is the same
      may |= np.isinf(logits)
    assert not (must & ~row).any(), (setting, "dropped", np.flatnonzero(must & ~row))
    assert not (row & ~may).any(), (setting, "kept", np.flatnonzero(row & ~may))


def test_filters_are_each_row_s_own():
  logits = np.tile(logits_of("normal", 200), (4, 1))
  mixed = settings_of(4, top_k=[3, 0, 0, 0], top_p=[1, 0.5, 1, 1], min_p=[0, 0, 0.2, 0])
  keep = jax.jit(keep_mask)
  kept = np.asarray(keep(logits, mixed))
  for row in range(4):
    alone = jax.tree.map(lambda x, row=row: x[row : row + 1], mixed)
    np.testing.assert_array_equal(kept[row], keep(logits[:1], alone)[0])
  assert kept[0].sum() == 3 and kept[3].all()
  assert 0 < kept[1].sum() < 200 and 0 < kept[2].sum() < 200


# ------------------------------------------------------------- choose


@functools.cache
def chosen():
  """One of everything: rows x settings, and what numpy says about them."""
  source = np.random.default_rng(0)
  rows, vocab = 512, 300
  logits = source.normal(0, 4, (rows, vocab)).astype(np.float32)
  uniforms = tuple(source.random((2, rows)).astype(np.float32))
  temperature = source.choice([0.0, 0.3, 1.0, 2.0], rows)
  given = {
    "temperature": temperature,
    "top_k": source.choice([0, 1, 7, 299, 10**6], rows),
    "top_p": source.choice([1.0, 0.9, 0.3, 1e-9], rows),
    "min_p": source.choice([0.0, 0.02, 0.7], rows),
  }
  out = jax.jit(choose)(logits, settings_of(rows, **given), uniforms)
  return logits, given, [np.asarray(x) for x in out]


def log_softmax(x):
  x = x.astype(np.float64)
  return x - x.max() - np.log(np.exp(x - x.max()).sum())


def test_log_probabilities_are_those_of_the_drawn_distribution():
  logits, given, (token, logp, raw_logp) = chosen()
  for i, row in enumerate(logits):
    temperature = given["temperature"][i]
    if temperature == 0:
      assert token[i] == row.argmax()
      assert abs(logp[i] - log_softmax(row)[token[i]]) < 1e-5
      assert logp[i] == raw_logp[i]  # no filter at temperature 0
      continue
    scaled = (row - row.max()) / np.float32(temperature)
    must, may = kept_by_sorting(
      scaled, *(given[name][i] for name in ("top_k", "top_p", "min_p"))
    )
    assert may[token[i]], "a token that the filters drop was drawn"
    low, high = (
      log_softmax(np.where(s, scaled, -np.inf))[token[i]] for s in (may, may & must)
    )
    if must[token[i]]:
      assert low - 1e-5 < logp[i] < high + 1e-5
    assert abs(raw_logp[i] - log_softmax(scaled)[token[i]]) < 1e-5
  assert (logp >= raw_logp - 1e-6).all() and (logp <= 1e-6).all()


def test_filtered_draws_follow_the_filtered_distribution():
  """Chi-square of `choose` itself, temperature and filters on."""
  rows, rounds, vocab = 2048, 8, 150
  logits = np.random.default_rng(3).normal(0, 2, vocab).astype(np.float32)
  sampling = settings_of(rows, temperature=1.7, top_k=60, top_p=0.9)
  keys_B = rng.row_keys(
    rng.key(1, Purpose.ROLLOUT), jnp.arange(rows), jnp.zeros(rows, jnp.int32)
  )

  @jax.jit
  def one(t):
    uniforms = rng.uniforms(keys_B, jnp.full((rows,), t))
    token_B, logp_B, _ = choose(jnp.tile(logits, (rows, 1)), sampling, uniforms)
    return jnp.zeros(vocab).at[token_B].add(1), jnp.zeros(vocab).at[token_B].set(logp_B)

  counts, logp = zip(*(one(t) for t in range(rounds)))
  counts, logp = np.sum(counts, 0), np.min(logp, 0)
  must, may = kept_by_sorting(logits / np.float32(1.7), 60, 0.9, 0.0)
  assert (must == may).all() and not counts[~must].any()
  due = np.exp(log_softmax(np.where(must, logits / np.float32(1.7), -np.inf)))
  due = due[must] * rows * rounds
  statistic = ((counts[must] - due) ** 2 / due).sum()
  assert statistic < chi_square_limit(must.sum() - 1)
  np.testing.assert_allclose(np.exp(logp[must]) * rows * rounds, due, rtol=1e-4)


def test_a_tiny_temperature_is_finite():
  """The least that `generate` takes: the most likely token, and no NaN."""
  logits = np.random.default_rng(0).normal(0, 30, (4, 300)).astype(np.float32)
  uniforms = (np.full(4, LAST), np.full(4, LAST))
  out = jax.jit(choose)(logits, settings_of(4, temperature=1e-6, top_p=0.9), uniforms)
  np.testing.assert_array_equal(out[0], logits.argmax(-1))
  assert np.isfinite(out[1]).all() and np.isfinite(out[2]).all()

"""Scoring given tokens: padding of any kind, and where gradients flow."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlft
from rlft.core.errors import ConfigError, DataError
from rlft.core.mesh import make_mesh
from rlft.models import hub
from rlft.models.heads import lm_logits
from rlft.sampling import score as module
from rlft.sampling.score import token_logp

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "models"
V = 72


quick = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


@pytest.fixture(scope="module")
def policy() -> hub.Policy:
  return hub.load(GOLDEN / "llama")


def rows_of(seed: int = 0):
  """Four rows of 3, 16, 1 and 9 tokens, right-padded."""
  source = np.random.default_rng(seed)
  tokens = source.integers(0, V, (4, 16))
  mask = np.arange(16) < np.array([3, 16, 1, 9])[:, None]
  return tokens, mask


def place(tokens, mask, where):
  """The same real tokens elsewhere in rows of 30."""
  out, out_mask = np.zeros((4, 30), np.int64), np.zeros((4, 30), bool)
  source = np.random.default_rng(3)
  for i in range(4):
    real = tokens[i][mask[i]]
    at = {
      "right": np.arange(real.size),
      "left": np.arange(30 - real.size, 30),
      "middle": np.arange(real.size) + 5,
      "holes": np.sort(source.choice(30, real.size, replace=False)),
    }[where]
    out[i, at], out_mask[i, at] = real, True
  return out, out_mask


def by_hand(policy, tokens, mask, temperature):
  """One compact row at a time, without batching, buckets or padding."""
  out = np.zeros(tokens.shape)
  run = quick(lambda *xs: policy.model.apply({"params": policy.params}, *xs).hidden)
  for i, row in enumerate(tokens):
    real = row[mask[i]][None].astype(np.int32)
    ones = np.ones_like(real, bool)
    index = np.arange(real.size)[None]
    hidden = run(real, index, ones)
    logits = np.asarray(lm_logits(policy.params, policy.config, hidden), np.float64)[0]
    logits /= temperature
    logits -= logits.max(-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    logp = logits[:-1][np.arange(real.size - 1), real[0, 1:]]
    out[i][np.flatnonzero(mask[i])[1:]] = logp
  return out


def test_against_compact_rows(policy):
  tokens, mask = rows_of()
  for temperature in (1.0, 0.25):
    logp = rlft.score(policy, tokens, mask, temperature=temperature)
    assert logp.dtype == np.float32 and logp.shape == (4, 16)
    exact = by_hand(policy, tokens, mask, temperature)
    np.testing.assert_allclose(logp, exact, atol=2e-5)
  assert not logp[:, 0].any() and not logp[~mask].any()  # first tokens and pads
  assert (logp[mask].reshape(-1) == 0).sum() == 4


@pytest.mark.parametrize("where", ["right", "left", "middle", "holes"])
def test_padding_of_any_kind(policy, where):
  """reliability.md B7: only the mask says what is padding."""
  tokens, mask = rows_of()
  due = rlft.score(policy, tokens, mask)[mask]
  moved, moved_mask = place(tokens, mask, where)
  got = rlft.score(policy, moved, moved_mask)
  np.testing.assert_allclose(got[moved_mask], due, atol=1e-5)
  assert not got[~moved_mask].any()
  first = moved_mask & (moved_mask.cumsum(1) == 1)
  assert not got[first].any()
  # What lies under a pad, an id or not, changes nothing at all.
  for junk in (0, 2, 71, -100, 10**9):
    again = rlft.score(policy, np.where(moved_mask, moved, junk), moved_mask)
    np.testing.assert_array_equal(again, got)


def test_the_pure_function_ignores_what_lies_under_pads(policy):
  """In the loss too, with its gradient: -100 is what other libraries put there."""
  tokens, mask = place(*rows_of(), "holes")
  run = quick(
    jax.value_and_grad(lambda p, t: token_logp(policy.model, p, t, mask).sum())
  )
  value, grad = run(policy.params, np.where(mask, tokens, 5).astype(np.int32))
  assert np.isfinite(value)
  for junk in (-100, V, 2**31 - 1):
    other, other_grad = run(
      policy.params, np.where(mask, tokens, junk).astype(np.int32)
    )
    assert value == other
    for a, b in zip(jax.tree.leaves(grad), jax.tree.leaves(other_grad)):
      np.testing.assert_array_equal(a, b)


def test_gradients_reach_only_what_is_scored(policy):
  """A pad's embedding, and tokens after the scored ones, get no gradient."""
  model = policy.model.clone()
  params = dict(policy.params)
  if policy.config.tie_embeddings:
    pytest.fail("this test wants an embedding of its own")
  tokens = np.array([[60, 61, 7, 8, 9, 10, 62, 63]], np.int32)
  mask = np.array([[0, 0, 1, 1, 1, 1, 0, 0]], bool)
  weight = np.array([[1, 1, 1, 1, 1, 0, 1, 1]], np.float32)  # token 10 is not scored

  def run(embedding):
    logp = token_logp(model, params | {"embedding": embedding}, tokens, mask)
    return (logp * weight).sum()

  grad = np.abs(np.asarray(quick(jax.grad(run))(params["embedding"]))).sum(-1)
  # 9 predicts 10, which is not scored; 7 and 8 predict 8 and 9.
  assert np.flatnonzero(grad).tolist() == [7, 8]


def test_order_and_batching_change_nothing(policy):
  """Rows are taken in parts; neither the parts nor the neighbours matter."""
  source = np.random.default_rng(5)
  tokens = source.integers(0, V, (23, 12))
  mask = np.arange(12) < source.integers(1, 13, (23, 1))
  whole = rlft.score(policy, tokens, mask)
  parts = rlft.score(policy, tokens, mask, max_tokens=64)
  np.testing.assert_allclose(parts, whole, atol=1e-5)
  order = source.permutation(23)
  moved = rlft.score(policy, tokens[order], mask[order])
  np.testing.assert_allclose(moved, whole[order], atol=1e-5)


def test_odd_shapes(policy):
  assert rlft.score(policy, np.zeros((0, 5), int), np.zeros((0, 5), bool)).shape == (
    0,
    5,
  )
  assert rlft.score(policy, np.zeros((3, 0), int), np.zeros((3, 0), bool)).shape == (
    3,
    0,
  )
  nothing = rlft.score(policy, np.full((2, 4), 999), np.zeros((2, 4), bool))
  np.testing.assert_array_equal(nothing, np.zeros((2, 4)))
  one = rlft.score(policy, [[3]], [[1]])
  np.testing.assert_array_equal(one, [[0]])


def test_temperatures_compile_once(policy):
  tokens, mask = rows_of()
  rlft.score(policy, tokens, mask)
  before = module._jit_token_logp._cache_size()
  for temperature in (0.5, 2, np.float64(3.0), np.float32(0.1), 1):
    rlft.score(policy, tokens, mask, temperature=temperature)
  rlft.score(policy, tokens[:3, :11], mask[:3, :11])  # the same buckets
  assert module._jit_token_logp._cache_size() == before


@pytest.mark.parametrize(
  "temperature", [0, 0.0, -1.0, float("nan"), float("inf"), 1e-30]
)
def test_temperatures_that_have_no_log_probs(policy, temperature):
  with pytest.raises(ConfigError, match="positive temperature"):
    rlft.score(policy, [[1, 2]], [[1, 1]], temperature=temperature)


@pytest.mark.parametrize(
  ("tokens", "mask", "message"),
  [
    ([1, 2], [1, 1], "must both be"),
    ([[1, 2]], [[1, 1, 1]], "must both be"),
    ([[1.0, 2.0]], [[1, 1]], "integer token ids"),
    ([[1, 72]], [[1, 1]], "vocabulary of 72"),
    ([[-1, 2]], [[1, 1]], "row 0 has the token id -1"),
    (np.ones((1, 129), int), np.ones((1, 129)), "129 tokens, the model at most 128"),
  ],
)
def test_bad_input(policy, monkeypatch, tokens, mask, message):
  monkeypatch.setattr(module, "_jit_token_logp", None)  # before any device work
  with pytest.raises(DataError, match=message):
    rlft.score(policy, tokens, mask)


def test_the_longest_row(policy):
  """As long as the model's positions; its bucket may be wider."""
  short = hub.load(GOLDEN / "gpt2")  # 40 learned positions, a bucket of 48
  tokens = np.random.default_rng(0).integers(0, V, (1, 40))
  logp = rlft.score(short, tokens, np.ones((1, 40), bool))
  due = by_hand(short, tokens, np.ones((1, 40), bool), 1.0)
  np.testing.assert_allclose(logp, due, atol=2e-5)


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)], ids=str)
def test_meshes_agree(policy, shape):
  tokens, mask = rows_of()
  sharded = hub.load(GOLDEN / "llama", mesh=make_mesh(*shape))
  np.testing.assert_allclose(
    rlft.score(sharded, tokens, mask), rlft.score(policy, tokens, mask), atol=1e-5
  )


def test_bfloat16_is_close(policy):
  """correctness.md 12: the mismatch is small, and is not none."""
  low = dataclasses.replace(policy, model=policy.model.clone(dtype=jnp.bfloat16))
  tokens, mask = rows_of()
  difference = rlft.score(low, tokens, mask) - rlft.score(policy, tokens, mask)
  assert 0 < np.exp(np.abs(difference[mask])).mean() - 1 < 0.05


def test_completions_alone_have_the_same_numbers(policy):
  """Rows of a prompt and its completion: only the completion passes the head."""
  tokens, _ = rows_of()
  lengths, start = np.array([9, 16, 12, 5]), np.array([3, 10, 11, 1])
  mask = np.arange(16) < lengths[:, None]
  whole = rlft.score(policy, tokens, mask, temperature=0.7)
  tokens = np.where(mask, tokens, 10**6)  # what lies under a pad is not read
  run = quick(functools.partial(module.completion_logp, policy.model), static_argnums=4)
  for columns in (6, 8):  # row 1 ends where its columns do, and before
    logp, entropy = run(policy.params, tokens, mask, start, columns, 0.7)
    for i in range(4):
      own = lengths[i] - start[i]
      np.testing.assert_allclose(
        logp[i, :own], whole[i, start[i] : lengths[i]], atol=2e-5
      )
      assert not logp[i, own:].any() and not entropy[i, own:].any()
      assert (entropy[i, :own] > 0).all()


def test_the_head_is_gathered_once_however_many_devices_share_the_batch():
  """Chunks are of a device's tokens: 8 devices of 1,024 each need one, not eight."""
  policy = hub.load(GOLDEN / "llama")
  shape = jax.ShapeDtypeStruct((16, 512), jnp.int32)
  mask = jax.ShapeDtypeStruct((16, 512), jnp.bool_)

  def chunks(model):
    run = lambda *rows: token_logp(model, policy.params, *rows)
    text = str(jax.make_jaxpr(run)(shape, mask))
    lengths = [int(n) for n in re.findall(r"length=(\d+)", text)]
    return lengths.count(4)  # of scans; the model has 2 layers

  assert policy.config.layers == 2
  assert chunks(policy.model) == 1
  assert chunks(policy.model.clone(mesh=make_mesh())) == 0

"""The decoder: what must not change its numbers, and what must."""

from __future__ import annotations

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlft.core.errors import ConfigError
from rlft.core.mesh import make_mesh, sharding, tree_shardings
from rlft.models import heads
from rlft.models.decoder import (
  Decoder,
  DecoderConfig,
  param_axes,
  param_shapes,
  positions_from_mask,
  stack_layers,
  unstack_layers,
)
from rlft.sampling.score import token_logp

CONFIG = DecoderConfig(
  vocab_size=64,
  width=32,
  layers=3,
  heads=4,
  kv_heads=2,
  head_dim=8,
  mlp_width=48,
  max_positions=64,
  windows=(0, 5, 0),
  qkv_bias=True,
  attention_softcap=30.0,
)
ROWS, LENGTH = 8, 16


def quick(function, **options):
  """`jit` that spends less time on compiling."""
  return jax.jit(
    function, compiler_options={"xla_backend_optimization_level": 0}, **options
  )


@functools.cache
def params_of(config: DecoderConfig = CONFIG, scale: float = 0.15):
  """Random, from numpy: nothing to compile; so large that attention is not uniform."""
  source = np.random.default_rng(0)
  draw = lambda x: source.normal(x.ndim < 2, scale, x.shape).astype(np.float32)
  return jax.tree.map(draw, param_shapes(Decoder(config)))


def batch_of(rows: int = ROWS, length: int = LENGTH):
  source = np.random.default_rng(0)
  tokens = source.integers(0, CONFIG.vocab_size, (rows, length)).astype(np.int32)
  mask = np.arange(length) >= source.integers(0, length // 2, (rows, 1))
  return tokens, mask


def loss(model: Decoder, params, tokens, mask):
  return -token_logp(model, params, tokens, mask).sum() / mask.sum()


def hidden_of(model: Decoder, params, tokens, mask):
  run = lambda p, t, m: model.apply({"params": p}, t, positions_from_mask(m), m).hidden
  return np.asarray(quick(run)(params, tokens, mask))


def assert_close(a, b, tolerance: float) -> None:
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    x, y = np.asarray(x), np.asarray(y)
    np.testing.assert_allclose(x, y, atol=tolerance * max(1, np.abs(y).max()), rtol=0)


# ------------------------------------------------------------- remat, scan


@functools.cache
def loss_and_grad(scan: bool, remat: str):
  params = params_of() if scan else unstack_layers(params_of(), CONFIG.layers)
  model = Decoder(CONFIG, scan=scan, remat=remat)
  value, grad = quick(jax.value_and_grad(functools.partial(loss, model)))(
    params, *batch_of()
  )
  return value, grad if scan else stack_layers(grad, CONFIG.layers)


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
@pytest.mark.parametrize("scan", [True, False])
def test_remat_and_scan_agree(scan, remat):
  """reliability.md B11: the same loss and the same gradient."""
  assert_close(loss_and_grad(scan, remat), loss_and_grad(True, "none"), 2e-5)


@pytest.mark.parametrize("scan", [True, False])
def test_remat_saves_less(scan):
  """The policies are there: what the backward pass is given shrinks."""
  params = params_of() if scan else unstack_layers(params_of(), CONFIG.layers)
  kept = {}
  for remat in ("none", "dots", "full"):
    model = Decoder(CONFIG, scan=scan, remat=remat)
    run = lambda params, model=model: jax.vjp(
      lambda p: loss(model, p, *batch_of()), params
    )[1]
    saved = jax.tree.leaves(jax.eval_shape(run, params))
    kept[remat] = sum(math.prod(x.shape) for x in saved)
  assert kept["full"] < kept["dots"] < kept["none"]


def test_unstacked_layers_stack_again():
  params = params_of()
  apart = unstack_layers(params, CONFIG.layers)
  assert {f"layer_{i}" for i in range(3)} <= set(apart) and "layers" not in apart
  assert jax.tree.structure(apart) == jax.tree.structure(
    param_shapes(Decoder(CONFIG, scan=False))
  )
  assert_close(stack_layers(apart, CONFIG.layers), params, 0)


# ------------------------------------------------------------- pads


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_pads_change_nothing(positions):
  """correctness.md 1 and 2: their number, their side and the ids under them."""
  config = dataclasses.replace(CONFIG, positions=positions)
  model, params = Decoder(config), params_of(config)
  source = np.random.default_rng(1)
  tokens = source.integers(0, 64, (2, 9)).astype(np.int32)
  rows, masks = [], []
  for left, right in ((0, 15), (15, 0), (3, 12), (8, 7)):
    rows.append(np.pad(tokens, ((0, 0), (left, right))))
    masks.append(np.pad(np.ones((2, 9), bool), ((0, 0), (left, right))))
  hole = np.zeros((2, 24), bool)
  hole[:, [0, 2, 3, 9, 10, 11, 20, 22, 23]] = True  # pads between tokens
  rows.append(np.zeros((2, 24), np.int32))
  rows[-1][hole] = tokens.reshape(-1)
  masks.append(hole)
  rows, masks = np.concatenate(rows), np.concatenate(masks)
  hidden = hidden_of(model, params, rows, masks)[masks].reshape(5, 2, 9, -1)
  np.testing.assert_allclose(
    hidden, np.broadcast_to(hidden[0], hidden.shape), atol=1e-5
  )
  other = np.where(masks, rows, source.integers(0, 64, rows.shape))
  again = hidden_of(model, params, other, masks)[masks].reshape(5, 2, 9, -1)
  np.testing.assert_array_equal(again, hidden)


def test_positions_come_from_the_mask():
  mask = np.array([[0, 0, 1, 1, 1, 0], [1, 0, 1, 0, 0, 1], [0] * 6], bool)
  position = np.asarray(positions_from_mask(mask))
  assert position[0, 2:5].tolist() == [0, 1, 2]
  assert position[1, [0, 2, 5]].tolist() == [0, 1, 2]
  assert position.min() == 0


# ------------------------------------------------------------- who sees whom


def sees(mask=None, **change) -> np.ndarray:
  """[t, s]: whether a change of token s changes the state at t (one layer)."""
  config = dataclasses.replace(CONFIG, **{"layers": 1, "windows": ()} | change)
  model = Decoder(config)
  params = params_of(config, 0.02)
  mask = np.ones(12, bool) if mask is None else mask
  length = mask.size
  tokens = np.tile(np.arange(length, dtype=np.int32), (length + 1, 1))
  tokens[np.arange(length), np.arange(length)] += 20
  hidden = hidden_of(model, params, tokens, np.tile(mask, (length + 1, 1)))
  return np.abs(hidden[:-1] - hidden[-1]).max(-1).T > 0


def test_a_window_counts_positions():
  index = np.arange(12)
  near = index[:, None] - index
  np.testing.assert_array_equal(sees(windows=(4,)), (near >= 0) & (near < 4))
  np.testing.assert_array_equal(sees(), near >= 0)
  # Pads between tokens take no place in the window.
  mask = np.array([1, 0, 0, 1, 0, 1, 1, 0, 0, 0, 1, 1], bool)
  seen = sees(mask, windows=(3,))[mask][:, mask]
  near = np.arange(6)[:, None] - np.arange(6)
  np.testing.assert_array_equal(seen, (near >= 0) & (near < 3))


def test_an_encoder_sees_everything():
  assert sees(causal=False).all()


# ------------------------------------------------------------- meshes


SHARDED = dataclasses.replace(CONFIG, mlp_width=64, tie_embeddings=False)


@functools.cache
def loss_on(shape: tuple[int, int, int] | None):
  params = params_of(SHARDED)
  if shape is None:
    run = quick(jax.value_and_grad(functools.partial(loss, Decoder(SHARDED))))
    compiled = run.lower(params, *batch_of()).compile()
    return compiled, compiled(params, *batch_of()), None
  mesh = make_mesh(*shape, devices=jax.devices()[: math.prod(shape)])
  model = Decoder(SHARDED, mesh=mesh)
  layout = tree_shardings(mesh, param_axes(model), param_shapes(model))
  params = jax.device_put(params, layout)
  batch = jax.device_put(batch_of(), sharding(mesh, ("batch", None), (ROWS, LENGTH)))
  run = quick(
    jax.value_and_grad(functools.partial(loss, model)), out_shardings=(None, layout)
  )
  compiled = run.lower(params, *batch).compile()
  return compiled, compiled(params, *batch), layout


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 1, 1), (2, 4, 1), (2, 2, 2)], ids=str)
def test_meshes_agree_and_shard(shape):
  """reliability.md B10: the same loss, and no device holds a whole weight."""
  compiled, (value, grad), layout = loss_on(shape)
  _, (plain, plain_grad), _ = loss_on(None)
  assert abs(float(value) - float(plain)) < 1e-5
  assert_close(grad, plain_grad, 1e-5)

  fsdp, tensor = shape[1:]
  entry = next(x for x in compiled.as_text().splitlines() if x.startswith("ENTRY"))
  local = [
    tuple(map(int, x.split(",") if x else []))
    for x in re.findall(r"f32\[([\d,]*)\]", entry.split("->")[0])
  ]
  leaves, axes = (
    jax.tree.leaves(params_of(SHARDED)),
    jax.tree.leaves(
      param_axes(Decoder(SHARDED)), is_leaf=lambda x: isinstance(x, tuple)
    ),
  )
  ways = {
    "embed": fsdp,
    "vocab": tensor,
    "heads": tensor,
    "kv_heads": tensor,
    "mlp": tensor,
  }
  due = [
    tuple(n // ways.get(axis, 1) for n, axis in zip(leaf.shape, names))
    for leaf, names in zip(leaves, axes)
  ]
  assert local[: len(due)] == due  # what the program says each device is given
  whole = sum(leaf.size for leaf in leaves)
  assert sum(math.prod(x) for x in due) < 1.3 * whole / (fsdp * tensor)
  # Nor does the program gather all layers of a weight at once.
  for leaf in jax.tree.leaves(params_of(SHARDED)["layers"]):
    if leaf.ndim == 3 and fsdp * tensor > 1:
      stacked = "[" + ",".join(map(str, leaf.shape)) + "]"
      assert not re.search(
        rf"f32{re.escape(stacked)}\S* all-gather", compiled.as_text()
      )
  for leaf, at in zip(jax.tree.leaves(grad), jax.tree.leaves(layout)):
    assert leaf.sharding.is_equivalent_to(at, leaf.ndim)


# ------------------------------------------------------------- heads


def reference_logp(params, config, hidden, targets, temperature):
  logits = np.asarray(heads.lm_logits(params, config, hidden), np.float64)
  logits = logits / np.broadcast_to(np.reshape(temperature, (-1, 1, 1)), (ROWS, 1, 1))
  logits -= logits.max(-1, keepdims=True)
  logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
  return np.take_along_axis(logits, targets[..., None], -1)[..., 0]


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize(
  "temperature", [0.01, np.linspace(0.3, 2, ROWS)], ids=["cold", "rows"]
)
def test_chunks_change_nothing(tie, temperature):
  """Any chunk size: the same log-probs and gradients, exact against float64."""
  config = dataclasses.replace(CONFIG, tie_embeddings=tie, final_softcap=20.0)
  params = {
    name: x for name, x in params_of(config).items() if name in ("embedding", "head")
  }
  source = np.random.default_rng(0)
  hidden = source.normal(size=(ROWS, 11, config.width)).astype(np.float32)
  targets = source.integers(0, 64, (ROWS, 11)).astype(np.int32)
  weight = source.normal(size=(ROWS, 11)).astype(np.float32)
  temperature = np.float32(temperature)

  def run(params, hidden, chunk):
    logp = heads.lm_logp(params, config, hidden, targets, temperature, chunk)
    return (logp * weight).sum(), logp

  both = quick(jax.value_and_grad(run, (0, 1), has_aux=True), static_argnums=2)
  (_, whole), grads = both(params, hidden, 10**6)
  exact = reference_logp(params, config, hidden, targets, temperature)
  np.testing.assert_allclose(whole, exact, atol=1e-5 / min(1, temperature.min()))
  assert whole.dtype == np.float32
  for chunk in (1, 3 * ROWS):
    (_, logp), chunked = both(params, hidden, chunk)
    assert_close(logp, whole, 2e-6)
    assert_close(chunked, grads, 2e-6)


@pytest.mark.parametrize(("vocab", "chunks"), [(2**15, 1), (2**16, 2), (2**18, 8)])
def test_a_chunk_of_logits_is_as_large_whatever_the_vocabulary(vocab, chunks):
  config = dataclasses.replace(CONFIG, vocab_size=vocab, tie_embeddings=False)
  params = {"head": jax.ShapeDtypeStruct((config.width, vocab), np.float32)}
  hidden = jax.ShapeDtypeStruct((4, 512, config.width), np.float32)
  targets = jax.ShapeDtypeStruct((4, 512), np.int32)
  run = lambda params, *rows: heads.lm_logp(params, config, *rows)
  text = str(jax.make_jaxpr(run)(params, hidden, targets))
  assert f"f32[4,{512 // chunks},{vocab}]" in text
  assert ("length=" in text) == (chunks > 1)
  assert f"length={chunks}" in text or chunks == 1


@pytest.mark.parametrize("chunk", [10**6, 3 * ROWS])
def test_entropy_is_that_of_the_whole_distribution(chunk):
  config = dataclasses.replace(CONFIG, tie_embeddings=False)
  params = {"head": params_of(config)["head"] * 40}
  source = np.random.default_rng(0)
  hidden = source.normal(size=(ROWS, 11, config.width)).astype(np.float32)
  targets = source.integers(0, 64, (ROWS, 11)).astype(np.int32)
  temperature = np.float32(0.7)
  logp, entropy = heads.lm_logp(
    params, config, hidden, targets, temperature, chunk, with_entropy=True
  )
  plain = heads.lm_logp(params, config, hidden, targets, temperature, chunk)
  np.testing.assert_array_equal(logp, plain)
  each = np.stack(
    [
      reference_logp(params, config, hidden, np.full((ROWS, 11), v), temperature)
      for v in range(config.vocab_size)
    ],
    -1,
  )
  np.testing.assert_allclose(entropy, -(np.exp(each) * each).sum(-1), atol=1e-5)


# ------------------------------------------------------------- dtypes, settings


def test_bfloat16_computes_in_bfloat16_and_sums_in_float32():
  tokens, mask = batch_of()
  model = Decoder(CONFIG, dtype=jnp.bfloat16)
  hidden = hidden_of(model, params_of(), tokens, mask)
  assert hidden.dtype == jnp.bfloat16
  logits = heads.lm_logits(params_of(), CONFIG, hidden)
  assert logits.dtype == jnp.float32
  run = lambda model: np.asarray(
    quick(functools.partial(token_logp, model))(params_of(), tokens, mask)
  )
  low, full = run(model), run(Decoder(CONFIG))
  assert low.dtype == np.float32
  assert 1e-5 < np.abs(low - full).mean() < 0.1
  grads = jax.eval_shape(
    jax.grad(functools.partial(loss, model)), params_of(), tokens, mask
  )
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(grads))  # the masters


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"kv_heads": 3}, "heads=4 is not a multiple of kv_heads=3"),
    ({"windows": (0, 1)}, "windows has 2 entries for layers=3"),
    ({"parallel_residual": True, "norm_placement": "post"}, "parallel_residual"),
  ],
)
def test_settings_that_contradict(change, message):
  with pytest.raises(ConfigError, match=message):
    dataclasses.replace(CONFIG, **change)

"""Adapters: they start as the base, move alone, and can be merged into it."""

from __future__ import annotations

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlft.core.errors import ConfigError
from rlft.core.mesh import make_mesh, tree_shardings
from rlft.models import hub
from rlft.models.decoder import (
  Decoder,
  DecoderConfig,
  Linear,
  param_axes,
  param_shapes,
  stack_layers,
  unstack_layers,
)
from rlft.models.lora import LoRAConfig, init_lora, lora_axes, merge_lora
from rlft.sampling.score import token_logp
from rlft.training.optimizer import OptimizerConfig
from rlft.training.step import init_state, make_step

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "models"
CONFIG = DecoderConfig(
  vocab_size=64,
  width=32,
  layers=2,
  heads=4,
  kv_heads=2,
  head_dim=8,
  mlp_width=64,
  max_positions=32,
  qkv_bias=True,
)
LORA = LoRAConfig(rank=4, alpha=12.0, targets=("attention/[qo]$", "mlp/"))
ROWS, LENGTH = 8, 12


def draw(shapes, scale, seed):
  source = np.random.default_rng(seed)
  one = lambda x: jnp.asarray(source.normal(0, scale, x.shape), jnp.float32)
  return jax.tree.map(one, shapes)


@pytest.fixture(scope="module", autouse=True)
def _quick_compilation():
  """Tiny programs that run a few times: compiling them is nearly all of the time."""
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def model():
  return Decoder(CONFIG, lora_scale=LORA.scale)


@pytest.fixture(scope="module")
def params(model):
  return draw(param_shapes(model), 0.15, 0)


@pytest.fixture(scope="module")
def fresh(model, params):
  return init_lora(model, params, LORA, jax.random.key(0))


@pytest.fixture(scope="module")
def lora(fresh):
  """As after training: b is not zero any more."""
  return draw(fresh, 0.3, 1)


@pytest.fixture(scope="module")
def batch():
  source = np.random.default_rng(2)
  tokens = source.integers(0, CONFIG.vocab_size, (ROWS, LENGTH)).astype(np.int32)
  return tokens, np.arange(LENGTH) >= source.integers(0, 5, (ROWS, 1))


@functools.partial(jax.jit, static_argnums=0)
def logp_of(model, params, tokens, mask, lora=None):
  return token_logp(model, params, tokens, mask, lora=lora)


def paths(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {"/".join(str(part.key) for part in path): leaf for path, leaf in leaves}


# ------------------------------------------------------------- what they compute


def test_the_start_is_the_base_bit_for_bit(model, params, fresh, batch):
  base = logp_of(model, params, *batch)
  np.testing.assert_array_equal(logp_of(model, params, *batch, fresh), base)


def test_the_factors(model, params, fresh, lora, batch):
  """a is N(0, 1/in), b is zero; b moves the output, and so does the scale."""
  leaves = paths(fresh)
  linears = [f"attention/{x}" for x in "qo"] + [f"mlp/{x}" for x in ("up", "gate")]
  assert set(leaves) == {
    f"layers/{x}/{factor}" for x in (*linears, "mlp/down") for factor in "ab"
  }
  assert leaves["layers/mlp/down/a"].shape == (2, 64, 4)
  assert leaves["layers/mlp/down/b"].shape == (2, 4, 32)
  wide = Decoder(dataclasses.replace(CONFIG, width=1024))
  a = init_lora(wide, param_shapes(wide), LORA, jax.random.key(0))
  a = a["layers"]["mlp"]["up"]["a"]
  assert abs(float(a.std()) * 32 - 1) < 0.03 and abs(float(a.mean())) < 0.002
  assert not any(leaf.any() for path, leaf in leaves.items() if path.endswith("/b"))

  base = logp_of(model, params, *batch)
  moved = logp_of(model, params, *batch, lora)
  other = logp_of(model.clone(lora_scale=1.0), params, *batch, lora)
  assert np.abs(moved - base).max() > 0.05 and np.abs(moved - other).max() > 0.05


def test_a_draw_depends_on_its_path_alone(model, params, fresh):
  one = LoRAConfig(rank=4, targets=("attention/q",))
  alone = init_lora(model, params, one, jax.random.key(0))
  q = fresh["layers"]["attention"]["q"]["a"]
  np.testing.assert_array_equal(alone["layers"]["attention"]["q"]["a"], q)
  assert np.abs(q[0] - q[1]).max() > 0.01  # layers differ
  up, gate = (fresh["layers"]["mlp"][x]["a"] for x in ("up", "gate"))
  assert np.abs(up - gate).max() > 0.01


@pytest.mark.parametrize(
  "remat", ["full", pytest.param("none", marks=pytest.mark.slow)]
)
def test_scan_and_unrolled_agree(model, params, lora, batch, remat):
  def value_and_grad(model, params, lora):
    loss = lambda lora: logp_of(model, params, *batch, lora).sum()
    return jax.value_and_grad(loss)(lora)

  value, grad = value_and_grad(model.clone(remat=remat), params, lora)
  flat, flat_grad = value_and_grad(
    model.clone(scan=False), unstack_layers(params, 2), unstack_layers(lora, 2)
  )
  assert abs(float(value) - float(flat)) < 1e-3 * abs(float(value))
  flat_grad = stack_layers(flat_grad, 2)
  for path, leaf in paths(grad).items():
    np.testing.assert_allclose(leaf, paths(flat_grad)[path], atol=1e-4)
    assert leaf.any(), path


def test_they_are_computed_in_the_dtype_of_the_model(params, lora):
  layer = Linear(64, ("embed", "mlp"), False, jnp.bfloat16)
  take = lambda tree: jax.tree.map(lambda x: x[0], tree["layers"]["mlp"]["up"])
  x = jnp.ones((2, 32), jnp.bfloat16)
  y = layer.apply({"params": take(params), "lora": take(lora)}, x)
  assert y.dtype == jnp.bfloat16


# ------------------------------------------------------------- merging, export


def test_merged_equals_unmerged(model, params, lora, batch):
  merged = merge_lora(params, lora, LORA.scale)
  apart = logp_of(model, params, *batch, lora)
  np.testing.assert_allclose(logp_of(model, merged, *batch), apart, atol=1e-5)
  before = paths(params)
  factors = paths(lora)
  targeted = {path[:-2] + "/kernel" for path in factors}
  for path, leaf in paths(merged).items():
    assert (leaf is before[path]) == (path not in targeted), path
    if path in targeted:  # W + alpha / r a b
      a, b = (factors[path.removesuffix("kernel") + name] for name in "ab")
      np.testing.assert_allclose(leaf, before[path] + 12.0 / 4 * (a @ b), atol=1e-5)
  assert jax.tree.structure(merged) == jax.tree.structure(params)
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  dtypes = {leaf.dtype for leaf in jax.tree.leaves(merge_lora(half, lora, 1.0))}
  assert dtypes == {jnp.dtype(jnp.bfloat16)}


def test_adapters_of_another_model_are_not_merged(params, lora):
  with pytest.raises(ConfigError, match="layer_0"):
    merge_lora(params, unstack_layers(lora, 2), 1.0)


@pytest.mark.parametrize(
  "name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)]
)
def test_a_merged_policy_is_saved_and_loaded(name, tmp_path):
  policy = hub.load(GOLDEN / name)
  model = policy.model.clone(lora_scale=LORA.scale)
  lora = init_lora(model, policy.params, LoRAConfig(rank=2), jax.random.key(0))
  lora = draw(lora, 0.05, 3)
  merged = merge_lora(policy.params, lora, LORA.scale)
  hub.save(dataclasses.replace(policy, params=merged), tmp_path / "merged")
  back = hub.load(tmp_path / "merged")
  tokens = np.arange(1, 13, dtype=np.int32).reshape(2, 6)
  mask = np.ones((2, 6), bool)
  apart = logp_of(model, policy.params, tokens, mask, lora)
  assert np.abs(apart - logp_of(model, policy.params, tokens, mask)).max() > 0.01
  again = logp_of(back.model, back.params, tokens, mask)
  np.testing.assert_allclose(again, apart, atol=1e-5)


# ------------------------------------------------------------- training


def updated(model, params, lora, batch, steps=3):
  def loss(lora, batch, base):
    logp = token_logp(model, base, *batch, lora=lora)
    return {"loss": (-logp.sum(), jnp.float32(batch[1].sum()))}

  config = OptimizerConfig(learning_rate=1e-2, schedule="constant")
  step = make_step(loss, config, micro_batches=2 if model.mesh is None else 1)
  state, losses = init_state(lora, config, steps), []
  for _ in range(steps):
    state, metrics = step(state, batch, params)
    losses.append(float(metrics["loss"]))
  return state, losses


@pytest.fixture(scope="module")
def trained(model, params, fresh, batch):
  before = jax.tree.map(np.array, params)
  return *updated(model, params, fresh, batch), before


def test_only_adapters_are_trained(model, params, fresh, trained, batch):
  state, losses, before = trained
  assert losses[2] < losses[1] < losses[0]
  assert jax.tree.structure(state.params) == jax.tree.structure(fresh)
  for path, leaf in paths(state.params).items():
    assert np.abs(leaf - paths(fresh)[path]).max() > 0, path
  for path, leaf in paths(params).items():
    np.testing.assert_array_equal(leaf, paths(before)[path])
  # The optimiser holds moments of the adapters and of nothing else.
  sizes = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
  assert sizes == 2 * sum(leaf.size for leaf in jax.tree.leaves(fresh))


@pytest.mark.parametrize(
  "shape", [(2, 2, 2), pytest.param((1, 4, 2), marks=pytest.mark.slow)], ids=str
)
def test_a_mesh_changes_nothing(model, params, fresh, trained, batch, shape):
  mesh = make_mesh(*shape)
  model = model.clone(mesh=mesh)
  layout = tree_shardings(mesh, param_axes(model), param_shapes(model))
  sharded = jax.device_put(params, layout)
  lora = init_lora(model, sharded, LORA, jax.random.key(0))
  jax.tree.map(np.testing.assert_array_equal, lora, fresh)
  down, q = lora["layers"]["mlp"]["down"], lora["layers"]["attention"]["q"]
  fsdp, tensor = shape[1:]
  local = lambda x: x.sharding.shard_shape(x.shape)
  assert local(down["a"]) == (2, 64 // tensor, 4)
  assert local(down["b"]) == (2, 4, 32 // fsdp)
  assert local(q["a"]) == (2, 32 // fsdp, 4) and local(q["b"]) == (2, 4, 32 // tensor)
  axes = lora_axes(model, lora)["layers"]["attention"]["q"]
  assert axes == {"a": ("layers", "embed", None), "b": ("layers", None, "heads")}

  state, losses = updated(model, sharded, lora, batch)
  np.testing.assert_allclose(losses, trained[1], atol=1e-5)
  for path, leaf in paths(state.params).items():
    assert leaf.sharding.is_equivalent_to(paths(lora)[path].sharding, leaf.ndim)
    # Adam divides by the root of tiny squares: a rounding difference can show.
    np.testing.assert_allclose(leaf, paths(trained[0].params)[path], atol=2e-3)
  merged = merge_lora(sharded, state.params, LORA.scale)
  for path, leaf in paths(merged).items():
    assert leaf.sharding.is_equivalent_to(paths(sharded)[path].sharding, leaf.ndim)


# ------------------------------------------------------------- settings


@pytest.mark.parametrize(
  "setting, match",
  [
    ({"rank": 0}, "rank=0"),
    ({"alpha": 0.0}, "alpha=0.0"),
    ({"alpha": float("nan")}, "alpha=nan"),
    ({"targets": ()}, "targets is empty"),
    ({"targets": ("(",)}, "no regular expression"),
  ],
)
def test_settings_are_checked(setting, match):
  with pytest.raises(ConfigError, match=match):
    LoRAConfig(**setting)


def test_a_target_that_matches_nothing_names_near_ones(model, params):
  config = LoRAConfig(targets=("mlp/", "attention/query"))
  with pytest.raises(ConfigError, match=r"'attention/query'.*layers/attention/q"):
    init_lora(model, params, config, jax.random.key(0))

"""The train step: accumulation, meshes, donation, compilations, golden numbers."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlft.algorithms.sft import sft_loss
from rlft.core.errors import ConfigError
from rlft.core.mesh import make_mesh, tree_shardings
from rlft.models.decoder import (
  Decoder,
  DecoderConfig,
  init_params,
  param_axes,
  param_shapes,
)
from rlft.training.data import TokenRow, collate, place
from rlft.training.optimizer import OptimizerConfig
from rlft.training.step import init_state, make_step

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "sft_step.json"
CONFIG = DecoderConfig(
  vocab_size=32,
  width=16,
  layers=2,
  heads=4,
  kv_heads=2,
  head_dim=8,
  mlp_width=32,
  max_positions=64,
)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, warmup_steps=2)
LENGTHS = (3, 16, 7, 2, 12, 9, 5, 14)  # unequal: token counts differ in every part


def make_batch(lengths=LENGTHS, size=8, seed=0):
  rng = np.random.default_rng(seed)
  rows = []
  for length in lengths:
    tokens = tuple(rng.integers(0, 32, length).tolist())
    weight = (0.0,) + (1.0,) * (length - 1)
    rows.append(TokenRow(tokens, weight))
  return collate(rows, size, 16)


@pytest.fixture(scope="module")
def model():
  return Decoder(CONFIG)


@pytest.fixture(scope="module")
def params(model):
  return init_params(model, jax.random.key(0))


def sft_step(model, optimizer=OPTIMIZER, **kwargs):
  return make_step(lambda p, b: sft_loss(model, p, b), optimizer, **kwargs)


@pytest.fixture(scope="module")
def step(model):
  return sft_step(model)


def on_mesh(params, shape):
  """(model on the mesh, its sharded parameters, the mesh)."""
  mesh = make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
  model = Decoder(CONFIG, mesh=mesh)
  layout = tree_shardings(mesh, param_axes(model), param_shapes(model))
  return model, jax.device_put(params, layout), mesh


# ------------------------------------------------------------------- accumulation


@pytest.fixture(scope="module")
def results(model, params, step):
  """State and metrics after an update in 1 x 8, 4 x 2 and 8 x 1 rows."""
  out = {}
  for parts in (1, 4, 8):
    train_step = step if parts == 1 else sft_step(model, micro_batches=parts)
    after = train_step(init_state(params, OPTIMIZER, 10), make_batch())
    out[parts] = jax.device_get(after)
  return out


class TestMicroBatches:
  @pytest.mark.parametrize("parts", [4, 8])
  def test_metrics_are_equal(self, results, parts):
    assert results[parts][1].keys() == results[1][1].keys()
    for name, value in results[1][1].items():
      assert results[parts][1][name] == pytest.approx(value, rel=1e-6), name

  @pytest.mark.parametrize("parts", [4, 8])
  def test_gradients_are_equal(self, results, parts):
    """The first moment after one update is (1 - b1) times the clipped gradient."""
    first = lambda result: result[0].opt_state[1].mu
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7, rtol=1e-4),
      first(results[parts]),
      first(results[1]),
    )

  @pytest.mark.parametrize("parts", [4, 8])
  def test_parameters_after_the_update_are_equal(self, results, parts):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6),
      results[parts][0].params,
      results[1][0].params,
    )

  def test_the_loss_is_not_the_mean_of_the_parts_means(self, step, params, results):
    """What a wrong accumulation would give is far from what is asserted above."""
    batch = make_batch()
    own = np.eye(8, dtype=np.float32)[:, :, None] * batch.weight  # one row each
    alone = lambda weight: step(
      init_state(params, OPTIMIZER, 10), batch.replace(weight=weight)
    )[1]["loss"]
    means = [float(alone(weight)) for weight in own]
    assert abs(np.mean(means) - results[1][1]["loss"]) > 1e-3


def test_batch_that_cannot_be_divided(model, params):
  state = init_state(params, OPTIMIZER, 10)
  with pytest.raises(ConfigError, match=r"8 rows .* 3 micro-batches .* multiple of 3"):
    sft_step(model, micro_batches=3)(state, make_batch())
  with pytest.raises(ConfigError, match="micro_batches=-1"):
    sft_step(model, micro_batches=-1)


def test_batch_that_the_mesh_cannot_divide(params):
  model, sharded, mesh = on_mesh(params, (2, 2, 2))
  step = sft_step(model, micro_batches=4, mesh=mesh)
  state = init_state(sharded, OPTIMIZER, 10)
  with pytest.raises(ConfigError, match=r"8 rows .* 4 batch shards; .* multiple of 16"):
    step(state, place(make_batch(), mesh))


# ------------------------------------------------------------------------- meshes


UPDATES = 3


def losses_of(step, state, mesh):
  out = []
  for i in range(UPDATES):
    state, metrics = step(state, place(make_batch(seed=i), mesh))
    out.append(float(metrics["loss"]))
  return out, state


@pytest.fixture(scope="module")
def plain_losses(step, params):
  return losses_of(step, init_state(params, OPTIMIZER, 10), None)[0]


def test_training_without_a_mesh_lowers_the_loss(step, params):
  state = init_state(params, OPTIMIZER, 20)
  batch = make_batch()
  losses = []
  for _ in range(8):
    state, metrics = step(state, batch)
    losses.append(float(metrics["loss"]))
  assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 1, 1), (2, 4, 1), (2, 2, 2)])
def test_every_mesh_gives_the_same_losses_sharded(params, plain_losses, shape, capfd):
  model, sharded, mesh = on_mesh(params, shape)
  step = sft_step(model, mesh=mesh)
  state = init_state(sharded, OPTIMIZER, 10)
  layout = lambda state: jax.tree.map(lambda x: x.sharding, state)
  before = layout(state)
  losses, state = losses_of(step, state, mesh)
  np.testing.assert_allclose(losses, plain_losses, atol=1e-5)
  assert step._cache_size() == 1
  # XLA warns where it copies an array to all devices to get from layout to layout.
  assert "Involuntary" not in capfd.readouterr().err
  # Layouts do not drift: a drift is a second compilation, or a gathered parameter.
  assert layout(state) == before

  _, fsdp, tensor = shape
  moments = state.opt_state[1]
  for tree in (state.params, moments.mu, moments.nu):
    # "embed" over fsdp, "vocab" and "mlp" over tensor, on the devices themselves.
    local = lambda x: x.addressable_shards[0].data.shape
    assert local(tree["embedding"]) == (32 // tensor, 16 // fsdp)
    assert local(tree["layers"]["mlp"]["up"]["kernel"]) == (2, 16 // fsdp, 32 // tensor)
    assert local(tree["layers"]["attention"]["q"]["kernel"]) == (
      2, 16 // fsdp, 32 // tensor,
    )  # fmt: skip


def test_a_transformation_lies_on_the_mesh(params):
  """Whose state has other shapes than the parameters: one compilation, equal losses."""
  rows = optax.scale_by_factored_rms(min_dim_size_to_factor=8)
  optimizer = optax.chain(rows, optax.scale(-1e-2))
  losses = []
  for shape in ((1, 1, 1), (2, 2, 2)):
    model, sharded, mesh = on_mesh(params, shape)
    step = sft_step(model, optimizer, mesh=mesh)
    found, state = losses_of(step, init_state(sharded, optimizer, 3), mesh)
    losses.append(found)
    assert step._cache_size() == 1
    assert all(x.sharding.mesh == mesh for x in jax.tree.leaves(state.opt_state))
  np.testing.assert_allclose(*losses, rtol=1e-5)
  assert losses[0][-1] < losses[0][0]


def test_micro_batches_on_a_mesh(params, plain_losses):
  model, sharded, mesh = on_mesh(params, (2, 2, 1))
  step = sft_step(model, micro_batches=2, mesh=mesh)
  losses, _ = losses_of(step, init_state(sharded, OPTIMIZER, 10), mesh)
  np.testing.assert_allclose(losses, plain_losses, atol=1e-5)


def test_moments_are_sharded_before_the_first_update(params):
  _, sharded, _ = on_mesh(params, (2, 2, 2))
  state = init_state(sharded, OPTIMIZER, 10)
  for tree in (state.opt_state[1].mu, state.opt_state[1].nu):
    jax.tree.map(lambda m, p: _assert_same_layout(m, p), tree, sharded)
  assert len(state.step.sharding.device_set) == 8


def _assert_same_layout(moment, param):
  assert moment.sharding == param.sharding


# ----------------------------------------------------------- donation, compilation


def test_state_is_donated_and_the_start_is_not(step, params):
  start = jax.device_get(params)
  state = init_state(params, OPTIMIZER, 10)
  after, _ = step(state, make_batch())
  for leaf in jax.tree.leaves((state.params, state.opt_state)):
    assert leaf.is_deleted()
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), start)
  moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), after.params, start)
  assert all(jax.tree.leaves(moved))


def test_parameters_start_as_float32_masters(params):
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  state = init_state(half, OPTIMIZER, 10)
  for leaf in jax.tree.leaves(state.params):
    assert leaf.dtype == jnp.float32


def test_the_schedule_is_traced(step, params):
  """Another length of the run, another step: the same program."""
  step(init_state(params, OPTIMIZER, 10), make_batch())
  before, rates = step._cache_size(), {}
  for horizon in (4, 10, 1000):
    state = init_state(params, OPTIMIZER, horizon)
    for _ in range(4):
      state, metrics = step(state, make_batch())
    rates[horizon] = float(metrics["learning_rate"])
  assert step._cache_size() == before
  assert rates[4] < rates[10] < rates[1000]


def test_bfloat16_compute_keeps_float32_masters(params, plain_losses):
  tiny = dataclasses.replace(OPTIMIZER, learning_rate=1e-6, weight_decay=0.0)
  step = sft_step(Decoder(CONFIG, dtype=jnp.bfloat16), tiny)
  state, metrics = step(init_state(params, tiny, 10), make_batch(seed=0))
  for leaf in jax.tree.leaves((state.params, state.opt_state[1].mu)):
    assert leaf.dtype == jnp.float32
  loss = float(metrics["loss"])
  assert metrics["loss"].dtype == jnp.float32
  assert loss == pytest.approx(plain_losses[0], abs=0.05)
  assert loss != plain_losses[0]  # it did compute in another precision
  # An update far below bfloat16's resolution is not rounded away.
  moved = jax.tree.map(
    lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()),
    state.params,
    params,
  )
  assert all(0 < x < 1e-6 for x in jax.tree.leaves(moved))


# ------------------------------------------------------------------- what is read


def test_rows_of_padding_change_nothing(step, model, params):
  """Neither the loss, nor the gradient, nor the number of tokens."""
  rows = LENGTHS[:5]
  compact, padded = make_batch(rows, size=5), make_batch(rows, size=8)
  assert not padded.mask[5:].any() and not padded.weight[5:].any()
  padded.tokens[5:] = 31  # any id may lie under a pad
  mean = lambda p, batch: _mean(sft_loss(model, p, batch)["loss"])
  loss, grads = jax.jit(jax.value_and_grad(mean))(params, compact)
  state, metrics = step(init_state(params, OPTIMIZER, 10), padded)
  assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-6)
  assert float(metrics["loss_denominator"]) == sum(rows) - len(rows)
  clip = min(1.0, 1.0 / float(metrics["grad_norm"]))
  jax.tree.map(
    lambda m, g: np.testing.assert_allclose(m, 0.1 * clip * g, rtol=1e-3, atol=1e-7),
    state.opt_state[1].mu,
    grads,
  )


def _mean(pair):
  return pair[0] / pair[1]


def test_gradient_against_finite_differences():
  """In float64, along random directions, through the whole model."""
  batch = make_batch()
  with jax.enable_x64(True):
    model = Decoder(CONFIG, dtype=jnp.float64)
    params = jax.tree.map(
      lambda x: x.astype(jnp.float64), init_params(model, jax.random.key(1))
    )
    both = jax.jit(
      jax.value_and_grad(lambda p: _mean(sft_loss(model, p, batch)["loss"]))
    )
    rng = np.random.default_rng(0)
    grads = both(params)[1]
    for _ in range(3):
      towards = jax.tree.map(lambda x: rng.normal(size=x.shape), params)
      # Not smaller: the loss is reduced in float32 by design.
      eps = 1e-3
      ahead, behind = (
        float(both(jax.tree.map(lambda p, d, e=e: p + e * d, params, towards))[0])
        for e in (eps, -eps)
      )
      exact = sum(
        float(jnp.vdot(g, d))
        for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves(towards))
      )
      assert abs(exact) > 0.02
      assert (ahead - behind) / (2 * eps) == pytest.approx(exact, rel=5e-3, abs=2e-3)


def test_weights_below_one_are_a_mean_too():
  """sum / denominator also where the denominator is under 1."""
  loss = lambda p, b: {
    "loss": (jnp.sum(b["w"] * p["x"] ** 2), jnp.sum(b["w"])),
    "share": (jnp.sum(b["w"]), jnp.float32(0.0)),
  }
  config = OptimizerConfig(learning_rate=0.1)
  step = make_step(loss, config)
  state = init_state({"x": jnp.float32(3.0)}, config, 1)
  _, metrics = step(state, {"w": jnp.array([0.125, 0.125])})
  assert float(metrics["loss"]) == pytest.approx(9.0)
  assert float(metrics["grad_norm"]) == pytest.approx(6.0)
  assert float(metrics["share"]) == 0.0  # nothing was counted: no NaN


def test_metrics(step, params):
  state = init_state(params, OPTIMIZER, 10)
  new, metrics = step(state, make_batch())
  assert set(metrics) == {
    "loss", "loss_denominator", "grad_norm", "update_norm", "learning_rate",
    "skipped",
  }  # fmt: skip
  for value in metrics.values():
    assert value.shape == () and value.dtype == jnp.float32
  assert int(new.step) == 1 and int(new.horizon) == 10
  assert float(metrics["learning_rate"]) == pytest.approx(0.5e-2)  # half-way warm
  change = jax.tree.map(lambda a, b: a - b, new.params, params)
  norm = np.sqrt(sum(float((x**2).sum()) for x in jax.tree.leaves(change)))
  assert float(metrics["update_norm"]) == pytest.approx(norm, rel=1e-4)


# ----------------------------------------------------------- numbers without bound


def poisoned(batch, row=0):
  """A token of the loss weighs infinitely: the loss and its gradient are NaN."""
  weight = np.array(batch.weight)
  weight[row, 1] = np.inf
  return batch.replace(weight=weight)


def overflowing(params):
  """A loss that is finite, with a gradient that is not."""
  return {"loss": (jnp.sqrt(jnp.maximum(params["w"], 0.0)), jnp.float32(1))}


@pytest.mark.parametrize("parts", [1, 4])
def test_a_loss_that_is_not_finite_changes_nothing(model, params, step, parts):
  """B1: parameters, moments and counters stay to the bit, and the next update is the
  one that would have been made without it."""
  step = step if parts == 1 else sft_step(model, micro_batches=parts)
  state, metrics = step(init_state(params, OPTIMIZER, 10), make_batch())
  assert metrics["skipped"] == 0
  before = jax.device_get(state)
  state, metrics = step(state, poisoned(make_batch()))
  assert metrics["skipped"] == 1 and metrics["update_norm"] == 0
  assert np.isnan(metrics["loss"])  # it is not hidden
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), before)
  state, metrics = step(state, make_batch(seed=1))
  assert metrics["skipped"] == 0 and int(state.step) == 2


def test_a_gradient_that_is_not_finite_changes_nothing():
  optimizer = OptimizerConfig(clip_norm=0.0)
  step = make_step(lambda params, batch: overflowing(params), optimizer)
  state = init_state({"w": jnp.float32(0.0)}, optimizer, 1)
  before = jax.device_get(state)
  state, metrics = step(state, jnp.zeros(1))
  assert metrics["skipped"] == 1 and metrics["loss"] == 0
  assert not np.isfinite(metrics["grad_norm"])
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), before)


def test_on_a_mesh_every_shard_is_skipped(params):
  model, sharded, mesh = on_mesh(params, (2, 2, 1))
  step, state = sft_step(model, mesh=mesh), init_state(sharded, OPTIMIZER, 10)
  before = jax.device_get(state)
  state, metrics = step(state, place(poisoned(make_batch(), row=7), mesh))
  assert metrics["skipped"] == 1
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), before)


def test_all_of_the_state_is_updated_where_it_lies(model, params, step):
  """Also by an update that may be skipped: to select between old and new values a
  program has to hold both, 4 bytes more for each parameter."""
  state = init_state(params, OPTIMIZER, 10)
  memory = step.lower(state, make_batch()).compile().memory_analysis()
  size = sum(x.nbytes for x in jax.tree.leaves(state))
  assert memory.alias_size_in_bytes >= size
  plain = dataclasses.replace(OPTIMIZER, clip_norm=0.0)  # clipping selects gradients
  text = (
    sft_step(model, plain).lower(init_state(params, plain, 10), make_batch()).as_text()
  )
  selects = [line for line in text.splitlines() if "stablehlo.select" in line]
  assert selects and not [
    line for line in selects if line.endswith("tensor<32x16xf32>")
  ]


# ------------------------------------------------------------------------- golden


def one_step(step) -> dict[str, float]:
  """Metrics of one update from parameters and rows that numpy makes."""
  rng = np.random.default_rng(123)
  draw = lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.2, jnp.float32)
  params = jax.tree.map(draw, param_shapes(Decoder(CONFIG)))
  metrics = step(init_state(params, OPTIMIZER, 10), make_batch())[1]
  return {name: float(f"{float(x):.7g}") for name, x in sorted(metrics.items())}


def test_one_step_gives_the_golden_metrics(step):
  golden, now = json.loads(GOLDEN.read_text()), one_step(step)
  moved = {
    name: (golden.get(name), now.get(name))
    for name in golden.keys() | now.keys()
    if now.get(name) != pytest.approx(golden.get(name), rel=2e-5)
  }
  assert not moved, (
    f"One supervised update no longer gives the numbers it gave (golden, now): {moved}."
    " Model, loss, optimiser or schedule compute something else than before. If that is"
    " a mistake, this test has found it. If it is meant, say in CHANGELOG.md what"
    " changed and why, and write the new numbers with\n"
    "    python tests/training/test_step.py"
  )


if __name__ == "__main__":
  GOLDEN.write_text(json.dumps(one_step(sft_step(Decoder(CONFIG))), indent=2) + "\n")
  print(GOLDEN.read_text())


def test_maxima_and_frozen_arguments_with_micro_batches():
  optimizer = OptimizerConfig(learning_rate=1.0, schedule="constant", clip_norm=0.0)

  def loss(params, batch, scale):
    x = params["w"] * batch * scale
    return {
      "loss": (jnp.sum(x), jnp.float32(batch.size)),
      "x_max": (jnp.max(jax.lax.stop_gradient(x)), jnp.float32(1)),
    }

  batch = jnp.asarray([-3.0, -1.0, -2.0, -8.0])
  for parts in (1, 2, 4):
    state = init_state({"w": jnp.float32(2)}, optimizer, 1)
    step = make_step(loss, optimizer, micro_batches=parts)
    state, metrics = step(state, batch, jnp.float32(0.5))
    # A maximum that started from 0, or was added up, would show here.
    assert float(metrics["x_max"]) == -1.0
    assert float(metrics["loss"]) == -3.5
    assert float(metrics["grad_norm"]) == 1.75

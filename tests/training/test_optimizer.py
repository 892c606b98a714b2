"""The optimiser against optax's own, update by update, and its masks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlft.core.errors import ConfigError
from rlft.training.optimizer import (
  OptimizerConfig,
  check_patterns,
  learning_rate,
  make_optimizer,
  matches,
)
from rlft.training.step import init_state, make_step

PEAK, WARMUP, HORIZON = 3e-3, 5, 20


def params():
  rng = np.random.default_rng(0)
  new = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return {
    "embedding": new(6, 4),
    "layers": {
      "norm": {"scale": new(4)},
      "mlp": {"kernel": new(4, 4), "bias": new(4)},
    },
  }


def loss(params, batch):
  """A made-up loss in which every parameter has a part."""
  hidden = params["embedding"][batch["id"]] * params["layers"]["norm"]["scale"]
  out = hidden @ params["layers"]["mlp"]["kernel"] + params["layers"]["mlp"]["bias"]
  return {"loss": (jnp.sum(jnp.tanh(out) ** 2), jnp.float32(batch["id"].size))}


def batches(count):
  rng = np.random.default_rng(1)
  return [{"id": rng.integers(0, 6, 8)} for _ in range(count)]


def run(config, updates=6):
  """Parameters after each update of our step, and its metrics."""
  state, step = init_state(params(), config, updates), make_step(loss, config)
  out, metrics = [], []
  for batch in batches(updates):
    state, one = step(state, batch)
    out.append(jax.device_get(state.params))
    metrics.append(jax.device_get(one))
  return out, metrics, state


# ------------------------------------------------------------------ learning rate


def decay_by_optax(schedule, end_factor):
  left = HORIZON - WARMUP
  if schedule == "linear":
    return optax.linear_schedule(PEAK, PEAK * end_factor, left)
  if schedule == "cosine":
    return optax.cosine_decay_schedule(PEAK, left, alpha=end_factor)
  return optax.constant_schedule(PEAK)


@pytest.mark.parametrize("end_factor", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedules_are_those_of_optax(schedule, end_factor):
  config = OptimizerConfig(
    learning_rate=PEAK, schedule=schedule, warmup_steps=WARMUP, end_factor=end_factor
  )
  rate = lambda step: float(learning_rate(config, jnp.int32(step), jnp.int32(HORIZON)))
  warm = optax.linear_schedule(0.0, PEAK, WARMUP)
  decay = decay_by_optax(schedule, end_factor)
  for step in range(HORIZON + 5):  # and beyond: the rate stays where it ended
    # One ahead of optax, whose first update of a warm-up moves nothing.
    want = warm(step + 1) if step < WARMUP else decay(step - WARMUP)
    assert rate(step) == pytest.approx(float(want), rel=1e-6, abs=1e-10), step


def test_without_warmup_the_first_rate_is_the_peak():
  config = OptimizerConfig(learning_rate=PEAK)
  assert float(learning_rate(config, 0, 10)) == pytest.approx(PEAK, rel=1e-6)
  assert float(learning_rate(config, 10, 10)) == 0.0


def test_total_steps_overrides_the_length_of_the_run():
  state = init_state(params(), OptimizerConfig(total_steps=77), 5)
  assert int(state.horizon) == 77
  assert int(init_state(params(), OptimizerConfig(), 5).horizon) == 5


# ------------------------------------------------------------------------ updates


@pytest.mark.parametrize("clip_norm", [0.0, 0.05])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_updates_are_those_of_optax_adamw(weight_decay, clip_norm):
  config = OptimizerConfig(
    learning_rate=PEAK,
    schedule="constant",
    b1=0.8,
    b2=0.95,
    eps=1e-5,
    weight_decay=weight_decay,
    clip_norm=clip_norm,
    no_decay=(r"bias$", r"scale$"),
  )
  decays = {
    "embedding": True,
    "layers": {"norm": {"scale": False}, "mlp": {"kernel": True, "bias": False}},
  }
  adamw = optax.adamw(PEAK, 0.8, 0.95, 1e-5, weight_decay=weight_decay, mask=decays)
  clip = optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity()
  theirs = optax.chain(clip, adamw)
  mean = lambda p, batch: loss(p, batch)["loss"][0] / loss(p, batch)["loss"][1]

  ours, metrics, _ = run(config)
  want = params()
  state = theirs.init(want)
  for i, batch in enumerate(batches(6)):
    grads = jax.grad(mean)(want, batch)
    norm = float(optax.tree.norm(grads))
    assert metrics[i]["grad_norm"] == pytest.approx(norm, rel=1e-5)  # before clipping
    assert not clip_norm or norm > clip_norm, "nothing would be clipped"
    updates, state = theirs.update(grads, state, want)
    want = optax.apply_updates(want, updates)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), ours[i], want
    )


def test_clipping_changes_the_first_moment_only_above_the_limit():
  """Adam's direction hides the scale of one update; its state does not."""
  _, metrics, wide = run(OptimizerConfig(clip_norm=100.0), updates=1)
  _, _, off = run(OptimizerConfig(clip_norm=0.0), updates=1)
  _, _, tight = run(OptimizerConfig(clip_norm=0.01), updates=1)
  moment = lambda state: next(
    x.mu for x in jax.tree.leaves(
      state.opt_state, is_leaf=lambda x: hasattr(x, "mu")
    ) if hasattr(x, "mu")
  )  # fmt: skip
  norm = lambda state: float(optax.tree.norm(moment(state))) / 0.1  # 1 - b1
  assert norm(wide) == pytest.approx(float(metrics[0]["grad_norm"]), rel=1e-5)
  assert norm(off) == pytest.approx(norm(wide), rel=1e-6)
  assert norm(tight) == pytest.approx(0.01, rel=1e-5)


# -------------------------------------------------------------------------- masks


def test_no_decay_is_by_pattern():
  start = params()
  config = OptimizerConfig(
    weight_decay=0.5, clip_norm=0, no_decay=("^layers/mlp", "scale$")
  )
  optimizer = make_optimizer(config)
  zero = jax.tree.map(jnp.zeros_like, start)
  directions, _ = optimizer.update(zero, optimizer.init(start), start)
  np.testing.assert_allclose(directions["embedding"], 0.5 * start["embedding"])
  for leaf in jax.tree.leaves(directions["layers"]):
    assert not np.any(leaf)


def test_frozen_parameters_stay_bit_identical_and_have_no_state():
  config = OptimizerConfig(
    learning_rate=1.0, weight_decay=0.5, freeze=("^embedding$", "mlp/bias")
  )
  start = jax.device_get(params())
  end, metrics, state = run(config, updates=3)
  assert np.array_equal(end[-1]["embedding"], start["embedding"])
  assert np.array_equal(
    end[-1]["layers"]["mlp"]["bias"], start["layers"]["mlp"]["bias"]
  )
  for path in (("norm", "scale"), ("mlp", "kernel")):
    a, b = (x["layers"][path[0]][path[1]] for x in (end[-1], start))
    assert np.all(a != b)
  shapes = [x.shape for x in jax.tree.leaves(state.opt_state)]
  assert (6, 4) not in shapes
  assert shapes.count((4, 4)) == 2  # the kernel's two moments
  assert shapes.count((4,)) == 2  # the scale's; none of the bias

  # The norm that is logged is the one that is clipped: of what moves.
  mean = lambda p: loss(p, batches(1)[0])["loss"][0] / 8
  grads = jax.grad(mean)(params())
  moving = (grads["layers"]["norm"]["scale"], grads["layers"]["mlp"]["kernel"])
  assert metrics[0]["grad_norm"] == pytest.approx(
    float(optax.tree.norm(moving)), rel=1e-5
  )


def test_patterns_are_searched_in_paths():
  found = matches(params(), ("mlp/k", "^norm", "embed"))
  assert found == {
    "embedding": True,
    "layers": {"norm": {"scale": False}, "mlp": {"kernel": True, "bias": False}},
  }


def test_freeze_that_matches_nothing_is_an_error():
  with pytest.raises(ConfigError, match="'attention' matches no parameter"):
    check_patterns(OptimizerConfig(freeze=("mlp", "attention")), params())
  with pytest.raises(ConfigError, match="matches no parameter"):
    init_state(params(), OptimizerConfig(freeze=("layer_0",)), 1)


def test_freezing_everything_is_an_error():
  with pytest.raises(ConfigError, match="leaves no parameter to train"):
    init_state(params(), OptimizerConfig(freeze=(".",)), 1)


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("learning_rate", 0.0),
    ("learning_rate", float("nan")),
    ("learning_rate", float("inf")),
    ("eps", -1.0),
    ("warmup_steps", -1),
    ("total_steps", -1),
    ("clip_norm", -1.0),
    ("clip_norm", float("nan")),
    ("weight_decay", -0.1),
    ("end_factor", -0.1),
    ("b1", 1.0),
    ("b2", 1.5),
    ("schedule", "cosin"),
    ("freeze", ("(",)),
    ("no_decay", ("[",)),
  ],
)
def test_values_out_of_range_are_refused(field, value):
  shown = value[0] if isinstance(value, tuple) else field
  with pytest.raises(ConfigError) as error:
    OptimizerConfig(**{field: value})
  assert shown in str(error.value)


def test_warmup_longer_than_the_schedule_is_refused():
  with pytest.raises(ConfigError, match="peak would never be reached"):
    OptimizerConfig(warmup_steps=11, total_steps=10)


# ------------------------------------------------------------ an optax transformation


def optax_alone(transformation, updates=6):
  """Parameters after each update of optax by itself."""
  ours, state, out = params(), transformation.init(params()), []
  for batch in batches(updates):
    grads = jax.grad(lambda p, b=batch: loss(p, b)["loss"][0] / 8)(ours)
    moves, state = transformation.update(grads, state, ours)
    ours = optax.apply_updates(ours, moves)
    out.append(ours)
  return out


SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 2, 6)
KEY = jax.random.key(3)


@pytest.mark.parametrize(
  "transformation",
  [
    optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(SCHEDULE)),
    optax.inject_hyperparams(optax.adam)(learning_rate=SCHEDULE),
    optax.chain(optax.add_noise(0.01, 0.5, KEY), optax.sgd(0.1)),  # a key in its state
    optax.chain(
      optax.scale_by_factored_rms(min_dim_size_to_factor=2), optax.scale(-0.1)
    ),
  ],
  ids=["chain", "injected", "noise", "factored"],
)
def test_a_transformation_updates_as_it_does_alone(transformation):
  ours, metrics, state = run(transformation)
  for a, b in zip(ours, optax_alone(transformation)):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 1e-5, 1e-6), a, b)
  again, _, _ = run(transformation)  # nothing of it was donated
  jax.tree.map(np.testing.assert_array_equal, ours[-1], again[-1])
  assert all(one["grad_norm"] > 0 and not one["skipped"] for one in metrics)
  assert int(state.step) == 6


def test_a_rate_that_optax_shows_is_logged():
  _, metrics, _ = run(optax.inject_hyperparams(optax.sgd)(learning_rate=SCHEDULE))
  rates = [one["learning_rate"] for one in metrics]
  np.testing.assert_allclose(rates, [SCHEDULE(i) for i in range(6)], rtol=1e-6)
  _, metrics, _ = run(optax.sgd(SCHEDULE), updates=1)
  assert "learning_rate" not in metrics[0]


def test_what_is_not_finite_is_skipped_under_any_optimiser():
  transformation = optax.adamw(1e-2)
  state, step = init_state(params(), transformation, 1), make_step(loss, transformation)
  before = jax.device_get((state.params, state.opt_state))
  bad = state.replace(params=state.params | {"embedding": jnp.full((6, 4), jnp.nan)})
  kept = jax.device_get(bad.opt_state)
  bad, metrics = step(bad, batches(1)[0])
  assert metrics["skipped"] == 1
  jax.tree.map(np.testing.assert_array_equal, kept, jax.device_get(bad.opt_state))
  jax.tree.map(np.testing.assert_array_equal, kept, before[1])


@pytest.mark.parametrize("wrong", [1e-3, "adamw", SCHEDULE, optax.adamw, None])
def test_what_is_no_optimiser_is_named(wrong):
  with pytest.raises(ConfigError, match="OptimizerConfig, or an optax transformation"):
    init_state(params(), wrong, 1)

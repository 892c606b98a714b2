"""Laws that every setting of the policy loss obeys. A new one joins by a line below.

Letters: B rows, C tokens of the completion region.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlft.objectives.policy import policy_loss

ROWS, TOKENS = 6, 5
INPUTS = ("logp", "old", "advantage", "behaviour")
PER_ROW = {"importance": "sequence", "clip_low": 0.1, "clip_high": 0.1}
SETTINGS = {
  "ppo": {},
  "ppo_asymmetric": {"clip_low": 0.1, "clip_high": 0.4},
  "ppo_dual_clip": {"dual_clip": 1.3},
  "ppo_truncated_importance": {"importance_cap": 1.1},
  "grpo": {"aggregate": "sequence"},
  "dr_grpo": {"aggregate": "constant", "constant_length": 7},
  "gspo": dict(aggregate="sequence", **PER_ROW),
  "gspo_truncated_importance": dict(
    aggregate="sequence", importance_cap=1.1, **PER_ROW
  ),
  "reinforce": {"clip": False},
  "rloo": {"clip": False, "aggregate": "constant", "constant_length": 1},
}


@pytest.fixture(params=SETTINGS)
def setting(request):
  return request.param


@pytest.fixture(scope="module")
def data():
  rng = np.random.default_rng(5)
  noise = lambda scale: rng.normal(scale=scale, size=(ROWS, TOKENS))
  old = -rng.exponential(size=(ROWS, TOKENS)) - 0.1
  arrays = {
    "logp": old + noise(0.3),
    "old": old,
    "advantage": noise(1.0),
    "behaviour": old + noise(0.2),
  }
  arrays = {name: x.astype(np.float32) for name, x in arrays.items()}
  mask = rng.random((ROWS, TOKENS)) < 0.7  # holes, as tools leave them
  mask[0], mask[1] = True, False
  return arrays | {"mask": mask}


def loss(setting, data):
  return policy_loss(
    *(data[name] for name in ("logp", "old", "advantage", "mask")),
    behaviour_logp_BC=data["behaviour"],
    **SETTINGS[setting],
  )


def mean(setting, data):
  (total, count), _ = loss(setting, data)
  return total / jnp.maximum(count, 1.0)


@functools.lru_cache
def jitted(setting):
  """The mean, its gradient by all float inputs, and stats; compiled once a setting."""

  def both(floats, mask):
    data = floats | {"mask": mask}
    value, grad = jax.value_and_grad(lambda f: mean(setting, f | {"mask": mask}))(
      floats
    )
    return value, grad, loss(setting, data)

  function = jax.jit(both)
  return lambda data: function({n: data[n] for n in INPUTS}, data["mask"])


def flat(pair_and_stats):
  pair, stats = pair_and_stats
  return {"loss": pair, **stats}


def test_every_branch_is_taken(data):
  """Else the laws below would hold of code that never ran."""
  for name, setting in SETTINGS.items():
    _, stats = jitted(name)(data)[2]
    clipped, count = stats["clip_fraction"]
    assert clipped == 0 if setting.get("clip") is False else 0 < clipped < count
    if "importance_cap" in setting:
      weight, count = stats["importance_weight"]
      assert 0 < weight < 1.1 * count
    else:
      assert "importance_weight" not in stats
  names = "ppo", "ppo_dual_clip"
  plain, dual = (jitted(n)(data)[2][1]["clip_fraction"][0] for n in names)
  assert dual > plain


def test_jit_changes_nothing(setting, data):
  plain, compiled = flat(loss(setting, data)), flat(jitted(setting)(data)[2])
  assert plain.keys() == compiled.keys()
  for x in jax.tree.leaves((plain, compiled)):
    assert jnp.shape(x) == () and x.dtype == jnp.float32
  for name in plain:
    np.testing.assert_allclose(plain[name], compiled[name], rtol=1e-5, err_msg=name)


def test_zero_advantage_is_zero_gradient(setting, data):
  value, grad, _ = jitted(setting)(
    data | {"advantage": np.zeros_like(data["advantage"])}
  )
  assert float(value) == 0 and not np.any(grad["logp"])
  assert np.any(jitted(setting)(data)[1]["logp"])


def test_ratio_one_is_the_vanilla_policy_gradient(setting, data):
  """-A, over tokens, or over row lengths and rows, or over the constant and rows."""
  mask, options = data["mask"], SETTINGS[setting]
  _, grad, (_, stats) = jitted(setting)(data | {"logp": data["old"]})
  rows = np.sum(mask.any(axis=1))
  share = mask / {
    "token": mask.sum(),
    "sequence": rows * np.maximum(mask.sum(axis=1, keepdims=True), 1),
    "constant": rows * options.get("constant_length", 0),
  }.get(options.get("aggregate", "token"))
  if "importance_cap" in options:
    share = share * np.minimum(np.exp(data["old"] - data["behaviour"]), 1.1)
  np.testing.assert_allclose(grad["logp"], -share * data["advantage"], atol=1e-6)
  count = float(mask.sum())
  assert stats["clip_fraction"] == (0, count) and stats["approx_kl"] == (0, count)
  assert stats["ratio_mean"] == (count, count) and stats["ratio_max"] == (1, 1)


def test_old_logp_may_be_the_logp_itself(setting, data):
  def value(logp):
    return mean(setting, data | {"logp": logp, "old": logp})

  expected = jitted(setting)(data | {"logp": data["old"]})[1]["logp"]
  grad = jax.jit(jax.grad(value))(data["old"])
  np.testing.assert_allclose(grad, expected, atol=1e-6)


def test_nothing_but_the_policy_gets_a_gradient(setting, data):
  grad = jitted(setting)(data)[1]
  for name in ("old", "advantage", "behaviour"):
    assert not np.any(grad[name]), name


def test_gradient_is_that_of_finite_differences(setting, data):
  if setting.startswith("gspo"):
    # With one advantage and weight a row, the stop-gradient form is the plain one.
    data = data | {
      "advantage": np.repeat(data["advantage"][:, :1], TOKENS, axis=1),
      "behaviour": data["old"] + np.float32(0.05),
    }
  step = 5e-3
  nudges = step * np.eye(ROWS * TOKENS, dtype=np.float32).reshape(-1, ROWS, TOKENS)
  value = jax.jit(jax.vmap(lambda logp: mean(setting, data | {"logp": logp})))
  numeric = value(data["logp"] + nudges) - value(data["logp"] - nudges)
  numeric = np.reshape(numeric, (ROWS, TOKENS)) / (2 * step)
  np.testing.assert_allclose(jitted(setting)(data)[1]["logp"], numeric, atol=1e-4)


@pytest.mark.parametrize("under", [np.nan, np.inf, -np.inf, 1e30])
def test_masked_tokens_have_no_part(setting, data, under):
  value, grad, out = jitted(setting)(data)
  changed = {n: np.where(data["mask"], data[n], np.float32(under)) for n in INPUTS}
  value2, grad2, out2 = jitted(setting)(data | changed)
  assert float(value) == float(value2)
  np.testing.assert_array_equal(grad["logp"], grad2["logp"])
  assert not np.any(grad2["logp"][~data["mask"]])
  assert flat(out) == flat(out2)


def test_nan_off_the_padding_is_not_hidden(setting, data):
  logp = data["logp"].copy()
  logp[0, 0] = np.nan
  assert np.isnan(jitted(setting)(data | {"logp": logp})[0])


def test_order_of_rows_is_nothing(setting, data):
  order = np.random.default_rng(1).permutation(ROWS)
  value, grad, out = jitted(setting)(data)
  value2, grad2, out2 = jitted(setting)({n: x[order] for n, x in data.items()})
  assert float(value) == pytest.approx(float(value2), rel=1e-5)
  np.testing.assert_allclose(grad["logp"][order], grad2["logp"], rtol=1e-5)
  for name, pair in flat(out).items():
    np.testing.assert_allclose(pair, flat(out2)[name], rtol=1e-5, err_msg=name)


def test_micro_batches_add_up(setting, data):
  whole = flat(jitted(setting)(data)[2])
  split = [{n: x[i : i + 2] for n, x in data.items()} for i in range(0, ROWS, 2)]
  split = [flat(jitted(setting)(part)[2]) for part in split]
  for name, pair in whole.items():
    combine = np.max if name.endswith("_max") else np.sum
    total = combine([part[name] for part in split], axis=0)
    np.testing.assert_allclose(total, pair, rtol=1e-5, err_msg=name)


def test_nothing_but_padding(setting, data):
  value, grad, out = jitted(setting)(data | {"mask": np.zeros_like(data["mask"])})
  assert float(value) == 0 and not np.any(grad["logp"])
  for name, (total, count) in flat(out).items():
    assert total == 0 and count == (1 if name == "ratio_max" else 0)


@pytest.mark.parametrize("gap", [200.0, -200.0])
def test_a_huge_log_ratio_is_finite(setting, data, gap):
  for name in ("logp", "behaviour"):
    value, grad, out = jitted(setting)(data | {name: data["old"] + np.float32(gap)})
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((value, grad, out)))

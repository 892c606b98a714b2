"""Fingerprints of weights: any bit, place, name or dtype; no mesh, no path."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlft.core.mesh import make_mesh
from rlft.training.fingerprint import fingerprint

NOISE = np.random.default_rng(0).standard_normal((2, 8, 6)).astype(np.float32)
PARAMS = {"a": {"kernel": NOISE}, "bias": np.zeros(5, np.float32)}


def changed(index, value):
  kernel = NOISE.copy()
  kernel[index] = value
  return {"a": {"kernel": kernel}, "bias": PARAMS["bias"]}


SWAPPED = NOISE.copy()
SWAPPED[0, [0, 1]] = NOISE[0, [1, 0]]


@pytest.mark.parametrize(
  "other",
  [
    changed((1, 7, 5), np.nextafter(NOISE[1, 7, 5], np.float32(9))),  # one bit
    {"a": {"kernel": SWAPPED}, "bias": PARAMS["bias"]},
    {"a": {"kernel": NOISE}, "bias": -PARAMS["bias"]},  # -0.0
    {"b": {"kernel": NOISE}, "bias": PARAMS["bias"]},
    {"a": {"kernel": NOISE.reshape(4, 4, 6)}, "bias": PARAMS["bias"]},
    {"a": {"kernel": NOISE}, "bias": jnp.zeros(5, jnp.bfloat16)},
    {"a": {"kernel": NOISE}, "bias": np.zeros(6, np.float32)},
  ],
)
def test_everything_counts(other):
  assert fingerprint(other) != fingerprint(PARAMS)


def test_where_the_weights_lie_does_not():
  due = fingerprint(PARAMS)
  assert fingerprint(jax.tree.map(jnp.asarray, PARAMS)) == due
  mesh = make_mesh(1, 4, 2, devices=jax.devices()[:8])
  layout = NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor"))
  kernel = jax.device_put(NOISE, layout)
  assert fingerprint({"a": {"kernel": kernel}, "bias": PARAMS["bias"]}) == due


def test_by_hand():
  """In whole numbers, from the definition."""

  def mix(x):
    x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
    x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
    return x ^ (x >> 16)

  from rlft.training import fingerprint as module

  bits = NOISE.view(np.uint32).reshape(-1).tolist()
  due = [
    sum(mix(x ^ mix((i + key) % 2**32)) for i, x in enumerate(bits)) % 2**32
    for key in module._KEYS
  ]
  assert np.asarray(module._sums({"a": NOISE})[0]).tolist() == due

"""Noise: addressed by integers, the same for any split, new for every address."""

from __future__ import annotations

import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlft.core import rng
from rlft.core.errors import ConfigError, RlftError
from rlft.core.mesh import make_mesh
from rlft.core.rng import Purpose


@jax.jit
def noise(seed, purpose, step, prompt_B, sample_B, t_B):
  keys_B = rng.row_keys(rng.key(seed, purpose, step), prompt_B, sample_B)
  return jnp.stack(rng.uniforms(keys_B, t_B))


def addresses(rows: int):
  source = np.random.default_rng(0)
  return tuple(source.integers(0, n, rows).astype(np.int32) for n in (10**6, 64, 512))


def test_every_part_of_the_address_matters():
  """All combinations of small integers give different numbers, in both halves."""
  grid = list(
    itertools.product(range(2), (1, 2), range(2), range(3), range(3), range(3))
  )
  rows = [
    noise(*(np.int32(x) for x in a[:3]), *(np.int32([x]) for x in a[3:])) for a in grid
  ]
  drawn = np.stack([np.asarray(row)[:, 0] for row in rows])
  assert len(np.unique(drawn[:, 0])) == len(np.unique(drawn[:, 1])) == len(grid)
  assert not set(drawn[:, 0]) & set(drawn[:, 1])


GOLDEN = [2875049, 1939461]  # of 2**24


def test_the_numbers_never_change():
  """A resumed run must draw what the killed one would have drawn, in any version."""
  drawn = noise(
    np.uint32(2**32 - 1), np.int32(2), np.int32(3), *np.int32([[5], [6], [7]])
  )
  np.testing.assert_array_equal(
    np.asarray(drawn)[:, 0] * 2**24, np.array(GOLDEN, np.float32)
  )


@pytest.mark.parametrize("sizes", [[1] * 48, [16, 32]], ids=str)
def test_noise_does_not_depend_on_the_split(sizes):
  rows = addresses(48)
  whole = np.asarray(noise(np.uint32(3), np.int32(1), np.int32(9), *rows))
  edges = np.cumsum(sizes)[:-1]
  parts = [
    np.asarray(noise(np.uint32(3), np.int32(1), np.int32(9), *part))
    for part in zip(*(np.split(x, edges) for x in rows))
  ]
  np.testing.assert_array_equal(np.concatenate(parts, 1), whole)
  order = np.random.default_rng(1).permutation(48)
  moved = noise(np.uint32(3), np.int32(1), np.int32(9), *(x[order] for x in rows))
  np.testing.assert_array_equal(np.asarray(moved), whole[:, order])


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)], ids=str)
def test_noise_does_not_depend_on_the_devices(shape):
  rows = addresses(48)
  whole = np.asarray(noise(np.uint32(3), np.int32(1), np.int32(9), *rows))
  layout = NamedSharding(make_mesh(*shape), PartitionSpec(("data", "fsdp")))
  drawn = noise(np.uint32(3), np.int32(1), np.int32(9), *jax.device_put(rows, layout))
  assert len(drawn.sharding.device_set) == 8
  np.testing.assert_array_equal(np.asarray(drawn), whole)


def test_noise_does_not_depend_on_jax_s_default_generator():
  rows = addresses(4)
  usual = np.asarray(noise(np.uint32(3), np.int32(1), np.int32(9), *rows))
  with jax.default_prng_impl("rbg"):
    other = np.asarray(noise(np.uint32(3), np.int32(1), np.int32(9), *rows))
  np.testing.assert_array_equal(usual, other)


def test_uniforms_are_uniform_and_the_halves_independent():
  rows = addresses(1 << 16)
  high, low = np.asarray(noise(np.uint32(0), np.int32(1), np.int32(0), *rows))
  for half in (high, low):
    assert half.dtype == np.float32 and half.min() >= 0 and half.max() < 1
    np.testing.assert_array_equal(half * 2**24, np.floor(half * 2**24))
  table = np.histogram2d(high, low, bins=16, range=[[0, 1], [0, 1]])[0]
  statistic = ((table - 256) ** 2 / 256).sum()  # 255 degrees of freedom: 255 +- 23
  assert 150 < statistic < 370


def test_purposes_are_numbers_that_stay():
  assert {p.name: int(p) for p in Purpose} == {
    "ROLLOUT": 1,
    "EVALUATION": 2,
    "SHUFFLE": 3,
    "INIT": 4,
    "OUTCOME": 5,
  }


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1, np.int64(5), np.uint32(5)])
def test_good_seeds(seed):
  assert rng.check_seed(seed) == int(seed) and type(rng.check_seed(seed)) is int


@pytest.mark.parametrize(
  "seed", [-1, 2**32, 1.0, 0.5, float("nan"), float("inf"), True, None, "1", [1]]
)
def test_bad_seeds(seed):
  with pytest.raises(ConfigError, match="a seed is an integer") as error:
    rng.check_seed(seed)
  assert isinstance(error.value, RlftError)


def test_no_two_streams_of_the_host_coincide():
  """numpy takes [s, 3, e] and [s, 3, e, 0] for the same; purposes keep them apart."""
  arity = {
    rng.Stream.PROMPTS: 1, rng.Stream.MINIBATCHES: 2, rng.Stream.ROWS: 1,
    rng.Stream.BATCHES: 1, rng.Stream.BALANCE: 0,
  }  # fmt: skip
  seen = {}
  for purpose, count in arity.items():
    for index in itertools.product(range(12), repeat=count):
      drawn = tuple(rng.numpy(7, purpose, *index).integers(0, 2**62, 2).tolist())
      assert drawn not in seen, (purpose, index, seen[drawn])
      seen[drawn] = purpose, index


def test_every_host_stream_of_a_run_has_a_purpose():
  """Seeded from a list of its own, it could be another's."""
  for path in pathlib.Path(rng.__file__).parents[1].rglob("*.py"):
    assert path.name == "rng.py" or "default_rng([" not in path.read_text(), path

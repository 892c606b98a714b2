"""The mesh: sizes that fit, logical axes to mesh axes, and what is not divisible."""

from __future__ import annotations

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from rlft.core import hosts
from rlft.core import mesh as meshes
from rlft.core.errors import ConfigError
from rlft.core.hosts import share_of


@pytest.mark.parametrize(
  ("sizes", "shape"),
  [
    ({}, (8, 1, 1)),
    ({"tensor": 2}, (4, 1, 2)),
    ({"data": 2, "fsdp": -1}, (2, 4, 1)),
    ({"data": 1, "fsdp": 2, "tensor": -1}, (1, 2, 4)),
    ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 2)),
  ],
)
def test_sizes(sizes, shape):
  mesh = meshes.make_mesh(**sizes)
  assert mesh.axis_names == ("data", "fsdp", "tensor")
  assert tuple(mesh.shape.values()) == shape
  assert meshes.batch_shards(mesh) == shape[0] * shape[1]
  assert sorted(d.id for d in mesh.devices.flat) == list(range(8))


def test_some_of_the_devices():
  mesh = meshes.make_mesh(devices=jax.devices()[3:5])
  assert [d.id for d in mesh.devices.flat] == [3, 4]


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    ({"data": -1, "fsdp": -1}, "at most one may be -1"),
    ({"data": 0}, "must be positive"),
    ({"data": -2}, "must be positive"),
    ({"tensor": 3}, "8 devices cannot be divided into groups of 3"),
    ({"data": 2, "fsdp": 2}, "multiply to 4, but there are 8 devices"),
    ({"data": 16}, "multiply to 16"),
  ],
)
def test_sizes_that_do_not_fit(sizes, message):
  with pytest.raises(ConfigError, match=message):
    meshes.make_mesh(**sizes)


def specs(mesh, axes, shape, **rules):
  """The partition, as long as the shape."""
  parts = tuple(meshes.partition_spec(mesh, axes, shape, **rules))
  return parts + (None,) * (len(shape) - len(parts))


def test_logical_axes():
  mesh = meshes.make_mesh(2, 2, 2)
  assert specs(mesh, ("vocab", "embed"), (10, 4)) == ("tensor", "fsdp")
  assert specs(mesh, ("batch", None), (8, 5)) == (("data", "fsdp"), None)
  assert specs(mesh, ("layers", "embed", "mlp"), (3, 4, 6)) == (None, "fsdp", "tensor")
  assert specs(mesh, (), ()) == ()
  with pytest.raises(ValueError, match="do not fit the shape"):
    meshes.partition_spec(mesh, ("embed",), (4, 4))


def test_what_does_not_divide_is_copied():
  mesh = meshes.make_mesh(2, 2, 2)
  assert specs(mesh, ("vocab", "embed"), (11, 4)) == (None, "fsdp")
  assert specs(mesh, ("batch", None), (6, 5)) == (None, None)


def test_rollout_rules_gather_nothing_for_a_token():
  mesh = meshes.make_mesh(2, 2, 2)
  rules = meshes.ROLLOUT_RULES
  assert specs(mesh, ("embed", "mlp"), (4, 4), rules=rules) == (None, "tensor")
  assert not any(names == "fsdp" for names in rules.values())


def test_every_rule_names_axes_of_the_mesh():
  for names in {**meshes.RULES, **meshes.ROLLOUT_RULES}.values():
    names = (names,) if isinstance(names, str) else names or ()
    assert set(names) <= set(meshes.AXES)


def test_constrain():
  x = jnp.arange(32.0).reshape(8, 4)
  mesh = meshes.make_mesh(2, 2, 2)
  pinned = jax.jit(lambda x: meshes.constrain(x, mesh, ("batch", "act_mlp")))(x)
  assert {s.data.shape for s in pinned.addressable_shards} == {(2, 2)}
  np.testing.assert_array_equal(np.asarray(pinned), x)
  assert meshes.constrain(x, None, ("batch", None)) is x
  one = meshes.make_mesh(devices=jax.devices()[:1])
  assert meshes.constrain(x, one, ("batch", None)) is x


def test_trees():
  mesh = meshes.make_mesh(1, 4, 2)
  shapes = {"a": {"kernel": np.zeros((8, 6))}, "scale": np.zeros((8,))}
  axes = {"a": {"kernel": ("embed", "mlp")}, "scale": (None,)}
  put = jax.device_put(shapes, meshes.tree_shardings(mesh, axes, shapes))
  assert put["a"]["kernel"].addressable_shards[0].data.shape == (2, 3)
  assert put["scale"].addressable_shards[0].data.shape == (8,)
  whole = jax.device_put(np.zeros((8, 6)), meshes.replicated(mesh))
  assert whole.sharding.spec == PartitionSpec() and whole.is_fully_replicated


@dataclasses.dataclass(frozen=True)
class Chip:
  """A device of a pod that is not there: hosts hold 2 x 2 chips of a 4 x 4 torus."""

  id: int
  process_index: int
  slice_index: int = 0


def pod(slices=1):
  host = lambda i: i // 16 * 4 + i % 16 // 8 * 2 + i % 4 // 2
  return [Chip(i, host(i), i // 16) for i in range(16 * slices)]


@pytest.mark.parametrize("sizes", [(16, 1, 1), (4, 4, 1), (2, 4, 2), (1, 4, 4)])
def test_the_rows_of_a_mesh_lie_on_whole_hosts(sizes):
  """In the order of the torus a host would hold rows 0, 1, 4 and 5 of 16."""
  devices = pod()
  assert [d.process_index for d in devices[:8]] == [0, 0, 1, 1, 0, 0, 1, 1]
  mesh = meshes.make_mesh(*sizes, devices=devices)
  hosts = [d.process_index for d in mesh.devices.flat]
  assert hosts == sorted(hosts) and set(map(hosts.count, hosts)) == {4}
  assert share_of(mesh, 1).index == 1 and share_of(mesh, 1).of == 4


def test_slices_lie_along_data():
  devices = pod(slices=2)[::-1]
  mesh = meshes.make_mesh(4, 2, 4, devices=devices)
  slices = np.vectorize(lambda d: d.slice_index)(mesh.devices)
  assert slices.shape == (4, 2, 4)
  assert (slices[:2] == 0).all() and (slices[2:] == 1).all()
  with pytest.raises(ConfigError, match=r"on 2 slices.*multiple of 2"):
    meshes.make_mesh(1, 8, 4, devices=devices)


def test_fewest_shards_that_fit():
  assert meshes.fewest_shards(100, 100, 8) == 1
  assert meshes.fewest_shards(101, 100, 8) == 2
  assert meshes.fewest_shards(390, 100, 8) == 4
  assert meshes.fewest_shards(390, 100, 6) == 6  # 4 does not divide it
  assert meshes.fewest_shards(9999, 100, 8) == 8  # even those do not fit


@pytest.mark.parametrize(
  ("platform", "kind", "chips", "asked", "alone"),
  [
    ("cpu", "cpu", 4, "", True),
    ("tpu", "TPU v5", 4, "", True),
    ("tpu", "TPU v4", 4, "together", False),
    ("tpu", "TPU v5 lite", 4, "", False),  # its compiler refuses 4 of 256 chips
    ("tpu", "TPU v5 lite", 1, "", True),
    ("tpu", "TPU v6 lite", 8, "", False),
  ],
)
def test_which_hosts_can_sample_alone(monkeypatch, platform, kind, chips, asked, alone):
  devices = np.full((chips, 1, 1), mock.Mock(platform=platform, device_kind=kind))
  part = hosts.Share(0, 2, (0, 1), mock.Mock(devices=devices, size=chips))
  monkeypatch.setattr(hosts, "several", lambda: True)
  monkeypatch.setattr(hosts, "share", lambda mesh: part)
  monkeypatch.setenv("RLFT_ROLLOUTS", asked)
  assert hosts.alone(None) is alone

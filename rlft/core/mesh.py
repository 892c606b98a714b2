"""One mesh for every model: axes, logical-axis rules, and where arrays live.

Parameters and activations carry logical axis names ("embed", "heads", ...); one table
maps them to the mesh axes ("data", "fsdp", "tensor"). `data` copies the parameters,
`fsdp` shards them and gathers a layer at a time, `tensor` shards the computation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlft.core.errors import ConfigError

AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axis. A logical axis that is not listed is not sharded.
RULES: Mapping[str, Any] = {
  # parameters
  "vocab": "tensor",
  "embed": "fsdp",
  "heads": "tensor",
  "kv_heads": "tensor",
  "mlp": "tensor",
  # activations
  "batch": ("data", "fsdp"),
  "act_heads": "tensor",
  "act_mlp": "tensor",
}

# While decoding, weights that are sharded over fsdp would be gathered for every token:
# the rollout layout keeps tensor parallelism and copies the rest.
ROLLOUT_RULES: Mapping[str, Any] = {**RULES, "embed": None}


def make_mesh(
  data: int = -1,
  fsdp: int = 1,
  tensor: int = 1,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """Builds the mesh ("data", "fsdp", "tensor").

  Args:
    data: copies of the parameters; -1 takes the devices that the others leave.
    fsdp: shards of the parameters, gathered a layer at a time.
    tensor: shards of heads, MLP and vocabulary.
    devices: the devices to use; all of them when None.

  Returns:
    The mesh; `data * fsdp * tensor` equals the number of devices. Slices lie along
    data; the devices of a host lie side by side, so that it holds whole rows.

  Raises:
    ConfigError: the sizes do not multiply to the number of devices, or the slices do
      not divide data.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
  unknown = [name for name, size in sizes.items() if size == -1]
  if len(unknown) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
    raise ConfigError(
      f"mesh sizes {sizes}: each must be positive, and at most one may be -1"
    )
  known = math.prod(size for size in sizes.values() if size != -1)
  if unknown:
    if len(devices) % known:
      raise ConfigError(
        f"{len(devices)} devices cannot be divided into groups of {known} "
        f"(mesh sizes {sizes}); choose sizes whose product divides {len(devices)}"
      )
    sizes[unknown[0]] = len(devices) // known
  if math.prod(sizes.values()) != len(devices):
    raise ConfigError(
      f"mesh sizes {sizes} multiply to {math.prod(sizes.values())}, but there are "
      f"{len(devices)} devices; set one of them to -1 to take what is left"
    )
  parts = slices(devices)
  if sizes["data"] % parts:
    raise ConfigError(
      f"mesh sizes {sizes} on {parts} slices: the network between slices is for data "
      f"alone, so data must be a multiple of {parts}"
    )
  shape = tuple(sizes[name] for name in AXES)
  kinds = (jax.sharding.AxisType.Auto,) * len(AXES)
  if len({device.process_index for device in devices}) > 1:
    # jax.make_mesh would lay a pod's rows along the axes of its torus, across hosts
    # that each hold 2 x 2 of its chips, and refuses shapes that do not follow them.
    place = lambda device: (_slice_of(device), device.process_index, device.id)
    grid = np.asarray(sorted(devices, key=place)).reshape(shape)
    return Mesh(grid, AXES, axis_types=kinds)
  return jax.make_mesh(shape, AXES, axis_types=kinds, devices=devices)


def _slice_of(device: jax.Device) -> int:
  return getattr(device, "slice_index", None) or 0


def fewest_shards(total: float, room: float, most: int) -> int:
  """The smallest divisor of `most` into which `total` can be cut to fit into `room`.

  For fsdp: what is sharded further than memory asks for is gathered from further away.

  Args:
    total: bytes to shard.
    room: bytes of a device.
    most: devices to shard over.

  Returns:
    The number of shards; `most` when even those do not fit (the run, or `rlft plan`,
    then says so).
  """
  divisors = [size for size in range(1, most + 1) if most % size == 0]
  return next((size for size in divisors if total / size <= room), most)


def slices(devices: Sequence[jax.Device]) -> int:
  """How many slices the devices are of, with a slower network between them."""
  return len({_slice_of(device) for device in devices})


def axis_size(mesh: Mesh | None, names: str | Sequence[str] | None) -> int:
  """Number of shards along one mesh axis or the product of several."""
  if mesh is None or names is None:
    return 1
  if isinstance(names, str):
    names = (names,)
  return math.prod(mesh.shape[name] for name in names)


def batch_shards(mesh: Mesh | None) -> int:
  """How many ways the batch axis is split; batch sizes are multiples of it."""
  return axis_size(mesh, RULES["batch"])


def partition_spec(
  mesh: Mesh,
  axes: Sequence[str | None],
  shape: Sequence[int],
  rules: Mapping[str, Any] = RULES,
) -> PartitionSpec:
  """The partition of an array with these logical axes.

  A dimension that its mesh axis does not divide is copied instead of sharded: a model
  with 3 key heads runs on a tensor axis of 2, with its key heads on both.
  """
  if len(axes) != len(shape):
    raise ValueError(f"logical axes {axes} do not fit the shape {tuple(shape)}")
  parts = []
  for axis, size in zip(axes, shape):
    names = rules.get(axis) if axis is not None else None
    names = (names,) if isinstance(names, str) else names or ()
    names = tuple(name for name in names if mesh.shape[name] > 1)
    sharded = names and size % axis_size(mesh, names) == 0
    parts.append((names if len(names) > 1 else names[0]) if sharded else None)
  # One spelling of each layout, the one in which jax gives results back: P(None) and
  # P("x") with one x mean P() and are not equal to it, and a train step that takes the
  # one and gives the other is compiled twice.
  while parts and parts[-1] is None:
    parts.pop()
  return PartitionSpec(*parts)


def sharding(
  mesh: Mesh,
  axes: Sequence[str | None],
  shape: Sequence[int],
  rules: Mapping[str, Any] = RULES,
) -> NamedSharding:
  """`partition_spec` as a sharding on the mesh."""
  return NamedSharding(mesh, partition_spec(mesh, axes, shape, rules))


def constrain(x: jax.Array, mesh: Mesh | None, axes: Sequence[str | None]) -> jax.Array:
  """Pins an activation to the layout of its logical axes; nothing without a mesh."""
  if mesh is None or mesh.size == 1:
    return x
  return jax.lax.with_sharding_constraint(x, sharding(mesh, axes, x.shape))


def tree_shardings(
  mesh: Mesh,
  axes_tree: Any,
  shapes_tree: Any,
  rules: Mapping[str, Any] = RULES,
) -> Any:
  """Shardings for a parameter tree.

  Args:
    mesh: the mesh.
    axes_tree: tree of tuples of logical axis names (see `models.decoder.param_axes`).
    shapes_tree: tree of arrays or `ShapeDtypeStruct` of the same structure.
    rules: logical axis -> mesh axis.

  Returns:
    Tree of `NamedSharding`.
  """
  return jax.tree.map(
    lambda leaf, axes: sharding(mesh, axes, leaf.shape, rules), shapes_tree, axes_tree
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """The layout of an array that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())

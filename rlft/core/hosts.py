"""Several processes, one run: who feeds which rows, and what they tell each other.

All processes run the same program over the same mesh. Rows (prompts, completions,
rewards) live where they were made: each process reads, samples and judges its share of
a batch, and only arrays on the mesh, or a few numbers a row, cross hosts.

With one process every function here gives back what it got.

Letters: B rows of a batch, b of them a process's own.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlft.core.errors import ConfigError, RlftError
from rlft.core.mesh import sharding

# Two processes that started 50 collective programs without waiting hung, 2 of 2 times:
# a device may run them in another order than its peer.
MOST_IN_FLIGHT = 2


def several() -> bool:
  """Whether this process is one of several."""
  return jax.process_count() > 1


def first() -> bool:
  """Whether this is the process that writes files and talks to people."""
  return jax.process_index() == 0


# ----------------------------------------------------------------------- the shares


@dataclasses.dataclass(frozen=True)
class Share:
  """A process's part of the batch.

  Attributes:
    index, of: it is the part `index` of `of` equal ones, in the order of the rows.
    leads: for each part, the first process that holds it: where the tensor axis is
      wider than a host, several hosts hold the same rows.
    mesh: of the devices that hold this part, of the same axes.
  """

  index: int
  of: int
  leads: tuple[int, ...]
  mesh: Mesh | None


def share(mesh: Mesh | None) -> Share:
  """This process's part of a batch on the mesh.

  Raises:
    ConfigError: processes hold unequal or interleaved parts: the mesh does not fit the
      hosts.
  """
  if not several():
    return Share(0, 1, (0,), mesh)
  if mesh is None:
    raise ConfigError("several processes train one model: they need a mesh")
  return share_of(mesh, jax.process_index())


@functools.lru_cache(maxsize=16)
def share_of(mesh: Mesh, process: int) -> Share:
  """The part of a process by its index, of a mesh whose devices need not be here."""
  grid = mesh.devices.reshape(-1, mesh.devices.shape[-1])  # [batch shards, tensor]
  rows: dict[int, list[int]] = {}
  for shard, devices in enumerate(grid):
    for held_by in sorted({device.process_index for device in devices}):
      rows.setdefault(held_by, []).append(shard)
  parts = sorted({tuple(shards) for shards in rows.values()})
  size = len(parts[0])
  equal = [tuple(range(i * size, (i + 1) * size)) for i in range(len(parts))]
  if parts != equal or size * len(parts) != len(grid) or process not in rows:
    raise ConfigError(
      f"a mesh of {dict(mesh.shape)} gives its processes the batch shards {rows}: each "
      "must hold as many as any other, side by side; let the size of the tensor axis "
      "divide the devices of a host, or be a multiple of them"
    )
  index = parts.index(tuple(rows[process]))
  leads = tuple(min(p for p in rows if tuple(rows[p]) == part) for part in parts)
  devices = grid[list(parts[index])]
  own = Mesh(
    devices.reshape(size, 1, devices.shape[1]), mesh.axis_names, mesh.axis_types
  )
  return Share(index, len(parts), leads, own)


# "On platforms with limited ICI routing" libtpu compiles for one chip or for all.
_ALL_OR_ONE = ("v5 lite", "v5e", "v6 lite", "v6e")


def alone(mesh: Mesh | None) -> bool:
  """Whether each process can run programs of its own on the devices of its part.

  Elsewhere rollouts run on the whole mesh, where every token waits for all hosts;
  RLFT_ROLLOUTS=together asks for it anywhere.
  """
  if not several():
    return True
  part = share(mesh).mesh
  if os.environ.get("RLFT_ROLLOUTS") == "together":
    return False
  device = part.devices.flat[0]
  limited = any(kind in device.device_kind.lower() for kind in _ALL_OR_ONE)
  return part.size == 1 or device.platform != "tpu" or not limited


def own_part(items: Sequence[Any], mesh: Mesh | None) -> Any:
  """This process's part of `items`, which are as many as can be shared equally."""
  part = share(mesh)
  if len(items) % part.of:
    raise ConfigError(
      f"{len(items)} rows cannot be shared equally by {part.of} parts of the hosts; "
      f"use a multiple of {part.of}"
    )
  size = len(items) // part.of
  return items[part.index * size : (part.index + 1) * size]


def own_evenly(items: Sequence[Any], mesh: Mesh | None) -> tuple[list[Any], int]:
  """This process's part of however many items, and how many of them are real.

  All parts are as long: where the number does not divide, the last item comes again at
  the end, for what a process makes of it and then drops.
  """
  part = share(mesh)
  size = -(-len(items) // part.of)
  first_own = part.index * size
  own = [items[min(i, len(items) - 1)] for i in range(first_own, first_own + size)]
  return own, min(size, max(0, len(items) - first_own))


# --------------------------------------------------------------- rows on the mesh


def place_own(batch: Any, mesh: Mesh | None) -> Any:
  """Puts rows on the mesh, each process its own part: [b, ...] to [B, ...].

  Args:
    batch: tree of host arrays [b, ...]; b is the same on all processes.
    mesh: rows lie over its batch axes; None puts them on jax's default device.
  """
  if mesh is None:
    return jax.device_put(batch)
  of = share(mesh).of

  def put(x):
    shape = (x.shape[0] * of, *x.shape[1:])
    where = sharding(mesh, ("batch",) + (None,) * (x.ndim - 1), shape)
    if not several():
      return jax.device_put(x, where)
    return jax.make_array_from_process_local_data(where, np.asarray(x), shape)

  return jax.tree.map(put, batch)


def own_rows(x: jax.Array, mesh: Mesh | None = None) -> np.ndarray:
  """The rows [b, ...] of an array [B, ...] that lie on this process's devices.

  Args:
    x: on the mesh; a number comes back as it is.
    mesh: rows are laid over its batch axes first, where a compiler may have chosen
      another layout; None takes them for laid so.
  """
  if x.is_fully_addressable or not x.ndim:
    return np.asarray(x)
  if mesh is not None:
    axes = ("batch",) + (None,) * (x.ndim - 1)
    x = jax.device_put(x, sharding(mesh, axes, x.shape))
  blocks = {}
  for shard in x.addressable_shards:
    blocks.setdefault(shard.index[0].indices(x.shape[0])[:2], shard.data)
  return np.concatenate([np.asarray(blocks[at]) for at in sorted(blocks)])


def spread(tree: Any, shardings: Any) -> Any:
  """Arrays laid out anew; host arrays must be the same on every process.

  Args:
    tree: of arrays.
    shardings: tree of shardings, or one for all.
  """

  def put(x, where):
    if where.is_fully_addressable or not getattr(x, "is_fully_addressable", True):
      return paced(jax.device_put(x, where))
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, where, lambda at: host[at])

  if isinstance(shardings, jax.sharding.Sharding):
    return jax.tree.map(lambda x: put(x, shardings), tree)
  return jax.tree.map(put, tree, shardings)


def put(tree: Any, mesh: Mesh | None) -> Any:
  """Small host values, whole on every device; a transfer that is asked for, where jit
  would make one by itself in every call."""
  if mesh is None:
    return jax.device_put(tree)
  return spread(tree, NamedSharding(mesh, PartitionSpec()))


def on_own_devices(tree: Any, mesh: Mesh) -> Any:
  """Arrays whose copies all processes have, as arrays of this process's part alone.

  Nothing is copied: the shards stay where they are, and what is computed from them
  waits for no other host.

  Args:
    tree: of arrays on `mesh` that are not sharded over its batch axes.
    mesh: the whole one.
  """
  part = share(mesh)
  if part.of == 1:
    return tree

  def take(x):
    where = NamedSharding(part.mesh, x.sharding.spec)
    held = {shard.device: shard.data for shard in x.addressable_shards}
    mine = [held[device] for device in where.addressable_devices_indices_map(x.shape)]
    return jax.make_array_from_single_device_arrays(x.shape, where, mine)

  return jax.tree.map(take, tree)


_flying: collections.deque = collections.deque()


def paced(result: Any) -> Any:
  """`result` of a program that was just started, once few enough are in flight.

  Args:
    result: whatever the program gave; it is not donated to the next one.
  """
  if several():
    _flying.append(jax.tree.leaves(result)[0])
    while len(_flying) > MOST_IN_FLIGHT - 1:
      jax.block_until_ready(_flying.popleft())
  return result


# ------------------------------------------------------------------ small messages


def together(rows: Any, mesh: Mesh | None) -> Any:
  """Numbers of each row, of all processes on every process: [b, ...] to [B, ...].

  For a few numbers a row, what a mean or a baseline needs; never for tokens.

  Args:
    rows: tree of host arrays [b, ...]; 64-bit numbers come back with 32 bits.
    mesh: decides the order.
  """
  if not several():
    return rows
  from jax.experimental import multihost_utils

  leads = list(share(mesh).leads)
  narrow = lambda x: np.asarray(x, np.float32 if x.dtype == np.float64 else None)
  rows = jax.tree.map(narrow, rows)
  gathered = multihost_utils.process_allgather(rows)  # [processes, b, ...]
  return jax.tree.map(lambda x: np.concatenate(np.asarray(x)[leads], axis=0), gathered)


def as_lead(rows: Any, mesh: Mesh | None) -> Any:
  """Own rows [b, ...] as the first process that holds them has them.

  Where several hosts hold the same rows each has judged them, and a judge need not say
  the same twice; what trains must be one.
  """
  part = share(mesh)
  if len(part.leads) == jax.process_count():
    return rows
  joined = together(rows, mesh)
  return jax.tree.map(lambda x: own_part(x, mesh), joined)


def everyone(value: Any) -> list[Any]:
  """A JSON value of every process, on every process, in their order.

  All processes must call it, in the same order.
  """
  if not several():
    return [value]
  from jax.experimental import multihost_utils

  data = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(data.size))
  size = 1 << int(sizes.max() - 1).bit_length()  # each size is another program
  rows = multihost_utils.process_allgather(np.pad(data, (0, size - data.size)))
  return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes)]


def each_part(value: Any, mesh: Mesh | None) -> list[Any]:
  """A JSON value of every part of the batch, in their order, on every process."""
  said = everyone(value)
  return [said[lead] for lead in share(mesh).leads]


def by_first(action: Callable[[], Any]) -> Any:
  """What `action` gives on process 0, on every process.

  Raises:
    RlftError: process 0 raised an error; without this the others would wait for ever.
  """
  if not several():
    return action()
  value = error = None
  if first():
    try:
      value = action()
    except Exception as raised:  # whatever it is, the others must be told
      error = raised
  value, text = everyone([value, None if error is None else str(error)])[0]
  if error is not None:
    raise error
  if text is not None:
    raise RlftError(f"process 0: {text}")
  return value

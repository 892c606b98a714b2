"""In how many parts an update takes its rows, where the settings leave it open.

The number changes memory and time, and no result but by rounding. It follows from the
shapes, the mesh and the kind of device alone, so that a run and its resume, all hosts,
and the plan of a run choose the same.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlft.core import hosts
from rlft.core.mesh import axis_size, batch_shards
from rlft.models import attention
from rlft.models.decoder import Decoder, DecoderConfig

# On a CPU a part should stay near the caches: 6 layers of width 256 and 32 rows of 192
# tokens take 6.8 s of CPU time in one part, 5.8 in four, 5.7 in eight, and temporaries
# of 1,527, 427 and 222 MiB. On an accelerator every part reads all weights again: as
# few as leave most of the memory to models.
CPU_TOKENS = 1024
SHARE = 0.35  # of an accelerator's memory, for what a part keeps for its gradient
GIB = 2**30
# Bytes of a chip that a program may use, by the kind that a device is of: those that
# a plan compiles for, where there is none to ask.
MEMORY = {
  "TPU v5 lite": 15.75 * GIB,
  "TPU v5": 95.73 * GIB,
  "TPU v6 lite": 31.24 * GIB,
}
_UNKNOWN = 16 * GIB  # of an accelerator that does not say


def micro_batches(rows: int, width: int, model: Decoder, memory: float | None) -> int:
  """The fewest equal parts that are small enough.

  Args:
    rows: of an update, over all shards of the mesh.
    width: T, tokens of a row; of a pair, those of both.
    model: gives the sizes, the computation's dtype, remat and the mesh.
    memory: see `device_memory`.

  Returns:
    A divisor of the rows of a shard; that many where even one row is too large.
  """
  shards = batch_shards(model.mesh)
  own = max(1, rows // shards)
  size, tensor = jnp.dtype(model.dtype).itemsize, axis_size(model.mesh, "tensor")
  config = model.config

  def fits(part: int) -> bool:
    if memory is None:
      return part * width <= CPU_TOKENS
    shape = part * shards, width, config.kv_heads, config.head_dim
    ordered = config.causal and not config.windows
    tiled = ordered and attention.kernel_fits(model.mesh, *shape)
    kept = kept_bytes(config, tensor, part, width, size, model.remat, tiled)
    return config.layers * kept <= SHARE * memory

  return next((m for m in range(1, own) if own % m == 0 and fits(own // m)), own)


def kept_bytes(
  config: DecoderConfig,
  tensor: int,
  rows: int,
  width: int,
  size: int,
  remat: str,
  tiled: bool,
) -> float:
  """What a layer keeps of a part for the backward pass, on a chip.

  Args:
    config: the architecture.
    tensor: shards of heads and MLP.
    rows, width: of the chip's part, [B, T].
    size: bytes of a number of the computation.
    remat: "none", "dots" or "full".
    tiled: by the attention kernel, which never holds all scores.
  """
  tokens, stream = rows * width, config.width
  query = config.heads * config.head_dim / tensor
  keys = config.kv_heads * config.head_dim / tensor
  hidden = config.mlp_width / tensor
  if remat == "full":
    return tokens * size * stream
  if remat == "dots":
    return tokens * size * (query + 2 * keys + 2 * hidden + 3 * stream)
  scores = 0.0 if tiled else score_bytes(config, tensor, rows, width, size)
  return inner_bytes(config, tensor, tokens, size) + scores + tokens * 4 * 2 * stream


def inner_bytes(config: DecoderConfig, tensor: int, tokens: int, size: int) -> float:
  """Activations inside a layer, but for attention scores."""
  heads = (2 * config.heads + 2 * config.kv_heads) * config.head_dim / tensor
  return tokens * size * (heads + 3 * config.mlp_width / tensor + 4 * config.width)


def score_bytes(
  config: DecoderConfig, tensor: int, rows: int, width: int, size: int
) -> float:
  """Attention scores of a layer, where plain products make them."""
  return rows * config.heads / tensor * width * width * (4 + size)


def device_memory(mesh: Mesh | None) -> float | None:
  """Bytes of a device, the same at every start and on all hosts; None of CPUs.

  All processes must call it, in the same order.
  """
  device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
  if device.platform == "cpu":
    return None
  if device.device_kind in MEMORY:
    return MEMORY[device.device_kind]
  stats = jax.local_devices(backend=device.platform)[0].memory_stats() or {}
  least = min(hosts.everyone(stats.get("bytes_limit") or _UNKNOWN))
  return max(least // GIB * GIB, 1.0)  # drivers differ by a few MB

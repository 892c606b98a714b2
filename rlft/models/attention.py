"""Attention of a call's tokens to each other: plain products, or a TPU's kernel.

Letters: B rows, T tokens, N key-value heads, G query heads of each, H head size.

The plain path holds [B, N, G, T, T] scores in float32; the kernel (jax's splash
attention) holds tiles of them in the chip's own memory. It is used on TPUs where it
fits, and nobody has to ask for it.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlft.core.mesh import axis_size, batch_shards, constrain, partition_spec
from rlft.models.cache import NEGATIVE

_TILES = (512, 256, 128)  # the kernel's blocks; tokens are a multiple of the last
_LANES = 128


def plain(
  q_BTNGH: jax.Array,
  k_BNTH: jax.Array,
  v_BNTH: jax.Array,
  mask_BTT: jax.Array,
  scale: float,
  softcap: float,
) -> jax.Array:
  """softmax(scale q k) v, where softcap c takes c * tanh(score / c) of scores.

  Args:
    q_BTNGH, k_BNTH, v_BNTH: queries, keys and values.
    mask_BTT: bool, what each token sees.
    scale: factor on the scores.
    softcap: 0 is off.

  Returns:
    [B, T, N, G, H], of the values' dtype.
  """
  scores = jnp.einsum(
    "btngh,bnsh->bngts", q_BTNGH, k_BNTH, preferred_element_type=jnp.float32
  )
  scores *= scale
  if softcap:
    scores = softcap * jnp.tanh(scores / softcap)
  scores = jnp.where(mask_BTT[:, None, None], scores, NEGATIVE)
  weights = jax.nn.softmax(scores, axis=-1).astype(v_BNTH.dtype)
  return jnp.einsum("bngts,bnsh->btngh", weights, v_BNTH)


def kernel_fits(
  mesh: Mesh | None, batch: int, length: int, kv_heads: int, head_dim: int
) -> bool:
  """Whether the kernel can be used: on a TPU, with whole tiles and whole shards.

  Args:
    mesh: its devices decide; None takes jax's default.
    batch, length: B and T.
    kv_heads, head_dim: N and H.
  """
  if mesh is None:
    platform = jax.default_backend()
  else:
    platform = next(iter(mesh.devices.flat)).platform
  return (
    platform == "tpu"
    and length % _TILES[-1] == 0
    and head_dim % _LANES == 0
    and batch % batch_shards(mesh) == 0
    and kv_heads % axis_size(mesh, "tensor") == 0
  )


def kernel(
  q_BTNGH: jax.Array,
  k_BNTH: jax.Array,
  v_BNTH: jax.Array,
  mask_BT: jax.Array,
  scale: float,
  softcap: float,
  mesh: Mesh | None,
  interpret: bool = False,
) -> jax.Array:
  """`plain` by splash attention, causal in the order of the tokens.

  Real tokens see real tokens alone; what stands under a pad means nothing, as there.

  Args:
    q_BTNGH, k_BNTH, v_BNTH, scale, softcap: as in `plain`.
    mask_BT: bool, real tokens; they lie in the order of their positions.
    mesh: rows lie over its batch axes, heads over its tensor axis; see `kernel_fits`.
    interpret: runs the kernel without a TPU, slowly; for tests.

  Returns:
    [B, T, N, G, H], of the values' dtype.

  Source: jax.experimental.pallas.ops.tpu.splash_attention.
  """
  attend = functools.partial(_own_rows, softcap=softcap, interpret=interpret)
  q_BNGTH = (q_BTNGH * jnp.asarray(scale, q_BTNGH.dtype)).transpose(0, 2, 3, 1, 4)
  arrays = q_BNGTH, k_BNTH, v_BNTH, mask_BT
  if mesh is not None and mesh.size > 1:
    # A kernel is opaque to the partitioner, which would gather all of its operands.
    axes = (
      ("batch", "act_heads", None, None, None),
      ("batch", "act_heads", None, None),
      ("batch", "act_heads", None, None),
      ("batch", None),
    )
    specs = tuple(partition_spec(mesh, a, x.shape) for a, x in zip(axes, arrays))
    arrays = tuple(constrain(x, mesh, a) for a, x in zip(axes, arrays))
    attend = jax.shard_map(
      attend, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False
    )
  return attend(*arrays).transpose(0, 3, 1, 2, 4)


def _own_rows(q_BNGTH, k_BNTH, v_BNTH, mask_BT, softcap: float, interpret: bool) -> Any:
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  _, kv_heads, groups, length, _ = q_BNGTH.shape
  tile = next(size for size in _TILES if length % size == 0)
  sizes = splash.BlockSizes(
    block_q=tile,
    block_kv=tile,
    block_kv_compute=tile,
    block_q_dkv=tile,
    block_kv_dkv=tile,
    block_kv_dkv_compute=tile,
    block_q_dq=tile,
    block_kv_dq=tile,
  )
  heads = [splash.CausalMask((length, length)) for _ in range(kv_heads * groups)]
  attend = splash.make_splash_mha(
    splash.MultiHeadMask(heads),
    block_sizes=sizes,
    attn_logits_soft_cap=softcap or None,
    head_shards=1,
    q_seq_shards=1,
    interpret=interpret,
  )

  def one(q_NGTH, k_NTH, v_NTH, mask_T):
    segment_T = mask_T.astype(jnp.int32)
    q_QTH = q_NGTH.reshape(kv_heads * groups, length, -1)
    out_QTH = attend(q_QTH, k_NTH, v_NTH, splash.SegmentIds(segment_T, segment_T))
    return out_QTH.reshape(q_NGTH.shape).astype(v_NTH.dtype)

  return jax.vmap(one)(q_BNGTH, k_BNTH, v_BNTH, mask_BT)

"""The decoder: one flax.linen transformer for every supported family.

What differs between families is configuration (norm, activation, positions, biases,
grouped keys, windows, soft-capping, residual layout); `models/families` translates.

Letters: B rows, T tokens, D width, E embedding width, N key-value heads, G query heads
per key-value head, H head size, F MLP width, V vocabulary, L layers, S slots.

Contract: `apply(params, tokens, positions, mask, cache) -> Output(hidden, kv, cache)`,
never logits: heads are functions on `hidden` (see `models.heads`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from rlft.core.errors import ConfigError
from rlft.core.mesh import constrain
from rlft.models import attention
from rlft.models import cache as kv_cache
from rlft.models.linear import Linear
from rlft.models.rope import (
  RopeScaling,
  longest_sample,
  rope_table,
  rotary_size,
  rotate,
)

Remat = Literal["none", "full", "dots"]


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """Architecture of a decoder; everything static, hashable.

  Attributes:
    vocab_size: V, rows of the embedding.
    width: D, size of the residual stream.
    layers: L.
    heads, kv_heads, head_dim: query heads, key-value heads, size of a head.
    mlp_width: F.
    max_positions: the longest sequence; rows of the table when positions are learned.
    norm: "rms" or "layer".
    norm_eps: added to the variance.
    norm_offset: added to the learned scale (1 in Gemma, which stores scale - 1).
    norm_placement: "pre" (before each sub-layer), "post" (after the residual sum, as
      in OPT-350m), "sandwich" (before and after each sub-layer, as in Gemma 2).
    parallel_residual: attention and MLP read the same input (GPT-NeoX).
    final_norm: whether a norm follows the last layer.
    activation: of the MLP; "gelu_tanh" is the tanh approximation.
    gated_mlp: down(act(gate(x)) * up(x)) instead of down(act(up(x))).
    qkv_bias, out_bias, mlp_bias: biases of the linear layers.
    qk_norm: RMS norm on each head's queries and keys (Qwen3, Gemma 3).
    positions: "rope" or "learned".
    position_offset: added to positions before the table (2 in OPT).
    rope_theta, rope_fraction, rope_scaling: rotary base, share of the head that is
      rotated, stretch.
    local_rope_theta: another base, unscaled, for layers with a window (Gemma 3).
    windows: for each layer 0 (global) or how many positions a token sees, itself
      included; empty means all global.
    attention_softcap, final_softcap: 0, or c in c * tanh(x / c).
    attention_scale: factor on scores; None is head_dim ** -0.5.
    embed_scale: factor on embeddings (sqrt(D) in Gemma).
    embed_width: E when it differs from D, with projections in and out (OPT-350m).
    tie_embeddings: whether the output matrix is the embedding.
    causal: False lets every token see every other one (encoders).
  """

  vocab_size: int
  width: int
  layers: int
  heads: int
  kv_heads: int
  head_dim: int
  mlp_width: int
  max_positions: int
  norm: Literal["rms", "layer"] = "rms"
  norm_eps: float = 1e-6
  norm_offset: float = 0.0
  norm_placement: Literal["pre", "post", "sandwich"] = "pre"
  parallel_residual: bool = False
  final_norm: bool = True
  activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
  gated_mlp: bool = True
  qkv_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  qk_norm: bool = False
  positions: Literal["rope", "learned"] = "rope"
  position_offset: int = 0
  rope_theta: float = 10000.0
  rope_fraction: float = 1.0
  rope_scaling: RopeScaling | None = None
  local_rope_theta: float | None = None
  windows: tuple[int, ...] = ()
  attention_softcap: float = 0.0
  final_softcap: float = 0.0
  attention_scale: float | None = None
  embed_scale: float = 1.0
  embed_width: int | None = None
  tie_embeddings: bool = True
  causal: bool = True

  def __post_init__(self):
    if self.heads % self.kv_heads:
      raise ConfigError(
        f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}"
      )
    if self.windows and len(self.windows) != self.layers:
      raise ConfigError(
        f"windows has {len(self.windows)} entries for layers={self.layers}; "
        "give one for each layer (0 = global), or none"
      )
    if self.parallel_residual and self.norm_placement != "pre":
      raise ConfigError("parallel_residual needs norm_placement='pre'")

  @property
  def output_width(self) -> int:
    """Size of the last axis of `hidden`: E where embeddings are projected, else D."""
    return self.embed_width or self.width

  def longest_sample(self, prompt: int) -> int:
    """How many tokens a row may have in all that is sampled after a prompt."""
    return longest_sample(prompt, self.max_positions, self.rope_scaling)

  @property
  def score_scale(self) -> float:
    return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale


@struct.dataclass
class Output:
  """What the trunk returns.

  Attributes:
    hidden: [B, T, E], after the final norm.
    kv: (k, v) of this call's tokens for all layers, [L, B, N, T, H] each or tuples of
      L arrays, when asked for; else None.
    cache: the cache with the token written, when one was given; else None.
  """

  hidden: jax.Array
  kv: Any = None
  cache: Any = None


@struct.dataclass
class _Context:
  """What all layers read: masks and rotary tables, computed once."""

  mask_BT: jax.Array
  mask_BTT: jax.Array | None
  distance_BTT: jax.Array | None
  rope: Any  # (cos, sin) [B, T, R] float32, or None
  local_rope: Any


def positions_from_mask(mask_BT: jax.Array) -> jax.Array:
  """Position of each real token: the number of real tokens before it."""
  return jnp.maximum(jnp.cumsum(mask_BT.astype(jnp.int32), axis=1) - 1, 0)


_ACTIVATIONS = {
  "silu": jax.nn.silu,
  "relu": jax.nn.relu,
  "gelu": lambda x: jax.nn.gelu(x, approximate=False),
  "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


class Norm(nn.Module):
  """RMS or layer normalisation in float32, returned in `dtype`."""

  config: DecoderConfig
  dtype: Any
  kind: str | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    config = self.config
    start = nn.initializers.constant(1.0 - config.norm_offset)
    scale = self.param(
      "scale",
      nn.with_logical_partitioning(start, (None,)),
      (x.shape[-1],),
      jnp.float32,
    )
    x32 = x.astype(jnp.float32)
    kind = self.kind or config.norm
    if kind == "layer":
      x32 -= jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    y = x32 * jax.lax.rsqrt(variance + config.norm_eps)
    y *= scale.astype(jnp.float32) + config.norm_offset
    if kind == "layer":
      zeros = nn.with_logical_partitioning(nn.initializers.zeros, (None,))
      y += self.param("bias", zeros, (x.shape[-1],), jnp.float32).astype(jnp.float32)
    return y.astype(self.dtype)


class Attention(nn.Module):
  """Grouped-query attention, over the call's own tokens or over a cache."""

  config: DecoderConfig
  dtype: Any
  mesh: Mesh | None
  lora_scale: float

  @nn.compact
  def __call__(self, x_BTD, context: _Context, window, layer, cache):
    config = self.config
    batch, length = x_BTD.shape[:2]
    groups = config.heads // config.kv_heads
    linear = functools.partial(Linear, dtype=self.dtype, lora_scale=self.lora_scale)

    def project(name, heads, axis):
      width = heads * config.head_dim
      y = linear(width, ("embed", axis), config.qkv_bias, name=name)(x_BTD)
      return y.reshape(batch, length, heads, config.head_dim)

    q = project("q", config.heads, "heads")
    k = project("k", config.kv_heads, "kv_heads")
    v = project("v", config.kv_heads, "kv_heads")
    if config.qk_norm:
      q = Norm(config, self.dtype, kind="rms", name="q_norm")(q)
      k = Norm(config, self.dtype, kind="rms", name="k_norm")(k)
    if context.rope is not None:
      table = context.rope
      if context.local_rope is not None:
        choose = lambda near, far: jnp.where(jnp.asarray(window) > 0, near, far)
        table = jax.tree.map(choose, context.local_rope, table)
      q, k = rotate(q, table), rotate(k, table)

    q_BTNGH = q.reshape(batch, length, config.kv_heads, groups, config.head_dim)
    if cache is not None:
      cache = kv_cache.write(cache, layer, k[:, 0], v[:, 0])
      out = kv_cache.attend(
        cache,
        layer,
        q_BTNGH[:, 0],
        window,
        config.score_scale,
        config.attention_softcap,
      )
      out = out[:, None]
    else:
      axes = ("batch", "act_heads", None, None)
      k_BNTH = constrain(k.transpose(0, 2, 1, 3), self.mesh, axes)
      v_BNTH = constrain(v.transpose(0, 2, 1, 3), self.mesh, axes)
      score = config.score_scale, config.attention_softcap
      shape = batch, length, config.kv_heads, config.head_dim
      ordered = config.causal and not config.windows
      if ordered and attention.kernel_fits(self.mesh, *shape):
        out = attention.kernel(
          q_BTNGH, k_BNTH, v_BNTH, context.mask_BT, *score, self.mesh
        )
      else:
        mask_BTT = context.mask_BTT
        if config.windows:
          mask_BTT &= (context.distance_BTT < window) | (jnp.asarray(window) == 0)
        out = attention.plain(q_BTNGH, k_BNTH, v_BNTH, mask_BTT, *score)
    out = out.astype(self.dtype).reshape(batch, length, config.heads * config.head_dim)
    out = constrain(out, self.mesh, ("batch", None, "act_heads"))
    scale = 0.02 / math.sqrt(2 * config.layers)
    axes = ("heads", "embed")
    y = linear(config.width, axes, config.out_bias, init_scale=scale, name="o")(out)
    kv = None if cache is not None else (k_BNTH, v_BNTH)
    return y, kv, cache


class MLP(nn.Module):
  """down(act(gate(x)) * up(x)), or down(act(up(x))) without a gate."""

  config: DecoderConfig
  dtype: Any
  mesh: Mesh | None
  lora_scale: float

  @nn.compact
  def __call__(self, x_BTD):
    config = self.config
    bias, axes = config.mlp_bias, ("embed", "mlp")
    act = _ACTIVATIONS[config.activation]
    linear = functools.partial(
      Linear, use_bias=bias, dtype=self.dtype, lora_scale=self.lora_scale
    )
    up = linear(config.mlp_width, axes, name="up")(x_BTD)
    if config.gated_mlp:
      gate = linear(config.mlp_width, axes, name="gate")(x_BTD)
      h = act(gate) * up
    else:
      h = act(up)
    h = constrain(h, self.mesh, ("batch", None, "act_mlp"))
    scale = 0.02 / math.sqrt(2 * config.layers)
    axes = ("mlp", "embed")
    return linear(config.width, axes, init_scale=scale, name="down")(h)


class Layer(nn.Module):
  """One transformer layer; its carry is (residual stream, cache)."""

  config: DecoderConfig
  dtype: Any
  mesh: Mesh | None
  lora_scale: float
  return_kv: bool

  @nn.compact
  def __call__(self, carry, per_layer, context: _Context):
    x, cache = carry
    window, layer = per_layer
    config = self.config
    norm = lambda name: Norm(config, self.dtype, name=name)
    shared = (config, self.dtype, self.mesh, self.lora_scale)
    attend = Attention(*shared, name="attention")
    mlp = MLP(*shared, name="mlp")
    placement = config.norm_placement

    h = x if placement == "post" else norm("attention_norm")(x)
    y, kv, cache = attend(h, context, window, layer, cache)
    if config.parallel_residual:
      x = x + y + mlp(norm("mlp_norm")(x))
    elif placement == "pre":
      x = x + y
      x = x + mlp(norm("mlp_norm")(x))
    elif placement == "sandwich":
      x = x + norm("post_attention_norm")(y)
      x = x + norm("post_mlp_norm")(mlp(norm("mlp_norm")(x)))
    else:
      x = norm("attention_norm")(x + y)
      x = norm("mlp_norm")(x + mlp(x))
    x = constrain(x, self.mesh, ("batch", None, None))
    return (x, cache), kv if self.return_kv else None


_REMAT_POLICIES = {
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Decoder(nn.Module):
  """Embedding, layers, final norm.

  Attributes:
    config: the architecture.
    dtype: of the computation; parameters keep their own.
    scan: True keeps layers stacked [L, ...] and scans them (one compiled layer);
      False unrolls them with parameters `layer_0`, `layer_1`, ... (see
      `unstack_layers`).
    remat: what the backward pass recomputes: "none", "full" (each layer), "dots"
      (everything but matrix products).
    mesh: where activations are pinned; None on one device.
    lora_scale: factor on what the collection "lora" adds (see `models.lora`).
  """

  config: DecoderConfig
  dtype: Any = jnp.float32
  scan: bool = True
  remat: Remat = "none"
  mesh: Mesh | None = None
  lora_scale: float = 1.0

  @nn.compact
  def __call__(self, tokens, positions, mask, cache=None, return_kv: bool = False):
    """Runs the trunk.

    Args:
      tokens: int32 [B, T]; any id may lie under a pad.
      positions: int32 [B, T], see `positions_from_mask`.
      mask: bool [B, T], True on real tokens; ignored with a cache.
      cache: None, or a `Cache`: T is 1, and the token is written at the row's cursor
        (the caller advances the cursor).
      return_kv: whether `Output.kv` is wanted (prefill).

    Returns:
      `Output`.
    """
    config = self.config
    width = config.output_width
    embedding = self.param(
      "embedding",
      nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed")),
      (config.vocab_size, width),
      jnp.float32,
    )
    # Gathered over fsdp as any weight is. Else rows come out split by width, and XLA
    # copies the activations to every device to split them by batch (and says so).
    table_VE = constrain(embedding, self.mesh, ("vocab", None))
    x = jnp.take(table_VE, tokens, axis=0).astype(self.dtype)
    if config.embed_scale != 1.0:
      x *= jnp.asarray(config.embed_scale, self.dtype)
    linear = functools.partial(
      Linear, use_bias=False, dtype=self.dtype, lora_scale=self.lora_scale
    )
    if config.embed_width:
      x = linear(config.width, (None, "embed"), name="project_in")(x)
    if config.positions == "learned":
      table = self.param(
        "position_embedding",
        nn.with_logical_partitioning(nn.initializers.normal(0.02), (None, "embed")),
        (config.max_positions + config.position_offset, config.width),
        jnp.float32,
      )
      at = positions + config.position_offset
      # A row that has ended at the last position steps past the table until its slot
      # is refilled; the NaN that `take` fills in would stay in the cache's slot.
      x += jnp.take(table, at, axis=0, mode="clip").astype(self.dtype)
    x = constrain(x, self.mesh, ("batch", None, None))

    context = self._context(positions, mask, cache)
    windows = config.windows or (0,) * config.layers
    block = Layer
    if self.remat != "none":
      block = nn.remat(
        Layer, policy=_REMAT_POLICIES[self.remat], prevent_cse=not self.scan
      )
    attributes = (config, self.dtype, self.mesh, self.lora_scale, return_kv)
    if self.scan:
      per_layer = (jnp.asarray(windows, jnp.int32), jnp.arange(config.layers))
      layers = nn.scan(
        block,
        variable_axes={"params": 0, "lora": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast),
        length=config.layers,
        unroll=self._unroll(),
        metadata_params={nn.PARTITION_NAME: "layers"},
      )(*attributes, name="layers")
      (x, cache), kv = layers((x, cache), per_layer, context)
    else:
      kv = []
      for i in range(config.layers):
        layer = block(*attributes, name=f"layer_{i}")
        (x, cache), layer_kv = layer((x, cache), (windows[i], i), context)
        kv.append(layer_kv)
      kv = tuple(zip(*kv)) if return_kv else None
    if config.final_norm:
      x = Norm(config, self.dtype, name="final_norm")(x)
    if config.embed_width:
      x = linear(width, ("embed", None), name="project_out")(x)
    if not config.tie_embeddings:
      # Declared here so that one tree holds the model; used by `models.heads`.
      init = nn.with_logical_partitioning(
        nn.initializers.normal(0.02), ("embed", "vocab")
      )
      self.param("head", init, (width, config.vocab_size), jnp.float32)
    return Output(hidden=x, kv=kv, cache=cache)

  def _unroll(self) -> int:
    """How many layers a turn of the scan holds.

    On a CPU several: with one, each turn copies its residuals into stacks that begin as
    zeros, 15 % of a train step at 6 layers; compilation bounds how many. Remat relies
    on the loop, which keeps the compiler from merging both forward passes.
    """
    devices = self.mesh.devices.flat if self.mesh is not None else ()
    platform = next((d.platform for d in devices), jax.default_backend())
    many = platform == "cpu" and self.remat == "none"
    return min(8, self.config.layers) if many else 1

  def _context(self, positions_BT, mask_BT, cache) -> _Context:
    config = self.config
    mask = distance = None
    if cache is None:
      distance = positions_BT[:, :, None] - positions_BT[:, None, :]
      mask = jnp.broadcast_to(mask_BT[:, None, :], distance.shape)
      if config.causal:
        mask &= distance >= 0
    rope = local = None
    if config.positions == "rope":
      # A row that is sampled is as long as its prompt: see `models.rope`.
      lengths_B = mask_BT.sum(-1) if cache is None else cache.start_B
      dim = rotary_size(config.head_dim, config.rope_fraction)
      where = positions_BT, lengths_B
      rope = rope_table(dim, config.rope_theta, config.rope_scaling, *where)
      if config.local_rope_theta is not None:
        local = rope_table(dim, config.local_rope_theta, None, *where)
    if cache is not None:
      # Else the CPU compiler makes sines and cosines again inside every layer.
      rope, local = jax.lax.optimization_barrier((rope, local))
    return _Context(mask_BT, mask, distance, rope, local)


def init_params(model: Decoder, key: jax.Array) -> dict:
  """Random float32 parameters, a plain nested dict."""
  return nn.unbox(_init(model, key))["params"]


def _init(model: Decoder, key):
  tokens = jnp.zeros((1, 2), jnp.int32)
  return model.init(key, tokens, tokens, jnp.ones((1, 2), bool))


def param_shapes(model: Decoder) -> dict:
  """Shapes and dtypes of the parameters, without making them."""
  return nn.unbox(_abstract(model))["params"]


def param_axes(model: Decoder) -> dict:
  """Logical axis names of every parameter: a tree of tuples like `param_shapes`."""
  return jax.tree.map(
    lambda box: tuple(box.names) if isinstance(box, nn.Partitioned) else (),
    _abstract(model)["params"],
    is_leaf=lambda x: isinstance(x, nn.Partitioned),
  )


def _abstract(model: Decoder):
  # Without a mesh: a constraint cannot be placed while shapes are all there is.
  bare = model.clone(mesh=None)
  return jax.eval_shape(lambda: _init(bare, jax.random.key(0)))


def unstack_layers(params: dict, layers: int) -> dict:
  """Parameters of a scanned model as those of an unrolled one (`scan=False`)."""
  out = {name: leaf for name, leaf in params.items() if name != "layers"}
  for i in range(layers):
    out[f"layer_{i}"] = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
  return out


def stack_layers(params: dict, layers: int) -> dict:
  """The reverse of `unstack_layers`."""
  out = {k: v for k, v in params.items() if not k.startswith("layer_")}
  each = [params[f"layer_{i}"] for i in range(layers)]
  out["layers"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
  return out

"""Models, states and batches as abstract shapes: `ShapeDtypeStruct`s with shardings.

They lie where a run's arrays lie; nothing is allocated.

Letters: B rows, C completion columns, P prompt columns, S slots, K samples.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from rlft.core.mesh import (
  ROLLOUT_RULES,
  RULES,
  replicated,
  sharding,
  tree_shardings,
)
from rlft.models.decoder import Decoder, DecoderConfig, param_axes, param_shapes
from rlft.models.lora import LoRAConfig, init_lora, lora_axes
from rlft.sampling import decode as device
from rlft.sampling.generate import EOS_BUCKET
from rlft.sampling.logits import Sampling
from rlft.training.optimizer import OptimizerConfig, make_optimizer
from rlft.training.step import TrainState

Shape = jax.ShapeDtypeStruct


def chip_bytes(tree: Any) -> int:
  """Bytes of one chip's shards of a tree of shapes with shardings."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


def put(mesh: Mesh, shape: tuple[int, ...], dtype: Any) -> Shape:
  """Small host values as `hosts.put` lays them: whole on every device."""
  return Shape(shape, dtype, sharding=replicated(mesh))


def scalar(mesh: Mesh, dtype: Any) -> Shape:
  """A number that the host passes."""
  return put(mesh, (), dtype)


@dataclasses.dataclass(frozen=True)
class Shapes:
  """Makes abstract arrays on a mesh."""

  mesh: Mesh

  def at(self, tree: Any, layout: Any, dtype: Any = None) -> Any:
    """A tree of shapes with the shardings of `layout`, in another dtype if given."""
    return jax.tree.map(
      lambda x, home: Shape(x.shape, dtype or x.dtype, sharding=home), tree, layout
    )

  def whole(self, tree: Any) -> Any:
    """Copied to every chip."""
    return self.at(tree, jax.tree.map(lambda _: replicated(self.mesh), tree))

  def rows(self, *shape: int, dtype: Any = jnp.int32) -> Shape:
    """An array whose first axis is the batch."""
    axes = ("batch",) + (None,) * (len(shape) - 1)
    if 0 in shape:  # jax gives what has no elements back whole
      axes = (None,) * len(shape)
    return Shape(shape, dtype, sharding=sharding(self.mesh, axes, shape))

  def params(self, model: Decoder, dtype: Any, rollout: bool = False) -> dict:
    """Parameters of a decoder, where training or the rollout has them."""
    shapes = param_shapes(model)
    rules = ROLLOUT_RULES if rollout else RULES
    layout = tree_shardings(self.mesh, param_axes(model), shapes, rules)
    return self.at(shapes, layout, dtype)

  def scalar_model(self, model: Decoder, dtype: Any) -> tuple[Decoder, dict]:
    """A value or reward model on such a trunk, and its parameters."""
    config = dataclasses.replace(model.config, tie_embeddings=True)
    model = model.clone(config=config)
    return model, {"trunk": self.params(model, dtype), "head": self.head(config)}

  def head(self, config: DecoderConfig) -> dict:
    """A scalar head."""
    kernel = Shape((config.output_width,), jnp.float32)
    return self.whole({"kernel": kernel, "bias": Shape((), jnp.float32)})

  def lora(self, model: Decoder, params: dict, config: LoRAConfig) -> dict:
    """Adapters."""
    bare, key = model.clone(mesh=None), jax.random.key(0)
    shapes = jax.eval_shape(lambda p: init_lora(bare, p, config, key), params)
    layout = tree_shardings(self.mesh, lora_axes(model, shapes), shapes)
    return self.at(shapes, layout)

  def state(self, params: Any, optimizer: OptimizerConfig) -> TrainState:
    """What `training.step.init_state` makes: float32 masters and their moments."""
    layout = jax.tree.map(lambda x: x.sharding, params)
    masters = self.at(params, layout, jnp.float32)
    adam, home = make_optimizer(optimizer), replicated(self.mesh)
    moments = optax.tree.map_params(
      adam,
      lambda x, like: Shape(x.shape, x.dtype, sharding=like.sharding),
      jax.eval_shape(adam.init, masters),
      masters,
      transform_non_params=lambda x: Shape(x.shape, x.dtype, sharding=home),
    )
    count = Shape((), jnp.int32, sharding=home)
    return TrainState(masters, moments, count, count)

  def decode_state(
    self, model: Decoder, slots: int, samples: int, prompt: int, completion: int
  ) -> device.DecodeState:
    """The sampler's state, sharded as `sampling.decode` keeps it."""
    bare = model.clone(mesh=None)
    state = jax.eval_shape(
      lambda: device.empty_state(bare, slots, samples, prompt, completion, 0)
    )
    lead = (None,) if model.scan else ()
    axes = (*lead, "batch", "act_heads", None, None)
    kv = lambda x: Shape(x.shape, x.dtype, sharding=sharding(self.mesh, axes, x.shape))
    row = lambda x: self.rows(*x.shape, dtype=x.dtype) if x.ndim else self.whole(x)
    names = ("prompt_k", "prompt_v", "k", "v")
    keys = {name: jax.tree.map(kv, getattr(state.cache, name)) for name in names}
    rows = jax.tree.map(row, state)
    return rows.replace(cache=rows.cache.replace(**keys))


def rules(mesh: Mesh, vocab: int, states: int = 1) -> device.Rules:
  """Of rows that end by an EOS, or by a stop automaton of so many states."""
  return device.Rules(
    eos_Z=put(mesh, (EOS_BUCKET,), jnp.int32),
    next_state_XV=put(mesh, (states, vocab), jnp.int32),
    stop_state=scalar(mesh, jnp.int32),
    again=scalar(mesh, jnp.bool_),
  )


def prompts(mesh: Mesh, count: int, wide: int) -> device.Prompts:
  """What the host passes to a prefill."""
  each = lambda *shape, dtype=jnp.int32: put(mesh, (count, *shape), dtype)
  return device.Prompts(
    slots_I=each(),
    tokens_IP=each(wide),
    mask_IP=each(wide, dtype=jnp.bool_),
    ids_I=each(),
    sampling=Sampling(
      temperature_B=each(dtype=jnp.float32),
      top_k_B=each(),
      top_p_B=each(dtype=jnp.float32),
      min_p_B=each(dtype=jnp.float32),
      max_new_B=each(),
    ),
    queue_IQ=each(0),
    queue_length_I=each(),
  )

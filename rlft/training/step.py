"""`make_step`: from a loss to a jitted, donated, sharded train step.

Every algorithm is such a step. A loss returns sums with their denominators, and
gradient accumulation carries both, so micro-batching cannot change an update.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlft.core import hosts
from rlft.core.errors import ConfigError
from rlft.core.mesh import batch_shards, constrain
from rlft.models.decoder import Decoder
from rlft.training import parts
from rlft.training.optimizer import (
  Optimizer,
  OptimizerConfig,
  check_patterns,
  learning_rate,
  make_optimizer,
  matches,
  rate_shown,
  settings,
)

log = logging.getLogger(__name__)

# {name: (sum, denominator)}; "loss" is the one that is differentiated. A name that ends
# in "_max" is a maximum, (value, 1): parts of a batch are combined by their largest.
Sums = dict[str, tuple[jax.Array, jax.Array]]
COUNT = "count/"


@struct.dataclass
class TrainState:
  """What an update changes.

  Attributes:
    params: the parameters, float32 masters.
    opt_state: the optimiser's state, sharded like the parameters.
    step: int32 scalar, updates done.
    horizon: int32 scalar, updates of the learning-rate schedule.
  """

  params: Any
  opt_state: Any
  step: jax.Array
  horizon: jax.Array


def init_state(params: Any, optimizer: Optimizer, horizon: int) -> TrainState:
  """A state before the first update.

  The parameters are copied: the train step donates its state, and the caller keeps
  what it gave.

  Args:
    params: where to start.
    optimizer: a configuration, or an optax transformation.
    horizon: updates that the run is going to make; `total_steps` of a configuration
      overrides it.

  Raises:
    ConfigError: a `freeze` pattern matches nothing, or leaves nothing to train.
  """
  check_patterns(optimizer, params)
  params = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), params)
  # Not under jit: there the moments do not see where the parameters lie, and all of
  # them would start on one device.
  opt_state = make_optimizer(optimizer).init(params)
  horizon = settings(optimizer).total_steps or horizon
  if not isinstance(optimizer, OptimizerConfig):
    opt_state, horizon = _owned(opt_state), 0  # its schedule is its own
  state = TrainState(params, opt_state, jnp.int32(0), jnp.int32(horizon))
  home = jax.tree.leaves(params)[0].sharding
  if isinstance(home, NamedSharding):
    # Counters, and what does not follow the parameters, lie on the whole mesh from the
    # start, as they do after an update: another layout would be another compilation.
    whole = NamedSharding(home.mesh, PartitionSpec())

    def home_of(x, followed):
      if followed is None:
        return hosts.spread(x, whole)
      lies = isinstance(x.sharding, NamedSharding)
      return x if lies else hosts.spread(x, followed.sharding)

    state = _beside_followed(home_of, state, params)
  return state


def go_on_from(saved: TrainState, fresh: TrainState) -> TrainState:
  """A saved state, whose schedule is as long as the configuration asks for now.

  Args:
    saved: what was restored.
    fresh: that of a run which begins now; only its horizon is read.
  """
  before, now = int(saved.horizon), int(fresh.horizon)
  if before != now:
    log.warning(
      "the learning rate goes on by the schedule that is configured now: %d updates, "
      "not the %d of the run that was saved",
      now,
      before,
    )
  return saved.replace(horizon=fresh.horizon)


def _beside_followed(function: Callable, state: Any, params: Any) -> Any:
  """`function` of each leaf of an optimiser's state and the parameter that it follows:
  the one at the end of its path, of its shape; None where there is none."""
  known = dict(jax.tree_util.tree_flatten_with_path(params)[0])

  def beside(path, x):
    ends = (known.get(path[i:]) for i in range(len(path)))
    same = (p for p in ends if p is not None and p.shape == x.shape)
    return function(x, next(same, None))

  return jax.tree_util.tree_map_with_path(beside, state)


def _owned(opt_state: Any) -> Any:
  """The state of somebody's optimiser as arrays that a step may donate: it may hold the
  parameters themselves, or an array that the caller keeps; and a key as plain numbers,
  which a checkpoint can hold.
  """
  leaves, tree = jax.tree.flatten(opt_state)
  del opt_state
  for i, x in enumerate(leaves):  # one by one, so that only one is held twice
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      x = jax.random.key_data(x)
    leaves[i] = jnp.array(x, x.dtype, copy=True)
  return jax.tree.unflatten(tree, leaves)


def make_step(
  loss: Callable[..., Sums],
  optimizer: Optimizer,
  *,
  micro_batches: int = 1,
  mesh: Mesh | None = None,
  model: Decoder | None = None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
  """Builds `train_step(state, batch, *frozen) -> (state, metrics)`.

  gradient = grad(sum over the batch of loss sums) / (sum of loss denominators)

  An update whose loss or gradient is not finite is not made: the state stays as it was,
  to the bit, and "skipped" is 1 (see `training.divergence`).

  Args:
    loss: pure; (params, batch, *frozen) -> {name: (sum, denominator)} with a "loss"
      entry. Its denominators must not depend on the parameters. What is frozen (the
      base weights under LoRA, say) is read whole by every part of the batch.
    optimizer: a configuration, or an optax transformation, whose updates are added to
      the parameters as they are; one that asks for it gets the loss as `value`.
    micro_batches: how many parts a batch is taken in; its rows must be a multiple. 0
      chooses for each shape of a batch, see `training.parts`.
    mesh: where the batch is sharded.
    model: of the loss; what is chosen depends on its sizes.

  Returns:
    The jitted step. Its state is donated. Metrics are float32 scalars on the device:
    the quotients, what others than "loss" were divided by ("count/NAME"), "grad_norm",
    "update_norm", "learning_rate" (of an optax transformation where
    `optax.inject_hyperparams` shows it), "loss_denominator", "skipped".
  """
  if micro_batches < (model is None):
    raise ConfigError(f"micro_batches={micro_batches}: at least 1, or 0 with a model")

  def total_and_sums(params, batch, *frozen):
    sums = loss(params, batch, *frozen)
    return sums["loss"][0], sums

  transformation, freeze = make_optimizer(optimizer), settings(optimizer).freeze
  own_rate = isinstance(optimizer, OptimizerConfig)
  grad = jax.grad(total_and_sums, has_aux=True)

  memory = None if micro_batches else parts.device_memory(mesh)

  def parts_of(batch) -> int:
    if micro_batches:
      return micro_batches
    shapes = [x.shape for x in jax.tree.leaves(batch)]
    width = max(math.prod(shape[1:]) for shape in shapes)  # of the tokens
    return parts.micro_batches(shapes[0][0], width, model, memory)

  def split(x, count):
    # Row i * M + m goes to part m: every device's rows are split where they are.
    x = x.reshape(x.shape[0] // count, count, *x.shape[1:])
    x = jnp.moveaxis(x, 1, 0)
    return constrain(x, mesh, (None, "batch") + (None,) * (x.ndim - 2))

  def add(total, part):
    sums = {
      name: jax.tree.map(_join(name), one, part[1][name])
      for name, one in total[1].items()
    }
    return jax.tree.map(jnp.add, total[0], part[0]), sums

  def accumulate(count, params, batch, *frozen):
    if count == 1:
      return grad(params, batch, *frozen)
    divided = jax.tree.map(functools.partial(split, count=count), batch)
    one = lambda part: grad(params, part, *frozen)
    like = jax.eval_shape(one, jax.tree.map(lambda x: x[0], divided))
    grads, sums = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    lowest = lambda name, x: jnp.full_like(x, -jnp.inf) if _is_max(name) else x
    sums = {k: jax.tree.map(functools.partial(lowest, k), v) for k, v in sums.items()}
    body = lambda total, part: (add(total, one(part)), None)
    return jax.lax.scan(body, (grads, sums), divided)[0]

  def train_step(state: TrainState, batch, *frozen):
    rows = jax.tree.leaves(batch)[0].shape[0]
    count = parts_of(batch)
    need = count * batch_shards(mesh)
    if rows % need:
      raise ConfigError(
        f"a batch of {rows} rows cannot be divided into {count} micro-batches "
        f"on {batch_shards(mesh)} batch shards; use a multiple of {need}"
      )
    grads, sums = accumulate(count, state.params, batch, *frozen)
    denominator = sums["loss"][1]
    scale = _quotient(1.0, denominator)
    # Frozen parameters' gradients end here, so that the compiler drops them, and the
    # norm that is logged is the norm that is clipped.
    grads = jax.tree.map(
      lambda g, frozen: jnp.zeros_like(g) if frozen else g * scale.astype(g.dtype),
      grads,
      matches(grads, freeze),
    )
    metrics = {name: _quotient(s, d) for name, (s, d) in sums.items()}
    metrics |= {
      COUNT + name: d
      for name, (_, d) in sums.items()
      if name != "loss" and not _is_max(name)
    }
    metrics["loss_denominator"] = denominator
    metrics["grad_norm"] = optax.tree.norm(grads)
    if own_rate:
      metrics["learning_rate"] = learning_rate(optimizer, state.step, state.horizon)
    sound = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
    metrics["skipped"] = 1.0 - sound.astype(jnp.float32)

    def update(state):
      updates, opt_state = transformation.update(
        grads, state.opt_state, state.params, value=metrics["loss"]
      )
      if own_rate:
        rate = metrics["learning_rate"]
        updates = jax.tree.map(lambda direction: -rate * direction, updates)
      else:
        opt_state = _as_before(opt_state, state, mesh)
      params = optax.apply_updates(state.params, updates)
      after = TrainState(params, opt_state, state.step + 1, state.horizon)
      return after, optax.tree.norm(updates)

    # Both branches work on the donated state where it lies. To select between old and
    # new values instead would keep both: 4 bytes more for each parameter.
    leave = lambda state: (state, jnp.float32(0))
    state, metrics["update_norm"] = jax.lax.cond(sound, update, leave, state)
    if not own_rate:
      metrics |= rate_shown(state.opt_state)
    return state, metrics

  step = jax.jit(train_step, donate_argnums=0)
  if not hosts.several():
    return step

  def paced_step(state, batch, *frozen):
    state, metrics = step(state, batch, *frozen)
    hosts.paced(metrics)
    return state, metrics

  return paced_step


def _as_before(opt_state: Any, before: TrainState, mesh: Mesh | None) -> Any:
  """An optax state of the types that it had; what follows no parameter whole on the
  mesh, where it lay."""
  opt_state = jax.tree.map(
    lambda new, old: jnp.asarray(new, old.dtype), opt_state, before.opt_state
  )
  whole = lambda x: constrain(x, mesh, (None,) * x.ndim)
  return _beside_followed(
    lambda x, followed: whole(x) if followed is None else x, opt_state, before.params
  )


def _is_max(name: str) -> bool:
  return name.endswith("_max")


def _join(name: str) -> Callable:
  """How one metric of two parts of a batch becomes that of both."""
  return jnp.maximum if _is_max(name) else jnp.add


def _quotient(total, denominator):
  """total / denominator; 0 where nothing was counted."""
  some = denominator > 0
  return jnp.where(some, total / jnp.where(some, denominator, 1.0), 0.0)

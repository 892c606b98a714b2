"""The optimiser of a run: from its configuration, or an optax transformation."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from rlft.core.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW with a schedule, clipping, and masks by regular expression.

  Where the settings of a method take one they take any optax transformation as well,
  such as `optax.adamw(1e-5)`. Give the same object to runs that are to share their
  compiled steps.

  Attributes:
    learning_rate: the peak.
    schedule: "constant", "linear" or "cosine" decay to `end_factor` of the peak.
    warmup_steps: linear warm-up; its first update already moves.
    total_steps: length of the schedule, warm-up included; 0 is the length of the run.
    end_factor: what the decay ends at, over the peak.
    b1, b2, eps: of Adam (Kingma & Ba 2015); eps 1e-8 for supervised training, RL takes
      1e-5.
    weight_decay: decoupled (Loshchilov & Hutter 2019).
    clip_norm: largest global gradient norm; 0 is off.
    no_decay: parameters without weight decay: patterns searched in paths such as
      "layers/attention/q/kernel".
    freeze: parameters that do not move, and have no optimiser state.
    max_nonfinite: an update whose loss or gradient is not finite is skipped; so many in
      a row end the run (of PPO and GRPO with the iteration), 1 the first.
  """

  learning_rate: float = 1e-4
  schedule: Literal["constant", "linear", "cosine"] = "cosine"
  warmup_steps: int = 0
  total_steps: int = 0
  end_factor: float = 0.0
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  weight_decay: float = 0.0
  clip_norm: float = 1.0
  no_decay: tuple[str, ...] = (r"bias$", r"scale$")
  freeze: tuple[str, ...] = ()
  max_nonfinite: int = 3

  def __post_init__(self):
    if self.schedule not in ("constant", "linear", "cosine"):
      raise ConfigError(
        f"schedule={self.schedule!r}: choose 'constant', 'linear' or 'cosine'"
      )
    for name in ("learning_rate", "eps"):
      if not 0 < getattr(self, name) < math.inf:
        raise ConfigError(f"{name}={getattr(self, name)}: must be positive")
    for name in (
      "warmup_steps",
      "total_steps",
      "end_factor",
      "clip_norm",
      "weight_decay",
    ):
      if not 0 <= getattr(self, name) < math.inf:
        raise ConfigError(f"{name}={getattr(self, name)}: must not be negative")
    if self.max_nonfinite < 1:
      raise ConfigError(f"max_nonfinite={self.max_nonfinite}: at least 1")
    for name in ("b1", "b2"):
      if not 0 <= getattr(self, name) < 1:
        raise ConfigError(f"{name}={getattr(self, name)}: must be in [0, 1)")
    if self.total_steps and self.warmup_steps > self.total_steps:
      raise ConfigError(
        f"warmup_steps={self.warmup_steps} is longer than the whole schedule, "
        f"total_steps={self.total_steps}: the peak would never be reached"
      )
    for pattern in (*self.no_decay, *self.freeze):
      try:
        re.compile(pattern)
      except re.error as error:
        raise ConfigError(
          f"pattern {pattern!r} is no regular expression: {error}"
        ) from error


# A transformation of one's own (anything with optax's `init` and `update`) brings its
# rate, schedule, clipping and masks itself.
Optimizer = OptimizerConfig | optax.GradientTransformation
_OWN = OptimizerConfig()


def settings(optimizer: Optimizer) -> OptimizerConfig:
  """What guards and masks read; of an optax transformation the defaults: nothing is
  frozen.

  Raises:
    ConfigError: it is neither.
  """
  if isinstance(optimizer, OptimizerConfig):
    return optimizer
  parts = (getattr(optimizer, name, None) for name in ("init", "update"))
  if isinstance(optimizer, type) or not all(map(callable, parts)):
    raise ConfigError(
      f"optimizer={optimizer!r:.100}: give an OptimizerConfig, or an optax "
      "transformation such as optax.adamw(1e-5)"
    )
  return _OWN


def learning_rate(
  config: OptimizerConfig, step: jax.Array, horizon: jax.Array
) -> jax.Array:
  """Learning rate of an update; its length is traced, so that it compiles nothing.

  Args:
    config: peak, schedule, warm-up.
    step: int32 scalar, index of the update, from 0.
    horizon: int32 scalar, updates of the whole schedule, warm-up included.

  Returns:
    float32 scalar: peak * min(1, (step + 1) / warmup_steps) * decay, where decay runs
    from 1 to `end_factor` between the end of the warm-up and the horizon.
  """
  step, horizon = jnp.float32(step), jnp.float32(horizon)
  warm = jnp.minimum(1.0, (step + 1) / max(1, config.warmup_steps))
  left = jnp.maximum(1.0, horizon - config.warmup_steps)
  progress = jnp.clip((step - config.warmup_steps) / left, 0.0, 1.0)
  if config.schedule == "cosine":
    progress = 0.5 * (1 - jnp.cos(jnp.pi * progress))
  elif config.schedule == "constant":
    progress = 0.0
  decay = 1 - (1 - config.end_factor) * progress
  return config.learning_rate * warm * decay


def matches(params: dict, patterns: tuple[str, ...]) -> dict:
  """Tree of bool: whether one of the patterns is found in a parameter's path."""

  def match(path, _):
    name = "/".join(str(part.key) for part in path)
    return any(re.search(pattern, name) for pattern in patterns)

  return jax.tree_util.tree_map_with_path(match, params)


def rate_shown(state: Any) -> dict[str, jax.Array]:
  """The learning rate that an optax state shows (`optax.inject_hyperparams` puts it
  there), by its name in the logs; {} where it shows none, or several."""
  found = [x for _, x in optax.tree.get_all_with_path(state, "learning_rate")]
  found = [x for x in found if isinstance(x, jax.Array) and x.ndim == 0]
  return {"learning_rate": jnp.float32(found[0])} if len(found) == 1 else {}


def check_patterns(optimizer: Optimizer, params: dict) -> None:
  """Raises `ConfigError` when `freeze` matches nothing or leaves nothing to train."""
  config = settings(optimizer)
  for pattern in config.freeze:
    if not any(jax.tree.leaves(matches(params, (pattern,)))):
      raise ConfigError(f"freeze pattern {pattern!r} matches no parameter")
  if all(jax.tree.leaves(matches(params, config.freeze))):
    raise ConfigError(f"freeze={config.freeze} leaves no parameter to train")


def make_optimizer(optimizer: Optimizer) -> optax.GradientTransformationExtraArgs:
  """As optax takes it: of an `OptimizerConfig` the direction of a step, which the train
  step multiplies by `-learning_rate(...)`; of a transformation the step itself.
  """
  settings(optimizer)
  if isinstance(optimizer, OptimizerConfig):
    optimizer = _direction(optimizer)
  return optax.with_extra_args_support(optimizer)


@functools.lru_cache(maxsize=64)
def _direction(config: OptimizerConfig) -> optax.GradientTransformation:
  """Clipped, Adam-preconditioned, with weight decay.

  The global norm that is clipped is that of the parameters that move.
  """
  decays = lambda params: jax.tree.map(
    lambda skip: not skip, matches(params, config.no_decay)
  )
  chain = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
  chain.append(optax.scale_by_adam(config.b1, config.b2, config.eps))
  if config.weight_decay:
    chain.append(optax.add_decayed_weights(config.weight_decay, decays))
  optimizer = optax.chain(*chain)
  if not config.freeze:
    return optimizer
  labels = lambda params: jax.tree.map(
    lambda frozen: "frozen" if frozen else "trained", matches(params, config.freeze)
  )
  return optax.multi_transform(
    {"trained": optimizer, "frozen": optax.set_to_zero()}, labels
  )

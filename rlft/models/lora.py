"""LoRA: low-rank adapters beside frozen linear layers.

  y = x W + (alpha / r) * (x a) b,   a [in, r], b [r, out]

The adapters are the flax collection "lora", a tree like the parameters with {"a", "b"}
at every targeted linear layer (stacked [L, ...] under scan). The base is the same
`apply` without that collection, so a reference policy costs no second copy:

  model = policy.model.clone(lora_scale=config.scale)
  token_logp(model, params, tokens, mask, lora=lora)    # the policy
  token_logp(model, params, tokens, mask)               # its reference

Source: Hu et al. 2021 (arXiv 2106.09685), section 4.1.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from rlft.core.errors import ConfigError
from rlft.core.hosts import spread
from rlft.core.mesh import tree_shardings
from rlft.models.decoder import Decoder, param_axes


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
  """Which linear layers get adapters, and how large.

  Attributes:
    rank: r.
    alpha: the update's factor is alpha / r, so that a rank can be changed without
      another learning rate.
    targets: patterns searched in the paths of linear layers, such as
      "layers/attention/q" or "layers/mlp/down". The embedding and the output head are
      no linear layers.
  """

  rank: int = 16
  alpha: float = 32.0
  targets: tuple[str, ...] = ("attention/", "mlp/")

  def __post_init__(self):
    if self.rank < 1:
      raise ConfigError(f"rank={self.rank}: at least 1")
    if not 0 < self.alpha < math.inf:
      raise ConfigError(f"alpha={self.alpha}: must be positive")
    if not self.targets:
      raise ConfigError("targets is empty: no linear layer would be trained")
    for pattern in self.targets:
      try:
        re.compile(pattern)
      except re.error as error:
        raise ConfigError(
          f"target {pattern!r} is no regular expression: {error}"
        ) from error

  @property
  def scale(self) -> float:
    """alpha / r, the `lora_scale` of the decoder and of `merge_lora`."""
    return self.alpha / self.rank


def init_lora(model: Decoder, params: dict, config: LoRAConfig, key: jax.Array) -> dict:
  """Adapters that change nothing yet: a ~ N(0, 1/in), b = 0.

  Args:
    model: the decoder; on a mesh, adapters lie where its rules put them.
    params: its parameters; not changed.
    config: see `LoRAConfig`.
    key: addresses the noise. A layer's draw depends on its path alone, not on which
      others are targeted.

  Returns:
    The collection "lora", float32.

  Raises:
    ConfigError: a target matches no linear layer.

  Source: Hu et al. 2021, section 4.1: a random Gaussian for one factor, zero for the
  other. The paper gives no variance; 1/in keeps `x a` at the size of x (its released
  code draws uniformly, with a third of that).
  """
  linears = _linears(params)
  for pattern in config.targets:
    if not any(re.search(pattern, path) for path in linears):
      near = difflib.get_close_matches(pattern, linears, n=3, cutoff=0.0)
      raise ConfigError(
        f"target {pattern!r} matches no linear layer; near ones: {', '.join(near)}"
      )
  lora: dict[str, Any] = {}
  for path, kernel in linears.items():
    if not any(re.search(pattern, path) for pattern in config.targets):
      continue
    *lead, size_in, size_out = kernel.shape
    own = jax.random.fold_in(key, zlib.crc32(path.encode()))
    a = jax.random.normal(own, (*lead, size_in, config.rank)) / math.sqrt(size_in)
    b = jnp.zeros((*lead, config.rank, size_out))
    _put(lora, path, {"a": a, "b": b})
  if model.mesh is None:
    return lora
  return spread(lora, tree_shardings(model.mesh, lora_axes(model, lora), lora))


def lora_axes(model: Decoder, lora: dict) -> dict:
  """Logical axis names of every adapter: a tree of tuples like `lora`.

  A factor is sharded where its kernel is: a along the input, b along the output. The
  rank is not sharded.
  """
  kernels = param_axes(model)
  out: dict[str, Any] = {}
  for path in _linears(lora, "a"):
    *lead, axis_in, axis_out = _get(kernels, path)["kernel"]
    _put(out, path, {"a": (*lead, axis_in, None), "b": (*lead, None, axis_out)})
  return out


def merge_lora(params: dict, lora: dict, scale: float) -> dict:
  """Parameters with the adapters added in: W + scale * a b.

  Args:
    params: the base's; not changed.
    lora: its adapters.
    scale: `LoRAConfig.scale`.

  Returns:
    Parameters of the same layout and dtypes, for rollouts and for export. What is not
    targeted is the same array, not a copy.
  """
  if "a" in lora:
    kernel = params["kernel"]
    merged = _merge(kernel, lora["a"], lora["b"], scale)
    return {**params, "kernel": jax.device_put(merged, kernel.sharding)}
  if set(lora) - set(params):
    raise ConfigError(f"adapters for {sorted(set(lora) - set(params))}: no such layers")
  changed = {name: merge_lora(params[name], lora[name], scale) for name in lora}
  return {**params, **changed}


@jax.jit
def _merge(kernel, a, b, scale):
  update = jnp.matmul(a, b, precision="highest", preferred_element_type=jnp.float32)
  return (kernel.astype(jnp.float32) + scale * update).astype(kernel.dtype)


def _linears(tree: dict, leaf: str = "kernel", prefix: str = "") -> dict[str, Any]:
  """Path of every node that holds `leaf` -> that array."""
  out = {}
  for name, node in tree.items():
    if isinstance(node, dict):
      if leaf in node:
        out[prefix + name] = node[leaf]
      out |= _linears(node, leaf, f"{prefix}{name}/")
  return out


def _get(tree: dict, path: str) -> dict:
  for name in path.split("/"):
    tree = tree[name]
  return tree


def _put(tree: dict, path: str, value: dict) -> None:
  *parents, last = path.split("/")
  for name in parents:
    tree = tree.setdefault(name, {})
  tree[last] = value

"""The table of names: which Hugging Face tensor holds which parameter, and how.

A family lists its tensors once; import, export and the checks of names and shapes all
derive from that list. Layouts differ in two ways only: a tensor is stored [out, in]
where ours is [in, out], and q, k and v may be fused along the output axis.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from rlft.core.errors import CheckpointError
from rlft.models.decoder import DecoderConfig, RopeScaling


@dataclasses.dataclass(frozen=True)
class Weight:
  """Where one parameter lies in a checkpoint.

  Attributes:
    path: the parameter, "/" between the levels of the tree; stacked over layers when
      it begins with "layers/".
    name: the tensor; "{}" is the layer.
    transpose: the tensor is [out, in], the parameter [in, out].
    part: 0, 1, 2 = q, k, v of a fused tensor; None when it is not fused.
    per_head: a fused output axis is [heads, 3, head size] (GPT-NeoX), not
      [3, heads * head size] (GPT-2).
  """

  path: str
  name: str
  transpose: bool = False
  part: int | None = None
  per_head: bool = False

  @property
  def stacked(self) -> bool:
    return "{}" in self.name

  def hf_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the tensor that holds a parameter (of one layer) of this shape."""
    if self.part is not None:  # the output axis is our last one
      shape = (*shape[:-1], 3 * shape[-1])
    return shape[::-1] if self.transpose else shape

  def _fused(self, tensor: np.ndarray, heads: int) -> np.ndarray:
    # [out, ...] -> [blocks, 3, size, ...]: splitting an axis is always a view, which
    # `put` relies on.
    rows = tensor if self.transpose else np.moveaxis(tensor, -1, 0)
    blocks = heads if self.per_head else 1
    return rows.reshape(blocks, 3, -1, *rows.shape[1:])[:, self.part]

  def take(self, tensor: np.ndarray, heads: int) -> np.ndarray:
    """The parameter in the tensor, a view where that is possible."""
    if self.part is not None:
      part = self._fused(tensor, heads)
      return part.reshape(-1, *part.shape[2:]).T
    return tensor.T if self.transpose else tensor

  def put(self, tensor: np.ndarray, value: np.ndarray, heads: int) -> None:
    """Writes the parameter to its place in the tensor; the inverse of `take`."""
    if self.part is not None:
      part = self._fused(tensor, heads)
      part[...] = value.T.reshape(part.shape)
    else:
      tensor[...] = value.T if self.transpose else value


@dataclasses.dataclass(frozen=True)
class Family:
  """How one architecture of Hugging Face maps to the decoder.

  Attributes:
    architecture: the name in config.json's "architectures".
    model_type: the name in its "model_type".
    prefix: of the names of the trunk; checkpoints of the bare trunk leave it out.
    weights: the table; rows of parameters that a config does not have are not used.
    from_hf: the contents of config.json -> our config.
    to_hf: our config -> what config.json must say of it; values that the architecture
      cannot express are lost, which `families.to_hf` finds out.
  """

  architecture: str
  model_type: str
  prefix: str
  weights: tuple[Weight, ...]
  from_hf: Callable[[dict[str, Any]], DecoderConfig]
  to_hf: Callable[[DecoderConfig], dict[str, Any]]


def linear(path: str, name: str) -> tuple[Weight, Weight]:
  """The rows of a linear layer that is stored [out, in]."""
  return (
    Weight(f"{path}/kernel", f"{name}.weight", transpose=True),
    Weight(f"{path}/bias", f"{name}.bias"),
  )


def norm(path: str, name: str) -> tuple[Weight, Weight]:
  """The rows of a norm."""
  return (
    Weight(f"{path}/scale", f"{name}.weight"),
    Weight(f"{path}/bias", f"{name}.bias"),
  )


# ------------------------------------------------------------- reading config.json

_ACTIVATIONS = {
  "silu": "silu",
  "swish": "silu",
  "relu": "relu",
  "gelu": "gelu",
  "gelu_new": "gelu_tanh",
  "gelu_pytorch_tanh": "gelu_tanh",
}


def size(hf: dict[str, Any], key: str, default: int | None = None) -> int:
  """A positive whole number of config.json."""
  value = hf.get(key)
  value = default if value is None else value
  if isinstance(value, bool) or not isinstance(value, int) or value < 1:
    raise CheckpointError(
      f"config.json: {key!r} is {value!r}; a {hf.get('model_type')} model needs a "
      "positive integer there"
    )
  return value


def number(hf: dict[str, Any], key: str, default: float) -> float:
  """A finite number of config.json; `default` where it is absent or null."""
  value = hf.get(key)
  value = default if value is None else value
  if isinstance(value, bool) or not isinstance(value, int | float):
    raise CheckpointError(f"config.json: {key!r} is {value!r}; it must be a number")
  if not math.isfinite(value):
    raise CheckpointError(f"config.json: {key!r} is {value!r}; it must be finite")
  return float(value)


def activation(name: str) -> str:
  """Our name of an activation."""
  if name not in _ACTIVATIONS:
    raise CheckpointError(
      f"config.json: the activation {name!r} is not supported; known: "
      f"{', '.join(sorted(_ACTIVATIONS))}"
    )
  return _ACTIVATIONS[name]


def refuse(hf: dict[str, Any], **only: Any) -> None:
  """Raises where a setting that we do not compute has another value than `only`'s."""
  for key, value in only.items():
    if hf.get(key) is not None and hf[key] != value:
      raise CheckpointError(
        f"config.json: {key}={hf[key]!r} is not supported for "
        f"{hf.get('model_type')} models (only {value!r} is)"
      )


def rope(
  hf: dict[str, Any], parameters: dict[str, Any] | None = None, theta: float = 1e4
) -> tuple[float, RopeScaling | None]:
  """Rotary base and stretch.

  transformers 5 writes them to "rope_parameters"; before, they were "rope_theta" and
  "rope_scaling". Both are read.

  Args:
    hf: config.json.
    parameters: the rotary settings when they are not `hf`'s own (Gemma 3 has two).
    theta: the base where none is given.
  """
  if parameters is None:
    parameters = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
  base = number(parameters, "rope_theta", number(hf, "rope_theta", theta))
  kind = parameters.get("rope_type", parameters.get("type", "default"))
  if kind == "default":
    return base, None
  if kind == "linear":
    return base, RopeScaling("linear", number(parameters, "factor", 1.0))
  if kind == "llama3":
    scaling = RopeScaling(
      "llama3",
      number(parameters, "factor", 8.0),
      number(parameters, "low_freq_factor", 1.0),
      number(parameters, "high_freq_factor", 4.0),
      size(
        parameters,
        "original_max_position_embeddings",
        size(hf, "max_position_embeddings"),
      ),
    )
    return base, scaling
  raise CheckpointError(
    f"config.json: the rotary scaling {kind!r} is not supported; supported: default, "
    "linear, llama3"
  )


def rope_to_hf(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
  """The reverse of `rope`, in the older spelling, which every version reads."""
  out: dict[str, Any] = {"rope_theta": theta}
  if scaling is not None:
    out["rope_scaling"] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
      out["rope_scaling"] |= {
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_positions,
      }
  return out


def windows(hf: dict[str, Any], local: list[bool], window: int | None) -> tuple:
  """Windows of the layers: "layer_types" where it is given, else those of `local`."""
  layers = size(hf, "num_hidden_layers")
  kinds = hf.get("layer_types")
  if kinds is not None:
    unknown = sorted({str(k) for k in kinds} - {"sliding_attention", "full_attention"})
    if unknown or len(kinds) != layers:
      raise CheckpointError(
        f"config.json: 'layer_types' has {len(kinds)} entries for {layers} layers, "
        f"unknown ones: {unknown}; give one of sliding_attention, full_attention for "
        "each layer"
      )
    local = [kind == "sliding_attention" for kind in kinds]
  if not any(local) or not window:
    return ()
  return tuple(window if near else 0 for near in local)


def layer_types(config: DecoderConfig) -> list[str]:
  """The reverse of `windows`."""
  return [
    "sliding_attention" if window else "full_attention"
    for window in config.windows or (0,) * config.layers
  ]

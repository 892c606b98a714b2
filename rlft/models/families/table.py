"""The table of names: which Hugging Face tensor holds which parameter, and how.

A family lists its tensors once; import, export and the checks of names and shapes all
derive from that list. Layouts differ in two ways only: a tensor is stored [out, in]
where ours is [in, out], and several (q, k and v) may be fused along the output axis.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from rlft.core.errors import CheckpointError
from rlft.models.decoder import DecoderConfig, RopeScaling
from rlft.models.rope import rotary_size


@dataclasses.dataclass(frozen=True)
class Weight:
  """Where one parameter lies in a checkpoint.

  Attributes:
    path: the parameter, "/" between the levels of the tree; stacked over layers when
      it begins with "layers/".
    name: the tensor; "{}" is the layer.
    transpose: the tensor is [out, in], the parameter [in, out].
    part: which one of the parameters in a fused tensor; None when it is not fused.
    sizes: the fields of the config whose values the parts of the output axis are to
      each other as.
    per_head: a fused output axis is [heads, parts] (GPT-NeoX), not [parts] (GPT-2).
  """

  path: str
  name: str
  transpose: bool = False
  part: int | None = None
  sizes: tuple[str, ...] = ("heads", "heads", "heads")
  per_head: bool = False

  @property
  def stacked(self) -> bool:
    return "{}" in self.name

  def hf_shape(self, shape: tuple[int, ...], config: DecoderConfig) -> tuple[int, ...]:
    """Shape of the tensor that holds a parameter (of one layer) of this shape."""
    if self.part is not None:  # the output axis is our last one
      sizes = [getattr(config, name) for name in self.sizes]
      shape = (*shape[:-1], shape[-1] * sum(sizes) // sizes[self.part])
    return shape[::-1] if self.transpose else shape

  def _fused(self, tensor: np.ndarray, config: DecoderConfig) -> np.ndarray:
    # [out, ...] -> [blocks, size of the part, ...]: splitting an axis is always a view,
    # which `put` relies on.
    rows = tensor if self.transpose else np.moveaxis(tensor, -1, 0)
    blocks = config.heads if self.per_head else 1
    rows = rows.reshape(blocks, -1, *rows.shape[1:])
    sizes = [getattr(config, name) for name in self.sizes]
    ends = [rows.shape[1] * sum(sizes[:n]) // sum(sizes) for n in range(len(sizes) + 1)]
    return rows[:, ends[self.part] : ends[self.part + 1]]

  def take(self, tensor: np.ndarray, config: DecoderConfig) -> np.ndarray:
    """The parameter in the tensor, a view where that is possible."""
    if self.part is not None:
      part = self._fused(tensor, config)
      return part.reshape(-1, *part.shape[2:]).T
    return tensor.T if self.transpose else tensor

  def put(self, tensor: np.ndarray, value: np.ndarray, config: DecoderConfig) -> None:
    """Writes the parameter to its place in the tensor; the inverse of `take`."""
    if self.part is not None:
      part = self._fused(tensor, config)
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
  "gelu_python": "gelu",
  # One function, written in several ways.
  "gelu_new": "gelu_tanh",
  "gelu_fast": "gelu_tanh",
  "gelu_accurate": "gelu_tanh",
  "gelu_python_tanh": "gelu_tanh",
  "gelu_pytorch_tanh": "gelu_tanh",
}


# Where null means what an absent key means; elsewhere a null is a damaged config.
_NULLABLE = frozenset(
  {
    "head_dim",
    "n_inner",
    "num_key_value_heads",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "word_embed_proj_dim",
  }
)
# The largest that is believed, before a file's header is there to compare: axes are
# counted in 32 bits, and names are made for each layer.
_MOST = {
  "num_hidden_layers": 10_000,
  "n_layer": 10_000,
  "num_attention_heads": 1 << 16,
  "n_head": 1 << 16,
  "num_key_value_heads": 1 << 16,
  "head_dim": 1 << 14,
}


def _given(hf: dict[str, Any], key: str, default: Any) -> Any:
  value = hf.get(key, default)
  return default if value is None and key in _NULLABLE else value


def size(hf: dict[str, Any], key: str, default: int | None = None, least=1) -> int:
  """A whole number of config.json, at least `least`; `default` where it is absent."""
  value, most = _given(hf, key, default), _MOST.get(key, 2**31 - 1)
  if isinstance(value, bool) or not isinstance(value, int) or value < least:
    raise CheckpointError(
      f"config.json: {key!r} is {value!r:.80}; a {hf.get('model_type')} model needs a "
      f"{'positive integer' if least else 'whole number'} there"
    )
  if value > most:
    raise CheckpointError(f"config.json: {key!r} is {value!r:.80}; at most {most}")
  return value


def head_size(hf: dict[str, Any], width: int, heads: int) -> int:
  """Features of a head where the heads share the width."""
  if width % heads:
    raise CheckpointError(
      f"config.json: a {hf.get('model_type')} model of width {width} cannot be split "
      f"into {heads} attention heads"
    )
  return width // heads


def number(hf: dict[str, Any], key: str, default: float | None) -> float:
  """A finite number of config.json; `default` where it is absent."""
  value = _given(hf, key, default)
  if isinstance(value, bool) or not isinstance(value, int | float):
    raise CheckpointError(f"config.json: {key!r} is {value!r:.80}; it must be a number")
  if not abs(value) < 1e300:  # whole numbers have no bounds, floats have infinity
    raise CheckpointError(f"config.json: {key!r} is {value!r:.80}; it must be finite")
  return float(value)


def flag(hf: dict[str, Any], key: str, default: bool) -> bool:
  """A switch of config.json, off where it is null; `default` where it is absent."""
  value = hf.get(key, default)
  if value not in (True, False, None) or isinstance(value, float):  # "false" is true
    raise CheckpointError(
      f"config.json: {key!r} is {value!r:.80}; it must be true or false"
    )
  return bool(value)


def activation(name: Any) -> str:
  """Our name of an activation."""
  if not isinstance(name, str) or name not in _ACTIVATIONS:
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


def rotary_share(hf: dict[str, Any], head_dim: int, key: str, default: float) -> float:
  """The share of a head that is rotated; an odd number of features is rounded up.

  Args:
    hf: config.json; "partial_rotary_factor" of its rotary settings goes first.
    head_dim: size of a head.
    key: what the family calls the share.
    default: where none is given.
  """
  own, name = rope_parameters(hf), "partial_rotary_factor"
  share = number(own, name, default) if name in own else number(hf, key, default)
  dim = rotary_size(head_dim, share)
  if not 0 <= share <= 1 or dim % 2 > head_dim - dim:
    raise CheckpointError(
      f"config.json: {key}={share!r} rotates {dim} of the {head_dim} features of a "
      "head; they are rotated in pairs, which must fit in it"
    )
  return share


def rope_parameters(hf: dict[str, Any]) -> dict[str, Any]:
  """The rotary settings, from "rope_parameters" (transformers 5) or "rope_scaling".

  Raises:
    CheckpointError: they are no objects, or contradict each other.
  """
  out: dict[str, Any] = {}
  for key in ("rope_scaling", "rope_parameters"):
    given = hf.get(key) or {}
    if not isinstance(given, dict):
      raise CheckpointError(
        f"config.json: {key!r} is {given!r}; it must be an object or null"
      )
    # Null is what an absent key is, but for a switch.
    given = {k: v for k, v in given.items() if v is not None or k == "truncate"}
    if "type" in given:  # the older name
      given = {"rope_type": given["type"]} | given
    for name in sorted(out.keys() & given.keys() - {"type"}):
      if out[name] != given[name]:
        raise CheckpointError(
          f"config.json: {name!r} is {out[name]!r} in 'rope_scaling', but "
          f"{given[name]!r} in 'rope_parameters'; give it once"
        )
    out |= given
  return out


def rope(
  hf: dict[str, Any],
  dim: int,
  parameters: dict[str, Any] | None = None,
  theta: float = 1e4,
) -> tuple[float, RopeScaling | None]:
  """Rotary base and stretch.

  transformers 5 writes them to "rope_parameters"; before, they were "rope_theta" and
  "rope_scaling". Both are read.

  Args:
    hf: config.json.
    dim: the rotated features of a head.
    parameters: the rotary settings when they are not `hf`'s own (Gemma 3 has two).
    theta: the base where none is given.
  """
  if parameters is None:
    parameters = rope_parameters(hf)
  nested = [key for key, value in parameters.items() if isinstance(value, dict)]
  if nested:
    raise CheckpointError(
      f"config.json: rotary settings of their own for {nested} are not supported for "
      f"{hf.get('model_type')} models"
    )
  own = "rope_theta" in parameters
  base = positive(parameters if own else hf, "rope_theta", theta)
  kind = parameters.get("rope_type") or parameters.get("type") or "default"
  if kind == "default":
    return base, None
  if kind in ("linear", "dynamic"):
    scaling = RopeScaling(kind, positive(parameters, "factor"))
    if kind == "dynamic":
      context = size(hf, "max_position_embeddings")
      scaling = dataclasses.replace(scaling, original_positions=context)
    return base, scaling
  if kind not in ("llama3", "yarn", "longrope"):
    raise CheckpointError(
      f"config.json: the rotary scaling {kind!r} is not supported; supported: default, "
      "linear, dynamic, llama3, yarn, longrope"
    )
  # As in transformers: the model's own key goes first (Phi-3 has it there), and a
  # model that names none was made for all of its positions.
  key = "original_max_position_embeddings"
  whole = size(hf, "max_position_embeddings")
  context = size({"model_type": hf.get("model_type"), **parameters}, key, whole)
  context = size(hf, key, context)
  if kind == "llama3":
    scaling = RopeScaling(
      "llama3",
      positive(parameters, "factor", 8.0),
      positive(parameters, "low_freq_factor", 1.0),
      positive(parameters, "high_freq_factor", 4.0),
      context,
    )
    return base, scaling
  factor = positive(parameters, "factor", whole / context)
  if kind == "longrope":
    stretch = math.sqrt(1 + max(0.0, math.log(factor)) / math.log(max(context, 2)))
    scaling = RopeScaling(
      "longrope",
      factor,
      original_positions=context,
      attention_factor=positive(parameters, "attention_factor", stretch),
      short_factors=_factors(parameters, "short_factor", dim),
      long_factors=_factors(parameters, "long_factor", dim),
    )
    return base, scaling
  if base == 1:
    raise CheckpointError("config.json: 'rope_theta' is 1, which yarn cannot stretch")
  m, m_all = (number(parameters, k, 0.0) for k in ("mscale", "mscale_all_dim"))
  stretch = _mscale(factor, 1.0)
  if m and m_all:
    stretch = _mscale(factor, m) / _mscale(factor, m_all)
  truncate = parameters.get("truncate", True)
  if not isinstance(truncate, bool):
    raise CheckpointError(f"config.json: 'truncate' is {truncate!r}; true or false")
  scaling = RopeScaling(
    "yarn",
    factor,
    original_positions=context,
    attention_factor=positive(parameters, "attention_factor", stretch),
    beta_fast=positive(parameters, "beta_fast", 32.0),
    beta_slow=positive(parameters, "beta_slow", 1.0),
    truncate=truncate,
  )
  return base, scaling


def _mscale(factor: float, scale: float) -> float:
  """YaRN's attention factor (arXiv 2309.00071, eq. 22), with DeepSeek's `scale`."""
  return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _factors(parameters: dict[str, Any], key: str, dim: int) -> tuple[float, ...]:
  given, count = parameters.get(key), (dim + 1) // 2
  if not isinstance(given, list) or len(given) != count:
    what = f"a list of {len(given)}" if isinstance(given, list) else repr(given)
    raise CheckpointError(
      f"config.json: {key!r} is {what}; longrope needs a list of {count} numbers, one "
      f"for each pair of the {dim} rotated features"
    )
  named = {f"{key}[{i}]": value for i, value in enumerate(given)}
  return tuple(positive(named, name) for name in named)


def positive(hf: dict[str, Any], key: str, default: float | None = None) -> float:
  """A positive number of config.json; one without a default must be there."""
  if hf.get(key) is None and default is None:
    raise CheckpointError(
      f"config.json: {key!r} is missing; this rotary scaling needs a positive number "
      "there"
    )
  value = number(hf, key, default)
  if value <= 0:
    raise CheckpointError(f"config.json: {key!r} is {value!r}; it must be positive")
  return value


def max_positions(hf: dict[str, Any], scaling: RopeScaling | None) -> int:
  """The longest sequence: "max_position_embeddings", or what a stretch makes of it.

  Of "dynamic" that field is the original context, and yarn is switched on by adding
  its settings alone (as Qwen documents it).
  """
  stretched = 0
  if scaling is not None and scaling.kind in ("yarn", "dynamic"):
    stretched = int(scaling.factor * scaling.original_positions)
  return max(size(hf, "max_position_embeddings", 2048), stretched)


def rope_to_hf(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
  """The reverse of `rope`, in the older spelling, which every version reads."""
  out: dict[str, Any] = {"rope_theta": theta}
  if scaling is None:
    return out
  stretch: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
  out["rope_scaling"] = stretch
  context = "original_max_position_embeddings"
  if scaling.kind == "dynamic":
    out["max_position_embeddings"] = scaling.original_positions
  elif scaling.kind != "linear":
    stretch[context] = scaling.original_positions
  if scaling.kind == "llama3":
    stretch["low_freq_factor"] = scaling.low_freq_factor
    stretch["high_freq_factor"] = scaling.high_freq_factor
  elif scaling.kind == "yarn":
    stretch |= {
      "attention_factor": scaling.attention_factor,
      "beta_fast": scaling.beta_fast,
      "beta_slow": scaling.beta_slow,
      "truncate": scaling.truncate,
    }
  elif scaling.kind == "longrope":
    out[context] = scaling.original_positions  # where transformers 4 looks for it
    stretch |= {
      "attention_factor": scaling.attention_factor,
      "short_factor": list(scaling.short_factors),
      "long_factor": list(scaling.long_factors),
    }
  return out


def windows(hf: dict[str, Any], local: list[bool], window: int | None) -> tuple:
  """Windows of the layers: "layer_types" where it is given, else those of `local`."""
  layers = size(hf, "num_hidden_layers")
  kinds = hf.get("layer_types")
  if not isinstance(kinds, list | None):
    raise CheckpointError(f"config.json: 'layer_types' is {kinds!r:.80}; give a list")
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

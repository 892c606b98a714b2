"""Phi-3, Phi-3.5 and Phi-4: Llama with q, k and v, and gate and up, in one tensor each.

Phi-4-mini rotates three quarters of each head; the long-context ones use longrope.
"""

from __future__ import annotations

from typing import Any

from rlft.models.decoder import DecoderConfig
from rlft.models.families import llama, table
from rlft.models.families.table import Family, Weight

_LAYER = "model.layers.{}"
_FUSED = {
  "attention/q": ("self_attn.qkv_proj", 0, ("heads", "kv_heads", "kv_heads")),
  "attention/k": ("self_attn.qkv_proj", 1, ("heads", "kv_heads", "kv_heads")),
  "attention/v": ("self_attn.qkv_proj", 2, ("heads", "kv_heads", "kv_heads")),
  "mlp/gate": ("mlp.gate_up_proj", 0, ("mlp_width", "mlp_width")),
  "mlp/up": ("mlp.gate_up_proj", 1, ("mlp_width", "mlp_width")),
}
_WEIGHTS = (
  *(
    weight
    for weight in llama.WEIGHTS
    if not weight.path.startswith(tuple(f"layers/{path}" for path in _FUSED))
  ),
  *(
    Weight(f"layers/{path}/kernel", f"{_LAYER}.{name}.weight", True, part, sizes)
    for path, (name, part, sizes) in _FUSED.items()
  ),
)
_CONTEXT = "original_max_position_embeddings"


def _from_hf(hf: dict[str, Any]) -> DecoderConfig:
  parameters = table.rope_parameters(hf)
  kind = parameters.get("rope_type", "default")
  if kind in ("su", "yarn"):  # what the first releases called longrope
    parameters["rope_type"] = "longrope"
  elif kind != "default":
    named = {"model_type": hf.get("model_type"), "rope_type": kind}
    table.refuse(named, rope_type="longrope")
  hf = {k: v for k, v in hf.items() if k != "rope_scaling"}
  hf = {_CONTEXT: 4096, **hf, "rope_parameters": parameters}
  window = hf.get("sliding_window")
  if window is not None:
    window = table.size(hf, "sliding_window")
  local = [True] * table.size(hf, "num_hidden_layers")
  windows = table.windows(hf, local, window)
  return DecoderConfig(**llama.settings(hf, partial=True, windows=windows))


def _to_hf(config: DecoderConfig) -> dict[str, Any]:
  out = llama.to_settings(config)
  # Without a stretch it is not used, but transformers checks that it is there.
  context = {_CONTEXT: min(config.max_positions, 4096)}
  return (
    context
    | out
    | {
      "partial_rotary_factor": config.rope_fraction,
      "sliding_window": config.windows[0] if config.windows else None,
    }
  )


PHI3 = Family("Phi3ForCausalLM", "phi3", "model.", _WEIGHTS, _from_hf, _to_hf)

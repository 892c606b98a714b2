"""Llama 2 and 3.x; its names and most of its settings serve other families too."""

from __future__ import annotations

from typing import Any

from rlft.core.errors import CheckpointError
from rlft.models.decoder import DecoderConfig
from rlft.models.families import table
from rlft.models.families.table import Family, Weight, linear, norm
from rlft.models.rope import rotary_size

_LAYER = "model.layers.{}"
TRUNK = (
  Weight("embedding", "model.embed_tokens.weight"),
  *norm("layers/attention_norm", f"{_LAYER}.input_layernorm"),
  *linear("layers/attention/q", f"{_LAYER}.self_attn.q_proj"),
  *linear("layers/attention/k", f"{_LAYER}.self_attn.k_proj"),
  *linear("layers/attention/v", f"{_LAYER}.self_attn.v_proj"),
  *linear("layers/attention/o", f"{_LAYER}.self_attn.o_proj"),
  Weight("layers/attention/q_norm/scale", f"{_LAYER}.self_attn.q_norm.weight"),
  Weight("layers/attention/k_norm/scale", f"{_LAYER}.self_attn.k_norm.weight"),
  *linear("layers/mlp/gate", f"{_LAYER}.mlp.gate_proj"),
  *linear("layers/mlp/up", f"{_LAYER}.mlp.up_proj"),
  *linear("layers/mlp/down", f"{_LAYER}.mlp.down_proj"),
  *norm("final_norm", "model.norm"),
  Weight("head", "lm_head.weight", transpose=True),
)
WEIGHTS = (*TRUNK, *norm("layers/mlp_norm", f"{_LAYER}.post_attention_layernorm"))


def settings(hf: dict[str, Any], partial: bool = False, **other: Any) -> dict[str, Any]:
  """What Llama, Mistral, Qwen, Gemma and Phi read in the same way; `other` wins.

  `partial` says whether a share of each head may stay without rotation.
  """
  table.refuse(hf, use_bidirectional_attention=False)
  width, heads = table.size(hf, "hidden_size"), table.size(hf, "num_attention_heads")
  head_dim = table.size(hf, "head_dim", width // heads)
  kv_heads = table.size(hf, "num_key_value_heads", heads)
  if heads % kv_heads:
    raise CheckpointError(
      f"config.json: 'num_attention_heads' is {heads}, which is not a multiple of "
      f"'num_key_value_heads', {kv_heads}"
    )
  fraction = table.rotary_share(hf, head_dim, "partial_rotary_factor", 1.0)
  if fraction != 1.0 and not partial:
    table.refuse(
      {"model_type": hf.get("model_type"), "partial_rotary_factor": fraction},
      partial_rotary_factor=1.0,
    )
  dim = rotary_size(head_dim, fraction)
  theta, scaling = other.pop("rope", None) or table.rope(hf, dim)
  shared = {
    "vocab_size": table.size(hf, "vocab_size"),
    "width": width,
    "layers": table.size(hf, "num_hidden_layers"),
    "heads": heads,
    "kv_heads": kv_heads,
    "head_dim": head_dim,
    "mlp_width": table.size(hf, "intermediate_size"),
    "max_positions": table.max_positions(hf, scaling),
    "norm_eps": table.positive(hf, "rms_norm_eps", 1e-6),
    "activation": table.activation(hf.get("hidden_act") or "silu"),
    "rope_theta": theta,
    "rope_fraction": fraction,
    "rope_scaling": scaling,
    "tie_embeddings": table.flag(hf, "tie_word_embeddings", False),
  }
  return shared | other


def to_settings(config: DecoderConfig) -> dict[str, Any]:
  """The reverse of `settings`."""
  activation = {"gelu_tanh": "gelu_pytorch_tanh"}.get(
    config.activation, config.activation
  )
  return {
    "vocab_size": config.vocab_size,
    "hidden_size": config.width,
    "num_hidden_layers": config.layers,
    "num_attention_heads": config.heads,
    "num_key_value_heads": config.kv_heads,
    "head_dim": config.head_dim,
    "intermediate_size": config.mlp_width,
    "max_position_embeddings": config.max_positions,
    "rms_norm_eps": config.norm_eps,
    "hidden_act": activation,
    "tie_word_embeddings": config.tie_embeddings,
    **table.rope_to_hf(config.rope_theta, config.rope_scaling),
  }


def _from_hf(hf: dict[str, Any]) -> DecoderConfig:
  bias = table.flag(hf, "attention_bias", False)
  mlp_bias = table.flag(hf, "mlp_bias", False)
  return DecoderConfig(**settings(hf), qkv_bias=bias, out_bias=bias, mlp_bias=mlp_bias)


def _to_hf(config: DecoderConfig) -> dict[str, Any]:
  return to_settings(config) | {
    "attention_bias": config.qkv_bias,
    "mlp_bias": config.mlp_bias,
  }


LLAMA = Family("LlamaForCausalLM", "llama", "model.", WEIGHTS, _from_hf, _to_hf)

"""OPT: learned positions from row 2 on; the 350m norms after the residual sum.

OPT-350m also embeds in fewer dimensions than it computes in, and has no final norm.
"""

from __future__ import annotations

from typing import Any

from rlft.models.decoder import DecoderConfig
from rlft.models.families import table
from rlft.models.families.table import Family, Weight, linear, norm

_LAYER = "model.decoder.layers.{}"
_WEIGHTS = (
  Weight("embedding", "model.decoder.embed_tokens.weight"),
  Weight("position_embedding", "model.decoder.embed_positions.weight"),
  *linear("project_in", "model.decoder.project_in"),
  *linear("project_out", "model.decoder.project_out"),
  *norm("layers/attention_norm", f"{_LAYER}.self_attn_layer_norm"),
  *linear("layers/attention/q", f"{_LAYER}.self_attn.q_proj"),
  *linear("layers/attention/k", f"{_LAYER}.self_attn.k_proj"),
  *linear("layers/attention/v", f"{_LAYER}.self_attn.v_proj"),
  *linear("layers/attention/o", f"{_LAYER}.self_attn.out_proj"),
  *norm("layers/mlp_norm", f"{_LAYER}.final_layer_norm"),
  *linear("layers/mlp/up", f"{_LAYER}.fc1"),
  *linear("layers/mlp/down", f"{_LAYER}.fc2"),
  *norm("final_norm", "model.decoder.final_layer_norm"),
  Weight("head", "lm_head.weight", transpose=True),
)


def _from_hf(hf: dict[str, Any]) -> DecoderConfig:
  table.refuse(hf, layer_norm_elementwise_affine=True)
  width, heads = table.size(hf, "hidden_size"), table.size(hf, "num_attention_heads")
  before = table.flag(hf, "do_layer_norm_before", True)
  embed = table.size(hf, "word_embed_proj_dim", width)
  bias = table.flag(hf, "enable_bias", True)
  return DecoderConfig(
    vocab_size=table.size(hf, "vocab_size"),
    width=width,
    layers=table.size(hf, "num_hidden_layers"),
    heads=heads,
    kv_heads=heads,
    head_dim=table.head_size(hf, width, heads),
    mlp_width=table.size(hf, "ffn_dim"),
    max_positions=table.size(hf, "max_position_embeddings", 2048),
    norm="layer",
    norm_eps=1e-5,  # torch's default; not in config.json
    norm_placement="pre" if before else "post",
    final_norm=before and not table.flag(hf, "_remove_final_layer_norm", False),
    activation=table.activation(hf.get("activation_function") or "relu"),
    gated_mlp=False,
    qkv_bias=bias,
    out_bias=bias,
    mlp_bias=bias,
    positions="learned",
    position_offset=2,
    embed_width=None if embed == width else embed,
    tie_embeddings=table.flag(hf, "tie_word_embeddings", True),
  )


def _to_hf(config: DecoderConfig) -> dict[str, Any]:
  before = config.norm_placement == "pre"
  activation = {"gelu_tanh": "gelu_new"}.get(config.activation, config.activation)
  return {
    "vocab_size": config.vocab_size,
    "hidden_size": config.width,
    "num_hidden_layers": config.layers,
    "num_attention_heads": config.heads,
    "ffn_dim": config.mlp_width,
    "max_position_embeddings": config.max_positions,
    "do_layer_norm_before": before,
    "_remove_final_layer_norm": before and not config.final_norm,
    "activation_function": activation,
    "enable_bias": config.qkv_bias,
    "word_embed_proj_dim": config.output_width,
    "tie_word_embeddings": config.tie_embeddings,
  }


OPT = Family("OPTForCausalLM", "opt", "model.", _WEIGHTS, _from_hf, _to_hf)

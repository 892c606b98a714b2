"""GPT-2: learned positions, layer norms with biases, q, k and v in one Conv1D."""

from __future__ import annotations

from typing import Any

from rlft.models.decoder import DecoderConfig
from rlft.models.families import table
from rlft.models.families.table import Family, Weight, norm

_LAYER = "transformer.h.{}"


def _conv1d(path: str, name: str, part: int | None = None) -> tuple[Weight, Weight]:
  """GPT-2's "Conv1D" is a linear layer stored [in, out]."""
  return (
    Weight(f"{path}/kernel", f"{name}.weight", part=part),
    Weight(f"{path}/bias", f"{name}.bias", part=part),
  )


_WEIGHTS = (
  Weight("embedding", "transformer.wte.weight"),
  Weight("position_embedding", "transformer.wpe.weight"),
  *norm("layers/attention_norm", f"{_LAYER}.ln_1"),
  *_conv1d("layers/attention/q", f"{_LAYER}.attn.c_attn", part=0),
  *_conv1d("layers/attention/k", f"{_LAYER}.attn.c_attn", part=1),
  *_conv1d("layers/attention/v", f"{_LAYER}.attn.c_attn", part=2),
  *_conv1d("layers/attention/o", f"{_LAYER}.attn.c_proj"),
  *norm("layers/mlp_norm", f"{_LAYER}.ln_2"),
  *_conv1d("layers/mlp/up", f"{_LAYER}.mlp.c_fc"),
  *_conv1d("layers/mlp/down", f"{_LAYER}.mlp.c_proj"),
  *norm("final_norm", "transformer.ln_f"),
  Weight("head", "lm_head.weight", transpose=True),
)


def _from_hf(hf: dict[str, Any]) -> DecoderConfig:
  table.refuse(hf, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
  width, heads = table.size(hf, "n_embd"), table.size(hf, "n_head")
  scaled = table.flag(hf, "scale_attn_weights", True)
  return DecoderConfig(
    vocab_size=table.size(hf, "vocab_size"),
    width=width,
    layers=table.size(hf, "n_layer"),
    heads=heads,
    kv_heads=heads,
    head_dim=table.head_size(hf, width, heads),
    mlp_width=table.size(hf, "n_inner", 4 * width),
    max_positions=table.size(hf, "n_positions", 1024),
    norm="layer",
    norm_eps=table.positive(hf, "layer_norm_epsilon", 1e-5),
    activation=table.activation(hf.get("activation_function") or "gelu_new"),
    gated_mlp=False,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    positions="learned",
    attention_scale=None if scaled else 1.0,
    tie_embeddings=table.flag(hf, "tie_word_embeddings", True),
  )


def _to_hf(config: DecoderConfig) -> dict[str, Any]:
  activation = {"gelu_tanh": "gelu_new"}.get(config.activation, config.activation)
  return {
    "vocab_size": config.vocab_size,
    "n_embd": config.width,
    "n_layer": config.layers,
    "n_head": config.heads,
    "n_inner": config.mlp_width,
    "n_positions": config.max_positions,
    "layer_norm_epsilon": config.norm_eps,
    "activation_function": activation,
    "scale_attn_weights": config.attention_scale is None,
    "tie_word_embeddings": config.tie_embeddings,
  }


GPT2 = Family("GPT2LMHeadModel", "gpt2", "transformer.", _WEIGHTS, _from_hf, _to_hf)

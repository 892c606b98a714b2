"""GPT-NeoX and Pythia: parallel or serial residual, rotary on a share of each head."""

from __future__ import annotations

from typing import Any

from rlft.models.decoder import DecoderConfig
from rlft.models.families import table
from rlft.models.families.table import Family, Weight, linear, norm
from rlft.models.rope import rotary_size

_LAYER = "gpt_neox.layers.{}"


def _fused(path: str, part: int) -> tuple[Weight, Weight]:
  """q, k and v of each head lie together in one tensor."""
  name = f"{_LAYER}.attention.query_key_value"
  fused = {"part": part, "per_head": True}
  return (
    Weight(f"{path}/kernel", f"{name}.weight", transpose=True, **fused),
    Weight(f"{path}/bias", f"{name}.bias", **fused),
  )


_WEIGHTS = (
  Weight("embedding", "gpt_neox.embed_in.weight"),
  *norm("layers/attention_norm", f"{_LAYER}.input_layernorm"),
  *_fused("layers/attention/q", part=0),
  *_fused("layers/attention/k", part=1),
  *_fused("layers/attention/v", part=2),
  *linear("layers/attention/o", f"{_LAYER}.attention.dense"),
  *norm("layers/mlp_norm", f"{_LAYER}.post_attention_layernorm"),
  *linear("layers/mlp/up", f"{_LAYER}.mlp.dense_h_to_4h"),
  *linear("layers/mlp/down", f"{_LAYER}.mlp.dense_4h_to_h"),
  *norm("final_norm", "gpt_neox.final_layer_norm"),
  Weight("head", "embed_out.weight", transpose=True),
)


def _from_hf(hf: dict[str, Any]) -> DecoderConfig:
  width, heads = table.size(hf, "hidden_size"), table.size(hf, "num_attention_heads")
  bias = table.flag(hf, "attention_bias", True)
  head_dim = table.head_size(hf, width, heads)
  fraction = table.rotary_share(hf, head_dim, "rotary_pct", 0.25)
  base = table.positive(hf, "rotary_emb_base", 1e4)
  other = {k: v for k, v in hf.items() if k != "rope_theta"}  # of other families
  theta, scaling = table.rope(other, rotary_size(head_dim, fraction), theta=base)
  return DecoderConfig(
    vocab_size=table.size(hf, "vocab_size"),
    width=width,
    layers=table.size(hf, "num_hidden_layers"),
    heads=heads,
    kv_heads=heads,
    head_dim=head_dim,
    mlp_width=table.size(hf, "intermediate_size"),
    max_positions=table.max_positions(hf, scaling),
    norm="layer",
    norm_eps=table.positive(hf, "layer_norm_eps", 1e-5),
    parallel_residual=table.flag(hf, "use_parallel_residual", True),
    activation=table.activation(hf.get("hidden_act") or "gelu"),
    gated_mlp=False,
    qkv_bias=bias,
    out_bias=bias,
    mlp_bias=True,
    rope_theta=theta,
    rope_fraction=fraction,
    rope_scaling=scaling,
    tie_embeddings=table.flag(hf, "tie_word_embeddings", False),
  )


def _to_hf(config: DecoderConfig) -> dict[str, Any]:
  rope = table.rope_to_hf(config.rope_theta, config.rope_scaling)
  rope["rotary_emb_base"] = rope.pop("rope_theta")
  activation = {"gelu_tanh": "gelu_new"}.get(config.activation, config.activation)
  return {
    "vocab_size": config.vocab_size,
    "hidden_size": config.width,
    "num_hidden_layers": config.layers,
    "num_attention_heads": config.heads,
    "intermediate_size": config.mlp_width,
    "max_position_embeddings": config.max_positions,
    "layer_norm_eps": config.norm_eps,
    "use_parallel_residual": config.parallel_residual,
    "hidden_act": activation,
    "attention_bias": config.qkv_bias,
    "rotary_pct": config.rope_fraction,
    "tie_word_embeddings": config.tie_embeddings,
    **rope,
  }


NEOX = Family("GPTNeoXForCausalLM", "gpt_neox", "gpt_neox.", _WEIGHTS, _from_hf, _to_hf)

"""Makes tests/golden/models: one tiny random checkpoint and its log-probs per family.

  pip install torch transformers
  python tests/golden/make_models.py [NAME ...]

Each folder holds config.json and model.safetensors as `transformers` saves them, and
golden.npz with a left- and a right-padded batch (leading axis of every array):

  tokens int32 [2, B, T]   random ids, under the pads too
  mask   bool  [2, B, T]   True on real tokens
  logp   float32 [2, B, T] log-prob of the token at t given the real tokens before it;
                           0 for a row's first token and where masked

The reference is transformers' eager attention in float32, with positions counted from
the mask. Weights are drawn far wider than `initializer_range`, norms and biases
included, so that a wrong epsilon, window, scale or frequency moves the log-probs.
"""

from __future__ import annotations

import pathlib
import sys

import numpy as np
import torch
import transformers as tf

T = 24
LENGTHS = (24, 17, 9)

_GQA = {
  "vocab_size": 72,
  "hidden_size": 32,
  "intermediate_size": 40,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 128,
  "rms_norm_eps": 0.01,
  "pad_token_id": None,
  "bos_token_id": 1,
  "eos_token_id": 2,
}
_LLAMA3 = {
  "rope_type": "llama3",
  "rope_theta": 500.0,
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  # With heads of 8: one frequency is kept, one blended, two are stretched.
  "original_max_position_embeddings": 32,
}
_YARN = {
  "rope_type": "yarn",
  "rope_theta": 100.0,
  "factor": 4.0,
  # With heads of 8: one frequency is kept, two are blended, one is stretched.
  "original_max_position_embeddings": 16,
  "beta_fast": 2.0,
  "beta_slow": 0.1,
}
# Rows of 24 and 17 tokens lie beyond the original context, one of 9 within.
_LONGROPE = {
  "rope_type": "longrope",
  "rope_theta": 100.0,
  "short_factor": [1.0, 1.2, 1.5],
  "long_factor": [1.5, 3.0, 9.0],
  "original_max_position_embeddings": 12,
}
_DYNAMIC = {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 100.0}
_GEMMA = {"head_dim": 12, "hidden_activation": "gelu_pytorch_tanh"}
_NEOX = {
  "vocab_size": 72,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "max_position_embeddings": 64,
  "hidden_act": "gelu",
  "layer_norm_eps": 0.01,
  "bos_token_id": 0,
  "eos_token_id": 0,
}
_OPT = {
  "vocab_size": 72,
  "hidden_size": 32,
  "ffn_dim": 48,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "max_position_embeddings": 40,
}


def _rope(theta: float, **more) -> dict:
  return dict(rope_type="default", rope_theta=theta, **more)


MODELS = {
  "llama": lambda: tf.LlamaConfig(
    **_GQA, rope_parameters=_rope(1e4), tie_word_embeddings=False
  ),
  "llama3_scaled": lambda: tf.LlamaConfig(
    **_GQA, rope_parameters=_LLAMA3, tie_word_embeddings=True
  ),
  "llama_bias": lambda: tf.LlamaConfig(
    **_GQA, head_dim=12, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
  ),
  "mistral": lambda: tf.MistralConfig(
    **_GQA, sliding_window=6, rope_parameters=_rope(1e4)
  ),
  "qwen2": lambda: tf.Qwen2Config(
    **_GQA, rope_parameters=_rope(1e6), tie_word_embeddings=True
  ),
  "qwen2_window": lambda: tf.Qwen2Config(
    **(_GQA | {"num_hidden_layers": 4}),
    use_sliding_window=True,
    sliding_window=5,
    max_window_layers=3,
    rope_parameters=_rope(1e6),
  ),
  "qwen2_yarn": lambda: tf.Qwen2Config(
    **(_GQA | {"max_position_embeddings": 64}), rope_parameters=dict(_YARN)
  ),
  "llama_dynamic": lambda: tf.LlamaConfig(
    **(_GQA | {"max_position_embeddings": 12}), rope_parameters=dict(_DYNAMIC)
  ),
  "phi3_longrope": lambda: tf.Phi3Config(
    **(_GQA | {"max_position_embeddings": 64}),
    original_max_position_embeddings=12,
    rope_parameters=dict(_LONGROPE, partial_rotary_factor=0.75),
    sliding_window=20,
    tie_word_embeddings=True,
  ),
  "qwen3": lambda: tf.Qwen3Config(
    **_GQA, head_dim=12, rope_parameters=_rope(1e6), tie_word_embeddings=False
  ),
  "gemma": lambda: tf.GemmaConfig(
    **(_GQA | {"num_key_value_heads": 1}),
    head_dim=12,
    hidden_act="gelu_pytorch_tanh",
  ),
  "gemma2": lambda: tf.Gemma2Config(
    **(_GQA | {"num_hidden_layers": 4}),
    **_GEMMA,
    sliding_window=5,
    query_pre_attn_scalar=7,
    attn_logit_softcapping=3.0,
    final_logit_softcapping=5.0,
  ),
  "gemma3_text": lambda: tf.Gemma3TextConfig(
    # 7 layers of a pattern of 6: five local, one global, and a remainder.
    **(_GQA | {"num_hidden_layers": 7, "hidden_size": 24, "intermediate_size": 32}),
    **_GEMMA,
    sliding_window=5,
    query_pre_attn_scalar=7,
    rope_parameters={
      "sliding_attention": _rope(100.0),
      "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4},
    },
  ),
  "gpt2": lambda: tf.GPT2Config(
    vocab_size=72,
    n_positions=40,
    n_embd=32,
    n_layer=2,
    n_head=4,
    layer_norm_epsilon=0.01,
    bos_token_id=71,
    eos_token_id=71,
  ),
  "gpt_neox": lambda: tf.GPTNeoXConfig(
    **_NEOX, use_parallel_residual=True, rope_parameters=_rope(1e4)
  ),
  "gpt_neox_serial": lambda: tf.GPTNeoXConfig(
    # A head size that is no multiple of the number of heads, as in GPT-NeoX-20B.
    **(
      _NEOX | {"hidden_size": 30, "num_attention_heads": 3, "hidden_act": "gelu_fast"}
    ),
    use_parallel_residual=False,
    # 5 of 10 features, which are rotated in pairs: 6.
    rope_parameters=_rope(1e4, partial_rotary_factor=0.5),
  ),
  "opt": lambda: tf.OPTConfig(**_OPT, do_layer_norm_before=True),
  "opt_350m": lambda: tf.OPTConfig(
    **_OPT, do_layer_norm_before=False, word_embed_proj_dim=20
  ),
}


def randomise(model: torch.nn.Module, seed: int) -> None:
  """Draws every parameter: fan-in scaled matrices, norms about 1, biases about 0."""
  generator = torch.Generator().manual_seed(seed)
  # Gemma's norms multiply by 1 + weight: their weights are about 0.
  centre = 0.0 if type(model).__name__.startswith("Gemma") else 1.0
  for name, p in model.named_parameters():
    noise = torch.randn(p.shape, generator=generator)
    if "norm" in name or "ln_" in name:
      value = 0.3 * noise + (centre if name.endswith("weight") else 0.0)
    elif p.ndim == 1:
      value = 0.3 * noise
    elif any(word in name for word in ("embed", "wte", "wpe")):
      value = 0.6 * noise
    else:
      # Conv1D of GPT-2 is [in, out], Linear [out, in].
      fan_in = p.shape[0] if type(model).__name__.startswith("GPT2") else p.shape[1]
      value = 1.2 * noise / fan_in**0.5
    p.data.copy_(value)


def batches(vocab_size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """The same rows padded on the left and on the right, random ids under the pads."""
  rng = np.random.default_rng(seed)
  rows = [rng.integers(vocab_size, size=n) for n in LENGTHS]
  tokens = rng.integers(vocab_size, size=(2, len(rows), T)).astype(np.int32)
  mask = np.zeros((2, len(rows), T), bool)
  for b, row in enumerate(rows):
    tokens[0, b, T - len(row) :] = row
    tokens[1, b, : len(row)] = row
    mask[0, b, T - len(row) :] = True
    mask[1, b, : len(row)] = True
  return tokens, mask


def token_logp(model, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """Each row alone: else the longest one's rotation would be that of all rows."""
  return np.concatenate(
    [_token_logp(model, tokens[b : b + 1], mask[b : b + 1]) for b in range(len(mask))]
  )


def _token_logp(model, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
  positions = np.maximum(np.cumsum(mask, -1) - 1, 0)
  with torch.no_grad():
    # A short text first: "dynamic" goes on with the rotation of a longer one else.
    model(input_ids=torch.zeros((1, 1), dtype=torch.long), use_cache=False)
    logits = model(
      input_ids=torch.tensor(tokens, dtype=torch.long),
      attention_mask=torch.tensor(mask, dtype=torch.long),
      position_ids=torch.tensor(positions, dtype=torch.long),
      use_cache=False,
    ).logits
  logp = torch.log_softmax(logits.float(), -1)[:, :-1]
  target = torch.tensor(tokens[:, 1:, None], dtype=torch.long)
  out = np.zeros(tokens.shape, np.float32)
  out[:, 1:] = torch.gather(logp, -1, target)[..., 0].numpy()
  real = mask.copy()
  real[:, 1:] &= mask[:, :-1]
  real[:, 0] = False
  return np.where(real, out, 0.0).astype(np.float32)


def make(name: str, folder: pathlib.Path) -> None:
  config = MODELS[name]()
  config._attn_implementation = "eager"
  seed = sum(name.encode())
  torch.manual_seed(seed)
  model = tf.AutoModelForCausalLM.from_config(config).eval().float()
  randomise(model, seed)
  model.save_pretrained(folder)
  (folder / "generation_config.json").unlink(missing_ok=True)
  tokens, mask = batches(config.vocab_size, seed)
  logp = np.stack([token_logp(model, t, m) for t, m in zip(tokens, mask)])
  left, right = (logp[s][mask[s]] for s in (0, 1))
  assert np.abs(left - right).max() < 1e-4, f"{name}: the reference moves with pads"
  np.savez_compressed(folder / "golden.npz", tokens=tokens, mask=mask, logp=logp)
  size = sum(f.stat().st_size for f in folder.iterdir())
  print(f"{name:16s} {size:7d} bytes  logp {left.min():.2f} .. {left.max():.2f}")


if __name__ == "__main__":
  torch.set_num_threads(1)
  here = pathlib.Path(__file__).parent / "models"
  for name in sys.argv[1:] or MODELS:
    make(name, here / name)

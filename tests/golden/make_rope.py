"""Makes tests/golden/rope.json: rotary frequencies as transformers computes them.

  pip install torch transformers
  python tests/golden/make_rope.py

A list of cases: what config.json says beyond _BASE, how many tokens a text has, and the
frequencies and the factor on cosine and sine that transformers then takes.
"""

from __future__ import annotations

import copy
import json
import pathlib

import torch
import transformers as tf

_BASE = {
  "vocab_size": 8,
  "hidden_size": 64,
  "intermediate_size": 8,
  "num_hidden_layers": 1,
  "num_attention_heads": 2,
  "max_position_embeddings": 128,
  "rope_theta": 1000.0,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
_LONG = {
  "rope_type": "longrope",
  "short_factor": [1.0 + 0.1 * i for i in range(16)],
  "long_factor": [1.0 + 0.5 * i for i in range(16)],
}
_CONTEXT = "original_max_position_embeddings"

CASES = (
  ({"rope_scaling": {"type": "linear", "factor": 4}}, 10),
  ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 10),
  ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 128),
  ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 129),
  ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, 400),
  ({"rope_scaling": _YARN}, 10),
  ({"rope_scaling": _YARN | {"beta_fast": 8, "beta_slow": 2}}, 10),
  ({"rope_scaling": _YARN | {"truncate": False}}, 10),
  ({"rope_scaling": _YARN | {"attention_factor": 0.7}}, 10),
  ({"rope_scaling": _YARN | {"mscale": 0.707, "mscale_all_dim": 0.5}}, 10),
  ({"rope_scaling": _YARN | {"mscale": 1.0}}, 10),
  ({"rope_scaling": _YARN | {"factor": None}}, 10),
  ({"rope_scaling": _YARN | {"factor": 1.0}}, 10),
  ({"rope_scaling": {"type": "yarn", "factor": 16.0}}, 10),
  ({"rope_scaling": _YARN, "rope_theta": 1e6, _CONTEXT: 64}, 10),
  ({"rope_parameters": _YARN | {"rope_theta": 500.0}}, 10),
  ({"rope_scaling": _LONG | {_CONTEXT: 32}}, 32),
  ({"rope_scaling": _LONG | {_CONTEXT: 32}}, 33),
  ({"rope_scaling": _LONG, _CONTEXT: 64}, 65),
  ({"rope_scaling": _LONG | {"factor": 8.0}, _CONTEXT: 64}, 64),
  ({"rope_scaling": _LONG | {"attention_factor": 1.5, _CONTEXT: 32}}, 33),
  ({"rope_scaling": _LONG}, 100),
)


def case(more: dict, length: int) -> dict:
  config = tf.LlamaConfig(**copy.deepcopy(_BASE | more))
  rotary = tf.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
  rotary(torch.zeros(1), torch.arange(length)[None])
  return {
    "config": _BASE | more,
    "length": length,
    "frequencies": rotary.inv_freq.tolist(),
    "attention_factor": float(rotary.attention_scaling),
  }


if __name__ == "__main__":
  path = pathlib.Path(__file__).with_name("rope.json")
  made = [case(more, length) for more, length in CASES]
  path.write_text("[\n" + ",\n".join(map(json.dumps, made)) + "\n]\n")

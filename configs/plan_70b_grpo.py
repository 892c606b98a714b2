"""GRPO of a 70B model, 8 samples a prompt, on 256 v5p chips.

For `rlft plan`, as configs/plan_7b_ppo.py; the model is Llama 3 70B by its config.json.

  rlft plan --config=configs/plan_70b_grpo.py --topology=v5p:4x8x8
"""

import dataclasses

from ml_collections import ConfigDict

from rlft.models import families

LLAMA_3_70B = dict(
  architectures=["LlamaForCausalLM"],
  hidden_act="silu",
  hidden_size=8192,
  intermediate_size=28672,
  max_position_embeddings=8192,
  num_attention_heads=64,
  num_hidden_layers=80,
  num_key_value_heads=8,
  rms_norm_eps=1e-5,
  rope_theta=500000.0,
  tie_word_embeddings=False,
  vocab_size=128256,
)


def get_config() -> ConfigDict:
  decoder = families.resolve(LLAMA_3_70B).from_hf(LLAMA_3_70B)
  return ConfigDict(
    dict(
      model=dict(decoder=dataclasses.asdict(decoder), dtype="bfloat16"),
      mesh=dict(data=-1, fsdp=32, tensor=8),
      grpo=dict(
        optimizer=dict(learning_rate=1e-6, schedule="linear", eps=1e-5),
        loss=dict(kl_coef=0.04),
        prompts_per_iteration=128,
        samples_per_prompt=8,
        max_new_tokens=1024,
        minibatches=4,
        compute_dtype="bfloat16",
        remat="full",
        max_rows=1024,
        max_tokens=262144,
      ),
    )
  )

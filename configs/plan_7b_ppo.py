"""PPO of a 7B model on a pod: policy, reference, value and reward model.

For `rlft plan`, which needs no weights: the model is Llama 2 7B by its config.json. For
a run set `--config.model.path=DIR --config.model.decoder=none`, a task and a reward
model.

  rlft plan --config=configs/plan_7b_ppo.py --topology=v5e:16x16
  rlft plan --config=configs/plan_7b_ppo.py:v5p --topology=v5p:4x4x4

What it needs and what bounds it: launch/PLANS.md.
"""

import dataclasses

from ml_collections import ConfigDict

from rlft.models import families

LLAMA_2_7B = dict(
  architectures=["LlamaForCausalLM"],
  hidden_act="silu",
  hidden_size=4096,
  intermediate_size=11008,
  max_position_embeddings=4096,
  num_attention_heads=32,
  num_hidden_layers=32,
  num_key_value_heads=32,
  rms_norm_eps=1e-5,
  rope_theta=10000.0,
  tie_word_embeddings=False,
  vocab_size=32000,
)
# Rows of an iteration, which are all in flight, and the mesh; data takes what is left.
SHAPES = {
  "v5e": dict(rows=1024, fsdp=32, tensor=8, max_tokens=131072),
  "v5p": dict(rows=1024, fsdp=16, tensor=4, max_tokens=131072),
}


def get_config(shape: str = "v5e") -> ConfigDict:
  """`:v5e` for 256 of these chips, `:v5p` for 64."""
  sizes = SHAPES[shape]
  adam = lambda rate: dict(learning_rate=rate, schedule="linear", eps=1e-5)
  decoder = families.resolve(LLAMA_2_7B).from_hf(LLAMA_2_7B)
  return ConfigDict(
    dict(
      model=dict(decoder=dataclasses.asdict(decoder), dtype="bfloat16"),
      mesh=dict(data=-1, fsdp=sizes["fsdp"], tensor=sizes["tensor"]),
      reward=dict(kind="reward_model", model="runs/reward_model/model"),
      ppo=dict(
        optimizer=adam(1e-6),
        value_optimizer=adam(1e-5),
        prompts_per_iteration=sizes["rows"],
        samples_per_prompt=1,
        max_new_tokens=512,
        epochs=1,
        minibatches=4,
        compute_dtype="bfloat16",
        remat="full",
        max_rows=sizes["rows"],
        max_tokens=sizes["max_tokens"],
      ),
    )
  )

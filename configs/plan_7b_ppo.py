from __future__ import annotations
import dataclasses
from ml_collections import ConfigDict
from rlft.models import families
LLAMA = dict(
  architectures=["LlamaForCausalLM"], vocab_size=32000, hidden_size=4096, intermediate_size=11008,
  num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=4096,
  rms_norm_eps=1e-5, hidden_act="silu", tie_word_embeddings=False)
def get_config(shape: str = "256"):
  return ConfigDict(dict(
    model=dict(decoder=dataclasses.asdict(families.resolve(LLAMA).from_hf(LLAMA)), dtype="bfloat16"),
    mesh=dict(data=-1, fsdp=32, tensor=8),
    reward=dict(kind="reward_model", model="runs/reward_model/model"),
    ppo=dict(prompts_per_iteration=512, samples_per_prompt=1, max_new_tokens=512, epochs=1, minibatches=4, micro_batches=1,
      compute_dtype="bfloat16", remat="full", max_rows=512, max_tokens=65536),
  ))

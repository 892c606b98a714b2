"""Makes tests/golden/peft: adapters on the golden models, and what PEFT computes.

  pip install torch transformers peft
  python tests/golden/make_peft.py

Each folder is an adapter as PEFT saves it, its base named by a path. golden.npz holds
the log-probs of the base's first rows ("logp", as in tests/golden/models), or a
classifier's score of each row alone ("scores"), before PEFT merges anything.
"""

from __future__ import annotations

import json
import pathlib
import shutil

import numpy as np
import peft
import torch
import transformers as tf

HERE = pathlib.Path(__file__).parent
ALL = "all-linear"
# name -> (base, tokens that are added, settings)
ADAPTERS = {
  "llama": (
    "llama",
    0,
    {
      "target_modules": ["q_proj", "v_proj", "down_proj", "lm_head"],
      "use_rslora": True,
      "rank_pattern": {"layers.1.self_attn.q_proj": 4, "down_proj": 3},
      "alpha_pattern": {r"^model\.layers\.(0|1)\.mlp\.down_proj": 5},
    },
  ),
  "llama_added": (
    "llama",
    2,
    {"target_modules": ALL, "modules_to_save": ["embed_tokens", "lm_head", "norm"]},
  ),
  "gpt2": (
    "gpt2",
    0,
    {
      "target_modules": ["c_attn", "c_proj", "c_fc"],
      "fan_in_fan_out": True,
      "modules_to_save": ["ln_f"],
    },
  ),
  "gpt2_ends": ("gpt2", 0, {"target_modules": ["wte", "wpe"], "fan_in_fan_out": True}),
  "gpt_neox": ("gpt_neox", 0, {"target_modules": ALL}),
  "phi3": ("phi3_longrope", 0, {"target_modules": ["qkv_proj", "gate_up_proj"]}),
  "opt": ("opt", 0, {"target_modules": ["q_proj", "fc1"]}),
  "gemma_embedding": (
    "gemma",
    0,
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
  ),
  "qwen2_head": ("qwen2", 0, {"target_modules": ["k_proj", "lm_head"]}),
  "qwen2_both": (
    "qwen2",
    0,
    {"target_modules": ["k_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
  ),
  "qwen2_added": ("qwen2", 2, {"target_modules": ["o_proj"]}),
  "llama_reward": ("llama", 0, {"task_type": "SEQ_CLS", "target_modules": ["q_proj"]}),
}


def make(name: str, base: str, added: int, settings: dict) -> None:
  torch.manual_seed(len(name))
  folder, path = HERE / "models" / base, HERE / "peft" / name
  scores = settings.get("task_type") == "SEQ_CLS"
  kind = tf.AutoModelForSequenceClassification if scores else tf.AutoModelForCausalLM
  more = {"num_labels": 1} if scores else {}
  model = kind.from_pretrained(
    folder, attn_implementation="eager", dtype=torch.float32, **more
  )
  if added:
    model.resize_token_embeddings(model.config.vocab_size + added)
  settings = {"r": 2, "lora_alpha": 3, "task_type": "CAUSAL_LM"} | settings
  adapted = peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()
  for parameter in adapted.parameters():
    if parameter.requires_grad:
      parameter.data += 0.2 * torch.randn_like(parameter)
  shutil.rmtree(path, ignore_errors=True)
  adapted.save_pretrained(path)
  (path / "README.md").unlink()
  about = json.loads((path / "adapter_config.json").read_text())
  about["base_model_name_or_path"] = f"../../models/{base}"
  (path / "adapter_config.json").write_text(json.dumps(about, indent=1) + "\n")
  with np.load(folder / "golden.npz") as file:
    tokens, mask = file["tokens"][0], file["mask"][0]
  logp, score = np.zeros(tokens.shape, np.float32), np.zeros(len(tokens), np.float32)
  model.config.pad_token_id = None  # rows are read alone: the last token counts
  for i in np.argsort(mask.sum(1)):
    ids = torch.tensor(tokens[i][mask[i]][None], dtype=torch.long)
    with torch.no_grad():
      logits = adapted(input_ids=ids, use_cache=False).logits[0]
    if scores:
      score[i] = float(logits[0])
    else:
      of = torch.log_softmax(logits.float(), -1)[:-1].gather(1, ids[0, 1:, None])
      logp[i, np.flatnonzero(mask[i])[1:]] = of[:, 0].numpy()
  golden = {"scores": score} if scores else {"logp": logp}
  np.savez(path / "golden.npz", **golden)


if __name__ == "__main__":
  torch.set_num_threads(1)
  for name, of in ADAPTERS.items():
    make(name, *of)

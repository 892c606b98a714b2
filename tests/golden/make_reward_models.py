"""Makes tests/golden/reward_models.json: scores of classifiers on the golden trunks.

  pip install torch transformers
  python tests/golden/make_reward_models.py

For each model of tests/golden/models: {"architecture": transformers' class, "scores":
of each row of golden.npz, alone}. The head is `head(width)` below; the trunk is what
the folder holds. Nothing but the scores is stored.
"""

from __future__ import annotations

import json
import pathlib

import numpy as np
import torch
import transformers as tf

HERE = pathlib.Path(__file__).parent


def head(width: int) -> np.ndarray:
  """score.weight, [1, width] float32."""
  return (np.arange(width, dtype=np.float32)[None] % 7 - 3) / 8


def scores(name: str) -> dict:
  folder = HERE / "models" / name
  with np.load(folder / "golden.npz") as file:
    tokens, mask = file["tokens"][0], file["mask"][0]
  model = tf.AutoModelForSequenceClassification.from_pretrained(
    folder, num_labels=1, attn_implementation="eager", dtype=torch.float32
  ).eval()
  model.config.pad_token_id = None  # rows are read alone: the last token counts
  model.score.weight.data.copy_(torch.tensor(head(model.score.weight.shape[1])))
  out = [0.0] * len(tokens)
  # Shortest first: transformers' "dynamic" rope keeps what a longer row made of it.
  for i in np.argsort(mask.sum(1)):
    row, real = tokens[i], mask[i]
    with torch.no_grad():
      ids = torch.tensor(row[real][None], dtype=torch.long)
      out[i] = float(model(input_ids=ids, use_cache=False).logits[0, 0])
  return {"architecture": type(model).__name__, "scores": out}


if __name__ == "__main__":
  torch.set_num_threads(1)
  made = {}
  for name in sorted(path.name for path in (HERE / "models").iterdir()):
    try:
      made[name] = scores(name)
    except Exception as error:  # an architecture without a classifier
      print(f"{name}: {type(error).__name__}: {str(error)[:100]}")
  (HERE / "reward_models.json").write_text(json.dumps(made, indent=1) + "\n")

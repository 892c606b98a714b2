"""The embedded mini model: a small decoder that has half learned arithmetic problems.

  rlft sft --config=configs/arithmetic_mini.py --workdir=runs/mini
  cp runs/mini/model/* rlft/assets/mini/

It is stopped early on purpose: `rlft quickstart` needs a start with room above it.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict(
    dict(
      model=dict(
        decoder=dict(
          vocab_size=0,
          width=96,
          layers=4,
          heads=4,
          kv_heads=4,
          head_dim=24,
          mlp_width=256,
          max_positions=256,
        ),
      ),
      # Any valid solution, not only the story's order: the model is to know that a
      # problem has several.
      task=dict(name="arithmetic", train=5000, knobs=dict(reference="any")),
      sft=dict(
        optimizer=dict(
          learning_rate=2e-3,
          schedule="constant",
          warmup_steps=100,
          b2=0.98,
          weight_decay=0.01,
        ),
        batch_size=128,
        epochs=16,
        max_length=256,
      ),
      eval=dict(max_new_tokens=48, max_rows=512),
      eval_splits=("dev", "test"),
      eval_prompts=250,
    )
  )

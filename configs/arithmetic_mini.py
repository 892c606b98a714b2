"""The embedded mini model: a small decoder that has half learned arithmetic problems.

  rlft sft --config=configs/arithmetic_mini.py --workdir=runs/mini
  cp runs/mini/model/* rlft/assets/mini/

It is stopped early on purpose: `rlft quickstart` needs a start with room above it. The
recipe was chosen on the dev split of another run: at a constant learning rate, greedy@1
was .38 after 14 epochs, .39 after 16 and .66 after 20.

Measured, 481,920 parameters, 640 updates, 2.0 million tokens in the loss, 37 minutes on
2 cores shared with other work; 250 prompts, K = 16, 95 % bootstrap intervals:

  split  greedy@1           maj@16             pass@1             pass@16
  dev    .400 [.336, .460]  .404 [.348, .462]  .237 [.207, .268]  .776 [.724, .828]
  test   .356 [.296, .416]  .366 [.308, .426]  .228 [.197, .258]  .752 [.696, .804]
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

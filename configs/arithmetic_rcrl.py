"""Return-conditioned RL with labels per step, on the embedded mini model.

  rlft return-conditioned --config=configs/arithmetic_rcrl.py --workdir=runs/rcrl

Measured with 50 updates (80,000 tokens in the loss; 1,600 sampled solutions, 29 % of
them right), 180 s on 2 cores shared with other work; 100 test prompts, K = 16:

                greedy@1           pass@1             pass@16
  before        .330 [.240, .420]  .216 [.171, .264]  .700 [.600, .790]
  under GOOD    .240 [.160, .320]  .149 [.117, .179]  .710 [.620, .800]
  under BAD     .240 [.160, .320]  .151 [.118, .182]  .720 [.630, .800]

GOOD and BAD are the same: this model does not learn from so few solutions what makes
one right. Nor did 141 updates with labels per solution (log-prob of 96 held-out
solutions under their own label minus under the other: 0.01 nats). Where right and wrong
can be told apart by what is written, the labels do work, as the tests show. (In this
run the new rows began with noise 0.01 instead of 0.3; 25 to 47 updates at 0.3 gave 0.00
to 0.02 nats as well.)
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict(
    dict(
      task=dict(name="arithmetic", train=200, knobs=dict(reference="any")),
      rcrl=dict(
        labels="step",
        value="outcome",
        # "3+4=7, 7+5=12, 12-2=10 #### 10": a comma ends a step, the answer is with the
        # last one.
        marks=(",",),
        samples_per_prompt=8,
        max_new_tokens=48,
        max_rows=512,
        # GOOD is to mean the policy's own good solutions, not the reference's.
        mix_sft=False,
        train=dict(
          optimizer=dict(learning_rate=5e-4, warmup_steps=10, b2=0.98),
          batch_size=64,
          epochs=2,
          max_length=256,
        ),
      ),
      eval=dict(max_new_tokens=48, max_rows=512),
      eval_prompts=100,
    )
  )

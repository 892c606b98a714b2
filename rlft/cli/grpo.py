"""GRPO, Dr. GRPO, DAPO, RLOO and REINFORCE: baselines from samples of one prompt.

  rlft grpo --config=configs/arithmetic_grpo.py --workdir=runs/grpo
  rlft grpo --config=configs/arithmetic_grpo.py:dapo --workdir=runs/dapo

Writes the improved model (a Hugging Face directory), every metric of every iteration,
an evaluation before and after, transcripts and a plot into the work directory.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from rlft.algorithms import grpo
from rlft.cli import config as configs
from rlft.cli import record, rl, runs
from rlft.cli.progress import Iterations
from rlft.cli.saving import CheckpointConfig, saving
from rlft.probes.evaluate import EvalConfig
from rlft.training.metrics import MetricWriter

SUMMARY = "improve a model by GRPO or one of its relatives"
GROUP = "train"
MANY_HOSTS = True


@dataclasses.dataclass(frozen=True)
class GRPORun:
  """Settings of `rlft grpo`.

  Attributes:
    model: where to start, and what a KL is measured to.
    mesh: the devices it runs on.
    task: the training prompts, and who checks.
    reward: see `RewardChoice`.
    grpo: the method.
    dev_prompts: greedy@1 on so many dev prompts chooses what is kept; 0 keeps the last.
    checkpoint: when the run is saved. The same command goes on from the last one.
    eval, eval_splits, eval_prompts: of the evaluation before and after.
  """

  model: runs.ModelConfig = dataclasses.field(default_factory=runs.ModelConfig)
  mesh: runs.MeshConfig = dataclasses.field(default_factory=runs.MeshConfig)
  task: runs.TaskConfig = dataclasses.field(default_factory=runs.TaskConfig)
  reward: rl.RewardChoice = dataclasses.field(default_factory=rl.RewardChoice)
  grpo: grpo.GRPOConfig = dataclasses.field(default_factory=grpo.GRPOConfig)
  dev_prompts: int = 0
  checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
  eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
  eval_splits: tuple[str, ...] = ("test",)
  eval_prompts: int = 100

  def __post_init__(self):
    taught = "False" if self.grpo.mask_truncated else ""
    rl.check_missing_eos(self.reward, "grpo.mask_truncated", taught)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  configs.add_arguments(parser, GRPORun, workdir="runs/grpo")


def run(args: argparse.Namespace) -> int:
  config = runs.fitted(configs.from_args(args, GRPORun))
  workdir = Path(args.workdir)
  if record.finished(workdir, "grpo", config):
    return 0
  train = runs.train_examples(config.task)
  dev = rl.dev_examples(config.task, config.dev_prompts)
  policy = runs.make_policy(config.model, config.mesh)
  learned = rl.learned_model(config.reward, policy)
  reward = rl.make_reward_of(config.reward, config.task, policy, learned)
  models = {"model": policy, "reward": learned}
  with saving(workdir, "grpo", config, models=models) as keep:
    if not keep.checkpoints.steps():
      rl.look("before", policy, config, workdir)
    with (
      MetricWriter(workdir) as writer,
      Iterations(writer, "GRPO", config.grpo.iterations, resumes=True) as on_event,
    ):
      result = grpo.run(
        policy,
        train,
        reward,
        config.grpo,
        dev_score=rl.dev_score(config.task, dev, config.eval),
        on_event=on_event,
        saving=keep,
      )
  rl.show_result("grpo", result, workdir)
  rl.look("after", result.policy, config, workdir)
  record.finish(workdir, "grpo", config)
  return 0

"""PPO: clipped policy gradients with a value model and a KL reward.

  rlft ppo --config=configs/arithmetic_ppo.py --workdir=runs/ppo
  rlft ppo --config.reward.kind=orm --config.reward.model=runs/orm/model

Writes the improved model (a Hugging Face directory), every metric of every iteration,
an evaluation before and after, transcripts and a plot into the work directory.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from rlft.algorithms import ppo
from rlft.cli import config as configs
from rlft.cli import record, rl, runs
from rlft.cli.progress import Iterations
from rlft.cli.saving import CheckpointConfig, saving
from rlft.models.scalar import as_value, load_scalar
from rlft.probes.evaluate import EvalConfig
from rlft.training.metrics import MetricWriter

SUMMARY = "improve a model by PPO"
GROUP = "train"
MANY_HOSTS = True


@dataclasses.dataclass(frozen=True)
class PPORun:
  """Settings of `rlft ppo`.

  Attributes:
    model: where to start, and what the KL is measured to.
    mesh: the devices it runs on.
    task: the training prompts, and who checks.
    reward: see `RewardChoice`.
    value: directory of a reward model that the value model starts from; "" starts with
      a zero head on a copy of the policy.
    ppo: the method.
    dev_prompts: greedy@1 on so many dev prompts chooses what is kept; 0 keeps the last.
    checkpoint: when the run is saved. The same command goes on from the last one.
    eval, eval_splits, eval_prompts: of the evaluation before and after.
  """

  model: runs.ModelConfig = dataclasses.field(default_factory=runs.ModelConfig)
  mesh: runs.MeshConfig = dataclasses.field(default_factory=runs.MeshConfig)
  task: runs.TaskConfig = dataclasses.field(default_factory=runs.TaskConfig)
  reward: rl.RewardChoice = dataclasses.field(default_factory=rl.RewardChoice)
  value: str = ""
  ppo: ppo.PPOConfig = dataclasses.field(default_factory=ppo.PPOConfig)
  dev_prompts: int = 0
  checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
  eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
  eval_splits: tuple[str, ...] = ("test",)
  eval_prompts: int = 100

  def __post_init__(self):
    taught = "score" if self.ppo.truncated != "score" else ""
    rl.check_missing_eos(self.reward, "ppo.truncated", taught)

  @property
  def trained(self) -> int:
    """Models that train."""
    return 2 if self.ppo.value == "separate" else 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
  configs.add_arguments(parser, PPORun, workdir="runs/ppo")


def run(args: argparse.Namespace) -> int:
  config = runs.fitted(configs.from_args(args, PPORun))
  workdir = Path(args.workdir)
  if record.finished(workdir, "ppo", config):
    return 0
  train = runs.train_examples(config.task)
  dev = rl.dev_examples(config.task, config.dev_prompts)
  policy = runs.make_policy(config.model, config.mesh, trained=config.trained)
  value = None
  if config.value:
    value = as_value(load_scalar(config.value, mesh=policy.model.mesh))
  learned = rl.learned_model(config.reward, policy)
  reward = rl.make_reward_of(config.reward, config.task, policy, learned)
  models = {"model": policy, "value": value, "reward": learned}
  with saving(workdir, "ppo", config, models=models) as keep:
    if not keep.checkpoints.steps():
      rl.look("before", policy, config, workdir)
    with (
      MetricWriter(workdir) as writer,
      Iterations(writer, "PPO", config.ppo.iterations, resumes=True) as on_event,
    ):
      result = ppo.run(
        policy,
        train,
        reward,
        config.ppo,
        value=value,
        dev_score=rl.dev_score(config.task, dev, config.eval),
        on_event=on_event,
        saving=keep,
      )
  rl.show_result("ppo", result, workdir)
  rl.look("after", result.policy, config, workdir)
  record.finish(workdir, "ppo", config)
  return 0

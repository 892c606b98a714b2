"""Evaluates a model on a task: greedy@1, maj@k, pass@k, chains, with intervals.

  rlft eval                                                  # the embedded mini model
  rlft eval --config.model.path=runs/x/model --config.splits=test,ood_steps
  rlft eval --config.model.path=smollm2 --config.task.name=gsm8k \\
    --config.task.path=DIR --config.eval.chat=True --config.prompts=200
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from rlft.cli import config as configs
from rlft.cli import record, runs
from rlft.cli.sft import evaluate_splits
from rlft.core import hosts
from rlft.probes.evaluate import EvalConfig

SUMMARY = "evaluate a model: greedy@1, maj@k, pass@k, chains"
GROUP = "sample and evaluate"
MANY_HOSTS = True


@dataclasses.dataclass(frozen=True)
class EvalRun:
  """Settings of `rlft eval`.

  Attributes:
    model, mesh, task: what is evaluated, on which devices, on which problems.
    eval: how.
    splits: of the task: arithmetic has test, dev, ood_steps, ood_numbers and
      ood_templates; gsm8k has test and train.
    prompts: of each split.
  """

  model: runs.ModelConfig = dataclasses.field(default_factory=runs.ModelConfig)
  mesh: runs.MeshConfig = dataclasses.field(default_factory=runs.MeshConfig)
  task: runs.TaskConfig = dataclasses.field(default_factory=runs.TaskConfig)
  eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
  splits: tuple[str, ...] = ("test",)
  prompts: int = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
  configs.add_arguments(parser, EvalRun, workdir="runs/eval")


def run(args: argparse.Namespace) -> int:
  config = runs.fitted(configs.from_args(args, EvalRun))
  workdir = Path(args.workdir)
  hosts.by_first(lambda: record.check(workdir, "eval"))
  policy = runs.make_policy(config.model, config.mesh)
  found = evaluate_splits(
    policy, config.task, config.eval, config.splits, config.prompts, workdir
  )
  if hosts.first():  # an evaluation replaces the one that was there, whole
    for path in workdir.glob("transcripts_*.txt"):
      if path.stem.removeprefix("transcripts_") not in found:
        path.unlink()
  record.begin(workdir, "eval", config)
  print(f"{workdir}: evaluation.json, transcripts_*.txt")
  return 0

"""Expert Iteration: sample, keep what the checker accepts, train on it, repeat.

  rlft expert-iteration --workdir=runs/ei                    # mini model, arithmetic
  rlft expert-iteration --config=configs/gsm8k_ei_smollm2.py \\
    --config.task.path=DIR --workdir=runs/gsm8k_ei

Writes the improved model (a Hugging Face directory), metrics, the accepted solutions of
the last round, an evaluation before, after SFT and at the end, and
transcripts into the work directory.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from pathlib import Path

import rlft
from rlft.algorithms import expert_iteration as ei
from rlft.algorithms import sft
from rlft.cli import config as configs
from rlft.cli import record, rl, runs, show
from rlft.cli.progress import Events
from rlft.cli.saving import CheckpointConfig, every_100_updates, saving
from rlft.cli.sft import train_first
from rlft.core import hosts
from rlft.probes.evaluate import EvalConfig
from rlft.training.metrics import MetricWriter

SUMMARY = "improve a model on its own checked solutions (Expert Iteration)"
GROUP = "train"
MANY_HOSTS = True


@dataclasses.dataclass(frozen=True)
class EIRun:
  """Settings of `rlft expert-iteration`.

  Attributes:
    model: what samples the first round.
    base: the checkpoint that `ei.start="base"` trains; None takes `model`.
    mesh: the devices it runs on.
    task: the training prompts, and who checks.
    ei: the method.
    sft_first: supervised training on the reference solutions before the first round.
    dev_prompts: greedy@1 on so many dev prompts chooses the round that is kept; 0 keeps
      the last. gsm8k takes them from the training file, after the training prompts.
    checkpoint: when the run is saved; the same command goes on from there. A round is
      always saved twice, when it is sampled and when it is trained; `every` is of
      `sft_first`, which has checkpoints of its own.
    eval, eval_splits, eval_prompts: of the evaluation before and after.
  """

  model: runs.ModelConfig = dataclasses.field(default_factory=runs.ModelConfig)
  base: runs.ModelConfig | None = None
  mesh: runs.MeshConfig = dataclasses.field(default_factory=runs.MeshConfig)
  task: runs.TaskConfig = dataclasses.field(default_factory=runs.TaskConfig)
  ei: ei.EIConfig = dataclasses.field(default_factory=ei.EIConfig)
  sft_first: sft.SFTConfig | None = None
  dev_prompts: int = 0
  checkpoint: CheckpointConfig = dataclasses.field(default_factory=every_100_updates)
  eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
  eval_splits: tuple[str, ...] = ("test",)
  eval_prompts: int = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
  configs.add_arguments(parser, EIRun, workdir="runs/expert_iteration")


def run(args: argparse.Namespace) -> int:
  config = runs.fitted(configs.from_args(args, EIRun))
  workdir = Path(args.workdir)
  if record.finished(workdir, "expert-iteration", config):
    return 0
  train = runs.train_examples(config.task)
  rows, judge = runs.text_rows(train), runs.judge_of(config.task)
  dev = rl.dev_examples(config.task, config.dev_prompts)
  policy = runs.make_policy(config.model, config.mesh)
  base = runs.make_policy(config.base, config.mesh) if config.base else policy
  look = functools.partial(rl.look, config=config, workdir=workdir)
  models = {"model": policy, "base": base if config.base else None}
  name = "expert-iteration"
  with (
    saving(workdir, name, config, "half-round", models=models) as keep,
    MetricWriter(workdir) as writer,
    Events(writer, resumes=True) as on_event,
  ):
    if config.sft_first is not None:
      policy = train_first(policy, rows, config, workdir, keep, on_event, look)
    elif not keep.checkpoints.steps():
      look("before", policy)
    result = ei.run(
      policy,
      train,
      judge,
      config.ei,
      base=base,
      sft_rows=rows,
      dev_score=rl.dev_score(config.task, dev, config.eval),
      on_event=on_event,
      timers=on_event.timers,
      saving=keep,
    )
  rlft.save(result.policy, workdir / "model")
  if hosts.first():
    with (workdir / "solutions.jsonl").open("w") as file:
      for solution in result.solutions:
        file.write(json.dumps(dataclasses.asdict(solution)) + "\n")
  round_table(result.rounds)
  rl.look("after", result.policy, config, workdir)
  print(
    f"{result.sampled_solutions} sampled solutions, {result.update_tokens} tokens in "
    f"the loss, {result.seconds:.0f} s\nmodel: {workdir / 'model'}"
  )
  record.finish(workdir, "expert-iteration", config)
  return 0


ROUND_COLUMNS = {
  "round": "round",
  "samples": "samples",
  "correct": "correct",
  "accepted": "accepted",
  "prompts_solved": "prompts solved",
  "lucky_of_correct": "lucky of correct",
  "lucky_of_accepted": "lucky of accepted",
  "lucky_of_kept": "lucky of kept",
  "kept": "kept",
  "unique_chains": "unique chains",
  "train_rows": "train rows",
  "update_tokens": "update tokens",
  "dev": "dev greedy@1",
}


def round_table(rounds: list[dict]) -> None:
  """Prints what each round sampled, accepted and trained on."""
  names = [name for name in ROUND_COLUMNS if name in rounds[0]]
  show.table(
    "rounds",
    [ROUND_COLUMNS[name] for name in names],
    [[row[name] for name in names] for row in rounds],
  )

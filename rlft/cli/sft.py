"""Supervised fine-tuning on a task's worked solutions.

  rlft sft --config=configs/arithmetic_mini.py --workdir=runs/mini
  rlft sft --config.model.path=smollm2 --config.task.name=gsm8k \\
    --config.task.path=DIR --config.sft.chat=True --workdir=runs/gsm8k_sft

Writes the model (a Hugging Face directory), metrics, an evaluation and transcripts into
the work directory.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import rlft
from rlft.algorithms import sft
from rlft.cli import config as configs
from rlft.cli import record, runs, show
from rlft.cli.progress import Events, counting
from rlft.cli.saving import CheckpointConfig, every_100_updates, saving
from rlft.models.hub import Policy
from rlft.probes.evaluate import EvalConfig, evaluate
from rlft.rewards.verifiable import title_of
from rlft.sampling.generate import generate
from rlft.training.metrics import MetricWriter
from rlft.training.saving import Saving

SUMMARY = "train on worked solutions (supervised fine-tuning)"
GROUP = "train"
MANY_HOSTS = True


@dataclasses.dataclass(frozen=True)
class SFTRun:
  """Settings of `rlft sft`.

  Attributes:
    model, mesh, task: what is trained, on which devices, on which problems.
    sft: how.
    checkpoint: when the run is saved. The same command goes on from the last one.
    eval, eval_splits, eval_prompts: the evaluation at the end; 0 prompts skips it.
  """

  model: runs.ModelConfig = dataclasses.field(default_factory=runs.ModelConfig)
  mesh: runs.MeshConfig = dataclasses.field(default_factory=runs.MeshConfig)
  task: runs.TaskConfig = dataclasses.field(default_factory=runs.TaskConfig)
  sft: sft.SFTConfig = dataclasses.field(default_factory=sft.SFTConfig)
  checkpoint: CheckpointConfig = dataclasses.field(default_factory=every_100_updates)
  eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
  eval_splits: tuple[str, ...] = ("test",)
  eval_prompts: int = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
  configs.add_arguments(parser, SFTRun, workdir="runs/sft")


def run(args: argparse.Namespace) -> int:
  config = runs.fitted(configs.from_args(args, SFTRun))
  workdir = Path(args.workdir)
  if record.finished(workdir, "sft", config):
    return 0
  rows = runs.text_rows(runs.train_examples(config.task))
  policy = runs.make_policy(config.model, config.mesh)
  with (
    saving(workdir, "sft", config, "update", models={"model": policy}) as keep,
    MetricWriter(workdir) as writer,
    Events(writer, resumes=True) as events,
  ):
    result = sft.train(policy, rows, config.sft, events.on_step, keep, events.timers)
  rlft.save(result.policy, workdir / "model")
  print(
    f"{result.steps} updates, {result.update_tokens} tokens in the loss, last loss "
    f"{result.losses[-1]:.4f}, {result.seconds:.0f} s"
  )
  if config.eval_prompts:
    evaluate_splits(
      result.policy, config.task, config.eval, config.eval_splits,
      config.eval_prompts, workdir,
    )  # fmt: skip
  print(f"model: {workdir}/model  (rlft sample --model={workdir}/model PROMPT)")
  record.finish(workdir, "sft", config)
  return 0


def train_first(
  policy: Policy,
  rows: Sequence[tuple[str, str]],
  config: Any,
  workdir: Path,
  keep: Saving,
  events: Events,
  look: Callable[[str, Policy], None],
) -> Policy:
  """Supervised training before another method: a stage with checkpoints of its own.

  Args:
    policy, rows: what is trained, on what.
    config: of the command; has `sft_first`, `checkpoint` and `model`.
    workdir: of the run; the stage is in its directory `sft`.
    keep: of the run.
    events: of the run.
    look: evaluates a policy under a title, before and after; not again in a run that
      goes on.
  """
  models = {"model": policy}
  with saving(workdir / "sft", "sft", config, "update", keep, models) as own:
    if not own.checkpoints.steps():
      look("before", policy)
    result = sft.train(
      policy, rows, config.sft_first, events.on_step, own, events.timers
    )
  events.after(result.steps)
  if not keep.checkpoints.steps():
    look("after_sft", result.policy)  # what the method is to be compared with
  return result.policy


def evaluate_splits(policy, task, config, splits, prompts, workdir, sampler=generate):
  """Evaluates on each split; prints and writes the table and transcripts."""
  judge = runs.judge_of(task)
  found = {}
  for split in splits:
    problems = runs.examples(task, split, prompts)
    with show.progress(f"evaluate {split}", 2 * len(problems)) as advance:
      found[split] = evaluate(
        policy,
        problems,
        judge,
        config,
        sampler=sampler,
        on_progress=counting(advance),
      )
  names = runs.headline(next(iter(found.values())).report)
  out = {split: e.report["left_out"] for split, e in found.items()}
  show.table(
    f"evaluation by {title_of(judge)}",
    ["split", "prompts", *["left out"] * any(out.values()), *names],
    [
      [split, len(e.examples), *[out[split]] * any(out.values())]
      + [runs.interval(e.report, n) for n in names]
      for split, e in found.items()
    ],
  )
  runs.write_json(
    workdir / "evaluation.json", {s: runs.plain(e.report) for s, e in found.items()}
  )
  for split, one in found.items():
    runs.write_transcripts(workdir / f"transcripts_{split}.txt", {"model": one})
  return found

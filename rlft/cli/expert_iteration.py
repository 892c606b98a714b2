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
import json
from pathlib import Path

import rlft
from rlft.algorithms import expert_iteration as ei
from rlft.algorithms import sft
from rlft.cli import config as configs
from rlft.cli import runs, show
from rlft.cli.progress import Events
from rlft.cli.sft import evaluate_splits
from rlft.probes.evaluate import EvalConfig, evaluate
from rlft.training.metrics import MetricWriter

SUMMARY = "improve a model on its own checked solutions (Expert Iteration)"


@dataclasses.dataclass(frozen=True)
class EIRun:
  """Settings of `rlft expert-iteration`.

  Attributes:
    model: what samples the first round.
    base: the checkpoint that `ei.start="base"` trains; None takes `model`.
    ei: the method.
    sft_first: supervised training on the reference solutions before the first round.
    dev_prompts: greedy@1 on so many dev prompts chooses the round that is kept; 0 keeps
      the last. gsm8k takes them from the training file, after the training prompts.
    eval, eval_splits, eval_prompts: of the evaluation before and after.
  """

  model: runs.ModelConfig = dataclasses.field(default_factory=runs.ModelConfig)
  base: runs.ModelConfig | None = None
  mesh: runs.MeshConfig = dataclasses.field(default_factory=runs.MeshConfig)
  task: runs.TaskConfig = dataclasses.field(default_factory=runs.TaskConfig)
  ei: ei.EIConfig = dataclasses.field(default_factory=ei.EIConfig)
  sft_first: sft.SFTConfig | None = None
  dev_prompts: int = 0
  eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
  eval_splits: tuple[str, ...] = ("test",)
  eval_prompts: int = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
  configs.add_arguments(parser, workdir="runs/expert_iteration")


def run(args: argparse.Namespace) -> int:
  config = configs.from_args(args, EIRun)
  workdir = Path(args.workdir)
  train = runs.train_examples(config.task)
  rows, judge = runs.text_rows(train), runs.judge_of(config.task)
  dev = _dev_examples(config)
  policy = runs.make_policy(config.model, config.mesh)
  base = runs.make_policy(config.base, config.mesh) if config.base else policy
  configs.write_resolved(workdir, config)

  def look(title: str, policy) -> None:
    if not config.eval_prompts:
      return
    print(f"{title}:")
    evaluate_splits(
      policy, config.task, config.eval, config.eval_splits, config.eval_prompts,
      workdir / title.replace(" ", "_"),
    )  # fmt: skip

  look("before", policy)
  with MetricWriter(workdir) as writer, Events(writer) as on_event:
    if config.sft_first is not None:
      policy = sft.train(policy, rows, config.sft_first, on_event.on_step).policy
      on_event.close()
      look("after SFT", policy)  # what Expert Iteration is to be compared with
    result = ei.run(
      policy,
      train,
      judge,
      config.ei,
      base=base,
      sft_rows=rows,
      dev_score=_dev_score(config, dev, judge),
      on_event=on_event,
    )
  rlft.save(result.policy, workdir / "model")
  with (workdir / "solutions.jsonl").open("w") as file:
    for solution in result.solutions:
      file.write(json.dumps(dataclasses.asdict(solution)) + "\n")
  round_table(result.rounds)
  look("after", result.policy)
  print(
    f"{result.sampled_solutions} sampled solutions, {result.update_tokens} tokens in "
    f"the loss, {result.seconds:.0f} s\nmodel: {workdir / 'model'}"
  )
  return 0


def _dev_examples(config: EIRun):
  if not config.dev_prompts:
    return []
  if config.task.name == "arithmetic":
    return runs.examples(config.task, "dev", config.dev_prompts)
  after = config.task.train_start + config.task.train
  return runs.examples(config.task, "train", config.dev_prompts, after)


def _dev_score(config: EIRun, dev, judge):
  if not dev:
    return None
  greedy = dataclasses.replace(config.eval, samples=1, ks=(1,))

  def score(policy):
    report = evaluate(policy, dev, judge, greedy).report
    return report["metrics"]["greedy@1"]["mean"]

  return score


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

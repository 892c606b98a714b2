"""Return-conditioned RL: learn from labelled solutions, then ask for good ones.

  rlft return-conditioned --config=configs/arithmetic_rcrl.py --workdir=runs/rcrl
  rlft return-conditioned --config=configs/arithmetic_rcrl.py \\
    --config.rcrl.value=rollouts                       # labels by continuations

Writes the conditioned model (a Hugging Face directory whose tokenizer knows [GOOD] and
[BAD]), metrics, the labelled solutions, and an evaluation before, under GOOD and under
BAD into the work directory.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rlft
from rlft.algorithms import return_conditioned as rc
from rlft.algorithms import sft
from rlft.cli import config as configs
from rlft.cli import record, runs, show
from rlft.cli.progress import Events
from rlft.cli.saving import CheckpointConfig, every_100_updates, saving
from rlft.cli.sft import evaluate_splits, train_first
from rlft.core.errors import ConfigError
from rlft.models.hub import Policy
from rlft.models.scalar import ScalarModel, check_same_tokenizer, load_scalar
from rlft.probes.evaluate import EvalConfig
from rlft.rewards.learned import probability, row_values
from rlft.sampling.generate import generate
from rlft.training import metrics
from rlft.training.metrics import MetricWriter

SUMMARY = "learn from good and bad solutions, ask for good ones"
GROUP = "train"


@dataclasses.dataclass(frozen=True)
class RCRLRun:
  """Settings of `rlft return-conditioned`.

  Attributes:
    model: what samples the data.
    base: the checkpoint that is trained; None takes `model`.
    mesh: the devices it runs on.
    task: the training prompts, and who checks.
    rcrl: the method.
    orm: of `rcrl.value="orm"`: the directory of an outcome model.
    sft_first: supervised training on the reference solutions before sampling.
    checkpoint: when the training is saved. The same command goes on from there;
      labelled solutions are saved as well, and `sft_first`.
    eval, eval_splits, eval_prompts: of the evaluation before and after.
  """

  model: runs.ModelConfig = dataclasses.field(default_factory=runs.ModelConfig)
  base: runs.ModelConfig | None = None
  mesh: runs.MeshConfig = dataclasses.field(default_factory=runs.MeshConfig)
  task: runs.TaskConfig = dataclasses.field(default_factory=runs.TaskConfig)
  rcrl: rc.RCRLConfig = dataclasses.field(default_factory=rc.RCRLConfig)
  orm: str = ""
  sft_first: sft.SFTConfig | None = None
  checkpoint: CheckpointConfig = dataclasses.field(default_factory=every_100_updates)
  eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
  eval_splits: tuple[str, ...] = ("test",)
  eval_prompts: int = 100

  def __post_init__(self):
    if (self.rcrl.value == "orm") != bool(self.orm):
      raise ConfigError(
        f"rcrl.value={self.rcrl.value!r} and orm={self.orm!r}: give the directory of "
        "an outcome model, and value='orm', or neither"
      )


def add_arguments(parser: argparse.ArgumentParser) -> None:
  configs.add_arguments(parser, RCRLRun, workdir="runs/return_conditioned")


def run(args: argparse.Namespace) -> int:
  config = runs.fitted(configs.from_args(args, RCRLRun))
  workdir = Path(args.workdir)
  if record.finished(workdir, "return-conditioned", config):
    return 0
  train = runs.train_examples(config.task)
  rows, judge = runs.text_rows(train), runs.judge_of(config.task)
  policy = runs.make_policy(config.model, config.mesh)
  base = runs.make_policy(config.base, config.mesh) if config.base else None
  scalar = orm_model(config.orm, policy) if config.orm else None
  orm = scalar and (lambda ids: [probability(x) for x in row_values(scalar, ids)])

  def look(title: str, policy, sampler=generate) -> None:
    if not config.eval_prompts:
      return
    print(f"{title}:")
    evaluate_splits(
      policy, config.task, config.eval, config.eval_splits, config.eval_prompts,
      workdir / title.replace(" ", "_"), sampler,
    )  # fmt: skip

  models = {"model": policy, "base": base, "orm": scalar}
  name = "return-conditioned"
  with (
    saving(workdir, name, config, "update", models=models) as keep,
    MetricWriter(workdir) as writer,
    Events(writer, resumes=True) as events,
  ):
    place = workdir / "labelled"
    with saving(place, "labelled", config, "sampling", keep, models) as labels:
      if config.sft_first is not None:
        policy = train_first(policy, rows, config, workdir, labels, events, look)
      elif not labels.checkpoints.steps():
        look("before", policy)
      result = rc.run(
        policy, train, judge, config.rcrl, base=base, sft_rows=rows, orm=orm,
        on_event=_without_repeats(events, workdir), saving=keep, labels=labels,
      )  # fmt: skip
  rlft.save(result.policy, workdir / "model")
  with (workdir / "solutions.jsonl").open("w") as file:
    for solution in result.solutions:
      file.write(json.dumps(dataclasses.asdict(solution)) + "\n")
  names = [name for name in COLUMNS if name in result.stats]
  show.table(
    "labelled",
    [COLUMNS[name] for name in names],
    [[result.stats[name] for name in names]],
  )
  for title, label in (("under GOOD", rc.GOOD), ("under BAD", rc.BAD)):
    look(title, result.policy, rc.sampler(config.rcrl, label))
  print(
    f"{result.sampled_solutions} sampled solutions, {result.update_tokens} tokens in "
    f"the loss, {result.seconds:.0f} s\nmodel: {workdir / 'model'}"
  )
  record.finish(workdir, "return-conditioned", config)
  return 0


def _without_repeats(
  events: Events, workdir: Path
) -> Callable[[str, dict[str, Any]], None]:
  """Leaves out the summary of a run that had nothing left to do, and had written it."""
  done = False

  def on_event(kind: str, values: dict[str, Any]) -> None:
    nonlocal done
    done = done or kind == "resume"
    written = lambda: any("round/round" in line for line in metrics.read(workdir))
    if not (kind == "round" and done and written()):
      events(kind, values)

  return on_event


def orm_model(path: str, policy: Policy) -> ScalarModel:
  """An outcome model, whose probabilities are the values of prefixes."""
  scalar = load_scalar(path, mesh=policy.model.mesh)
  if scalar.kind != "outcome":
    raise ConfigError(f"{path} is a model of kind {scalar.kind!r}; give an outcome one")
  check_same_tokenizer(policy, scalar)
  return scalar


COLUMNS = {
  "samples": "samples",
  "continuations": "continuations",
  "correct": "correct",
  "truncated": "truncated",
  "not_judged": "not judged",
  "without_marks": "without marks",
  "kept_good": "GOOD",
  "kept_bad": "BAD",
  "kept_good_labels": "GOOD labels",
  "kept_bad_labels": "BAD labels",
  "train_rows": "train rows",
  "update_tokens": "update tokens",
}

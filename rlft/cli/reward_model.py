"""A reward model from preferences, or an outcome model from sampled solutions.

  rlft reward-model --config=configs/reward_model_hh.py \\
    --config.preferences.path=DIR/test.jsonl --workdir=runs/hh
  rlft reward-model --config.kind=outcome --workdir=runs/orm   # mini model, arithmetic

`kind=pairs` learns which of two completions people prefer (Bradley-Terry); formats are
found by the fields of the rows. `kind=outcome` samples the model on a task, and learns
which of its solutions, and of their prefixes, end in a right answer. Writes the model
(for --config.reward.model of `rlft ppo` and `rlft grpo`), metrics, and accuracy by
split into the work directory.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any, Literal

from rlft.algorithms import reward_model
from rlft.cli import config as configs
from rlft.cli import record, rl, runs, show
from rlft.cli.progress import Events, counting
from rlft.cli.saving import CheckpointConfig, every_100_updates, saving
from rlft.core.errors import ConfigError
from rlft.models.hub import Policy
from rlft.models.scalar import ScalarModel, save_scalar
from rlft.probes.reward_models import accuracy, auc
from rlft.tasks import preferences
from rlft.tasks.preferences import Preference
from rlft.training.metrics import MetricWriter
from rlft.training.outcomes import Outcome, sample_outcomes

SUMMARY = "train a reward model on preferences, or an outcome model on samples"
GROUP = "train"


@dataclasses.dataclass(frozen=True)
class PreferencesConfig:
  """Which preferences.

  Attributes:
    path: a jsonl file, or a directory with `<split>.jsonl`.
    format: "auto", or one of `rlft.tasks.preferences`.
    split: of a directory.
    on_bad: what a bad row does: "raise", or "skip" and count it.
    template: what prompts are put into, at `{}`.
    limit: rows of the file that are used; 0 is all.
    held_out: share of the prompts kept for the accuracy in distribution.
    other: files whose accuracy is out of distribution, with their own template.
    other_template: of their prompts.
  """

  path: str = ""
  format: Literal["auto", "pairs", "hh", "alpaca_eval", "asset"] = "auto"
  split: str = "train"
  on_bad: Literal["raise", "skip"] = "raise"
  template: str = "{}"
  limit: int = 0
  held_out: float = 0.1
  other: tuple[str, ...] = ()
  other_template: str = "{}"


@dataclasses.dataclass(frozen=True)
class OutcomesConfig:
  """How outcomes are sampled; the prompts are those of `task`.

  Attributes:
    samples, temperature, max_new_tokens, stop, few_shot, max_rows: of sampling, K a
      prompt; few_shot is text before prompts of which the model learns nothing.
    eval_splits, eval_prompts: of the task, for the area under the curve.
    seed: of the noise.
  """

  samples: int = 8
  temperature: float = 1.0
  max_new_tokens: int = 256
  stop: tuple[str, ...] = ()
  few_shot: str = ""
  max_rows: int = 128
  eval_splits: tuple[str, ...] = ("test",)
  eval_prompts: int = 100
  seed: int = 0


@dataclasses.dataclass(frozen=True)
class RewardModelRun:
  """Settings of `rlft reward-model`.

  Attributes:
    kind: "pairs" reads `preferences`, "outcome" samples `task` by `outcomes`.
    model, mesh: where the trunk starts.
    preferences: the pairs of kind "pairs".
    task, outcomes: the prompts of kind "outcome", and how they are sampled.
    train: how.
    checkpoint: when the run is saved. The same command goes on from the last one, of
      outcomes after sampling them again.
  """

  kind: Literal["pairs", "outcome"] = "pairs"
  model: runs.ModelConfig = dataclasses.field(default_factory=runs.ModelConfig)
  mesh: runs.MeshConfig = dataclasses.field(default_factory=runs.MeshConfig)
  preferences: PreferencesConfig = dataclasses.field(default_factory=PreferencesConfig)
  task: runs.TaskConfig = dataclasses.field(default_factory=runs.TaskConfig)
  outcomes: OutcomesConfig = dataclasses.field(default_factory=OutcomesConfig)
  train: reward_model.RewardModelConfig = dataclasses.field(
    default_factory=reward_model.RewardModelConfig
  )
  checkpoint: CheckpointConfig = dataclasses.field(default_factory=every_100_updates)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  configs.add_arguments(parser, RewardModelRun, workdir="runs/reward_model")


def run(args: argparse.Namespace) -> int:
  config = runs.fitted(configs.from_args(args, RewardModelRun))
  workdir = Path(args.workdir)
  if record.finished(workdir, "reward-model", config):
    return 0
  # Files are read before the model: a bad row is known at once.
  splits = read_pairs(config.preferences) if config.kind == "pairs" else {}
  policy = runs.make_policy(config.model, config.mesh)
  reward_model.check(policy, config.train)
  name, models = f"reward-model {config.kind}", {"model": policy}
  with (
    saving(workdir, name, config, "update", models=models) as keep,
    MetricWriter(workdir) as writer,
    Events(writer, resumes=True) as events,
  ):
    if config.kind == "pairs":
      rows, train = splits.pop("train"), reward_model.train_pairs
    else:
      task, train = config.task, reward_model.train_outcome
      rows = sample(policy, config, "train", task.train, task.train_start)
    result = train(
      policy, rows, config.train, on_step=events.on_step, saving=keep,
      timers=events.timers,
    )  # fmt: skip
  save_scalar(result.model, workdir / "model")
  print(
    f"{result.steps} updates on {result.rows} rows ({result.dropped} dropped), loss "
    f"{result.losses[0]:.4f} at first and {result.losses[-1]:.4f} at last, "
    f"{result.seconds:.0f} s"
  )
  if config.kind == "pairs":
    evaluate_pairs(result.model, splits, config, workdir)
  else:
    evaluate_outcomes(result.model, policy, config, workdir)
  print(f"model: {workdir / 'model'}  (--config.reward.model of rlft ppo, rlft grpo)")
  record.finish(workdir, "reward-model", config)
  return 0


def read_pairs(config: PreferencesConfig) -> dict[str, list[Preference]]:
  """The sets by name: "train", "held out" of it, and each other file's."""
  if not config.path:
    raise ConfigError(
      "preferences.path is empty: give a jsonl file of preferences by "
      "--config.preferences.path=PATH, or --config.kind=outcome"
    )
  if config.limit < 0:
    raise ConfigError(f"preferences.limit={config.limit}: 0 (all) or positive")
  found = preferences.load(
    config.path,
    config.format,
    config.split,
    config.on_bad,
    template=config.template,
  )
  if config.limit:
    found = found[: config.limit]
  rest, held = preferences.hold_out(found, config.held_out)
  splits = {"train": rest, "held out": held}
  for path in config.other:
    splits[path] = preferences.load(
      path, on_bad=config.on_bad, template=config.other_template
    )
  return {name: rows for name, rows in splits.items() if rows}


def evaluate_pairs(
  model: ScalarModel,
  splits: dict[str, list[Preference]],
  config: RewardModelRun,
  workdir: Path,
) -> None:
  """Accuracy on the sets that were not trained on: a table and evaluation.json."""
  found = {
    name: accuracy(
      model, rows, max_length=config.train.max_length, chat=config.train.chat
    )
    for name, rows in splits.items()
  }
  _report(
    ["split", "pairs", "accuracy"],
    [[name, one["pairs"], one["accuracy"]] for name, one in found.items()],
    found,
    workdir,
  )


def evaluate_outcomes(
  model: ScalarModel, policy: Policy, config: RewardModelRun, workdir: Path
) -> None:
  """Area under the curve on new prompts: a table and evaluation.json."""
  table, found = [], {}
  for split in config.outcomes.eval_splits if config.outcomes.eval_prompts else ():
    rows = sample(policy, config, split, config.outcomes.eval_prompts)
    right = sum(row.label for row in rows) / len(rows)
    areas = [auc(model, rows, at, chat=config.train.chat) for at in ("steps", "final")]
    table.append([split, len(rows), right, *areas])
    found[split] = {"right": right, "auc_steps": areas[0], "auc_final": areas[1]}
  if found:
    columns = ["split", "solutions", "right", "AUC of prefixes", "AUC of solutions"]
    _report(columns, table, found, workdir)


def _report(columns: list[str], rows: list[list[Any]], found: Any, workdir: Path):
  show.table("accuracy, with 95 % intervals", columns, rows)
  runs.write_json(workdir / "evaluation.json", found)


def sample(
  policy: Policy, config: RewardModelRun, split: str, count: int, start: int = 0
) -> list[Outcome]:
  """Outcomes of a split's prompts, with a progress bar."""
  examples = runs.examples(config.task, split, count, start)
  one = config.outcomes
  with show.progress(f"sample {split}", len(examples)) as advance:
    return sample_outcomes(
      policy,
      examples,
      runs.judge_of(config.task),
      rl.steps_of(config.task),
      one.samples,
      max_new_tokens=one.max_new_tokens,
      temperature=one.temperature,
      stop=one.stop,
      few_shot=one.few_shot,
      chat=config.train.chat,
      seed=one.seed,
      max_rows=one.max_rows,
      on_progress=counting(advance),
    )

"""DPO or IPO: trains a model on preference pairs, without a reward model.

  rlft dpo --config.preferences.path=DIR/train.jsonl --workdir=runs/dpo
  rlft dpo --config.preferences.path=DIR --config.model.path=smollm2 \\
    --config.dpo.chat=True --config.dpo.lora.rank=16 --workdir=runs/dpo_lora

Formats of pairs are found by the fields of their rows (see rlft/tasks/preferences.py).
The reference is the model at the start, or `--config.reference`. Writes the model (a
Hugging Face directory), metrics, and accuracy on held-out pairs before and after into
the work directory.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import rlft
from rlft.algorithms import dpo
from rlft.cli import config as configs
from rlft.cli import record, runs, show
from rlft.cli.progress import Events
from rlft.cli.reward_model import PreferencesConfig, read_pairs
from rlft.cli.saving import CheckpointConfig, every_100_updates, saving
from rlft.core.errors import ConfigError
from rlft.training.metrics import MetricWriter

SUMMARY = "train on preference pairs (DPO, IPO)"
GROUP = "train"


@dataclasses.dataclass(frozen=True)
class DPORun:
  """Settings of `rlft dpo`.

  Attributes:
    model, mesh: what is trained, on which devices.
    reference: a model of the same tokenizer, as in model.path; "" is the start.
    preferences: the pairs, and those that are held out.
    dpo: how.
    checkpoint: when the run is saved. The same command goes on from the last one.
  """

  model: runs.ModelConfig = dataclasses.field(default_factory=runs.ModelConfig)
  mesh: runs.MeshConfig = dataclasses.field(default_factory=runs.MeshConfig)
  reference: str = ""
  preferences: PreferencesConfig = dataclasses.field(default_factory=PreferencesConfig)
  dpo: dpo.DPOConfig = dataclasses.field(default_factory=dpo.DPOConfig)
  checkpoint: CheckpointConfig = dataclasses.field(default_factory=every_100_updates)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  configs.add_arguments(parser, DPORun, workdir="runs/dpo")


def run(args: argparse.Namespace) -> int:
  config = configs.from_args(args, DPORun)
  workdir = Path(args.workdir)
  if record.finished(workdir, "dpo", config):
    return 0
  if not config.preferences.path:
    raise ConfigError(
      "preferences.path is empty: give a jsonl file of preferences by "
      "--config.preferences.path=PATH"
    )
  # Files are read before the model: a bad row is known at once.
  dev = read_pairs(config.preferences)
  train = dev.pop("train")
  policy = runs.make_policy(config.model, config.mesh)
  reference = None
  if config.reference:
    other = dataclasses.replace(config.model, path=config.reference, decoder=None)
    reference = runs.make_policy(other, config.mesh)
  dpo.check(policy, config.dpo, reference)
  models = {"model": policy, "reference": reference}
  with (
    saving(workdir, "dpo", config, "update", models=models) as keep,
    MetricWriter(workdir) as writer,
    Events(writer, resumes=True) as events,
  ):
    result = dpo.train(
      policy,
      train,
      config.dpo,
      reference,
      dev,
      on_step=events.on_step,
      on_progress=lambda done, of: events("reference", {"done": done, "of": of}),
      saving=keep,
      timers=events.timers,
    )
  rlft.save(result.policy, workdir / "model")
  print(
    f"{result.steps} updates on {result.pairs} pairs ({result.dropped} dropped), loss "
    f"{result.losses[0]:.4f} at first and {result.losses[-1]:.4f} at last, "
    f"{result.seconds:.0f} s"
  )
  if dev:
    _show(result, workdir)
  print(f"model: {workdir}/model  (rlft sample --model={workdir}/model PROMPT)")
  record.finish(workdir, "dpo", config)
  return 0


def _show(result: dpo.DPOResult, workdir: Path) -> None:
  """Held-out pairs before and after: a table and evaluation.json."""
  both = {"before": result.before, "after": result.after}
  show.table(
    "held-out pairs, with 95 % intervals",
    ["split", "", "pairs", "accuracy", "margin", "chosen likelier"],
    [
      [split, when, one.pairs, one.accuracy, one.margin, one.likelier]
      for split in result.before
      for when, found in both.items()
      for one in [found[split]]
    ],
  )
  runs.write_json(
    workdir / "evaluation.json",
    {
      when: {split: dataclasses.asdict(one) for split, one in found.items()}
      for when, found in both.items()
    },
  )

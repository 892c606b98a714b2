"""Watch a small model get better at word problems, in a few minutes, on a laptop.

Loads the embedded model (a decoder of under a million parameters that rlft trained on
arithmetic word problems) and improves it in two ways, on the same prompts and with the
same number of tokens in the loss:

  SFT   goes on with the worked solutions that come with the prompts;
  EI    Expert Iteration: adds the model's own solutions, checked step by step.

Both are evaluated on new problems like those of training, and on problems told in
sentences that training never shows. No network, no accelerator. `--seeds=5` repeats it
with other prompts and other noise, and tests the sign of the difference.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from pathlib import Path

import rlft
from rlft.algorithms import expert_iteration as ei
from rlft.algorithms import sft
from rlft.cli import config as configs
from rlft.cli import record, runs, show
from rlft.cli.expert_iteration import round_table
from rlft.cli.progress import Events, counting
from rlft.core.errors import ConfigError
from rlft.models import hub
from rlft.models.hub import Policy
from rlft.probes import reasoning
from rlft.probes.evaluate import EvalConfig, Evaluation, evaluate
from rlft.tasks import arithmetic
from rlft.training.metrics import MetricWriter
from rlft.training.optimizer import OptimizerConfig

SUMMARY = "watch a small model get better at word problems"
GROUP = "start here"

ARMS = ("start", "SFT", "EI")
SPLITS = {"test": "in-distribution", "ood_templates": "out-of-distribution"}
# The problems from here on were not among those that the embedded model learned from.
FRESH = 1_000_000
# References in any valid order, as the embedded model learned them.
KNOBS = arithmetic.Knobs(reference="any")


@dataclasses.dataclass(frozen=True)
class Quickstart:
  """Settings of `rlft quickstart`.

  Attributes:
    prompts: training prompts, the same for both arms.
    eval_prompts: of each of the two evaluation sets.
    ei: Expert Iteration; the SFT arm takes its optimiser, batch size and budget.
    eval: the evaluation.
  """

  prompts: int = 1000
  eval_prompts: int = 100
  ei: ei.EIConfig = dataclasses.field(
    default_factory=lambda: ei.EIConfig(
      train=sft.SFTConfig(
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=10, b2=0.98),
        batch_size=64,
        update_tokens=160_000,
        max_length=128,
      ),
      rounds=1,
      samples_per_prompt=8,
      max_new_tokens=48,
      start="previous",
      max_rows=512,
    )
  )
  eval: EvalConfig = dataclasses.field(
    default_factory=lambda: EvalConfig(samples=16, max_new_tokens=48, max_rows=512)
  )


def add_arguments(parser: argparse.ArgumentParser) -> None:
  configs.add_arguments(parser, Quickstart, workdir="runs/quickstart")
  parser.add_argument(
    "--seeds", type=int, default=1, help="repeat with so many seeds (default: 1)"
  )


def run(args: argparse.Namespace) -> int:
  began = time.perf_counter()
  config = configs.from_args(args, Quickstart)
  if args.seeds < 1:
    raise ConfigError(f"--seeds={args.seeds}: at least 1")
  workdir = Path(args.workdir)
  settings = {"seeds": args.seeds, **configs.dump(config)}
  if record.finished(workdir, "quickstart", settings, resumes=False):
    return 0
  start = rlft.load(hub.MINI)
  record.begin(workdir, "quickstart", settings)
  problems = {
    split: arithmetic.generate(split, config.eval_prompts) for split in SPLITS
  }

  before = _evaluate("start", start, problems, config)
  repeats = []
  for seed in range(args.seeds):
    where = workdir if args.seeds == 1 else workdir / f"seed_{seed}"
    repeats.append(_one_seed(seed, start, before, problems, config, where))
  seconds = time.perf_counter() - began
  results = {"seconds": seconds, "seeds": repeats}
  if args.seeds > 1:
    results["sign_tests"] = _sign_tests(repeats, _metrics(config))
  runs.write_json(workdir / "results.json", results)
  record.finish(workdir, "quickstart", settings)
  print(f"\n{seconds:.0f} s in all; {workdir / 'results.json'} has every number.")
  return 0


def _one_seed(
  seed: int,
  start: Policy,
  before: dict[str, Evaluation],
  problems: dict[str, list],
  config: Quickstart,
  workdir: Path,
) -> dict:
  """Both arms of one seed: prompts, noise and row order are its own."""
  train = arithmetic.generate(
    "train", config.prompts, KNOBS, start=FRESH + seed * config.prompts
  )
  rows = runs.text_rows(train)
  method = dataclasses.replace(config.ei, seed=seed)
  with MetricWriter(workdir) as writer:
    writer.rewind(-1)  # what a run that was killed here has written
    with Events(writer, "EI") as on_event:
      found = ei.run(
        start,
        train,
        arithmetic.judge,
        method,
        sft_rows=rows,
        on_event=on_event,
        timers=on_event.timers,
      )
    # The same tokens in the loss as all rounds together, on the reference solutions.
    continued = dataclasses.replace(
      method.train, update_tokens=found.update_tokens, seed=seed
    )
    with Events(writer, "SFT") as events:
      plain = sft.train(start, rows, continued, events.on_step, timers=events.timers)
    after = {
      "start": before,
      "SFT": _evaluate("SFT", plain.policy, problems, config, before),
      "EI": _evaluate("EI", found.policy, problems, config, before),
    }
    for arm, evaluations in after.items():
      for split, one in evaluations.items():
        metrics = {
          f"{arm}/{split}/{name}": values["mean"]
          for name, values in one.report["metrics"].items()
        }
        writer.write(plain.steps, metrics, samples=found.sampled_solutions)
  cost = {
    "start": (0, 0, 0.0),
    "SFT": (0, plain.update_tokens, plain.seconds),
    "EI": (found.sampled_solutions, found.update_tokens, found.seconds),
  }
  round_table(found.rounds)
  _table(after, cost, _metrics(config))
  differences = _differences(after)
  _difference_table(differences, _metrics(config))
  rlft.save(found.policy, workdir / "model")
  plot = show.plot_bars(
    workdir / "quickstart.png",
    {
      f"{name} ({split})": {
        metric: {arm: runs.interval(after[arm][split].report, metric) for arm in ARMS}
        for metric in _metrics(config)
      }
      for split, name in SPLITS.items()
    },
    title=f"{config.prompts} prompts, {found.update_tokens:,} tokens in the loss",
  )
  for split in SPLITS:
    runs.write_transcripts(
      workdir / f"transcripts_{split}.txt", {arm: after[arm][split] for arm in ARMS}
    )
  print(
    f"\nplot         {plot}\n"
    f"transcripts  {workdir}/transcripts_*.txt\n"
    f"metrics      {workdir}/metrics.jsonl, {workdir}/tensorboard\n"
    f"model        {workdir}/model (transformers loads it too); to talk to it:\n"
    f'  rlft sample --model={workdir}/model "{train[0].prompt.strip()}\n"'
  )
  return {
    "seed": seed,
    "reports": {
      arm: {split: runs.plain(one.report) for split, one in evaluations.items()}
      for arm, evaluations in after.items()
    },
    "differences": differences,
    "rounds": found.rounds,
    "sampled_solutions": found.sampled_solutions,
    "update_tokens": {"SFT": plain.update_tokens, "EI": found.update_tokens},
    "seconds": {"SFT": plain.seconds, "EI": found.seconds},
  }


def _evaluate(name, policy, problems, config, before=None) -> dict[str, Evaluation]:
  out = {}
  total = sum(2 * len(examples) for examples in problems.values())
  with show.progress(f"evaluate {name}", total) as advance:
    for split, examples in problems.items():
      known = None
      if before is not None:
        known = reasoning.correct_chains(before[split].sample_verdicts, examples)
      out[split] = evaluate(
        policy,
        examples,
        arithmetic.judge,
        config.eval,
        known_chains=known,
        on_progress=counting(advance),
      )
  return out


def _metrics(config: Quickstart) -> tuple[str, ...]:
  """The accuracies that are shown; K of maj@K and pass@K is the largest evaluated."""
  k = max(config.eval.ks)
  return ("greedy@1", f"maj@{k}", f"pass@{k}") if k > 1 else ("greedy@1", "pass@1")


def _table(after: dict, cost: dict, metrics: tuple[str, ...]) -> None:
  for split, name in SPLITS.items():
    body = []
    for arm in ARMS:
      report = after[arm][split].report
      samples, tokens, seconds = cost[arm]
      body.append(
        [
          arm,
          *(runs.interval(report, metric) for metric in metrics),
          report["totals"]["unique_chains"],
          report["totals"].get("novel_chains"),
          report["totals"]["lucky_share"],
          samples,
          tokens,
          round(seconds),
        ]
      )
    columns = ["arm", *metrics, "chains", "novel", "lucky", "sampled solutions"]
    prompts = len(after["start"][split].examples)
    show.table(
      f"{name}: {prompts} {split} prompts",
      [*columns, "update tokens", "seconds"],
      body,
    )


def _differences(after: dict) -> dict:
  """EI minus SFT and EI minus start, paired by prompt."""
  return {
    split: {
      f"EI - {arm}": reasoning.compare(
        after[arm][split].report, after["EI"][split].report
      )
      for arm in ("start", "SFT")
    }
    for split in SPLITS
  }


def _difference_table(differences: dict, metrics: tuple[str, ...]) -> None:
  metrics = (*metrics, "unique_chains")
  show.table(
    "what EI changed, paired by prompt (95 % bootstrap over prompts)",
    ["difference", *metrics],
    [
      [
        f"{name}, {SPLITS[split]}",
        *(tuple(v[m][k] for k in ("difference", "low", "high")) for m in metrics),
      ]
      for split, pairs in differences.items()
      for name, v in pairs.items()
    ],
  )


def _sign_tests(repeats: list[dict], metrics: tuple[str, ...]) -> dict:
  """One-sided sign tests over seeds: how often EI came out higher."""
  found, body = {}, []
  for split, name in SPLITS.items():
    for pair in ("EI - start", "EI - SFT"):
      for metric in metrics:
        each = [r["differences"][split][pair][metric]["difference"] for r in repeats]
        wins, losses = sum(d > 0 for d in each), sum(d < 0 for d in each)
        p = sign_test(wins, losses)
        found[f"{split}/{pair}/{metric}"] = {
          "differences": each, "higher": wins, "lower": losses, "p": p,
        }  # fmt: skip
        mean = sum(each) / len(each)
        body.append([f"{pair}, {metric}, {name}", mean, f"{wins} of {len(each)}", p])
  show.table(
    f"{len(repeats)} seeds: one-sided sign tests",
    ["difference", "mean", "higher", "p"],
    body,
  )
  return found


def sign_test(wins: int, losses: int) -> float:
  """P(at least so many wins | both signs equally likely); ties are left out."""
  n = wins + losses
  return sum(math.comb(n, k) for k in range(wins, n + 1)) / 2**n

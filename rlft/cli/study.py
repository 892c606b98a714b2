"""The report of `rlft compare`: tables, curves, and the paper's claims beside them.

Values are means over seeds of means over prompts. An interval is a 95 % bootstrap over
prompts of values averaged over seeds: it says how much hangs on the choice of prompts.
How much hangs on the seed is said by the sign tests, where there are seeds enough.

Letters: P prompts.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlft.cli import runs, show
from rlft.objectives import estimates

if TYPE_CHECKING:
  from rlft.cli.compare import Study

Results = Mapping[tuple[str, int, str], Mapping[str, Any]]

NAMES = {
  "start": "start",
  "sft": "SFT continued",
  "ei": "EI",
  "ppo": "PPO, sparse",
  "ppo_dense": "PPO, dense",
  "ppo_orm": "PPO, ORM",
  "ppo_orm_dense": "PPO, dense ORM",
  "rcrl": "RCRL",
  "grpo": "GRPO",
  "best_of_n": "best-of-n",
}


def report(workdir: Path, results: Results, config: Study) -> None:
  """Prints the tables, and writes report.md, report.json and the plots."""
  k = max(config.eval.ks)
  metrics = ("greedy@1", f"maj@{k}", f"rerank@{k}", f"pass@{k}")
  lines = [
    "# Every method at one budget",
    "",
    f"{config.budget:,} sampled solutions an arm, {config.task.train:,} training "
    f"prompts, {config.eval_prompts} test prompts, K = {k}, {config.seeds} "
    f"seed{'s' * (config.seeds > 1)}; accepted or rewarded: {config.accept} solutions. "
    "Means over seeds; [95 % bootstrap over prompts]. The last column is of training, "
    "without the outcome model's.",
  ]
  summary: dict[str, Any] = {}
  for start in config.starts:
    arms = [arm for arm in NAMES if (start, 0, arm) in results]
    cells = {
      split: {arm: _cells(results, config, start, arm, split) for arm in arms}
      for split in config.eval_splits
    }
    summary[start] = cells
    for split, by_arm in cells.items():
      title = f"start {start}, {split}"
      columns = ["arm", *metrics, "chains", "novel", "lucky", "samples", "seconds"]
      body = [_row(arm, by_arm[arm], metrics) for arm in arms]
      show.table(title, columns, body)
      lines += ["", f"## {title}", "", *_markdown(columns, body)]
    curve = show.plot_lines(
      workdir / f"samples_{start}.png",
      {
        NAMES[arm]: _curve(results, config, start, arm)
        for arm in arms
        if arm != "start"
      },
      title=f"start {start}: mean of {config.seeds} seeds",
      ylabel="greedy@1 on dev prompts",
    )
    shown = lambda one: {m: one["metrics"][m] for m in metrics if m in one["metrics"]}
    bars = show.plot_bars(
      workdir / f"metrics_{start}.png",
      {
        split: {NAMES[arm]: shown(one) for arm, one in by_arm.items()}
        for split, by_arm in cells.items()
      },
      title=f"start {start}",
    )
    lines += ["", f"![greedy@1 against sampled solutions]({curve.name})"]
    lines += ["", f"![all metrics]({bars.name})"]
    said = _claims(results, config, start, metrics)
    print("\n".join(said))
    lines += ["", f"## What this says, start {start}", "", *said]
  (workdir / "report.md").write_text("\n".join(lines) + "\n")
  runs.write_json(workdir / "report.json", summary)


def _per_seed(results: Results, config, start, arm, split, metric) -> np.ndarray:
  """[seeds, P]."""
  each = [
    results[start, seed, arm]["splits"][split]["per_prompt"][metric]
    for seed in range(config.seeds)
  ]
  return np.array([[math.nan if x is None else x for x in row] for row in each])


def _cells(results: Results, config, start, arm, split) -> dict[str, Any]:
  ones = [results[start, seed, arm] for seed in range(config.seeds)]
  names = ones[0]["splits"][split]["per_prompt"]
  found = {}
  for name in names:
    value_P = _per_seed(results, config, start, arm, split, name)
    if np.isnan(value_P).all():
      continue
    # Of the seeds that have a value for the prompt; the others are no 0.
    known = ~np.isnan(value_P)
    mean_P = np.where(known, value_P, 0).sum(0) / np.maximum(known.sum(0), 1)
    mean_P[~known.any(0)] = np.nan
    found[name] = estimates.bootstrap_interval(mean_P, seed=0)
  total = lambda name: statistics.mean(
    one["splits"][split]["totals"].get(name) or 0 for one in ones
  )
  return {
    "metrics": found,
    "chains": total("unique_chains"),
    "novel": total("novel_chains"),
    "lucky": total("lucky_share"),
    "sampled_solutions": ones[0]["sampled_solutions"],
    "seconds": statistics.mean(one["seconds"] for one in ones),
  }


def _row(arm: str, cells: Mapping[str, Any], metrics: Sequence[str]) -> list[Any]:
  values = [cells["metrics"].get(metric) for metric in metrics]
  counts = [cells["chains"], cells["novel"] if arm != "start" else None]
  return [
    NAMES[arm], *values, *counts, cells["lucky"], cells["sampled_solutions"],
    round(cells["seconds"]),
  ]  # fmt: skip


def _markdown(columns: Sequence[str], body: Sequence[Sequence[Any]]) -> list[str]:
  cell = lambda x: show.cell(x)
  rows = [columns, ["---"] * len(columns), *([cell(x) for x in row] for row in body)]
  return ["| " + " | ".join(row) + " |" for row in rows]


def _curve(results: Results, config, start, arm) -> list[tuple[float, Any]]:
  """(sampled solutions, mean of dev greedy@1 over seeds, with their range)."""
  histories = [results[start, seed, arm]["history"] for seed in range(config.seeds)]
  length = min(map(len, histories))
  out = []
  for i in range(length):
    scores = [history[i][1] for history in histories]
    x = statistics.mean(history[i][0] for history in histories)
    out.append((x, (statistics.mean(scores), min(scores), max(scores))))
  return out


# ------------------------------------------------------------------ the paper's claims


def _claims(results: Results, config, start, metrics) -> list[str]:
  """Each claim of arXiv 2403.04642 with the numbers that bear on it."""
  split = config.eval_splits[0]
  k = max(config.eval.ks)
  arms = [arm for arm in NAMES if (start, 0, arm) in results and arm != "start"]
  mean = lambda arm, metric: float(
    np.nanmean(_per_seed(results, config, start, arm, split, metric))
  )
  against = lambda a, b, metric: _difference(
    results, config, start, split, a, b, metric
  )
  lines = []
  by_greedy = sorted(arms, key=lambda arm: -mean(arm, "greedy@1"))
  ranking = ", ".join(f"{NAMES[a]} {mean(a, 'greedy@1'):.3f}" for a in by_greedy)
  lines.append(f"- *EI is best in most cases.* greedy@1 on {split}: {ranking}.")
  rl = [a for a in arms if a in ("ei", "ppo", "grpo", "rcrl", "ppo_orm")]
  if len(rl) > 1:
    values = [mean(a, "greedy@1") for a in rl]
    lines.append(
      f"- *All methods are comparable.* greedy@1 of {', '.join(NAMES[a] for a in rl)} "
      f"spans {max(values) - min(values):.3f}."
    )
  if "sft" in arms:
    lines.append(
      "- *SFT trades pass@k for maj@1.* SFT continued over the start: "
      f"{against('start', 'sft', 'greedy@1')}; {against('start', 'sft', f'pass@{k}')}."
    )
  for arm in ("ei", "ppo", "grpo"):
    if arm in arms:
      lines.append(
        f"- *RL raises both.* {NAMES[arm]} over the start: "
        f"{against('start', arm, 'greedy@1')}; {against('start', arm, f'pass@{k}')}."
      )
  for dense, sparse in (("ppo_dense", "ppo"), ("ppo_orm_dense", "ppo_orm")):
    if dense in arms and sparse in arms:
      lines.append(
        f"- *Dense rewards bring no clear gain.* {NAMES[dense]} over {NAMES[sparse]}: "
        f"{against(sparse, dense, 'greedy@1')}."
      )
  if "sft" in arms:
    for arm in arms:
      if arm != "sft":
        lines.append(
          f"- {NAMES[arm]} over SFT continued: {against('sft', arm, 'greedy@1')}; "
          f"{against('sft', arm, f'pass@{k}')}."
        )
  return lines


def _difference(results, config, start, split, a, b, metric) -> str:
  """b - a, paired by prompt, with its interval; and the sign over seeds."""
  a_SP = _per_seed(results, config, start, a, split, metric)
  b_SP = _per_seed(results, config, start, b, split, metric)
  value, low, high = estimates.paired_bootstrap_interval(
    np.nanmean(a_SP, 0), np.nanmean(b_SP, 0), seed=0
  )
  text = f"{metric} {value:+.3f} [{low:+.3f}, {high:+.3f}]"
  if config.seeds > 1:
    each = np.nanmean(b_SP, 1) - np.nanmean(a_SP, 1)
    text += f", higher in {int((each > 0).sum())} of {config.seeds} seeds"
  return text

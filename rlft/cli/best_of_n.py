"""Best-of-n: samples n completions of each prompt and keeps the best by a reward.

  rlft best-of-n                                     # mini model, the task's checker
  rlft best-of-n --config.reward.kind=reward_model --config.reward.model=runs/rm/model
  rlft best-of-n --config.split=train --config.prompts=1000 \\
    --config.best.threshold=1 --config.distill.batch_size=32   # and train on the best

Writes every sample with its reward, the kept ones, reward and correctness against n as
table and plot, and, when any field of `distill` is set, the model that was trained on
the kept ones with its evaluation before and after.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np

import rlft
from rlft.algorithms import best_of_n, sft
from rlft.algorithms.best_of_n import BestOfNResult
from rlft.cli import config as configs
from rlft.cli import record, rl, runs, show
from rlft.cli.progress import Events
from rlft.core.errors import ConfigError
from rlft.objectives.estimates import best_of_n_kl
from rlft.probes.evaluate import EvalConfig
from rlft.rewards.verifiable import judge_all, title_of
from rlft.training.metrics import MetricWriter

SUMMARY = "keep the best of n samples by a reward, and perhaps train on them"
GROUP = "sample and evaluate"


@dataclasses.dataclass(frozen=True)
class BestOfNRun:
  """Settings of `rlft best-of-n`.

  Attributes:
    model, mesh: what samples.
    task: the problems, and who checks.
    split, prompts: of the task; where it distills, `split` is none of `eval_splits`.
    reward: what chooses, see `RewardChoice`.
    best: n, and how samples are drawn.
    distill: how the kept completions train; none does not train.
    eval, eval_splits, eval_prompts: of the evaluation around the training.
  """

  model: runs.ModelConfig = dataclasses.field(default_factory=runs.ModelConfig)
  mesh: runs.MeshConfig = dataclasses.field(default_factory=runs.MeshConfig)
  task: runs.TaskConfig = dataclasses.field(default_factory=runs.TaskConfig)
  split: str = "test"
  prompts: int = 100
  reward: rl.RewardChoice = dataclasses.field(default_factory=rl.RewardChoice)
  best: best_of_n.BestOfNConfig = dataclasses.field(
    default_factory=best_of_n.BestOfNConfig
  )
  distill: sft.SFTConfig | None = None
  eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
  eval_splits: tuple[str, ...] = ("test",)
  eval_prompts: int = 100

  def __post_init__(self):
    if self.prompts < 1:
      raise ConfigError(f"prompts={self.prompts}: at least 1")
    if self.distill and self.eval_prompts and self.split in self.eval_splits:
      raise ConfigError(
        f"split={self.split!r} would be trained on and evaluated: set "
        "--config.split=train"
      )


def add_arguments(parser: argparse.ArgumentParser) -> None:
  configs.add_arguments(parser, BestOfNRun, workdir="runs/best_of_n")


def run(args: argparse.Namespace) -> int:
  config = runs.fitted(configs.from_args(args, BestOfNRun))
  workdir = Path(args.workdir)
  if record.finished(workdir, "best-of-n", config, resumes=False):
    return 0
  start = config.task.train_start if config.split == "train" else 0
  examples = runs.examples(config.task, config.split, config.prompts, start)
  policy = runs.make_policy(config.model, config.mesh)
  reward = rl.make_reward_of(config.reward, config.task, policy)
  if config.distill:
    sft.check(policy, config.distill)
  record.begin(workdir, "best-of-n", config)
  with MetricWriter(workdir) as writer, Events(writer) as events:
    writer.rewind(-1)  # what a run that was killed here has written
    if config.distill is None:
      best = best_of_n.best_of_n(
        policy,
        examples,
        reward,
        config.best,
        lambda done, of: events("sample", {"done": done, "of": of}),
      )
    else:
      trained, best = best_of_n.distill(
        policy, examples, reward, config.best, config.distill, events
      )
  report(best, config, workdir)
  if config.distill:
    rl.look("before", policy, config, workdir)
    rl.look("after", trained.policy, config, workdir)
    rlft.save(trained.policy, workdir / "model")
    print(
      f"trained on {len(best.rows)} kept completions: {trained.steps} updates, "
      f"{trained.update_tokens} tokens in the loss, last loss "
      f"{trained.losses[-1]:.4f}\nmodel: {workdir / 'model'}"
    )
  record.finish(workdir, "best-of-n", config)
  return 0


def report(best: BestOfNResult, config: BestOfNRun, workdir: Path) -> None:
  """Samples as JSONL; reward and correctness against n as table, JSON and plot."""
  texts = [text for row in best.completions for text in row]
  judge = runs.judge_of(config.task)
  verdicts = judge_all(judge, texts, best.examples)
  correct_PN = np.array([v.correct for v in verdicts]).reshape(best.reward.shape)
  workdir.mkdir(parents=True, exist_ok=True)
  with (workdir / "samples.jsonl").open("w", encoding="utf-8") as file:
    for p, example in enumerate(best.examples):
      line = {
        "id": example.id,
        "prompt": example.prompt,
        "kept": int(best.kept[p]) if best.kept[p] >= 0 else None,
        "text": best.texts[p],
        "samples": [
          {
            "text": text,
            "reward": None if np.isnan(paid) else float(paid),
            "correct": bool(right),
          }
          for text, paid, right in zip(
            best.completions[p], best.reward[p], correct_PN[p]
          )
        ],
      }
      file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
  curves = {"reward": best.curve(), "correct": best.curve(correct_PN)}
  show.table(
    f"best of n by {config.reward.kind}, {len(best.examples)} prompts, 95 % intervals, "
    f"correct by {title_of(judge)}",
    ["n", "reward", "correct", "KL at most"],
    [
      [str(n), paid, right, best_of_n_kl(n)]
      for (n, paid), (_, right) in zip(*curves.values())
    ],
  )
  runs.write_json(
    workdir / "best_of_n.json",
    {k: dict(v) for k, v in curves.items()} | {"judge": title_of(judge)},
  )
  known = {
    name: [(n, interval) for n, interval in points if not np.isnan(interval[0])]
    for name, points in curves.items()
  }
  plot = show.plot_lines(
    workdir / "best_of_n.png",
    {name: points for name, points in known.items() if points},
    title=f"best of n by {config.reward.kind}",
    xlabel="n",
    ylabel="mean over prompts",
  )
  print(
    f"{best.sampled_solutions} sampled solutions; {best.unjudged} prompts without a "
    f"judged one, {best.truncated} kept completions cut by the length limit; "
    f"{best.seconds:.0f} s\nsamples: {workdir / 'samples.jsonl'}\nplot:    {plot}"
  )

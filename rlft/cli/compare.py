"""The study: every method from one checkpoint, at one budget, in one table.

  rlft compare --config=configs/study_arithmetic.py --workdir=runs/study        # short
  rlft compare --config=configs/study_arithmetic.py:full --workdir=runs/study_full

Each arm starts from the same checkpoint and gets the same prompts, the same checker and
the same number of sampled solutions (samples that train an outcome model are counted
with the arms that use it as their reward). Of the checkpoints that an arm passed, the
one with the best greedy@1 on dev prompts is evaluated, the start among them: the same
rule for all. An arm that is finished is not run again: the command goes on where it was
stopped. Writes report.md, report.json and plots into the work directory.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import rlft
from rlft.algorithms import best_of_n, grpo, ppo, reward_model, sft
from rlft.algorithms import expert_iteration as ei
from rlft.algorithms import return_conditioned as rc
from rlft.cli import config as configs
from rlft.cli import record, rl, runs, show, study
from rlft.cli.progress import Events, Iterations, counting
from rlft.core.errors import ConfigError
from rlft.core.types import Example
from rlft.models.hub import Policy
from rlft.models.scalar import ScalarModel, load_scalar, save_scalar
from rlft.probes import reasoning
from rlft.probes.evaluate import EvalConfig, evaluate
from rlft.rewards.learned import score_rows
from rlft.sampling.generate import generate
from rlft.training.metrics import MetricWriter
from rlft.training.outcomes import sample_outcomes

SUMMARY = "compare all methods at an equal budget of sampled solutions"
GROUP = "study"

ARMS = (
  "sft",
  "ei",
  "ppo",
  "ppo_dense",
  "ppo_orm",
  "ppo_orm_dense",
  "rcrl",
  "grpo",
  "best_of_n",
)
STARTS = ("sft", "base")
# The start itself is evaluated too; it is no method.
START = "start"


@dataclasses.dataclass(frozen=True)
class Study:
  """Settings of `rlft compare`.

  Attributes:
    model: the checkpoint of the start "sft".
    base: the checkpoint, or the architecture, of the start "base"; `pretrain` trains it
      first, on `pretrain_prompts` problems, to stand for a pretrained model that has
      seen little of the task.
    pretrain, pretrain_prompts: see above; 0 prompts leaves `base` as it is.
    mesh: the devices it runs on.
    task: training prompts and checker; supervised rows are mixed in from the start
      "sft" only.
    arms, starts: what is compared.
    seeds: prompts, noise and row order are a seed's own.
    budget: sampled solutions of every arm but "sft", which has as many update tokens as
      "ei".
    accept: of the checker: "consistent" or "final".
    sft, ei, ppo, grpo, rcrl, best_of_n: the methods. How much they sample follows from
      the budget; `ppo` is of all four PPO arms.
    orm, orm_samples: the outcome model, trained on so many samples of each prompt from
      the start; it rewards the arms "*_orm*", and reranks the samples of all arms.
    dev_prompts: greedy@1 on these chooses the checkpoint.
    eval, eval_splits, eval_prompts: of the table.
  """

  model: runs.ModelConfig = dataclasses.field(default_factory=runs.ModelConfig)
  base: runs.ModelConfig = dataclasses.field(default_factory=runs.ModelConfig)
  pretrain: sft.SFTConfig = dataclasses.field(default_factory=sft.SFTConfig)
  pretrain_prompts: int = 0
  mesh: runs.MeshConfig = dataclasses.field(default_factory=runs.MeshConfig)
  task: runs.TaskConfig = dataclasses.field(
    default_factory=lambda: runs.TaskConfig(train=1024)
  )
  arms: tuple[str, ...] = ARMS
  starts: tuple[str, ...] = ("sft",)
  seeds: int = 1
  budget: int = 8192
  accept: str = "consistent"
  sft: sft.SFTConfig = dataclasses.field(default_factory=sft.SFTConfig)
  ei: ei.EIConfig = dataclasses.field(default_factory=ei.EIConfig)
  ppo: ppo.PPOConfig = dataclasses.field(default_factory=ppo.PPOConfig)
  grpo: grpo.GRPOConfig = dataclasses.field(default_factory=grpo.GRPOConfig)
  rcrl: rc.RCRLConfig = dataclasses.field(default_factory=rc.RCRLConfig)
  best_of_n: best_of_n.BestOfNConfig = dataclasses.field(
    default_factory=best_of_n.BestOfNConfig
  )
  orm: reward_model.RewardModelConfig = dataclasses.field(
    default_factory=reward_model.RewardModelConfig
  )
  orm_samples: int = 2
  dev_prompts: int = 200
  eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
  eval_splits: tuple[str, ...] = ("test", "ood_templates")
  eval_prompts: int = 100

  def __post_init__(self):
    for name, legal in (("arms", ARMS), ("starts", STARTS)):
      given = getattr(self, name)
      if not given or not set(given) <= set(legal):
        raise ConfigError(f"{name}={given}: choose some of {legal}")
    for name in ("seeds", "budget", "dev_prompts", "eval_prompts", "orm_samples"):
      if getattr(self, name) < 1:
        raise ConfigError(f"{name}={getattr(self, name)}: at least 1")
    prompts = self.task.train
    if self.budget % (prompts * self.ei.rounds):
      raise ConfigError(
        f"budget={self.budget} must be a multiple of task.train x ei.rounds = "
        f"{prompts} x {self.ei.rounds}: every prompt is sampled equally often"
      )
    for name in ("ppo", "grpo"):
      one = getattr(self, name)
      rows = one.prompts_per_iteration * one.samples_per_prompt
      if self.budget % rows or prompts * self.orm_samples % rows:
        raise ConfigError(
          f"budget={self.budget} and the outcome model's {prompts * self.orm_samples} "
          f"samples must be multiples of the {rows} rows of an iteration of {name}"
        )
    if prompts * self.orm_samples >= self.budget:
      raise ConfigError("orm_samples leave nothing of the budget to the arms *_orm*")
    if "sft" in self.arms and "ei" not in self.arms:
      raise ConfigError("the arm 'sft' takes its update tokens from 'ei': compare both")


def add_arguments(parser: argparse.ArgumentParser) -> None:
  configs.add_arguments(parser, Study, workdir="runs/study")


def run(args: argparse.Namespace) -> int:
  config = configs.from_args(args, Study)
  workdir = Path(args.workdir)
  if record.finished(workdir, "compare", config, resumes=False):
    return 0
  if changed := record.changed(workdir, config):
    raise ConfigError(
      f"{workdir} holds a study with other settings ({record.told(changed)}); give "
      "another --workdir"
    )
  record.begin(workdir, "compare", config)
  # "sft" follows "ei", whose update tokens it takes.
  arms = [START, *sorted(config.arms, key=lambda arm: arm == "sft")]
  todo = [
    (start, seed, arm)
    for start in config.starts
    for seed in range(config.seeds)
    for arm in arms
  ]
  for number, (start, seed, arm) in enumerate(todo, 1):
    where = workdir / start / f"seed_{seed}"
    if (where / arm / "result.json").is_file():
      continue
    print(f"[{number}/{len(todo)}] start {start}, seed {seed}: {arm}", flush=True)
    _Bench(config, workdir, start, seed).do(arm)
  results = {
    (start, seed, arm): json.loads(
      (workdir / start / f"seed_{seed}" / arm / "result.json").read_text()
    )
    for start, seed, arm in todo
  }
  study.report(workdir, results, config)
  record.finish(workdir, "compare", config)
  print(f"\nreport: {workdir / 'report.md'}")
  return 0


@dataclasses.dataclass
class Trained:
  """What an arm gave, before it is evaluated.

  Attributes:
    policy: the last checkpoint, or the best by dev score where it chose itself.
    sampled, update_tokens: its cost.
    history: (sampled solutions, dev greedy@1), the start first.
    sampler: how it is sampled.
  """

  policy: Policy
  sampled: int = 0
  update_tokens: int = 0
  history: Sequence[tuple[int, float]] = ()
  sampler: Callable[..., Any] = generate


class _Bench:
  """One start and seed: the checkpoint, its prompts, and the arms."""

  def __init__(self, config: Study, workdir: Path, start: str, seed: int):
    self.config, self.seed, self.start_name = config, seed, start
    self.root = workdir / start
    self.where = self.root / f"seed_{seed}"
    first = config.task.train_start + seed * config.task.train
    self.task = dataclasses.replace(config.task, train_start=first)
    self.train = runs.train_examples(self.task)
    self.rows = runs.text_rows(self.train) if start == "sft" else []
    self.judge = runs.judge_of(self.task)
    self.start = self._start()
    self.dev_rows = self._dev_rows()
    self.dev = rl.dev_score(config.task, self.dev_rows, config.eval)

  def _dev_rows(self) -> list[Example]:
    """The same for all seeds: after the training prompts of the last one, where both
    come from one file."""
    config = self.config
    every = dataclasses.replace(config.task, train=config.task.train * config.seeds)
    return rl.dev_examples(every, config.dev_prompts)

  def _start(self) -> Policy:
    config = self.config
    if self.start_name == "sft":
      return runs.make_policy(config.model, config.mesh)
    made = self.root / "model"
    if made.is_dir():
      return runs.make_policy(runs.ModelConfig(path=str(made)), config.mesh)
    policy = runs.make_policy(config.base, config.mesh)
    if config.pretrain_prompts:
      seen = runs.examples(config.task, "train", config.pretrain_prompts)
      with MetricWriter(self.root) as writer, Events(writer, "pretrain") as events:
        policy = sft.train(
          policy, runs.text_rows(seen), config.pretrain, events.on_step
        ).policy
    rlft.save(policy, made)
    return policy

  # ------------------------------------------------------------------- one arm

  def do(self, arm: str) -> None:
    """Runs an arm, evaluates it, and writes result.json: then it is done."""
    began = time.perf_counter()
    where = self.where / arm
    if arm == START:
      trained = Trained(self.start, history=[(0, self.dev(self.start))])
    else:
      orm = self.orm()  # every arm is reranked by it: its seconds are no arm's
      began = time.perf_counter()
      with MetricWriter(where) as writer:
        trained = self._train(arm, orm, writer)
    seconds = time.perf_counter() - began
    trained = self._choose(trained)
    self._write(arm, where, trained, seconds)

  def _choose(self, trained: Trained) -> Trained:
    """One rule for all: the start stays where nothing was better on the dev prompts."""
    first, best = trained.history[0][1], max(score for _, score in trained.history)
    if len(trained.history) > 1 and best <= first:
      return dataclasses.replace(trained, policy=self.start, sampler=generate)
    return trained

  def _write(self, arm: str, where: Path, trained: Trained, seconds: float) -> None:
    config, orm = self.config, self.orm()
    score = score_rows(orm)
    reports, evaluations = {}, {}
    known = self._known(arm)
    for split in config.eval_splits:
      problems = runs.examples(config.task, split, config.eval_prompts)
      with show.progress(f"evaluate {split}", 2 * len(problems)) as advance:
        one = evaluate(
          trained.policy,
          problems,
          self.judge,
          config.eval,
          known_chains=known.get(split),
          sampler=trained.sampler,
          score=score,
          on_progress=counting(advance),
        )
      evaluations[split] = one
      reports[split] = {
        **runs.plain(one.report),
        "per_prompt": {k: v.tolist() for k, v in one.report["per_prompt"].items()},
      }
      if arm == START:
        chains = reasoning.correct_chains(one.sample_verdicts, one.examples)
        reports[split]["chains"] = {
          str(i): sorted(map(list, found)) for i, found in chains.items()
        }
      runs.write_transcripts(where / f"transcripts_{split}.txt", {arm: one})
    rlft.save(trained.policy, where / "model")
    runs.write_json(
      where / "result.json",
      {
        "arm": arm,
        "start": self.start_name,
        "seed": self.seed,
        "sampled_solutions": trained.sampled,
        "update_tokens": trained.update_tokens,
        "history": [list(point) for point in trained.history],
        "seconds": seconds,
        "splits": reports,
      },
    )

  def _known(self, arm: str) -> dict[str, dict[int, set]]:
    """The chains that the start finds, for each split; novel ones are the others."""
    if arm == START:
      return {}
    found = json.loads((self.where / START / "result.json").read_text())["splits"]
    return {
      split: {int(i): {tuple(c) for c in chains} for i, chains in one["chains"].items()}
      for split, one in found.items()
    }

  def orm(self) -> ScalarModel:
    """The outcome model of this start and seed; trained when it is first asked for."""
    made = self.where / "orm"
    if made.is_dir():
      return load_scalar(made, mesh=self.start.model.mesh)
    config = self.config
    with show.progress("sample outcomes", len(self.train)) as advance:
      outcomes = sample_outcomes(
        self.start,
        self.train,
        self.judge,
        rl.steps_of(self.task),
        config.orm_samples,
        max_new_tokens=config.eval.max_new_tokens,
        seed=self.seed,
        max_rows=config.eval.max_rows,
        on_progress=counting(advance),
      )
    with MetricWriter(self.where) as writer, Events(writer, "orm") as events:
      trained = reward_model.train_outcome(
        self.start,
        outcomes,
        dataclasses.replace(config.orm, seed=self.seed),
        on_step=events.on_step,
      )
    save_scalar(trained.model, made)
    return trained.model

  # ------------------------------------------------------------------- the methods

  def _train(self, arm: str, orm: ScalarModel, writer: MetricWriter) -> Trained:
    if arm.startswith("ppo"):
      return self._ppo(arm, orm, writer)
    return getattr(self, f"_{arm}")(writer)

  def _once(
    self, policy: Policy, sampled: int, tokens: int, sampler=generate
  ) -> Trained:
    """Of an arm that trains once: two points of its curve."""
    score = self.dev(policy) if sampler is generate else self._dev_with(policy, sampler)
    history = [(0, self.dev(self.start)), (sampled, score)]
    return Trained(policy, sampled, tokens, history, sampler)

  def _dev_with(self, policy: Policy, sampler) -> float:
    config = self.config
    greedy = dataclasses.replace(config.eval, samples=1, ks=(1,))
    report = evaluate(policy, self.dev_rows, self.judge, greedy, sampler=sampler).report
    return report["metrics"]["greedy@1"]["mean"]

  def _ei(self, writer: MetricWriter) -> Trained:
    config = self.config
    method = dataclasses.replace(
      config.ei,
      samples_per_prompt=config.budget // (config.task.train * config.ei.rounds),
      accept=config.accept,
      seed=self.seed,
    )
    with Events(writer, "EI") as on_event:
      found = ei.run(
        self.start, self.train, self.judge, method, sft_rows=self.rows,
        dev_score=self.dev, on_event=on_event,
      )  # fmt: skip
    history = [(0, self.dev(self.start))]
    history += [(one["sampled_solutions"], one["dev"]) for one in found.rounds]
    return Trained(found.policy, found.sampled_solutions, found.update_tokens, history)

  def _sft(self, writer: MetricWriter) -> Trained:
    budget = json.loads((self.where / "ei" / "result.json").read_text())
    train = dataclasses.replace(
      self.config.sft, update_tokens=budget["update_tokens"], seed=self.seed
    )
    with Events(writer, "SFT") as events:
      found = sft.train(self.start, runs.text_rows(self.train), train, events.on_step)
    return self._once(found.policy, 0, found.update_tokens)

  def _ppo(self, arm: str, orm: ScalarModel, writer: MetricWriter) -> Trained:
    config = self.config
    kind = {"ppo": "sparse", "ppo_dense": "dense"}.get(arm, arm.removeprefix("ppo_"))
    spent = config.task.train * config.orm_samples if "orm" in kind else 0
    rows = config.ppo.prompts_per_iteration * config.ppo.samples_per_prompt
    iterations = (config.budget - spent) // rows
    method = dataclasses.replace(
      config.ppo, iterations=iterations, eval_every=-(-iterations // 6), seed=self.seed
    )
    choice = rl.RewardChoice(
      kind=kind, accept=config.accept, model=str(self.where / "orm") if spent else ""
    )
    reward = rl.make_reward_of(choice, self.task, self.start, orm)
    with Iterations(writer, arm, iterations) as on_event:
      found = ppo.run(
        self.start, self.train, reward, method, dev_score=self.dev, on_event=on_event
      )
    return Trained(
      found.policy,
      spent + found.sampled_solutions,
      found.update_tokens,
      [(spent * (at > 0) + at, score) for at, score in found.history],
    )

  def _grpo(self, writer: MetricWriter) -> Trained:
    config = self.config
    rows = config.grpo.prompts_per_iteration * config.grpo.samples_per_prompt
    iterations = config.budget // rows
    method = dataclasses.replace(
      config.grpo, iterations=iterations, eval_every=-(-iterations // 6), seed=self.seed
    )
    choice = rl.RewardChoice(accept=config.accept)
    reward = rl.make_reward_of(choice, self.task, self.start)
    with Iterations(writer, "grpo", iterations) as on_event:
      found = grpo.run(
        self.start, self.train, reward, method, dev_score=self.dev, on_event=on_event
      )
    return Trained(
      found.policy, found.sampled_solutions, found.update_tokens, found.history
    )

  def _rcrl(self, writer: MetricWriter) -> Trained:
    config = self.config
    method = dataclasses.replace(
      config.rcrl,
      samples_per_prompt=config.budget // config.task.train,
      accept=config.accept,
      seed=self.seed,
    )
    with Events(writer, "RCRL") as on_event:
      found = rc.run(
        self.start, self.train, self.judge, method, sft_rows=self.rows,
        on_event=on_event,
      )  # fmt: skip
    sampler = rc.sampler(method)
    return self._once(
      found.policy, found.sampled_solutions, found.update_tokens, sampler
    )

  def _best_of_n(self, writer: MetricWriter) -> Trained:
    config = self.config
    method = dataclasses.replace(
      config.best_of_n, n=config.budget // config.task.train, seed=self.seed
    )
    reward = rl.make_reward_of(
      rl.RewardChoice(accept=config.accept), self.task, self.start
    )
    with Events(writer, "best-of-n") as on_event:
      found, best = best_of_n.distill(
        self.start,
        self.train,
        reward,
        method,
        dataclasses.replace(config.sft, seed=self.seed),
        on_event,
      )
    return self._once(found.policy, best.sampled_solutions, found.update_tokens)

"""What `rlft ppo` and `rlft grpo` share: rewards by name, dev scores, what is shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import rlft
from rlft.cli import runs, show
from rlft.cli.sft import evaluate_splits
from rlft.core import watchdog
from rlft.core.errors import ConfigError
from rlft.core.types import Example
from rlft.models.hub import Policy
from rlft.models.scalar import ScalarModel, load_scalar
from rlft.probes.evaluate import EvalConfig, evaluate
from rlft.rewards.contract import RewardConfig
from rlft.rewards.learned import orm_reward, reward_model_reward
from rlft.rewards.verifiable import make_reward, step_match
from rlft.tasks import arithmetic, gsm8k
from rlft.training.rollouts import RewardOf


@dataclasses.dataclass(frozen=True)
class RewardChoice:
  """Which reward.

  Attributes:
    kind: "sparse" (the task's checker), "dense" (and worked steps that match the
      reference's), "orm" or "orm_dense" (an outcome model in the checker's place), or
      "reward_model".
    accept: of the checker: "final" asks for the answer, "consistent" also for a valid
      chain of steps.
    model: directory of the outcome or reward model (see `rlft reward-model`).
    config: clipping, completions without an end, failures.
  """

  kind: Literal["sparse", "dense", "orm", "orm_dense", "reward_model"] = "sparse"
  accept: Literal["final", "consistent"] = "consistent"
  model: str = ""
  config: RewardConfig = dataclasses.field(default_factory=RewardConfig)

  def __post_init__(self):
    legal = ("sparse", "dense", "orm", "orm_dense", "reward_model")
    if self.kind not in legal:
      raise ConfigError(f"kind={self.kind!r}: choose one of {legal}")
    if self.learned and not self.model:
      raise ConfigError(
        f"reward.kind={self.kind!r} needs reward.model, a directory that "
        "`rlft reward-model` wrote or a published reward model"
      )

  @property
  def learned(self) -> bool:
    return self.kind not in ("sparse", "dense")


def steps_of(task: runs.TaskConfig) -> Callable[[str], list[tuple[int, str]]]:
  """The task's `steps`: where worked steps end, and their results."""
  return arithmetic.steps if task.name == "arithmetic" else gsm8k.steps


def check_missing_eos(reward: RewardChoice, name: str, taught: str) -> None:
  """Raises where a rule for completions that were cut would have no effect.

  Args:
    reward: has the rule.
    name: of the method's setting that leaves those out.
    taught: its value that does not; "" where it does not already.
  """
  rule = reward.config.missing_eos
  if taught and rule in ("penalty", "replace"):
    raise ConfigError(
      f"reward.config.missing_eos={rule!r} pays completions that the length limit cut, "
      f"and {name} leaves those out: set {name}={taught}, or missing_eos='score'"
    )


def learned_model(choice: RewardChoice, policy: Policy) -> ScalarModel | None:
  """The model of a learned reward, on the policy's mesh."""
  return load_scalar(choice.model, mesh=policy.model.mesh) if choice.learned else None


def make_reward_of(
  choice: RewardChoice,
  task: runs.TaskConfig,
  policy: Policy,
  model: ScalarModel | None = None,
) -> RewardOf:
  """The reward that was chosen, for this policy.

  Args:
    choice: see `RewardChoice`.
    task: gives the checker and the steps.
    policy: that samples.
    model: a learned one that is in memory already; else `choice.model` is loaded.
  """
  steps = steps_of(task)
  if choice.learned:
    model = model or learned_model(choice, policy)
    if choice.kind == "reward_model":
      return reward_model_reward(model, policy, choice.config)
    mode = "step" if choice.kind == "orm_dense" else "final"
    return orm_reward(model, mode, steps, policy, choice.config)
  dense = step_match(steps, policy.tokenizer) if choice.kind == "dense" else None
  return make_reward(runs.judge_of(task), choice.accept, choice.config, step=dense)


def dev_examples(task: runs.TaskConfig, count: int) -> list[Example]:
  """Dev prompts; those of gsm8k follow the training prompts in the training file."""
  if not count:
    return []
  if task.name == "arithmetic":
    return runs.examples(task, "dev", count)
  return runs.examples(task, "train", count, task.train_start + task.train)


def dev_score(
  task: runs.TaskConfig, dev: Sequence[Example], config: EvalConfig
) -> Callable[[Policy], float] | None:
  """greedy@1 on the dev prompts; None where there are none."""
  if not dev:
    return None
  judge = runs.judge_of(task)
  greedy = dataclasses.replace(config, samples=1, ks=(1,))

  def score(policy: Policy) -> float:
    beat = lambda done, of: watchdog.beat("dev score")
    report = evaluate(policy, dev, judge, greedy, on_progress=beat).report
    return report["metrics"]["greedy@1"]["mean"]

  return score


# What the last table shows of a run's first and last iteration.
SUMMARY_ROWS = (
  "reward/mean",
  "reward/correct/mean",
  "kl/sequence",
  "entropy",
  "ratio_max",
  "clip_fraction",
  "value/explained_variance",
  "groups/equal",
  "completion/length_mean",
  "completion/truncated",
  "completion/unique",
  "mismatch/max",
  "time/rollout",
  "time/update",
)


def show_result(name: str, result: Any, workdir: Path) -> None:
  """A table of the first and last iteration, and the curves of the run."""
  first, last = result.iterations[0], result.iterations[-1]
  show.table(
    f"{name}: first and last of {len(result.iterations)} iterations",
    ["", "first", "last"],
    [[row, first[row], last.get(row)] for row in SUMMARY_ROWS if row in first],
  )
  curve = lambda key: [
    (one["sampled_solutions"], one[key]) for one in result.iterations if key in one
  ]
  lines = {"reward": curve("reward/mean"), "correct": curve("reward/correct/mean")}
  lines["dev greedy@1"] = result.history
  plot = show.plot_lines(
    workdir / f"{name}.png",
    {label: points for label, points in lines.items() if points},
    title=f"{name}: {result.sampled_solutions:,} sampled solutions",
    ylabel="mean",
  )
  rlft.save(result.policy, workdir / "model")
  print(
    f"{result.sampled_solutions} sampled solutions, {result.update_tokens} tokens in "
    f"the losses, {result.seconds:.0f} s\n"
    f"model: {workdir / 'model'}\nplot:  {plot}"
  )


def look(title: str, policy: Policy, config: Any, workdir: Path) -> None:
  """Evaluates on the run's splits, unless it asks for no prompts."""
  if config.eval_prompts:
    print(f"{title}:")
    evaluate_splits(
      policy, config.task, config.eval, config.eval_splits, config.eval_prompts,
      workdir / title,
    )  # fmt: skip

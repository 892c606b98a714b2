"""Settings that have no effect because of another one: set, they are an error.

A run that ignores what it was told trains something else than was meant.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from rlft.cli import fields
from rlft.core.errors import ConfigError

ANY = "any"  # whatever is set: not none, not 0, not empty
NEVER = ()

# Class, its settings, the one that decides whether they have an effect, and the values
# with which they do.
RULES: tuple[tuple[str, str, str, Any], ...] = (
  ("TaskConfig", "path annotations check on_bad", "name", ("gsm8k",)),
  ("TaskConfig", "seed knobs", "name", ("arithmetic",)),
  ("ModelConfig", "path", "decoder", (None,)),
  ("ModelConfig", "seed", "decoder", ANY),
  ("RewardChoice", "model", "kind", ("orm", "orm_dense", "reward_model")),
  ("RewardChoice", "accept", "kind", ("sparse", "dense")),
  ("OptimizerConfig", "end_factor total_steps", "schedule", ("linear", "cosine")),
  ("SFTConfig", "epochs", "update_tokens", (0,)),
  ("PPOLoss", "constant_length", "aggregate", ("constant",)),
  ("PPOConfig", "value_optimizer critic_warmup", "value", ("separate",)),
  ("PPOConfig", "loss.value_coef", "value", ("shared",)),
  ("PPOConfig", "kl_horizon", "kl_target", ANY),
  ("PPORun", "value", "ppo.value", ("separate",)),
  ("PPORun", "ppo.eval_every", "dev_prompts", ANY),
  ("GRPOLoss", "constant_length", "aggregate", ("constant",)),
  ("GRPOLoss", "clip_low clip_high dual_clip", "clip", (True,)),
  ("GRPORun", "grpo.eval_every", "dev_prompts", ANY),
  ("EIRun", "base", "ei.start", ("base",)),
  ("EIRun", "ei.patience", "dev_prompts", ANY),
  ("RCRLConfig", "continuations estimate", "value", ("rollouts",)),
  ("RCRLConfig", "marks", "labels", ("step",)),
  ("BestOfNRun", "task.train_start", "split", ("train",)),
  ("BestOfNRun", "task.train", "prompts", NEVER),
  ("EvalRun", "task.train task.train_start", "prompts", NEVER),
  ("RewardModelRun", "preferences train.normalise", "kind", ("pairs",)),
  ("RewardModelRun", "task outcomes train.loss_on", "kind", ("outcome",)),
  ("Study", "ppo.iterations ppo.eval_every ppo.seed", "budget", NEVER),
  ("Study", "grpo.iterations grpo.eval_every grpo.seed", "budget", NEVER),
  ("Study", "ei.samples_per_prompt ei.accept ei.seed", "budget", NEVER),
  ("Study", "rcrl.samples_per_prompt rcrl.accept rcrl.seed", "budget", NEVER),
  ("Study", "best_of_n.n best_of_n.seed sft.seed orm.seed", "budget", NEVER),
)


def check(config: Any) -> None:
  """Raises `ConfigError` where a setting differs from its default to no effect.

  Args:
    config: the settings of a command.
  """
  every = list(fields.walk(type(config)))
  for kind, names, decider, used in RULES:
    for path in _groups(config, every, kind):
      given = _get(config, path + decider)
      if given in used if used != ANY else given:
        continue
      for name in names.split():
        for one in _changed(config, every, path + name):
          raise ConfigError(
            f"{one}={fields.spell(_get(config, one))} has no effect with "
            f"{path}{decider}={_spelled(given)}: {_cure(path + decider, used)}"
          )


def _groups(config: Any, every: list[fields.Field], kind: str) -> Iterator[str]:
  """Paths of the groups of a class, each with a dot at its end."""
  if type(config).__name__ == kind:
    yield ""
  for one in every:
    if one.group and type(_get(config, one.path)).__name__ == kind:
      yield f"{one.path}."


def _changed(config: Any, every: list[fields.Field], path: str) -> Iterator[str]:
  """The settings at or below a path that are not at their default."""
  for one in every:
    if one.path == path or one.path.startswith(f"{path}."):
      value = _get(config, one.path)
      if not one.group and value != one.default:
        yield one.path


def _get(config: Any, path: str) -> Any:
  for name in path.split("."):
    config = getattr(config, name, None)
  return config


def _spelled(value: Any) -> str:
  return "(set)" if dataclasses.is_dataclass(value) else fields.spell(value)


def _cure(decider: str, used: Any) -> str:
  if used == NEVER:
    return f"it follows from {decider}; leave it out"
  if used == ANY:
    return f"set {decider}, or leave it out"
  choices = " or ".join(f"{decider}={_spelled(value)}" for value in used)
  return f"set --config.{choices}, or leave it out"

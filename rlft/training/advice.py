"""What a run that learns nothing is told, early, and once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

PATIENCE = 2  # iterations in a row: one may be chance


def early(iterations: Sequence[Mapping[str, float]], config: Any) -> list[str]:
  """What there is to say after the last of these iterations.

  It is said of the first time that `PATIENCE` iterations in a row had no use, so that a
  run which goes on does not repeat it.

  Args:
    iterations: metrics of all iterations so far.
    config: of the method: its temperature, max_new_tokens and samples_per_prompt.
  """
  patience = min(PATIENCE, config.iterations)
  last = iterations[-1]
  since = f"of iterations {len(iterations) - patience + 1} to {len(iterations)}"
  said = []
  if _first_time(_cut, iterations, patience):
    said.append(
      f"every completion {since} was cut at max_new_tokens={config.max_new_tokens}: "
      "raise it, or let completions end, by stop for a base model and by chat=True for "
      "one that was trained on chats"
    )
  if _first_time(_unjudged, iterations, patience):
    said.append(
      f"no completion {since} could be judged: nothing is learned. The reward gave "
      "None or failed, see above; or it leaves completions out that are cut"
    )
  if _first_time(_flat, iterations, patience):
    said.append(
      f"all rewards {since} are equal within each group (their mean is "
      f"{last['reward/mean']:.4g}): nothing tells good completions from bad ones, and "
      "nothing is learned. Look at what the reward gives for some completions; raise "
      f"temperature={config.temperature} or samples_per_prompt="
      f"{config.samples_per_prompt}; or take prompts that are sometimes solved"
    )
  return said


def _first_time(
  useless: Callable[[Mapping[str, float]], bool],
  iterations: Sequence[Mapping[str, float]],
  patience: int,
) -> bool:
  """Whether the last iteration is the one that makes the first such streak."""
  streak = 0
  for at, stats in enumerate(iterations, 1):
    streak = streak + 1 if useless(stats) else 0
    if streak == patience:
      return at == len(iterations)
  return False


def _cut(stats: Mapping[str, float]) -> bool:
  return stats["completion/truncated"] == 1


def _unjudged(stats: Mapping[str, float]) -> bool:
  return stats["reward/judged"] == 0


def _flat(stats: Mapping[str, float]) -> bool:
  if _unjudged(stats):
    return False
  if "groups/equal" in stats:  # of a baseline that is no group's the batch may differ
    return stats["groups/equal"] == 1 and stats["advantage/std"] == 0
  return stats["reward/std"] == 0 and not stats.get("reward/steps/std")

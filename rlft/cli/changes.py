"""Which settings may be others in a run that goes on, and which begin another run.

What may change is applied from there on; everything else is refused with what differs,
as half of a run would have been made by either value. The table is in docs/resume.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from rlft.cli import config as configs
from rlft.core.errors import CheckpointError, ConfigError

WEIGHTS = "weights"  # fingerprints of models, beside the settings

_METHOD = r"(ppo|grpo|sft|sft_first|ei\.train|rcrl\.train|dpo|train)"
# Of settings by path.
MAY_CHANGE = (
  # Where models lie: their weights are compared.
  r"model\..*|base\..*|reference|value|orm|reward\.model",
  # How it is computed, watched and saved.
  r"(mesh|checkpoint)\..*",
  rf"({_METHOD}|ei|rcrl)\.(micro_batches|remat|max_tokens|max_rows)|outcomes\.max_rows",
  # How long it is, and how fast it learns.
  r"(ppo|grpo)\.(iterations|eval_every)|ei\.(rounds|patience)",
  r"(sft|rcrl\.train|dpo|train)\.(epochs|update_tokens|batch_size)",
  r"(ppo|grpo|sft|ei\.train|rcrl\.train|dpo|train)\.(value_)?optimizer\."
  r"(learning_rate|schedule|warmup_steps|total_steps|end_factor|max_nonfinite"
  r"|clip_norm|weight_decay)",
  # What PPO and GRPO read anew in every iteration, and say in every line.
  r"ppo\.(kl_coef|kl_target|kl_horizon|old_logp)|grpo\.(old_logp|kl_every)",
)
# Not where a dev score chooses what is kept: old and new ones would be compared.
EVALUATION = r"eval\..*|eval_(splits|prompts)|outcomes\.eval_.*|preferences\.other.*"


def decides_prompts(path: str) -> bool:
  """Whether a setting decides which prompts a run has, and when each comes."""
  return path.partition(".")[0] == "task" or bool(
    re.fullmatch(r"(ppo|grpo)(\.(seed|prompts_per_iteration))?", path)
  )


def check(
  where: Any, saved: Mapping[str, Any], now: Mapping[str, Any], allowed: Iterable[str]
) -> dict[str, tuple[Any, Any]]:
  """The settings that have changed, by path: (before, now).

  Args:
    where: the work directory, for people.
    saved: settings of the run, as it was saved.
    now: those that it is to go on with.
    allowed: paths, of settings or of whole groups, that may change as well.

  Raises:
    ConfigError: nothing has a path of `allowed`.
    CheckpointError: one has changed that may not.
  """
  changed, allowed = configs.diff(saved, now), tuple(allowed)
  everything = configs.diff({}, now).keys() | configs.diff({}, saved).keys()
  within = lambda path, names: any(f"{path}.".startswith(f"{n}.") for n in names)
  for name in allowed:
    if not any(within(path, [name]) for path in everything):
      raise ConfigError(
        f"allow_changed={name}: there is no such setting; give whole paths, such as "
        "grpo.temperature"
      )
  patterns = [*MAY_CHANGE, *([] if now.get("dev_prompts") else [EVALUATION])]
  refused = {
    path: (before, after)
    for path, (before, after) in changed.items()
    if not within(path, allowed)
    and not any(re.fullmatch(pattern, path) for pattern in patterns)
    # A setting that the release which saved it did not have.
    and not (before == configs.ABSENT and not path.startswith(f"{WEIGHTS}."))
  }
  if refused:
    shown = "; ".join(
      f"{path}: {a} there, {b} here" for path, (a, b) in refused.items()
    )
    raise CheckpointError(
      f"{where} is of another run: {shown}. Go on with its settings (in its "
      f"{configs.RESOLVED}), choose another workdir, or allow what you know is right "
      f"from here on by --allow_changed={','.join(refused)}"
    )
  return changed

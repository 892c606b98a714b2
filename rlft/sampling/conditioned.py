"""Sampling under a label, of policies that return-conditioned RL has trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlft.core.errors import ConfigError
from rlft.core.types import Rollout
from rlft.sampling.decode import MOST_AGAIN
from rlft.sampling.generate import generate

if TYPE_CHECKING:
  from rlft.models.hub import Policy

GOOD, BAD = "[GOOD]", "[BAD]"


def generate_conditioned(
  policy: Policy,
  prompts: Sequence[str] | Sequence[Sequence[int]],
  *,
  label: str = GOOD,
  marks: Sequence[str] = (),
  **settings: Any,
) -> Rollout:
  """`generate` under a label: before the first step, and after each mark.

  Args:
    policy: a conditioned policy.
    prompts: as for `generate`.
    label: GOOD or BAD.
    marks: those of training with labels per step; none with labels per solution.
    settings: of `generate`. With marks there can be no `stop`.

  Returns:
    `Rollout`. Labels are in `tokens`, not in `completion_mask` nor in the texts.

  Raises:
    ConfigError: the policy does not know the label.
  """
  token = label_id(policy, label)
  forced = [[token]] * len(prompts)
  return generate(policy, prompts, forced=forced, again=tuple(marks), **settings)


def label_tokens(sampler: Any) -> int:
  """The most labels that a sampler puts into a row, which take positions; none of one
  that is no partial of `generate_conditioned`."""
  if getattr(sampler, "func", None) is not generate_conditioned:
    return 0
  return 1 + (MOST_AGAIN if sampler.keywords.get("marks") else 0)


def label_id(policy: Policy, label: str) -> int:
  """The control token's id; `ConfigError` where the policy does not know it."""
  if policy.tokenizer is None or label not in policy.tokenizer.get_vocab():
    raise ConfigError(
      f"the policy does not know {label!r}: train it by return-conditioned RL"
    )
  return policy.tokenizer.convert_tokens_to_ids(label)

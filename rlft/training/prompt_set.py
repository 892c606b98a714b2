"""The prompts of a run, which one that goes on must be given again.

Which prompts come next, and whose a kept solution is, hangs on their number, order and
ids. With others some would be sampled twice, some never, or a solution would be trained
behind the prompt of another.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from rlft.core.errors import CheckpointError
from rlft.core.types import Example


def facts(examples: Sequence[Example], **order: int) -> dict[str, Any]:
  """What the prompts of a run are, for JSON.

  Args:
    examples: that are sampled, in their order.
    order: settings that decide which of them come when.
  """
  return {**order, "prompts": len(examples), "digest": _digest(examples)}


def check(
  meta: Mapping[str, Any],
  examples: Sequence[Example],
  grows: bool = False,
  **order: int,
) -> None:
  """Raises `CheckpointError` where a run cannot go on with these prompts.

  Args:
    meta: what was saved; its "prompts" are the `facts`, which old runs lack.
    examples, order: as in `facts`, of now.
    grows: whether prompts may have been added behind those of the run.
  """
  saved = meta.get("prompts")
  if not saved:
    return
  for name, value in order.items():
    if saved[name] != value:
      raise CheckpointError(
        f"the run was saved with {name}={saved[name]}, and with {name}={value} some "
        f"prompts would come twice and others never: give {name}={saved[name]}, or "
        "start in another directory"
      )
  count = saved["prompts"]
  known = examples[:count] if grows else examples
  if len(known) == count and _digest(known) == saved["digest"]:
    return
  more = " with new ones at their end only," if grows else ""
  raise CheckpointError(
    f"the run was saved with {count} training prompts, and the {len(examples)} that "
    f"are given now are others, or stand in another order: give the same,{more} or "
    "start in another directory"
  )


def _digest(examples: Sequence[Example]) -> str:
  found = hashlib.sha256()
  for example in examples:
    text = json.dumps([example.id, example.prompt], sort_keys=True, default=str)
    found.update(text.encode() + b"\n")
  return found.hexdigest()

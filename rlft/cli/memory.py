"""Says of a device that is out of memory what was asked for, and what asks for less."""

from __future__ import annotations

import re

from rlft.training.metrics import phase_of

# What a phase holds beside the weights, and the setting that bounds it.
_CURES = {
  "rollout": "lower max_rows (completions in flight), or max_new_tokens",
  "score": "lower max_tokens (tokens that are scored at once)",
  "reward": "lower max_tokens (tokens that a reward model scores at once)",
  "update": (
    "set micro_batches, which changes no number: a device's rows of an update, each "
    "taken alone, are its most and need least; or set remat='full'"
  ),
  "evaluation": "lower eval.max_rows (completions in flight)",
}
_EVERYWHERE = (
  "bfloat16 computation (compute_dtype), LoRA and a mesh of more devices need less in "
  "every phase; `rlft plan` says beforehand what fits"
)
_SIZE = r"([\d.]+ ?(?:[KMGT]i?B?\b|bytes)?)"


def explain(error: BaseException) -> str:
  """What a person is told of XLA's RESOURCE_EXHAUSTED."""
  text, phase = str(error), phase_of(error)
  asked = _find(rf"(?:allocat\w*|reserve) {_SIZE}", text) or _find(
    rf"[Uu]sed {_SIZE} of", text
  )
  free = _find(rf"(?:are|is|only) {_SIZE} (?:free|available)", text)
  limit = _find(rf"[Uu]sed [\d.]+\w* of {_SIZE}", text)
  sizes = [f"{asked} were asked for"] if asked else []
  sizes += [f"{free} are free"] if free else []
  sizes += [f"there are {limit} in all"] if limit else []
  where = f" in the phase {phase!r}" if phase else ""
  cures = _CURES.get(phase) or "; ".join(f"{p}: {c}" for p, c in _CURES.items())
  return (
    f"a device ran out of memory{where}: {', '.join(sizes) or 'sizes are not said'}.\n"
    f"  To need less: {cures}.\n  {_EVERYWHERE[0].upper()}{_EVERYWHERE[1:]}.\n"
    "  Nothing is tried again; what was saved stays, and the same command goes on from "
    f"it.\n  XLA: {text.splitlines()[0]:.300}"
  )


def _find(pattern: str, text: str) -> str:
  found = re.search(pattern, text)
  if not found:
    return ""
  size = found[1].strip()
  number = re.fullmatch(r"(\d+)(?: bytes)?", size)
  return (
    f"{int(number[1]):,} bytes ({int(number[1]) / 2**30:,.2f} GiB)" if number else size
  )

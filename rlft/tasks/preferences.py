"""Preferences: of two completions of a prompt, the one that was preferred.

The fields of a row tell the format:

  pairs        prompt, chosen, rejected, and perhaps margin
  hh           chosen, rejected: whole dialogues, as Anthropic's hh-rlhf has them, or
               lists of messages
  alpaca_eval  instruction, output_1, output_2, preference (1 or 2)
  asset        source, a, b, winner: "asset" is a, what stands in b_from is b
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rlft.core.errors import ConfigError, DataError
from rlft.tasks import jsonl
from rlft.text.encode import Prompt, is_messages, says

_log = logging.getLogger(__name__)

_TURN = "\n\nAssistant:"
# A prompt of so many words does not stand before an answer by chance, as "Hi" may.
_WORDS = 3
_FIELDS = {
  "pairs": ("prompt", "chosen", "rejected"),
  "hh": ("chosen", "rejected"),
  "alpaca_eval": ("instruction", "output_1", "output_2", "preference"),
  "asset": ("source", "a", "b", "b_from", "winner"),
}


@dataclasses.dataclass(frozen=True)
class Preference:
  """Two completions of one prompt.

  Attributes:
    id: index of the row in its data set.
    prompt: the text that both continue, or a list of messages that both answer.
    chosen, rejected: the completions, the preferred one first.
    margin: by how much it is preferred, at least 0; None when nobody said.
  """

  id: int
  prompt: Prompt
  chosen: str
  rejected: str
  margin: float | None = None


def load(
  path: str | os.PathLike[str],
  format: str = "auto",
  split: str = "train",
  on_bad: str = "raise",
  max_bad_fraction: float = 0.1,
  template: str = "{}",
) -> list[Preference]:
  """Reads a set of preferences.

  A row whose annotator found both sides equal is a tie: it prefers nothing, and is
  dropped and counted. A bad row lacks a field, has a blank side, two equal sides, or
  dialogues that differ before their last answer. Sides may be lists of messages; what
  they repeat of the prompt is taken off, and of texts see `without_prompts`.

  Args:
    path: a file (see `jsonl`), or a directory with `<split>.jsonl` or another kind.
    format: "auto" takes that of the first row, or one of those above.
    split: of a directory.
    on_bad: "raise" at the first bad row, or "skip" it, count it and log the count.
    max_bad_fraction: with "skip", the share of bad rows above which nothing is loaded.
    template: what a prompt is put into, at its `{}`, for sets whose prompts do not say
      that an answer follows: "Question: {}\\n\\nAnswer: ".

  Returns:
    Preferences in the order of the file; skipped rows shift no id.

  Raises:
    DataError: no such file, a bad row (file and line are named), too many bad rows, or
      no row that prefers anything.
    ConfigError: an option that does not exist.
  """
  if format != "auto" and format not in _FIELDS:
    raise ConfigError(f"format={format!r}: choose 'auto' or one of {tuple(_FIELDS)}")
  if on_bad not in ("raise", "skip"):
    raise ConfigError(f"on_bad={on_bad!r}: 'raise' or 'skip'")
  if not 0 <= max_bad_fraction <= 1:
    raise ConfigError(f"max_bad_fraction={max_bad_fraction}: from 0 to 1")
  if template.count("{}") != 1:
    raise ConfigError(f"template={template!r}: it must hold {{}} once")
  path = Path(os.path.expanduser(path))
  if os.path.isdir(path):
    path = jsonl.of_split(path, split)
  found: list[Preference] = []
  bad: list[str] = []
  ties = 0
  for index, (place, row) in enumerate(jsonl.rows(path)):
    try:
      if format == "auto":
        format = _format(row)
      sides = _sides(row, format)
    except DataError as error:
      if on_bad == "raise":
        raise DataError(f"{place}: {error}") from None
      bad.append(f"{place}: {error}")
      continue
    if sides is None:
      ties += 1
      continue
    prompt, chosen, rejected, margin = sides
    if isinstance(prompt, str):
      prompt = template.replace("{}", prompt)
    elif template != "{}":
      raise ConfigError(
        f"template={template!r}, but {place} has messages: leave it out"
      )
    found.append(Preference(index, prompt, chosen, rejected, margin))
  rows = len(found) + len(bad) + ties
  if ties:
    _log.warning("%s: dropped %d of %d rows, which are ties", path, ties, rows)
  if bad:
    _log.warning("skipped %d of %d rows, first %s", len(bad), rows, bad[0])
  if len(bad) > max_bad_fraction * rows:
    raise DataError(
      f"{len(bad)} of {rows} rows are bad, more than max_bad_fraction"
      f"={max_bad_fraction}; first {bad[0]}"
    )
  if not found:
    raise DataError(f"{path}: no row prefers anything ({rows} rows, {ties} ties)")
  return without_prompts(found)


def without_prompts(preferences: Sequence[Preference]) -> list[Preference]:
  """The preferences, without the prompt where both sides repeat it before they answer.

  Some sets give the whole text as a side. A set does so when all of its rows do; of one
  that is mixed, rows whose prompt is no greeting, but three words at least.
  """

  def repeats(one: Preference) -> bool:
    sides, prompt = (one.chosen, one.rejected), one.prompt
    return (
      isinstance(prompt, str)
      and bool(prompt.strip())
      and all(side.startswith(prompt) and side[len(prompt) :].strip() for side in sides)
    )

  found = [repeats(one) for one in preferences]
  every = all(found)
  out = [
    dataclasses.replace(
      one,
      chosen=one.chosen[len(one.prompt) :],
      rejected=one.rejected[len(one.prompt) :],
    )
    if again and (every or len(one.prompt.split()) >= _WORDS)
    else one
    for one, again in zip(preferences, found)
  ]
  if taken := sum(a is not b for a, b in zip(out, preferences)):
    _log.warning(
      "%d of %d preferences repeat their prompt on both sides: it is taken off",
      taken,
      len(out),
    )
  return out


Rows = str | os.PathLike[str] | Iterable[Any]


def as_preferences(rows: Rows) -> list[Preference]:
  """A set of preferences in any form; ties are left out.

  Args:
    rows: `Preference`s; dicts or a `datasets.Dataset` in one of the formats above; or
      the path of a file, see `load`.

  Raises:
    DataError: of a row that is none; names row and column.
  """
  if isinstance(rows, str | os.PathLike):
    return load(rows)
  found = []
  for i, row in enumerate(rows):
    if not isinstance(row, Preference):
      try:
        sides = _sides(row, _format(row))
      except DataError as error:
        raise DataError(f"preference {i}: {error}") from None
      if sides is None:
        continue
      row = Preference(i, *sides)
    found.append(row)
  return found


def hold_out(
  preferences: Sequence[Preference], share: float, seed: int = 0
) -> tuple[list[Preference], list[Preference]]:
  """Splits a set into (rest, held out), all rows of a prompt on one side.

  Which side depends on (seed, prompt) alone, so that more rows move none.

  Args:
    preferences: the set.
    share: of the prompts, about, that are held out.
    seed: decides which.
  """
  if not 0 <= share < 1:
    raise ConfigError(f"share={share}: from 0 to below 1")

  def held(prompt: Prompt) -> bool:
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)
    digest = hashlib.sha256(f"{seed}\n{text}".encode(errors="replace")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64

  rest, out = [], []
  for one in preferences:
    (out if held(one.prompt) else rest).append(one)
  return rest, out


def _format(row: Any) -> str:
  """The format whose fields a row has."""
  _check_object(row)
  for name, fields in _FIELDS.items():
    if all(field in row for field in fields):
      return name
  known = "; ".join(f"{name}: {', '.join(f)}" for name, f in _FIELDS.items())
  raise DataError(
    f"the row has {', '.join(map(str, row)) or 'nothing'}: the fields of no known "
    f"format ({known})."
  )


def _sides(row: Any, format: str) -> tuple[str, str, str, float | None] | None:
  """(prompt, chosen, rejected, margin) of a row; None for a tie."""
  _check_object(row)
  margin = None
  if format in ("pairs", "hh") and is_messages(row.get("chosen")):
    prompt, chosen = _reply(row, "chosen")
    other, rejected = _reply(row, "rejected")
    if prompt != other:
      raise DataError("the dialogues differ before their last answer.")
    margin = row.get("margin")
  elif format == "pairs" and is_messages(row.get("prompt")):
    chosen, rejected = _texts(row, "chosen", "rejected")
    prompt, margin = row["prompt"], row.get("margin")
  elif format == "pairs":
    prompt, chosen, rejected = _texts(row, "prompt", "chosen", "rejected")
    margin = row.get("margin")
  elif format == "hh":
    dialogues = _texts(row, "chosen", "rejected")
    for name, text in zip(("chosen", "rejected"), dialogues):
      if _TURN not in text:
        raise DataError(f"{name!r} has no {_TURN!r}: nobody answers.")
    (prompt, chosen), (other, rejected) = (
      (text[: at + len(_TURN)], text[at + len(_TURN) :])
      for text in dialogues
      for at in [text.rindex(_TURN)]
    )
    if prompt != other:
      raise DataError("the dialogues differ before their last answer.")
  elif format == "alpaca_eval":
    prompt, first, second = _texts(row, "instruction", "output_1", "output_2")
    which = row.get("preference")
    if which in (0, 1.5):
      return None
    if which not in (1, 2):
      raise DataError(f"'preference' is {which!r:.40}; it must be 1 or 2, or 0: a tie.")
    chosen, rejected = (first, second) if which == 1 else (second, first)
  else:
    prompt, first, second, other, winner = _texts(
      row, "source", "a", "b", "b_from", "winner"
    )
    if winner == "similar":
      return None
    if winner not in ("asset", other):
      raise DataError(f"'winner' is {winner!r}; it must be asset, {other} or similar.")
    chosen, rejected = (first, second) if winner == "asset" else (second, first)
  if margin is not None and not _is_margin(margin):
    raise DataError(f"'margin' is {margin!r:.40}; it must be a number, at least 0.")
  for name, text in (("chosen", chosen), ("rejected", rejected)):
    if not text.strip():
      raise DataError(f"the {name} side is blank.")
  if chosen.strip() == rejected.strip():
    raise DataError(f"both sides are equal: {chosen.strip()!r:.60}.")
  return prompt, chosen, rejected, None if margin is None else float(margin)


def _reply(row: dict[str, Any], name: str) -> tuple[Prompt, str]:
  """(prompt, the assistant's text) of a side that is a list of messages."""
  messages = row.get(name)
  if not is_messages(messages) or messages[-1]["role"] != "assistant":
    raise DataError(
      f"{name!r} is {messages!r:.80}; it must be messages, an assistant's at the end."
    )
  *before, last = messages
  (text,) = _texts({name: last.get("content")}, name)
  if any(map(str.strip, says(last)[1:])):
    raise DataError(
      f"{name!r} says more than its content, {says(last)[1]!r:.60}: preferences are "
      "of texts; write it into the content."
    )
  prompt = row.get("prompt")
  if prompt is None:  # the side is the whole dialogue
    prompt = before
  elif isinstance(prompt, str):
    said = {"role": "user", "content": prompt}
    repeated = bool(before) and before[-1].get("content") == prompt
    prompt = before if repeated else [*before, said]
  elif is_messages(prompt) and before and before != prompt:
    prompt = None
  if not is_messages(prompt):
    raise DataError(f"the messages of {name!r} do not answer the prompt.")
  return prompt, text


def _is_margin(x: Any) -> bool:
  number = isinstance(x, int | float) and not isinstance(x, bool)
  return number and 0 <= x < math.inf


def _check_object(row: Any) -> None:
  if isinstance(row, DataError):
    raise row
  if not isinstance(row, dict):
    raise DataError(f"the row is a {type(row).__name__}; it must be a JSON object.")


def _texts(row: dict[str, Any], *names: str) -> list[str]:
  """The fields, checked to be text."""
  for name in names:
    if name not in row:
      raise DataError(f"no {name!r}; the row has {', '.join(map(str, row))}.")
    if not isinstance(row[name], str):
      raise DataError(f"{name!r} is {row[name]!r:.40}; it must be text.")
  return [row[name] for name in names]

"""Prompts in any form that people have them in, as `Example`s."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlft.core.errors import ConfigError, DataError
from rlft.core.types import Example
from rlft.tasks import jsonl
from rlft.text.encode import is_completion, is_messages

Prompts = str | os.PathLike[str] | Iterable[Any]
_OWN = ("id", "prompt", "answer", "solution")
# Names under which reward functions get something else.
_TAKEN = ("prompts", "completions", "completion_ids", "finished")
_FORMS = (
  "give a list of texts, of lists of messages, of dicts with a 'prompt' or of "
  "Examples, a datasets.Dataset, or the path of a file of rows"
)


def as_examples(prompts: Prompts) -> list[Example]:
  """The examples of a data set.

  Args:
    prompts: `Example`s; texts; lists of messages (a system prompt, several turns);
      dicts or a `datasets.Dataset` with a column "prompt" (a text or messages), and
      "id", "answer", "solution" and any other column where they like; or the path of a
      file of such rows (`rlft.tasks.jsonl`).

  Returns:
    `Example`s. Their ids are those of the rows where all are integers from 0 to
    2**31 - 1, else the index of the row (an id that is none is the column "row_id").

  Raises:
    DataError: what is given is none of these, or a row has no usable prompt; names row
      and column.
  """
  rows = list(_rows(prompts))
  if all(isinstance(row, Example) for _, row in rows):
    return [row for _, row in rows]
  read = [_columns(row, where) for where, row in rows]
  own_ids = all(_usable(row.get("id")) for row in read)
  return [_example(row, i, own_ids) for i, row in enumerate(read)]


def is_data(prompts: Any) -> bool:
  """Whether these are rows of a data set or a file, and not bare prompts."""
  if isinstance(prompts, str | os.PathLike | Mapping):
    return True
  return any(isinstance(row, Example | Mapping) for row in prompts)


def as_rows(rows: Prompts) -> list[Any]:
  """Rows to train on as (prompt, completion).

  Args:
    rows: pairs, as they are; `Example`s with their solutions; dicts or a
      `datasets.Dataset` with the columns "prompt" and "completion" (or "solution"), or
      "messages" of which the last is the assistant's; or the path of a file of them.

  Raises:
    DataError: a dict has no such columns; names row and column.
  """
  pairs = isinstance(rows, Sequence) and not isinstance(rows, str)
  if pairs and not any(isinstance(row, Example | Mapping) for row in rows):
    return list(rows)
  return [_pair(row, where) for where, row in _rows(rows)]


def _pair(row: Any, where: str) -> Any:
  if isinstance(row, Example):
    return row.prompt, row.solution
  if not isinstance(row, Mapping):
    return row
  if "prompt" not in row and isinstance(row.get("messages"), Sequence):
    *before, last = row["messages"] or [None]
    if not before or not is_messages([last]) or last["role"] != "assistant":
      raise DataError(f"{where}, column 'messages' does not end with the assistant")
    row = {**row, "prompt": before, "completion": [last]}
  prompt = _columns(row, where)["prompt"]
  name = next((n for n in ("completion", "solution") if n in row), None)
  if name is None:
    raise DataError(
      f"{where} has no column 'completion', only {', '.join(map(repr, row))}"
    )
  completion = row[name]
  if is_messages(completion) and len(completion) == 1:
    completion = completion[0]
  if isinstance(completion, Mapping) and is_completion(completion):
    more = {k for k, x in completion.items() if x and k not in ("role", "content")}
    if more or not isinstance(completion.get("content"), str):
      return prompt, completion  # it reasons, or calls a tool
    completion = completion["content"]
  if not isinstance(completion, str):
    raise DataError(
      f"{where}, column {name!r} is {completion!r:.200}: give a text, or one message "
      "of the assistant"
    )
  return prompt, completion


def opened(examples: Sequence[Example], few_shot: str) -> list[Any]:
  """The examples' prompts behind a few-shot text.

  Raises:
    ConfigError: a prompt is a list of messages, which no text can open.
  """
  for example in examples:
    if few_shot and not isinstance(example.prompt, str):
      raise ConfigError(
        f"few_shot is text for base models, and the prompt with id {example.id} is a "
        "list of messages: put the shots there"
      )
  return [few_shot + e.prompt if few_shot else e.prompt for e in examples]


def _rows(prompts: Prompts) -> Iterable[tuple[str, Any]]:
  """(place, row) of each row."""
  if isinstance(prompts, str | os.PathLike):
    path = Path(os.path.expanduser(prompts))
    if not os.path.isfile(path):  # also for what is too long for a path
      raise DataError(
        f"prompts is one string, {str(prompts)!r:.200}, and no file: {_FORMS}"
      )
    for where, row in jsonl.rows(path):
      if isinstance(row, DataError):
        raise DataError(f"{where}: {row}")
      yield where, row
    return
  if isinstance(prompts, Mapping):
    splits = ", ".join(map(repr, list(prompts)[:8]))
    raise DataError(
      f"prompts is a mapping of {splits}: choose one split of a DatasetDict; {_FORMS}"
    )
  if hasattr(prompts, "to_dict") and hasattr(prompts, "columns"):
    raise DataError("prompts is a DataFrame: give df.to_dict('records')")
  if not isinstance(prompts, Iterable):
    raise DataError(f"prompts is {prompts!r:.200}: {_FORMS}")
  for i, row in enumerate(prompts):
    yield f"prompt {i}", row


def _columns(row: Any, where: str) -> dict[str, Any]:
  """A row by its columns, "prompt" among them and checked."""
  if isinstance(row, str) or (
    isinstance(row, Sequence) and any(isinstance(m, Mapping) for m in row)
  ):
    row = {"prompt": row}
  if not isinstance(row, Mapping):
    raise DataError(f"{where} is {row!r:.200}: {_FORMS}")
  row = dict(row)
  if "prompt" not in row:
    raise DataError(
      f"{where} has no column 'prompt', only {', '.join(map(repr, row))}: rename the "
      "one with the texts"
    )
  _check(row["prompt"], f"{where}, column 'prompt'")
  if row.get("tools") and not isinstance(row["prompt"], str):
    raise DataError(
      f"{where} has a column 'tools', which chat templates are not given here: make "
      "its prompt a text with tokenizer.apply_chat_template(prompt, tools=tools, "
      "add_generation_prompt=True, tokenize=False), or leave the column out"
    )
  for name in row:
    if name in _TAKEN or not isinstance(name, str):
      raise DataError(
        f"{where} has a column {name!r}, under which reward functions get something "
        "else: rename it"
      )
  return row


def _check(prompt: Any, where: str) -> None:
  if isinstance(prompt, str):
    return
  if not isinstance(prompt, Sequence) or isinstance(prompt, bytes) or not prompt:
    raise DataError(f"{where} is {prompt!r:.200}: give a text or a list of messages")
  for i, message in enumerate(prompt):
    if not is_messages([message]) or not _has_content(message):
      raise DataError(
        f"{where}, message {i} is {message!r:.200}: a message is "
        '{"role": "user", "content": "..."}, both texts'
      )


def _has_content(message: Mapping) -> bool:
  """Whether a message has a text, parts with texts, or calls tools instead."""
  content = message.get("content")
  if content is None:
    return bool(message.get("tool_calls"))
  parts = content if isinstance(content, Sequence) else ()
  return isinstance(content, str) or (
    len(parts) > 0 and all(isinstance(part, Mapping) for part in parts)
  )


def _usable(id: Any) -> bool:
  return type(id) is int and 0 <= id < 2**31


def _example(row: dict[str, Any], index: int, own_id: bool) -> Example:
  columns = {name: x for name, x in row.items() if name not in _OWN}
  if not own_id and row.get("id") is not None:
    columns.setdefault("row_id", row["id"])
  return Example(
    row["id"] if own_id else index,
    row["prompt"],
    row.get("solution", ""),
    row.get("answer", ""),
    columns=columns,
  )

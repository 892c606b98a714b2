"""Prompts, rows and preferences in every form that people have them in."""

from __future__ import annotations

import json

import datasets
import pytest

from rlft.core.errors import ConfigError, DataError
from rlft.core.types import Example
from rlft.tasks.preferences import Preference, as_preferences
from rlft.tasks.prompts import as_examples, as_rows, is_data, opened

CHAT = [
  {"role": "system", "content": "Be brief."},
  {"role": "user", "content": "1 + 1?"},
]
ROWS = [
  {"prompt": "a", "answer": 1, "tests": ["x"]},
  {"prompt": CHAT, "answer": 2, "tests": ["y", "z"]},
]


def test_examples_stay_what_they_are():
  examples = [Example(5, "a", "s", "1"), Example(3, "b", "", "")]
  assert as_examples(examples) == examples
  assert as_examples(iter(examples)) == examples
  assert as_examples([]) == []


def test_texts_and_messages_are_numbered():
  assert as_examples(["a", CHAT]) == [Example(0, "a", "", ""), Example(1, CHAT, "", "")]


def test_dicts_data_sets_and_files_keep_their_columns(tmp_path):
  first, second = due = as_examples(ROWS)
  assert (first.id, first.prompt, first.answer, first.solution) == (0, "a", 1, "")
  assert first.columns == {"tests": ["x"]} and second.columns == {"tests": ["y", "z"]}
  path = tmp_path / "rows.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
  assert as_examples(path) == as_examples(str(path)) == due
  texts = datasets.Dataset.from_list([ROWS[0], ROWS[0] | {"prompt": "b"}])
  assert [e.prompt for e in as_examples(texts)] == ["a", "b"]
  assert as_examples(texts)[0] == first
  chats = datasets.Dataset.from_list([{"prompt": CHAT, "level": 3}])
  assert as_examples(chats) == [Example(0, CHAT, "", "", columns={"level": 3})]


def test_ids_are_those_of_the_rows_where_all_can_be():
  rows = [{"prompt": "a", "id": 7}, {"prompt": "b", "id": 3}]
  assert [e.id for e in as_examples(rows)] == [7, 3]
  rows[0]["id"] = "first"
  one, two = as_examples(rows)
  assert (one.id, two.id) == (0, 1)
  assert (one.columns, two.columns) == ({"row_id": "first"}, {"row_id": 3})


@pytest.mark.parametrize(
  "rows, message",
  [
    ("What is 1 + 1?", "one string.*no file"),
    ({"train": [], "test": []}, "mapping of 'train', 'test': choose one split"),
    (["a", None], "prompt 1 is None"),
    (["a", 3], "prompt 1 is 3"),
    ([[1, 2]], r"prompt 0 is \[1, 2\]"),
    ([{"question": "a", "answer": "b"}], "0 has no column 'prompt', only 'question'"),
    ([{"prompt": "a"}, {"prompt": None}], "prompt 1, column 'prompt' is None"),
    ([{"prompt": []}], "column 'prompt' is"),
    ([{"prompt": ["a"]}], "column 'prompt', message 0 is 'a'"),
    ([[{"role": "user"}]], "column 'prompt', message 0"),
    ([{"prompt": "a", "completions": "b"}], "column 'completions'.*rename"),
    ([Example(0, "a", "", ""), "b"], r"prompt 0 is Example|prompt 1"),
    (3, "prompts is 3"),
  ],
)
def test_bad_rows_are_named(rows, message):
  with pytest.raises(DataError, match=message):
    as_examples(rows)


def test_a_bad_line_is_named(tmp_path):
  path = tmp_path / "rows.jsonl"
  path.write_text('{"prompt": "a"}\n{"text": "b"}\n')
  with pytest.raises(DataError, match=r"rows.jsonl, line 2 has no column 'prompt'"):
    as_examples(path)


def test_bare_prompts_are_told_from_data():
  assert not any(map(is_data, (["a"], [CHAT], [[1, 2]])))
  assert all(map(is_data, (ROWS, [Example(0, "a", "", "")], "a.jsonl")))


def test_shots_are_for_texts():
  assert opened(as_examples(["a"]), "shot ") == ["shot a"]
  assert opened(as_examples([CHAT]), "") == [CHAT]
  with pytest.raises(ConfigError, match="few_shot is text"):
    opened(as_examples([CHAT]), "shot ")


def test_training_rows(tmp_path):
  pairs = [("a", "b"), ("c", (1, 2))]
  assert as_rows(pairs) == pairs
  assert as_rows([Example(0, "a", "b", "")]) == [("a", "b")]
  rows = [{"prompt": "a", "completion": "b"}]
  assert as_rows(rows) == as_rows(datasets.Dataset.from_list(rows)) == [("a", "b")]
  said = {"role": "assistant", "content": "2"}
  assert as_rows([{"messages": [*CHAT, said]}]) == [(CHAT, "2")]
  assert as_rows([{"prompt": CHAT, "completion": [said]}]) == [(CHAT, "2")]
  (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]) + "\n")
  assert as_rows(tmp_path / "rows.jsonl") == [("a", "b")]
  for bad, message in (
    ({"prompt": "a"}, "prompt 0 has no column 'completion'"),
    ({"prompt": "a", "completion": 3}, "column 'completion' is 3"),
    ({"messages": CHAT}, "does not end with the assistant"),
    ({"messages": ["a", "b"]}, "does not end with the assistant"),
    ({"prompt": CHAT, "completion": CHAT[1:]}, "'role': 'user'.*give a text, or one"),
    ({"messages": [*CHAT, said], "tools": [{"type": "function"}]}, "a column 'tools'"),
  ):
    with pytest.raises(DataError, match=message):
      as_rows([bad])


CALL = {"tool_calls": [{"type": "function", "function": {"name": "add"}}]}


def test_messages_may_reason_and_call_tools():
  """All of a message is trained and shown, or it is refused: never a part of it."""
  said = {"role": "assistant", "content": "2"}
  for last in (
    said | {"reasoning_content": "1 + 1 is 2"},
    said | CALL,
    {"role": "assistant", "content": None, **CALL},
  ):
    assert as_rows([{"messages": [*CHAT, last]}]) == [(CHAT, last)]
    assert as_rows([{"prompt": CHAT, "completion": last}]) == [(CHAT, last)]
  # A data set of Arrow has every key in every message.
  assert as_rows([{"messages": [*CHAT, said | {"tool_calls": None}]}]) == [(CHAT, "2")]
  turns = [*CHAT, {"role": "assistant", **CALL}, {"role": "tool", "content": "2"}]
  parts = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
  assert [e.prompt for e in as_examples([turns, parts])] == [turns, parts]
  with pytest.raises(DataError, match=r"message 0.*both texts"):
    as_examples([[{"role": "user", "content": ["hi"]}]])


def test_preferences():
  own = Preference(4, "p", "good", "bad")
  row = {"prompt": "p", "chosen": "good", "rejected": "bad"}
  assert as_preferences([own]) == [own]
  due = [Preference(0, "p", "good", "bad")]
  assert as_preferences([row]) == due
  assert as_preferences(datasets.Dataset.from_list([row])) == due
  with pytest.raises(DataError, match=r"preference 1: (no|the row has)"):
    as_preferences([row, {"prompt": "p", "chosen": "good"}])

"""Preference sets: every format, what a bad row is told, and the real files."""

from __future__ import annotations

import json

import pytest

from rlft.core.errors import ConfigError, DataError
from rlft.tasks.preferences import Preference, hold_out, load

HH = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: bye\n\nAssistant:"
GOOD = {
  "pairs": (
    {"prompt": "p", "chosen": "c", "rejected": "r", "margin": 2},
    Preference(0, "p", "c", "r", 2.0),
  ),
  "hh": (
    {"chosen": HH + " good", "rejected": HH + " bad"},
    Preference(0, HH, " good", " bad"),
  ),
  "alpaca_eval": (
    {"instruction": "i", "output_1": "x", "output_2": "y", "preference": 2},
    Preference(0, "i", "y", "x"),
  ),
  "asset": (
    {"source": "s", "a": "x", "b": "y", "b_from": "hsplit", "winner": "asset"},
    Preference(0, "s", "x", "y"),
  ),
}


def write(tmp_path, *rows):
  path = tmp_path / "train.jsonl"
  lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
  path.write_text("".join(line + "\n" for line in lines))
  return path


@pytest.mark.parametrize("format", GOOD)
def test_formats(tmp_path, format):
  row, expected = GOOD[format]
  path = write(tmp_path, row)
  assert load(path) == load(tmp_path, format) == [expected]
  with pytest.raises(DataError, match=r"test\.jsonl: No such file"):
    load(tmp_path, split="test")


USER, SYSTEM = (
  {"role": role, "content": f"a {role} text"} for role in ("user", "system")
)


def says(text):
  return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
  ("row", "prompt"),
  [
    ({"prompt": [USER], "chosen": "c", "rejected": "r"}, [USER]),
    ({"prompt": [USER], "chosen": [says("c")], "rejected": [says("r")]}, [USER]),
    (
      {
        "prompt": USER["content"],
        "chosen": [USER, says("c")],
        "rejected": [USER, says("r")],
      },
      [USER],
    ),
    (
      {
        "prompt": [SYSTEM, USER],
        "chosen": [SYSTEM, USER, says("c")],
        "rejected": [SYSTEM, USER, says("r")],
      },
      [SYSTEM, USER],
    ),
    (
      {
        "chosen": [SYSTEM, USER, says("x"), USER, says("c")],
        "rejected": [SYSTEM, USER, says("x"), USER, says("r")],
      },
      [SYSTEM, USER, says("x"), USER],
    ),
  ],
)
def test_messages(tmp_path, row, prompt):
  assert load(write(tmp_path, row)) == [Preference(0, prompt, "c", "r")]


@pytest.mark.parametrize(
  ("row", "message"),
  [
    ({"chosen": [USER, says("c")], "rejected": [SYSTEM, says("r")]}, "differ before"),
    ({"chosen": [USER, says("c")], "rejected": [USER]}, "an assistant's at the end"),
    (
      {"prompt": [SYSTEM], "chosen": [USER, says("c")], "rejected": [says("r")]},
      "'chosen' do not answer the prompt",
    ),
    ({"chosen": [USER, says(" ")], "rejected": [USER, says("r")]}, "is blank"),
    (
      {"chosen": [USER, says("c") | {"thinking": "w"}], "rejected": [USER, says("r")]},
      "'chosen' says more than its content, 'w'",
    ),
  ],
)
def test_messages_that_are_no_preference(tmp_path, row, message):
  with pytest.raises(DataError, match=f"line 1: .*{message}"):
    load(write(tmp_path, row))


def test_sides_that_repeat_the_prompt(tmp_path, caplog):
  pair = lambda p, c, r: {"prompt": p, "chosen": c, "rejected": r}
  again = pair("Q: 2+2?\nA:", "Q: 2+2?\nA: 4", "Q: 2+2?\nA: 5")
  hello = pair("Hi", "Hi! What is it?", "Hi, you.")
  sides = lambda *rows: [(x.chosen, x.rejected) for x in load(write(tmp_path, *rows))]
  assert sides(again) == [(" 4", " 5")]
  assert "1 of 1 preferences repeat their prompt" in caplog.text
  greeting = (hello["chosen"], hello["rejected"])
  assert sides(again, hello, GOOD["pairs"][0])[:2] == [(" 4", " 5"), greeting]
  one_side = pair("Q: 2+2?\nA:", "Q: 2+2?\nA: 4", "5")
  assert sides(one_side) == [(one_side["chosen"], "5")]


def test_half_a_character_is_replaced(tmp_path):
  row = '{"prompt": "p\\ud83d", "chosen": "c \\ud83d\\ude42", "rejected": "r"}'
  assert load(write(tmp_path, row)) == [Preference(0, "p\ufffd", "c 🙂", "r")]


def test_the_other_side_wins(tmp_path):
  alpaca, asset = GOOD["alpaca_eval"][0], GOOD["asset"][0]
  assert load(write(tmp_path, alpaca | {"preference": 1}))[0].chosen == "x"
  assert load(write(tmp_path, asset | {"winner": "hsplit"}))[0].chosen == "y"


def test_template(tmp_path):
  path = write(tmp_path, GOOD["pairs"][0] | {"prompt": "{} and {}"})
  assert load(path, template="Q: {}\nA:")[0].prompt == "Q: {} and {}\nA:"
  with pytest.raises(ConfigError, match="template='Q'"):
    load(path, template="Q")


@pytest.mark.parametrize(
  ("format", "change", "message"),
  [
    ("pairs", {"chosen": "r "}, "both sides are equal: 'r'"),
    ("pairs", {"chosen": " "}, "the chosen side is blank"),
    ("pairs", {"rejected": None}, "'rejected' is None; it must be text"),
    ("pairs", {"chosen": ["c"]}, r"'chosen' is \['c'\]; it must be text"),
    ("pairs", {"margin": -1}, "'margin' is -1"),
    ("pairs", {"margin": float("nan")}, "'margin' is nan"),
    ("pairs", {"margin": True}, "'margin' is True"),
    ("hh", {"rejected": "no turns"}, "'rejected' has no"),
    ("hh", {"rejected": HH + " bad\n\nAssistant: x"}, "differ before"),
    ("hh", {"chosen": HH}, "the chosen side is blank"),
    ("alpaca_eval", {"preference": 3}, "'preference' is 3"),
    ("alpaca_eval", {"preference": None}, "'preference' is None"),
    ("asset", {"winner": "turkcorpus"}, "'winner' is 'turkcorpus'"),
    ("asset", {"b": "x"}, "both sides are equal"),
  ],
)
def test_bad_rows_are_named_or_counted(tmp_path, caplog, format, change, message):
  good, expected = GOOD[format]
  path = write(tmp_path, good | change, *[good] * 10)
  with pytest.raises(DataError, match=rf"train\.jsonl, line 1: .*{message}"):
    load(path)
  kept = load(path, on_bad="skip")
  assert [one.id for one in kept] == list(range(1, 11))  # no id has moved
  assert kept[0].chosen == expected.chosen
  assert "skipped 1 of 11 rows, first" in caplog.text
  with pytest.raises(DataError, match="1 of 11 rows are bad, more than"):
    load(path, on_bad="skip", max_bad_fraction=0.05)


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("{", "not JSON"),
    ("[1]", "the row is a list"),
    ("{}", "the row has nothing: the fields of no known format"),
    ('{"chosen": "x"}', "the row has chosen: the fields of no known format"),
    (
      '{"instruction": "i", "output": "x"}',
      "the row has instruction, output: the fields",
    ),
  ],
)
def test_lines_that_are_no_rows(tmp_path, line, message):
  with pytest.raises(DataError, match=rf"line 1: {message}"):
    load(write(tmp_path, line))


def test_rows_of_another_format_than_the_first(tmp_path):
  path = write(tmp_path, GOOD["pairs"][0], GOOD["hh"][0])
  with pytest.raises(DataError, match="line 2: no 'prompt'; the row has chosen, rej"):
    load(path)


def test_ties_are_dropped_and_counted(tmp_path, caplog):
  good = GOOD["asset"][0]
  path = write(tmp_path, good | {"winner": "similar"}, good)
  assert [one.id for one in load(path)] == [1]
  assert "dropped 1 of 2 rows, which are ties" in caplog.text
  with pytest.raises(DataError, match=r"no row prefers anything \(1 rows, 1 ties\)"):
    load(write(tmp_path, GOOD["alpaca_eval"][0] | {"preference": 0}))
  with pytest.raises(DataError, match="no row prefers anything"):
    load(write(tmp_path))


def test_options_that_do_not_exist(tmp_path):
  for option in ({"format": "trl"}, {"on_bad": "drop"}, {"max_bad_fraction": 2}):
    with pytest.raises(ConfigError, match=next(iter(option))):
      load(tmp_path, **option)


def test_hold_out():
  rows = [Preference(i, f"p{i // 2}", "c", "r") for i in range(400)]
  rest, held = hold_out(rows, 0.25, seed=1)
  assert sorted(x.id for x in rest + held) == list(range(400))
  assert not {x.prompt for x in rest} & {x.prompt for x in held}
  assert 60 < len(held) < 140
  assert hold_out(rows[:100], 0.25, seed=1)[1] == [x for x in held if x.id < 100]
  assert hold_out(rows, 0.25, seed=2)[1] != held
  assert hold_out(rows, 0.0) == (rows, [])
  with pytest.raises(ConfigError, match="share=1"):
    hold_out(rows, 1)


@pytest.mark.parametrize(
  ("name", "bad", "count"),
  [
    ("hh_rlhf_harmless_test/test.jsonl", 9, 2303),
    ("dpo_en_demo/train.jsonl", 0, 300),
    ("alpaca_eval/ppo_human_vs_davinci003.jsonl", 0, 797),
    ("asset/pairwise_human.jsonl", 0, 1434),
  ],
)
def test_real_files(data_dir, caplog, name, bad, count):
  found = load(data_dir / name, on_bad="skip")
  assert len(found) == count
  assert (f"skipped {bad} of " in caplog.text) == bool(bad)
  assert all(one.chosen != one.rejected for one in found)
  if name.startswith("hh"):
    assert all(one.prompt.endswith("\n\nAssistant:") for one in found)
    with pytest.raises(DataError, match=r"line 87: the \w+ side is blank"):
      load(data_dir / name)


def test_a_file_of_single_outputs_is_no_preference_set(data_dir):
  for name in ("alpaca_eval/alpaca7b_vs_gpt4turbo", "asset/ratings_human"):
    with pytest.raises(DataError, match=r"line 1: .* no known format"):
      load(data_dir / f"{name}.jsonl")

"""GSM8K: the real files, every kind of bad row, and both answer checks."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlft.core.errors import ConfigError, DataError
from rlft.core.types import Example
from rlft.tasks import answers, chains, gsm8k

GOOD = {
  "question": "Tom has 48 pens and sells half. How many?",
  "answer": "He sells 48/2 = <<48/2=24>>24.\nHe keeps 48-24=<<48-24=24>>24.\n#### 24",
}


def write(path, rows):
  lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
  path.write_text("".join(line + "\n" for line in lines))
  return path


def reference_is_correct(completion: str, answer: str) -> bool:
  """What grade_school_math/dataset.py computes, said in other words."""
  found = re.search(r"#### (\-?[0-9\.\,]+)", completion)
  gold = re.search(r"#### (\-?[0-9\.\,]+)", answer)
  return bool(found) and found[1].replace(",", "") == gold[1].replace(",", "")


@pytest.mark.parametrize(
  ("split", "rows", "annotated", "count", "raw", "distinct"),
  [("train", 7473, 7378, 23716, 7279, 7165), ("test", 1319, 1301, 4282, 1298, 1283)],
)
def test_real_files(data_dir, split, rows, annotated, count, raw, distinct):
  examples = gsm8k.load(data_dir / "gsm8k", split)
  assert [example.id for example in examples] == list(range(rows))
  solutions = [example.solution for example in examples]
  for example in examples:
    assert chains.parse_number(example.answer) is not None
    assert gsm8k.judge(example.solution, example).correct
    assert gsm8k.strict_gsm8k(example.solution) == example.answer
    assert answers.last(example.solution) == answers.stated(example.solution)
  texts = [re.findall(r"<<([^<>]*)>>", solution) for solution in solutions]
  assert sum(map(bool, texts)) == annotated
  assert sum(map(len, texts)) == count
  # Each annotation is exactly right: the reference wrote as many decimals as needed.
  equations = [chains.parse_equation(text) for row in texts for text in row]
  assert all(equation.holds for equation in equations)
  # 7,279 sequences of annotations as written; 7,234 once the operands of + and * are
  # sorted and numbers normalised; 7,165 chains without the 357 equations that have no
  # operator, such as <<5=5>>.
  assert len({tuple(row) for row in texts if row}) == raw
  with_annotations = [s for s, row in zip(solutions, texts) if row]
  assert len({chains.canonical(s) for s in with_annotations} - {None}) == distinct
  assert all(chains.consistent(s) is True for s in with_annotations)


def test_the_last_annotation_is_not_always_the_answer(data_dir):
  examples = gsm8k.load(data_dir / "gsm8k" / "train.jsonl")
  annotated = [example for example in examples if "<<" in example.solution]
  ends = [chains.consistent(e.solution, e.answer) for e in annotated]
  assert ends.count(False) == 377  # of 7,378: why `judge` does not ask for it
  examples = gsm8k.load(data_dir / "gsm8k" / "train.jsonl", annotations="strip")
  assert not any("<<" in example.solution for example in examples)
  # Plain equations are read as far as they go; what is read is hardly ever wrong.
  verdicts = [gsm8k.judge(example.solution, example) for example in examples]
  assert all(verdict.correct for verdict in verdicts)
  assert sum(verdict.consistent is True for verdict in verdicts) > 6200
  assert sum(verdict.consistent is False for verdict in verdicts) < 60


def test_example_text(tmp_path):
  path = write(tmp_path / "a.jsonl", [GOOD, {**GOOD, "question": " Second? "}])
  first, second = gsm8k.load(path)
  assert first.prompt == f"Question: {GOOD['question']}\nAnswer:"
  assert first.solution == " " + GOOD["answer"]
  assert (second.prompt, second.answer) == ("Question: Second?\nAnswer:", "24")
  (stripped,) = gsm8k.load(path, annotations="strip", limit=1)
  assert stripped.solution == " He sells 48/2 = 24.\nHe keeps 48-24=24.\n#### 24"
  shot = gsm8k.load(path, shots=[first])[1]
  assert shot.prompt == (
    f"Question: {GOOD['question']}\nAnswer: {GOOD['answer']}\n\n"
    "Question: Second?\nAnswer:"
  )


BAD = [
  ("{", "not JSON"),
  ("[" * 100_000, "not JSON"),
  ("1" * 10_000, "not JSON"),
  ("[1]", "a list"),
  ("null", "NoneType"),
  ({}, "no 'question'; the row has nothing"),
  ({"question": "a"}, "no 'answer'; the row has question"),
  ({"question": None, "answer": "#### 1"}, "'question' is None"),
  ({"question": "a", "answer": 5}, "'answer' is 5"),
  ({"question": "a", "answer": ["#### 1"]}, "must be text"),
  ({"question": " ", "answer": "#### 1"}, "'question' is blank"),
  ({"question": "a", "answer": "so 5"}, "no final '#### number'"),
  ({"question": "a", "answer": "#### ,"}, "no final '#### number'"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_bad_rows_name_file_and_line(tmp_path, row, message, caplog):
  path = write(tmp_path / "rows.jsonl", [GOOD, row, GOOD])
  with pytest.raises(DataError, match=re.escape(message)) as error:
    gsm8k.load(path)
  assert f"{path}, line 2:" in str(error.value)
  assert len(str(error.value)) < 500
  with caplog.at_level(logging.WARNING):
    examples = gsm8k.load(path, on_bad="skip", max_bad_fraction=0.5)
  assert [example.id for example in examples] == [0, 2]
  assert "skipped 1 of 3 rows" in caplog.text and "line 2" in caplog.text
  with pytest.raises(DataError, match="1 of 3 rows are bad"):
    gsm8k.load(path, on_bad="skip")


def test_a_line_that_is_not_utf8_spoils_only_itself(tmp_path):
  path = tmp_path / "rows.jsonl"
  good = json.dumps(GOOD).encode()
  path.write_bytes(b"\xef\xbb\xbf" + good + b"\n\xff\xfe\n" + good)
  with pytest.raises(DataError, match="line 2: the line is not UTF-8"):
    gsm8k.load(path)
  loaded = gsm8k.load(path, on_bad="skip", max_bad_fraction=0.5)
  assert [example.id for example in loaded] == [0, 2]


def test_ids_run_on_over_files_and_limit_stops_reading(tmp_path):
  one = write(tmp_path / "one.jsonl", [GOOD, "{", GOOD])
  two = write(tmp_path / "train.jsonl", [GOOD, GOOD, "{"])
  loaded = gsm8k.load([one, two], on_bad="skip", max_bad_fraction=0.5)
  assert [example.id for example in loaded] == [0, 2, 3, 4]
  assert len(gsm8k.load(tmp_path, limit=2)) == 2  # the bad third row is not read
  with pytest.raises(DataError, match=r"train.jsonl, line 3"):
    gsm8k.load(tmp_path)


def test_nothing_to_load(tmp_path):
  with pytest.raises(DataError, match="no rows"):
    gsm8k.load(write(tmp_path / "none.jsonl", []))
  with pytest.raises(DataError, match="no rows"):
    gsm8k.load([])
  with pytest.raises(DataError, match=r"test\.jsonl: No such file"):
    gsm8k.load(tmp_path, "test")
  with pytest.raises(DataError, match=r"gone\.jsonl: No such file"):
    gsm8k.load(tmp_path / "gone.jsonl")
  with pytest.raises(DataError, match="name of a data set"):
    gsm8k.load("gone")
  everything = write(tmp_path / "bad.jsonl", ["{", "{"])
  with pytest.raises(DataError, match="no rows"):
    gsm8k.load(everything, on_bad="skip", max_bad_fraction=1.0)


@pytest.mark.parametrize(
  "option",
  [{"on_bad": "drop"}, {"annotations": "yes"}, {"limit": 0}, {"max_bad_fraction": 2}],
)
def test_unknown_options_are_named(tmp_path, option):
  with pytest.raises(ConfigError, match=next(iter(option))):
    gsm8k.load(write(tmp_path / "a.jsonl", [GOOD]), **option)


def test_named_data_set(monkeypatch):
  asked = []

  def load_dataset(*args, **kwargs):
    asked.append((args, kwargs))
    if kwargs["split"] != "test":
      raise ConnectionError("no route")
    return [GOOD, {"question": None, "answer": "#### 1"}]

  fake = types.SimpleNamespace(load_dataset=load_dataset)
  monkeypatch.setitem(sys.modules, "datasets", fake)
  loaded = gsm8k.load("openai/gsm8k", "test", limit=1)
  assert [example.answer for example in loaded] == ["24"]
  assert asked == [(("openai/gsm8k", "main"), {"split": "test"})]
  with pytest.raises(DataError, match=r"openai/gsm8k\[test\], row 1: 'question' is"):
    gsm8k.load("openai/gsm8k", "test")
  with pytest.raises(DataError, match="when offline"):
    gsm8k.load("openai/gsm8k", "train")


@pytest.mark.parametrize(
  ("text", "strict", "numeric"),
  [
    ("#### 18", "18", "18"),
    ("#### -18", "-18", "-18"),
    ("#### 1,800", "1800", "1800"),
    ("#### 18.0", "18.0", "18"),
    ("#### 18.", "18.", "18"),
    ("#### 18. So", "18.", "18"),
    ("#### $18", None, "18"),
    ("#### -$18.50", None, "-18.5"),
    ("#### $-18", None, "-18"),
    ("####18", None, "18"),
    ("####  18", None, "18"),
    ("####\n18", None, "18"),
    ("#### **18**", None, "18"),
    ("#### 18 eggs", "18", "18"),
    ("#### .5", ".5", "0.5"),
    ("#### 1/2", "1", None),
    ("#### 1e3", "1", None),
    ("#### 2^3", "2", None),
    ("#### 5,4", "54", None),
    ("#### 1,80", "180", None),
    ("#### eighteen", None, None),
    ("#### ٣", None, "3"),
    ("#### 42 000", "42", "42000"),
    ("#### 18 20", "18", None),
    ("#### 2 + 3 = 5", "2", None),
    ("#### \\boxed{18}", None, "18"),
    ("#### ", None, None),
    ("the answer is 18", None, None),
    ("#### 18\nQuestion: next\nAnswer: #### 20", "18", "18"),
    ("#### no #### 20", "20", None),  # the reference searches on; numeric does not
    ("#### ,", "", None),
    ("#### " + "9" * 200, "9" * 200, None),
    ("", None, None),
  ],
)
def test_extraction(text, strict, numeric):
  assert gsm8k.strict_gsm8k(text) == strict
  assert answers.stated(text) == numeric


def test_the_flexible_check_reads_what_chat_models_write():
  example = Example(0, "", "", "1800")
  for text in ("It is $1,800 a day.", "So \\boxed{1800}.", "so\n#### 1800"):
    assert gsm8k.judge(text, example, "flexible").answer == "1800"
    assert gsm8k.judge(text, example, "flexible").correct
    assert gsm8k.judge(text, example).correct == ("####" in text)
  assert not gsm8k.judge("It is 1,800 or 20.", example, "flexible").correct


def test_judge_checks_and_chains():
  example = Example(0, "", "", "1800")
  loose = gsm8k.judge("900*2=<<900*2=1800>>1800\n#### $1,800.00", example)
  assert (loose.answer, loose.correct, loose.consistent) == ("1800", True, True)
  assert loose.chain == ("2*900=1800",)
  assert not gsm8k.judge("#### $1800", example, "strict").correct
  lucky = gsm8k.judge("<<900*3=1800>>1800\n#### 1800", example)
  assert lucky.correct and lucky.consistent is False
  silent = gsm8k.judge("It is clear.\n#### 1800", example)
  assert silent.correct and silent.consistent is None and silent.chain is None
  broken = gsm8k.judge("<<900*2=1800\n#### 1800", example)
  assert broken.correct and broken.consistent is False and broken.chain is None
  # Zero is an answer; a missing one is never equal to anything.
  assert gsm8k.judge("#### 0", Example(0, "", "", "0")).correct
  assert not gsm8k.judge("", Example(0, "", "", "")).correct
  with pytest.raises(ConfigError, match="check is 'exact'"):
    gsm8k.judge("#### 1", example, "exact")


ANSWER_LIKE = st.text(alphabet="# 0123456789.,-$/=<>+*x()\n\u0663é", max_size=80)


@given(ANSWER_LIKE | st.text(), st.integers(-2000, 2000))
@settings(max_examples=300, deadline=None)
def test_strict_is_the_reference_on_any_text(text, gold):
  example = Example(0, "", "", str(gold))
  strict = gsm8k.judge(text, example, "strict")
  assert strict.correct == reference_is_correct(text, f"#### {gold}")
  gsm8k.judge(text, example, "numeric")


@given(st.integers(-(10**9), 10**9), st.sampled_from(["{}", "{:,}", "{}.", "{:,}.00"]))
def test_numeric_reads_every_integer(value, style):
  text = "so\n#### " + style.format(value)
  assert answers.stated(text) == str(value)


@pytest.mark.parametrize("unit", ["#", "#### ", "#### 1,", "<<1+1=2>>", "1+", "-$ "])
def test_ten_megabytes_are_judged_quickly(unit):
  text = unit * (10_000_000 // len(unit))
  began = time.perf_counter()
  for check in gsm8k.CHECKS:
    gsm8k.judge(text, Example(0, "", "", "1"), check)
  assert time.perf_counter() - began < 3


@pytest.mark.parametrize("annotations", ["keep", "strip"])
def test_steps_are_the_chain_of_every_reference(data_dir, annotations):
  examples = gsm8k.load(data_dir / "gsm8k", limit=2000, annotations=annotations)
  counts = []
  for example in examples:
    found = gsm8k.steps(example.solution)
    chain = chains.canonical(example.solution) or ()
    assert [f"={value}" for _, value in found] == [c[c.index("=") :] for c in chain]
    ends = [end for end, _ in found]
    assert ends == sorted(set(ends))
    # Where a step ends nothing of its number is left.
    assert not any(re.match(r"\.?[0-9]", example.solution[end:]) for end in ends)
    counts.append(len(found))
  mean = sum(counts) / len(counts)
  assert (3.1 < mean < 3.3) if annotations == "keep" else (2.0 < mean < 3.3), mean

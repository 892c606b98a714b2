"""The number that an answer states: what is one beyond doubt, and what is none."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rlft.tasks import answers, chains, gsm8k

READ = [
  ("18", "18"), ("18.", "18"), ("  18\n", "18"), ("\n18", "18"), ("18.50", "18.5"),
  (".5", "0.5"), ("-5", "-5"), ("- 5", "-5"), ("+7", "7"), ("−5", "-5"), ("–5", "-5"),
  ("$18.00", "18"), ("-$5", "-5"), ("$-5", "-5"), ("- $ 5", "-5"), ("\\$18", "18"),
  ("USD 18", "18"), ("US$18", "18"), ("₹18", "18"), ("€ 18", "18"), ("18%", "18"),
  ("18\\%", "18"), ("1,000", "1000"), ("$1,234,567.", "1234567"), ("9{,}500", "9500"),
  ("$9{,}500$", "9500"), ("9\\,500", "9500"), ("42 000", "42000"),
  ("5\u00a0000", "5000"), ("5\u202f000", "5000"), ("5\u20091\u2009", None),
  ("1\u2009234\u2009567.5", "1234567.5"), ("\\boxed{18}", "18"),
  ("$\\boxed{-5}$", "-5"),
  ("**18**", "18"), ("\\(18\\)", "18"), ("\\boxed{\\text{18 eggs}}", "18"),
  ("`18`", "18"), ("(18)", "18"), ("= 18", "18"), ("x = 18", "18"), ("~18", "18"),
  (": 18", "18"), ("# 18", "18"), ("Answer: 18", "18"), ("**The answer is 18.**", "18"),
  ("18 eggs", "18"), ("72, altogether.", "72"), ("$18/day", "18"), ("18th", "18"),
  ("18 m^2", "18"), ("18 cm³", "18"), ("18 boys and girls", "18"), ("١٨", "18"),
  ("１８", "18"), ("18 kg", "18"), ("18</answer>", "18"),
  ("18 yards", "18"), ("18 - that is all", "18"),
]  # fmt: skip
DOUBTFUL = [
  "", ",", "eighteen", "42 00", "1,80", "5,4", "0,500", "1.234.567", "1.234,5",
  "1,234 567", "1 234,567", "3 1/2", "3½", "3/4", "1e3", "2^3", "2³", "18^n", "10:30",
  "12-15", "12–15", "12 to 15", "18 or 20", "18 or twenty", "18 20", "18, 20",
  "18\t20", "2 + 3 = 5", "5 x 3 = 15", "18 = 18", "18+", "18 + x", "5x", "18 - y",
  "7 million", "7k", "7 K", "7M", "3 dozen", "3 and a half", "3 hundredths",
  "7 squared", "minus 5", "negative 5", "not 18", "--5", "-(5)", "±5", "√18", "< 18",
  "18π", "18<x", "18</answer>20", "18 </ 2", "18\\pi",
  "\\frac{1}{2}", "\\frac12", "1\\frac{1}{2}", "\\boxed{3}\\boxed{4}", "18 in 2 parts",
  "18万", "①", "18" + " " * 100 + "20", "18" + " a" * 600, "9" * 200,
  "7 hours and ten",
]  # fmt: skip


@pytest.mark.parametrize(("text", "number"), READ)
def test_one_number_beyond_doubt(text, number):
  assert answers.stated("so 3\n#### " + text) == number
  assert answers.last("so 3\n#### " + text) == number
  assert answers.last("so 3\n\\boxed{" + text.strip() + "}. Or 3.") == number


@pytest.mark.parametrize("text", DOUBTFUL)
def test_a_number_in_parts_is_none(text):
  assert answers.stated("so 3\n#### " + text) is None
  if "boxed" not in text:
    assert answers.last("so 3\n\\boxed{" + text + "}") is None


def test_the_first_mark_and_its_line_count():
  assert answers.stated("#### 18\nQuestion: 5 and 3?\n#### 20") == "18"
  assert answers.stated("#### no #### 20") is None
  assert answers.stated("18") is None
  assert answers.stated("##### 18") == "18"


@pytest.mark.parametrize(
  ("text", "number"),
  [
    ("She makes 9 * 2 = $18.\n\\boxed{18}", "18"),
    ("\\boxed{18}, which is 9 in two days.", "18"),
    ("\\boxed{9} a day: \\boxed{\\text{18 eggs}}", "18"),
    ("The answer is 18.", "18"),
    ("<think>9 * 2</think>\n<answer>18</answer>", "18"),
    ("9 * 2 = 18\n\n**Final answer: $18**\n\nI hope that helps!", "18"),
    ("So she makes $18 every day.", "18"),
    ("It is -18.", "-18"),
    ("- 18 dollars", "18"),  # a list
    ("It costs $1,234.50 in all", "1234.5"),
    ("The plot has 42 000 m^2.", "42000"),
    ("#### Step 1: add\n5 + 13 = 18\n#### Answer\n18", "18"),
    ("#### Step 1: add 5 and 13\n\\boxed{18}", "18"),
    ("#### 18\nQuestion: next\n#### 20", "18"),
    ("#### \\boxed{18}", "18"),
    ("#### 1. Add\n5 + 13 = 18\n#### 2. State\nIt is 18.", "18"),
    ("#### 18. So she sells all of them.", "18"),
    ("#### 18 20", None),  # an answer, and none
    ("#### 18 \\boxed{20}", None),
    ("#### 18 \\boxed{18}", None),
    ("#### 18\n\\boxed{20}", None),
    ("\\boxed{}", None),
    ("\\boxed{18", None),
    ("It is 3 1/2.", None),
    ("It is 18 or 20.", None),
    ("From 12-15.", None),
    ("At 10:30.", None),
    ("It is 18 20", None),
    ("5, 18", None),
    ("7 million people", None),
    ("3 and a half", None),
    ("x^2", None),
    ("\\frac{1}{2}", None),
    ("in room A18", None),
    ("5 + 13", None),
    ("COVID-19", None),
    ("none", None),
    ("", None),
  ],
)
def test_the_last_number(text, number):
  assert answers.last(text) == number


AMOUNT = st.integers(0, 10**6)
SHOWN = st.sampled_from(["{}", "{:,}", "${}", "-{}", "{}.5", "{}%", "\\boxed{{{}}}"])
BETWEEN = st.text(
  alphabet=" \t\u00a0\u2009\u202f.,:;/-+*^=_'xa()[]{}$#\\|~", max_size=4
)
WORDS = st.sampled_from([" or ", " and ", " to ", " eggs in ", " is not ", ". So "])


@given(AMOUNT, AMOUNT, SHOWN, SHOWN, BETWEEN | WORDS)
@example(42, 0, "{}", "{}00", " ")
@settings(max_examples=400, deadline=None)
def test_two_numbers_are_never_one_of_them(one, two, first, second, between):
  """Whatever stands between them: it may join them to a third, and is else none."""
  parts = [first.format(one), second.format(two)]
  text = f"#### {parts[0]}{between}{parts[1]}"
  known = {answers.stated(f"#### {part}") for part in parts} - {None}
  known |= {f"-{number}" for number in known}
  heading = re.match(r"[.):]\s+\**[A-Za-z]", between)  # `#### 1. So 18`
  for read in (answers.stated,) if heading else (answers.stated, answers.last):
    found = read(text)
    if between or "{" in text:  # else the digits are one number's
      assert found not in known, (text, found)


@given(st.integers(-(10**9), 10**9), st.sampled_from(["{}", "{:,}", "{}.", "{:,}.00"]))
def test_every_integer_is_read(value, style):
  written = style.format(value)
  assert answers.stated(f"so\n#### {written}") == str(value)
  assert answers.last(f"It is {written}") == str(value)
  assert answers.last(f"Hence $\\boxed{{{written}}}$ in 3 days") == str(value)


@given(st.text(alphabet="# 0123456789.,-$/=+*x()\n\\{}boxedUSD½é", max_size=80))
@settings(max_examples=300, deadline=None)
def test_any_text_gives_a_number_or_none(text):
  for read in (answers.stated, answers.last):
    found = read(text)
    assert found is None or chains.normalise(chains.parse_number(found)) == found


@pytest.mark.parametrize(
  "unit", ["USD ", "$ ", "a =", "the answer is ", "\\boxed{", "1 ", "1,1", "####", "- "]
)
def test_hostile_texts_are_read_quickly(unit):
  text = "#### " + unit * (1_000_000 // len(unit))
  began = time.perf_counter()
  for one in (text, text[5:], text[:1000], text[5:1000]):
    answers.stated(one)
    answers.last(one)
  assert time.perf_counter() - began < 1


def test_every_real_answer_is_read(data_dir):
  """In the words of a chat model too, behind the equations of the solution."""
  for e in gsm8k.load(data_dir / "gsm8k", "test"):
    work, _, _ = e.solution.rpartition("\n####")
    gold = chains.normalise(chains.parse_number(e.answer))
    assert answers.last(f"{work}\nThe answer is {e.answer}.") == gold
    assert answers.last(f"{work}\nSo it is $\\boxed{{{e.answer}}}$.") == gold

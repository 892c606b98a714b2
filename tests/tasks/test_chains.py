"""Equations read exactly, or not at all, from any text."""

from __future__ import annotations

import re
import time
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rlft.tasks import chains


@pytest.mark.parametrize(
  ("text", "chain"),
  [
    ("<<48/2=24>>24 <<48+24=72>>72 #### 72", ("48/2=24", "24+48=72")),
    ("48 / 2 = 24, then 24 + 48 = $72.", ("48/2=24", "24+48=72")),
    ("3+4=7, 7*2=14 #### 14", ("3+4=7", "2*7=14")),
    ("3+4=7,7*2=14", ("3+4=7", "2*7=14")),
    ("3+4=7\n7*2=14", ("3+4=7", "2*7=14")),
    ("3+4=7 7*2=14", ("3+4=7", "2*7=14")),
    ("3 x 4 = 12 and 12 × 2 = 24 and 24 ÷ 3 = 8", ("3*4=12", "2*12=24", "24/3=8")),
    ("5 − 2 = 3 or 5 – 2 = 3", ("5-2=3", "5-2=3")),
    ("$1,000.50 + $2 = $1,002.50", ("2+1000.5=1002.5",)),
    ("He is 3. 3+4=7", ("3+4=7",)),
    ("(she has 3+4=7 left)", ("3+4=7",)),
    ("(3+4=7 is left)", None),  # an open bracket: refused, not guessed
    ("27(1/3)=9", ("27*(1/3)=9",)),
    ("(2+3)(4)=20", ("4*(2+3)=20",)),
    ("<<4=4>><<5+1=6>>", ("1+5=6",)),
    # Canonical: + and * sort and flatten, - and / keep their order.
    ("<<1+2+3=6>>", ("1+2+3=6",)),
    ("<<3+(2+1)=6>>", ("1+2+3=6",)),
    ("<<10-3-2=5>>", ("10-3-2=5",)),
    ("<<10-(3-2)=9>>", ("10-(3-2)=9",)),
    ("<<10-(3+2)=5>>", ("10-(2+3)=5",)),
    ("<<8/4/2=1>>", ("8/4/2=1",)),
    ("<<8/(4/2)=4>>", ("8/(4/2)=4",)),
    ("<<(3+2)*4=20>>", ("4*(2+3)=20",)),
    ("<<0.50*10.0=5.00>>", ("10*0.5=5",)),
    ("<<+3+4=7>>", ("3+4=7",)),
    ("<<3--4=7>>", ("3--4=7",)),
    ("<<560//10=56>>", ("560//10=56",)),
    # After the answer nothing counts.
    ("<<1+1=2>> #### 2 <<5+5=10>>", ("1+1=2",)),
    # Unreadable: not a chain, and not half of one.
    ("<<1+1=2>> <<1+=2>>", None),
    ("<<1+1=2>> <<1+1=2", None),
    ("2x-5=13", None),
    ("16,0000/10=16000", None),
    ("2 students * 3 - 1 = 5 students", None),
    ("5 - 1 - 1/2 = 3 1/2", None),
    ("1 1/2 + 2 = 3", None),
    ("$350 000 x 5/100 = $17500", None),
    ("100/5 = 5A/5", None),
    ("20/100 = 20%", None),
    ("1+1=$" + " " * 125 + "23", None),
    ("1+1=" + " " * 125 + "23", None),  # too far away, and no half of it
    ("<<2**3=8>>", None),
    ("<<__import__('os')=1>>", None),
    ("<<٣+٤=٧>>", None),
    ("x = 5", None),
    ("", None),
  ],
)
def test_canonical(text, chain):
  assert chains.canonical(text) == chain


@pytest.mark.parametrize(
  ("text", "answer", "expected"),
  [
    ("<<3+4=7>> <<7*2=14>>", None, True),
    ("<<3+4=7>> <<7*2=14>>", "14", True),
    ("<<3+4=7>> <<7*2=14>>", "14.0", True),
    ("<<3+4=7>> <<7*2=14>>", "7", False),
    ("<<3+4=8>> <<7*2=14>>", "14", False),
    ("<<10/3=3.33>>", None, False),  # exact, not nearly
    ("<<1/3*3=1>>", None, True),  # no float would do
    ("<<.1+.2=.3>>", None, True),
    ("<<3/4=3/4>>", None, True),
    ("<<1/0=0>>", None, False),
    ("<<0/0=0>>", None, False),
    ("<<1+1=2/0>>", None, False),
    ("<<7//2=3>>", None, True),
    ("<<2=2>>", "2", True),
    ("<<2=3>>", None, False),
    ("<<1+=2>>", None, False),  # a broken step is not a valid one
    ("no equation #### 5", "5", None),
    ("x = 5 #### 5", "5", None),
    ("3+4=7, 7*2=15 #### 15", "15", False),
    ("<<3+4=7>>", "seven", False),
    ("1+1=2" * 100_000, None, False),  # too long to be judged
  ],
)
def test_consistent(text, answer, expected):
  assert chains.consistent(text, answer) is expected


@pytest.mark.parametrize(
  ("text", "value"),
  [
    ("18", 18),
    ("-3", -3),
    ("- 3", -3),
    ("$1,234.50", Fraction(2469, 2)),
    ("-$2", -2),
    ("18.", 18),
    (".5", Fraction(1, 2)),
    ("", None),
    ("-", None),
    (".", None),
    ("1.2.3", None),
    ("1e3", None),
    ("--3", None),
    ("٣", None),
    ("9" * 30, None),
    ("9" * 10_000_000, None),
  ],
)
def test_parse_number(text, value):
  assert chains.parse_number(text) == value


@given(st.fractions(max_denominator=10**6))
def test_normalised_numbers_read_back(value):
  text = chains.normalise(value)
  if "/" in text:
    above, below = text.split("/")
    assert Fraction(int(above), int(below)) == value
  elif len(text) <= chains.MAX_DIGITS:
    assert chains.parse_number(text) == value
    assert not text.endswith(("0", ".")) or "." not in text


def expressions():
  numbers = st.integers(0, 99).map(str)
  return st.recursive(
    numbers,
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(
      lambda parts: "(" + "".join(parts) + ")"
    ),
    max_leaves=8,
  )


def value_of(text: str) -> Fraction | None:
  """A second evaluator, for fully bracketed expressions: innermost bracket first."""
  values: list[Fraction | None] = []

  def push(value):
    values.append(value)
    return f"v{len(values) - 1}"

  text = re.sub(r"[0-9]+", lambda match: push(Fraction(match[0])), text)
  while "(" in text:
    inner = re.search(r"\(v([0-9]+)([-+*/])v([0-9]+)\)", text)
    left, right = values[int(inner[1])], values[int(inner[3])]
    if left is None or right is None or (inner[2] == "/" and right == 0):
      value = None
    else:
      value = {
        "+": left + right,
        "-": left - right,
        "*": left * right,
        "/": right and left / right,
      }[inner[2]]
    text = text[: inner.start()] + push(value) + text[inner.end() :]
  return values[int(text[1:])]


@given(expressions())
@settings(max_examples=200, deadline=None)
def test_values_are_exact_and_canonical_forms_mean_the_same(text):
  equation = chains.parse_equation(f"{text}=1")
  assert equation is not None
  assert equation.value == value_of(text)
  again = chains.parse_equation(equation.form)
  assert again.value == equation.value
  assert again.form == equation.form


@given(st.permutations(["2", "13", "7", "(4-1)"]), st.sampled_from("+*"))
def test_order_of_sums_and_products_is_no_identity(parts, sign):
  reference = chains.parse_equation(sign.join(["2", "7", "13", "(4-1)"]) + "=0").form
  assert chains.parse_equation(sign.join(parts) + "=0").form == reference
  nested = f"{parts[0]}{sign}({parts[1]}{sign}({parts[2]}{sign}{parts[3]}))=0"
  assert chains.parse_equation(nested).form == reference


@given(st.text(alphabet="0123456789+-*/=().,<># $x×÷−\n%aé\u0663", max_size=120))
@example("=" * 50)
@example("<<" * 50)
@example("(" * 120 + "=1")
@settings(max_examples=500, deadline=None)
def test_no_text_breaks_the_reader(text):
  chain = chains.canonical(text)
  assert chain is None or (chain and all("=" in step for step in chain))
  assert chains.consistent(text, "7") in (True, False, None)
  chains.parse_equation(text)
  chains.parse_number(text)


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_no_unicode_breaks_the_reader(text):
  chains.canonical(text)
  chains.consistent("<<" + text + "=1>>", text)


@pytest.mark.parametrize(
  "unit",
  [
    "1",
    "=",
    "1=",
    "1+1=2 ",
    "(",
    "((1+",
    "<<",
    "<<1+",
    "<<1+1=2>>",
    ",",
    "1,",
    "-",
    " ",
  ]
  + ["1,111", "$", "x", "1 x ", "####", ">>", "=1 "],
)
def test_pathological_text_is_quick(unit):
  for size in (chains.MAX_CHARS, 10_000_000):
    text = unit * (size // len(unit))
    began = time.perf_counter()
    chains.canonical(text)
    chains.consistent(text)
    assert time.perf_counter() - began < 4, size


def test_deep_brackets_end_without_recursion_errors():
  depth = chains.MAX_DEPTH
  assert chains.parse_equation("(" * depth + "1+1" + ")" * depth + "=2").holds
  assert chains.parse_equation("(" * 100 + "1+1" + ")" * 100 + "=2") is None


# ------------------------------------------------------------------ steps


def pieces(text):
  """The text of each step, and its result."""
  found, begin = [], 0
  for end, result in chains.steps(text):
    found.append((text[begin:end], result))
    begin = end
  return found


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("", []),
    ("no step at all", []),
    ("a 48/2 = <<48/2=24>>24 b", [("a 48/2 = <<48/2=24>>24", "24")]),
    # Nothing after the annotation, or something else than its result.
    ("<<48/2=24>> clips 7", [("<<48/2=24>>", "24")]),
    ("<<1+1=2>>$2. <<3-4=-1>>-1!", [("<<1+1=2>>$2", "2"), (". <<3-4=-1>>-1", "-1")]),
    ("<<600*2=1200>>1,200 and", [("<<600*2=1200>>1,200", "1200")]),
    ("<<5/2=2.50>>2.50.", [("<<5/2=2.50>>2.50", "2.5")]),
    # What cannot be read is no step, and spoils no other one.
    ("<<a=1>>1 <<1+1=2>>2 <<3", [("<<a=1>>1 <<1+1=2>>2", "2")]),
    ("<<5=5>>5 <<1+1=3>>3", [("<<5=5>>5 <<1+1=3>>3", "3")]),
    # With an annotation anywhere, plain equations are repeated by annotations.
    ("1+1=2, <<1+2=3>>3", [("1+1=2, <<1+2=3>>3", "3")]),
    ("so 48 / 2 = $24, then", [("so 48 / 2 = $24", "24")]),
    ("1+1=2\n2+2=5 #### 1+1=2", [("1+1=2", "2"), ("\n2+2=5", "5")]),
    ("x=3 and 5=5", []),
  ],
)
def test_steps(text, expected):
  assert pieces(text) == expected


def test_a_text_too_long_has_no_steps():
  assert chains.steps("1+1=2 " + " " * chains.MAX_CHARS) == []

"""Generated word problems: splits that never meet, several ways, a strict judge."""

from __future__ import annotations

import itertools
import re
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlft.core.errors import ConfigError
from rlft.core.types import Example
from rlft.tasks import arithmetic, stories
from rlft.tasks.arithmetic import SPLITS, Knobs, generate, judge, solutions, words

FIRST_PROMPT = (
  "Max has 3 red pens and 8 blue pens. The next day he sells 2 of the pens. In the end,"
  " how many pens does Max have?\n"
)
FIRST_SOLUTION = "3-2=1, 1+8=9 #### 9"


def tokens(text: str) -> list[str]:
  return re.findall(arithmetic.TOKEN_PATTERN, text)


def contents(split: str, n: int, seed: int) -> set[str]:
  knobs = arithmetic._shift(Knobs(), split)
  plots = (arithmetic._plot(split, index, knobs, seed)[1] for index in range(n))
  return {arithmetic._content(plot) for plot in plots}


def steps_of(example: Example) -> int:
  return example.solution.count("=")


def numbers_of(example: Example) -> list[int]:
  return [int(number) for number in re.findall("[0-9]+", example.prompt)]


def test_generation_is_addressed_by_seed_split_and_index():
  whole = generate("train", 40, seed=3)
  assert whole == generate("train", 40, seed=3)
  assert whole[25:30] == generate("train", 5, seed=3, start=25)
  assert [example.id for example in whole] == list(range(40))
  assert whole != generate("train", 40, seed=4)
  assert generate("dev", 5)[0].prompt != generate("test", 5)[0].prompt


def test_the_first_problems_stay_what_published_runs_saw():
  # Changing a wording, a draw or the hash changes every data set that was published.
  first = generate("train", 1)[0]
  assert first.prompt == FIRST_PROMPT
  assert first.solution == FIRST_SOLUTION
  assert first.answer == FIRST_SOLUTION.split()[-1]


def test_splits_never_share_a_problem_whatever_the_seed():
  per_split = {"train": 3000, "ood_steps": 100}
  prompts: dict[str, set[str]] = {}
  content: dict[str, set[str]] = {}
  for place, split in enumerate(SPLITS):
    n = per_split.get(split, 300)
    prompts[split] = {example.prompt for example in generate(split, n, seed=place)}
    content[split] = contents(split, n, seed=place + 7)
  for one in SPLITS:
    for other in SPLITS:
      if one < other:
        assert not prompts[one] & prompts[other], (one, other)
        assert not content[one] & content[other], (one, other)


def test_every_content_of_a_small_world_belongs_to_exactly_one_split():
  knobs = Knobs(steps=(2, 2), operands=(2, 9), operations="+-")
  drawn = {
    split: {
      arithmetic._content(arithmetic._plot(split, i, knobs, 0)[1]) for i in range(150)
    }
    for split in ("train", "dev", "test")
  }
  world = {f"+{a}+{b}+{c}" for a, b, c in itertools.combinations(range(2, 10), 3)}
  for a, b in itertools.combinations(range(2, 10), 2):
    world |= {f"+{a}+{b}-{c}" for c in range(2, 10) if a + b > c and c not in (a, b)}
  everything = set.union(*drawn.values())
  assert everything <= world
  assert len(everything) > len(world) / 3
  assert sum(map(len, drawn.values())) == len(everything)
  assert len(drawn["train"]) > len(drawn["dev"]) > 0 < len(drawn["test"])


def test_content_does_not_depend_on_order_or_words():
  plot = arithmetic._Plot("a+b", {"a": 3, "b": 4}, (("+", 5),), "*", 2)
  same = arithmetic._Plot("a+b+c", {"a": 5, "b": 3, "c": 4}, (), "*", 2)
  other = arithmetic._Plot("a+b", {"a": 3, "b": 4}, (("-", 5),), "*", 2)
  grouped = arithmetic._Plot("(a+b)*k", {"a": 3, "b": 4, "k": 2}, (), "", 0)
  multiplied = arithmetic._Plot("a+b", {"a": 4, "b": 3}, (), "*", 2)
  assert arithmetic._content(plot) == arithmetic._content(same)
  assert arithmetic._content(plot) != arithmetic._content(other)
  assert arithmetic._content(grouped) == arithmetic._content(multiplied)


def test_each_ood_split_shifts_exactly_its_own_knob():
  train = generate("train", 800)
  assert {steps_of(example) for example in train} == {2, 3, 4}
  assert max(max(numbers_of(example)) for example in train) <= 12
  assert {steps_of(example) for example in generate("ood_steps", 60)} == {5}
  for example in generate("ood_numbers", 100):
    factors = [number for number in numbers_of(example) if number <= 5]
    assert all(number > 12 for number in numbers_of(example) if number not in factors)
    assert len(factors) < len(numbers_of(example))
    assert steps_of(example) in (2, 3, 4)


def wordings(part: str) -> set[str]:
  """Sentence shapes: all that is not a wording's fixed text is a slot."""
  texts = [text for o in stories.OPENINGS[part].values() for _, text in o]
  for group in (stories.EVENTS, stories.QUESTIONS):
    texts += [text for options in group[part].values() for text in options]
  return set(texts)


def test_unseen_wordings_are_new_and_use_only_words_that_training_has():
  assert not wordings("seen") & wordings("unseen")
  seen = {word for e in generate("train", 4000) for word in tokens(e.prompt)}
  unseen = {word for e in generate("ood_templates", 400) for word in tokens(e.prompt)}
  assert unseen <= seen


def test_ood_templates_problems_are_told_in_unseen_wordings_only():
  def sentences(part: str) -> re.Pattern:
    shapes = (re.escape(text).replace("\\", "") for text in sorted(wordings(part)))
    escaped = (re.escape(text) for text in shapes)
    return re.compile("|".join(re.sub(r"\\{\w+\\}", r"\\w+", text) for text in escaped))

  seen, unseen = sentences("seen"), sentences("unseen")

  def covered(pattern: re.Pattern, text: str) -> bool:
    return not pattern.sub("", text).strip()

  for example in generate("ood_templates", 60):
    assert covered(unseen, example.prompt), example.prompt
    assert not covered(seen, example.prompt), example.prompt
  for example in generate("train", 60):
    assert covered(seen, example.prompt), example.prompt


def test_every_kind_has_at_least_ten_wordings_for_training():
  kinds = [
    *stories.OPENINGS["seen"].values(),
    *stories.EVENTS["seen"].values(),
    *stories.QUESTIONS["seen"].values(),
  ]
  assert min(len(set(kind)) for kind in kinds) >= 10
  assert set(stories.OPENINGS["seen"]) == set(stories.OPENINGS["unseen"])


@pytest.mark.parametrize("split", SPLITS)
def test_every_solution_of_every_problem_is_right_and_fits(split):
  n = 60 if split == "ood_steps" else 150
  vocabulary = set(words())
  for example in generate(split, n, seed=5):
    numbers = numbers_of(example)
    assert len(set(numbers)) == len(numbers), example.prompt
    assert set(tokens(example.prompt + example.solution)) <= vocabulary
    assert len(tokens(example.prompt)) <= 80
    options = solutions(split, example.id, seed=5)
    assert example.solution in options
    chains = set()
    for solution in options:
      verdict = judge(solution, example)
      assert verdict.correct and verdict.consistent, (example, solution)
      assert len(tokens(solution)) + 1 <= arithmetic.MAX_SOLUTION_TOKENS
      chains.add(verdict.chain)
      for left, sign, right, result in re.findall(
        r"(\d+)([-+*/])(\d+)=(-?\d+)", solution
      ):
        a, b = Fraction(left), Fraction(right)
        value = {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign]
        assert value == int(result) > 0
    assert len(chains) == len(options)  # each one another chain


def test_many_problems_have_several_solutions_and_the_mix_is_skewed():
  several = first = 0
  for example in generate("train", 600):
    options = solutions("train", example.id)
    if len(options) > 1:
      several += 1
      first += options[0] == example.solution
  assert several / 600 > 0.6
  assert 0.75 < first / several < 0.85  # 80 %; the standard error is 2 %


def test_vocabulary_is_small_and_has_nothing_idle():
  examples = generate("train", 4000) + generate("ood_templates", 400)
  used = {token for e in examples for token in tokens(e.prompt + e.solution)}
  assert used == set(words())
  assert len(words()) <= 300
  assert list(words()) == sorted(set(words()))


TOM = Example(
  0,
  "Tom has 3 red pens and 4 blue pens. Ann has 2 times as many pens as Tom has now."
  " How many pens does Ann have?\n",
  "3+4=7, 7*2=14 #### 14",
  "14",
)


@pytest.mark.parametrize(
  ("completion", "answer", "correct", "consistent", "chain"),
  [
    ("3+4=7, 7*2=14 #### 14", "14", True, True, ("3+4=7", "2*7=14")),
    (" 3 + 4 = 7 , 2 * 7 = 1 4 # # # # 1 4", "14", True, True, ("3+4=7", "2*7=14")),
    ("4*2=8,3*2=6,8+6=14####14", "14", True, True, ("2*4=8", "2*3=6", "6+8=14")),
    # Lucky: right answer, wrong work.
    ("3+4=8, 8*2=14 #### 14", "14", True, False, ("3+4=8", "2*8=14")),
    ("7*2=14 #### 14", "14", True, False, ("2*7=14",)),  # 7 comes from nowhere
    ("3+4=7, 7+7=14 #### 14", "14", True, False, ("3+4=7", "7+7=14")),  # 2 unused
    ("3+4=7, 7*2=14, 3+2=5 #### 14", "14", True, False, ANY := object()),
    ("4+3=7, 3+4=7, 7*2=14 #### 14", "14", True, False, ANY),  # an idle step
    ("3+4=7, 7*2=14, 14+0=14 #### 14", "14", True, False, ANY),  # padding
    ("3+4=7, 7*2=14, 14/1=14 #### 14", "14", True, False, ANY),
    ("3+4=7, 7*2=14 #### 15", "15", False, False, ANY),
    ("3*2=6, 6+4=10 #### 10", "10", False, True, ("2*3=6", "4+6=10")),
    ("#### 14", "14", True, False, None),
    ("so 3+4=7, 7*2=14 #### 14", "14", True, False, None),
    ("3+4=7; 7*2=14 #### 14", "14", True, False, None),
    ("3+4=7, 7*2=14", None, False, False, ("3+4=7", "2*7=14")),
    ("3+4=7, 7*2=14 ####", None, False, False, ANY),
    ("3+4=7, 7*2=14 #### -14", None, False, False, ANY),
    ("3+4=7, 7*2=14 #### 014", "14", True, True, ANY),
    ("3+4=7, 7*2=14 #### 14 #### 15", "14", True, True, ANY),  # the first counts
    ("3+4=7, 7*2=14 #### 14000000", None, False, False, ANY),
    ("3/0=3, 4*2=8 #### 8", "8", False, False, ("3/0=3", "2*4=8")),
    ("٣+٤=٧ #### 14", "14", True, False, None),  # other digits are not digits
    ("", None, False, False, None),
  ],
)
def test_judge(completion, answer, correct, consistent, chain):
  verdict = judge(completion, TOM)
  assert (verdict.answer, verdict.correct) == (answer, correct)
  assert verdict.consistent is consistent
  if chain is not ANY:
    assert verdict.chain == chain


def test_judge_accepts_division_only_where_it_is_exact():
  example = Example(0, "Ann shares 7 pens and 8 pens among 2 boys.", "", "7")
  assert judge("7+8=15, 15/2=7 #### 7", example).consistent is False
  exact = Example(0, "Ann shares 7 pens and 9 pens among 2 boys.", "", "8")
  assert judge("7+9=16, 16/2=8 #### 8", exact).consistent is True


@given(st.text(alphabet="0123456789+-*/=,.# ab\n<>٣é", max_size=200) | st.text())
@settings(max_examples=300, deadline=None)
def test_judge_survives_any_text(completion):
  verdict = judge(completion, TOM)
  assert verdict.correct == (verdict.answer == "14")
  assert not verdict.consistent or verdict.chain


@pytest.mark.parametrize("unit", ["1", "1+1=2,", "#", "####1", ",", " ", "9=", "\x00"])
def test_judge_is_quick_on_ten_megabytes(unit):
  text = unit * (10_000_000 // len(unit))
  began = time.perf_counter()
  judge(text, TOM)
  assert time.perf_counter() - began < 2


@pytest.mark.parametrize(
  ("knobs", "named"),
  [
    ({"steps": (1, 3)}, "steps"),
    ({"steps": (4, 3)}, "steps"),
    ({"operands": (0, 5)}, "operands"),
    ({"factors": (2, 1000)}, "factors"),
    ({"operations": "+^"}, "operations"),
    ({"operations": ""}, "operations"),
    ({"max_value": 1}, "max_value"),
  ],
)
def test_bad_knobs_are_named(knobs, named):
  with pytest.raises(ConfigError, match=f"knobs.{named}"):
    Knobs(**knobs)


def test_impossible_requests_end_with_a_cure():
  with pytest.raises(ConfigError, match="allow more operations"):
    generate("train", 1, Knobs(operations="/"))
  with pytest.raises(ConfigError, match="ood_steps"):
    generate("ood_steps", 1, Knobs(steps=(2, 5)))
  with pytest.raises(ConfigError, match="one of train"):
    generate("validation", 1)
  with pytest.raises(ConfigError, match="negative"):
    generate("train", -1)
  assert generate("train", 0) == []


def test_knobs_are_obeyed():
  knobs = Knobs(steps=(3, 3), operands=(10, 30), factors=(6, 9), operations="+-")
  for example in generate("test", 60, knobs):
    assert steps_of(example) == 3
    assert all(10 <= number <= 30 for number in numbers_of(example))
    assert not set("*/") & set(example.solution)
    results = re.findall(r"=(\d+)", example.solution)
    assert all(int(result) <= 99 for result in results)


def test_references_in_any_order_take_each_solution_alike():
  knobs = arithmetic.Knobs(reference="any")
  told = arithmetic.generate("train", 600)
  ranks, story_first = [], 0
  for plain, example in zip(told, arithmetic.generate("train", 600, knobs)):
    ways = arithmetic.solutions("train", example.id, knobs)
    assert example.solution in ways and example.answer == plain.answer
    if len(ways) > 1:
      ranks.append(ways.index(example.solution) / (len(ways) - 1))
      story_first += plain.solution == ways[0]
  # Uniform ranks have mean 1/2; in story order four in five are the first.
  assert abs(sum(ranks) / len(ranks) - 0.5) < 0.06
  assert story_first / len(ranks) > 0.7
  with pytest.raises(ConfigError, match="reference"):
    arithmetic.Knobs(reference="last")


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("", []),
    ("#### 12", []),
    ("3+4=7, 7+5=12 #### 12", [(5, "7"), (13, "12")]),
    (" 3 + 4 = 7 ,7+5=1 2\n#### 12", [(10, "7"), (19, "12")]),
    ("3+4=8,", [(5, "8")]),  # a wrong one is a step too
    ("3+4=7 and 7+5=12, x, 12-2=10", [(28, "10")]),  # no marker, no step
    ("3+4=007", [(7, "7")]),
    ("3+4=7 #### 7, 1+1=2", [(5, "7")]),
    ("3+4=7, ## ## 7, 1+1=2", [(5, "7")]),
    ("3+4=1234567", []),
    ("٣+4=7", []),
  ],
)
def test_steps(text, expected):
  assert arithmetic.steps(text) == expected


def test_steps_of_every_reference():
  for split in arithmetic.SPLITS:
    for example in generate(split, 20):
      found = arithmetic.steps(example.solution)
      assert found[-1][1] == example.answer
      chain = arithmetic.judge(example.solution, example).chain
      assert [value for _, value in found] == [c.split("=")[1] for c in chain]
      assert all(example.solution[end] in ", " for end, _ in found)

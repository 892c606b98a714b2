"""Multi-step arithmetic word problems, generated, with worked solutions.

    Tom has 3 red marbles, 4 blue marbles and 5 green marbles. Then he sells 2 marbles.
    How many marbles does Tom have now?
    3+4=7, 7+5=12, 12-2=10 #### 10

Most problems have several valid solutions (another order of a sum, (a+b)*k or
a*k+b*k); the reference is picked at random, mostly the order of the story, so that a
model can learn to solve a problem in more ways than it was shown.

A problem is drawn from (seed, split, index) with integers only. No problem of one
split is in another one, whatever the seeds: what a problem computes (its content: the
signed products of its sum, and what divides it) is hashed, and the hash decides the
one split that may use it. Out-of-distribution splits differ from the others in
exactly one way each:

    ood_steps      one step more than the most that training sees
    ood_numbers    every operand larger than the largest that training sees
    ood_templates  every sentence worded as training never sees, with the same words
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import re
from collections import Counter
from typing import Literal

from rlft.core.errors import ConfigError
from rlft.core.types import Example, Verdict
from rlft.tasks import chains, stories

SPLITS = ("train", "dev", "test", "ood_steps", "ood_numbers", "ood_templates")
# The text splits into these: a tokenizer with one id for each of `words()` reads all.
TOKEN_PATTERN = r"####|[0-9]|[A-Za-z]+|[^\sA-Za-z0-9]"
# A solution with its end-of-sequence token, in such tokens.
MAX_SOLUTION_TOKENS = 48

_BUCKETS = 16  # of the content hash; the first five go to the five held-out splits
_MAX_EVENTS = 3
_ATTEMPTS = 20_000
_MAX_COMPLETION_CHARS = 4096
# Of each opening: its worked steps, the operations it needs.
_OPENINGS = {
  "a+b": (1, "+"),
  "a+b+c": (2, "+"),
  "k*a": (1, "*"),
  "(a+b)*k": (2, "+*"),
  "k*a+b": (2, "+*"),
  "k*a+l*b": (3, "+*"),
}

Step = tuple[int, str, int, int]  # left, operator, right, result
Way = tuple[Step, ...]


@dataclasses.dataclass(frozen=True)
class Knobs:
  """How hard the in-distribution problems are.

  Attributes:
    steps: fewest and most equations of the reference solution, 2 to 5.
    operands: smallest and largest quantity in the text, at least 2.
    factors: smallest and largest number of groups, multiplier or divisor, at least 2.
    operations: those that may be needed, out of "+-*/".
    max_value: the largest intermediate result.
    reference: which valid solution is the reference: "story" takes the story's order
      for four problems in five, "any" takes each with the same probability.
  """

  steps: tuple[int, int] = (2, 4)
  operands: tuple[int, int] = (2, 12)
  factors: tuple[int, int] = (2, 5)
  operations: str = "+-*/"
  max_value: int = 99
  reference: Literal["story", "any"] = "story"

  def __post_init__(self):
    for name, least, most in (
      ("steps", 2, 5),
      ("operands", 2, 999),
      ("factors", 2, 99),
    ):
      low, high = getattr(self, name)
      if not least <= low <= high <= most:
        raise ConfigError(
          f"knobs.{name} is {(low, high)}; it is (low, high) with"
          f" {least} <= low <= high <= {most}."
        )
    if self.reference not in ("story", "any"):
      raise ConfigError(f"knobs.reference is {self.reference!r}; 'story' or 'any'.")
    if not self.operations or set(self.operations) - set("+-*/"):
      raise ConfigError(
        f"knobs.operations is {self.operations!r}; it is some of '+-*/'."
      )
    if not 2 <= self.max_value <= 99_999:
      raise ConfigError(f"knobs.max_value is {self.max_value}; it is 2 to 99999.")


def generate(
  split: str, n: int, knobs: Knobs | None = None, seed: int = 0, start: int = 0
) -> list[Example]:
  """Problems `start` to `start + n - 1` of a split.

  Args:
    split: one of SPLITS.
    n: how many problems.
    knobs: the in-distribution difficulty; the `ood_` splits are shifted from it.
    seed: addresses the problems, together with the split and the index.
    start: the index, and id, of the first problem.

  Returns:
    Examples; the prompt ends in a newline, and prompt + solution is the whole text.
    The same problem may come twice in a split, as it would in a sample.

  Raises:
    ConfigError: unknown split, negative n, or knobs that no problem can meet.
  """
  if split not in SPLITS:
    raise ConfigError(f"split is {split!r}; it is one of {', '.join(SPLITS)}.")
  if n < 0 or start < 0:
    raise ConfigError(f"n is {n} and start is {start}; neither may be negative.")
  knobs = _shift(knobs or Knobs(), split)
  return [_problem(split, index, knobs, seed) for index in range(start, start + n)]


def judge(completion: str, example: Example) -> Verdict:
  """What a completion is worth.

  - answer: the digits after the first `####`.
  - correct: the answer is the example's.
  - chain: the canonical equations, None unless all that stands before `####` is
    equations between two numbers, separated by commas.
  - consistent: there is a chain; every equation holds; each operand is a number of
    the problem or the result of an earlier equation; each number of the problem is
    used, and each result but the last (so that idle steps are no new solution); and
    the last result is the answer. It does not say that the answer is correct.

  White space means nothing, so digit-level tokenizers may put any between digits.

  Args:
    completion: what a model wrote after the prompt, hostile text included.
    example: the problem.
  """
  text = "".join(completion[:_MAX_COMPLETION_CHARS].split())
  work, _, rest = text.partition("####")
  digits = re.match(r"([0-9]{1,6})(?![0-9])", rest)
  answer = str(int(digits[1])) if digits else None
  steps = [_parse_step(step) for step in work.split(",")]
  if None in steps:
    return Verdict(answer, answer == example.answer, False, None)
  given = [int(number) for number in re.findall(r"[0-9]+", example.prompt)]
  consistent = _derives(steps, given) and str(steps[-1][3]) == answer
  chain = tuple(_canonical(step) for step in steps)
  return Verdict(answer, answer == example.answer, consistent, chain)


def steps(completion: str) -> list[tuple[int, str]]:
  """Where each worked step ends, and its result.

  Steps are equations between two numbers, right or wrong, with commas between them,
  before the first `####`; what is no equation is passed over. White space means
  nothing, as in `judge`.

  Args:
    completion: what a model wrote after the prompt, hostile text included.

  Returns:
    (offset after the last digit of the result, the result), in order.
  """
  work = re.split(r"#(?:\s*#){3}", completion[:_MAX_COMPLETION_CHARS])[0]
  found, at = [], 0
  for part in work.split(","):
    step = _parse_step("".join(part.split()))
    if step is not None:
      found.append((at + len(part.rstrip()), str(step[3])))
    at += len(part) + 1
  return found


def solutions(
  split: str, index: int, knobs: Knobs | None = None, seed: int = 0
) -> list[str]:
  """All enumerated solutions of a problem, the story's order first.

  More may be valid: sums are enumerated by the pair that is added first, the rest in
  the order of the story.

  Returns:
    The texts, as `Example.solution` has one of them.
  """
  if split not in SPLITS:
    raise ConfigError(f"split is {split!r}; it is one of {', '.join(SPLITS)}.")
  _, _, ways = _plot(split, index, _shift(knobs or Knobs(), split), seed)
  return [_write(way) for way in ways]


def words() -> tuple[str, ...]:
  """The closed vocabulary: every token of every prompt and solution, sorted.

  Tokens are the matches of TOKEN_PATTERN: words as they are written, single digits,
  single signs, and `####`.
  """
  texts = [*stories.HE, *stories.SHE, *stories.THINGS["any"]]
  texts += ["he she He She him her", "0123456789+-*/=,.? ####"]
  for wording in ("seen", "unseen"):
    for options in stories.OPENINGS[wording].values():
      texts += [text for _, text in options]
    for part in (stories.EVENTS, stories.QUESTIONS):
      texts += itertools.chain.from_iterable(part[wording].values())
  plain = (re.sub(r"\{\w+\}", " ", text) for text in texts)
  return tuple(sorted({token for text in plain for token in _tokens(text)}))


def _tokens(text: str) -> list[str]:
  return re.findall(TOKEN_PATTERN, text)


# --- drawing a problem ----------------------------------------------------


class _Draws:
  """Integers addressed by their key: a hash read as one number in mixed radix."""

  def __init__(self, *key: object):
    text = "/".join(map(str, key)).encode()
    self._bits = int.from_bytes(hashlib.blake2b(text).digest(), "big")

  def below(self, n: int) -> int:
    # 512 bits against draws of a few bits: the bias is far below 1e-60.
    self._bits, value = divmod(self._bits, n)
    return value

  def between(self, low: int, high: int) -> int:
    return low + self.below(high - low + 1)

  def pick(self, options):
    return options[self.below(len(options))]


@dataclasses.dataclass(frozen=True)
class _Plot:
  """What happens, without words: an opening, events, and what is asked."""

  opening: str
  numbers: dict[str, int]  # a, b, c, k, l of the opening
  events: tuple[tuple[str, int], ...]
  question: str  # "" the whole, "*" a multiple, "/" a part
  factor: int  # of the question


def _shift(knobs: Knobs, split: str) -> Knobs:
  """The knobs of a split, out of the in-distribution ones."""
  if split == "ood_steps":
    if knobs.steps[1] == 5:
      raise ConfigError(
        f"knobs.steps is {knobs.steps}: ood_steps needs one more than 5."
      )
    return dataclasses.replace(knobs, steps=(knobs.steps[1] + 1,) * 2)
  if split == "ood_numbers":
    high = knobs.operands[1]
    return dataclasses.replace(
      knobs, operands=(high + 1, 4 * high), max_value=4 * knobs.max_value
    )
  return knobs


def _problem(split: str, index: int, knobs: Knobs, seed: int) -> Example:
  draws, plot, ways = _plot(split, index, knobs, seed)
  way = ways[0]
  if knobs.reference == "any":
    way = draws.pick(ways)
  elif len(ways) > 1 and draws.below(10) >= 8:
    way = draws.pick(ways[1:])
  wording = "unseen" if split == "ood_templates" else "seen"
  prompt = _tell(plot, wording, draws) + "\n"
  return Example(index, prompt, _write(way), str(way[-1][3]))


def _plot(split: str, index: int, knobs: Knobs, seed: int):
  for attempt in range(_ATTEMPTS):
    draws = _Draws(seed, split, index, attempt)
    plot = _draw_plot(draws, knobs)
    if plot is None or _split_of(plot, split) != split:
      continue
    ways = _ways(plot, knobs.max_value, knobs.steps[1])
    if ways and max(map(_cost, ways)) <= MAX_SOLUTION_TOKENS:
      return draws, plot, ways
  raise ConfigError(
    f"no problem of split {split!r} meets {knobs} in {_ATTEMPTS} draws; allow more"
    " operations, a wider range of operands or factors, or a larger max_value."
  )


def _draw_plot(draws: _Draws, knobs: Knobs) -> _Plot | None:
  allowed = set(knobs.operations)
  steps = draws.between(*knobs.steps)
  opening = draws.pick(tuple(_OPENINGS))
  question = draws.pick(("", "*", "/"))
  own, needs = _OPENINGS[opening]
  left = steps - own - bool(question)
  signs = [sign for sign in "+-" if sign in allowed]
  if not 0 <= left <= _MAX_EVENTS or not allowed.issuperset(needs + question):
    return None
  if left and not signs:
    return None
  numbers = {
    name: draws.between(*(knobs.factors if name in "kl" else knobs.operands))
    for name in re.findall("[a-z]", opening)
  }
  events = tuple(
    (draws.pick(signs), draws.between(*knobs.operands)) for _ in range(left)
  )
  factor = draws.between(*knobs.factors) if question else 0
  every = [*numbers.values(), *(number for _, number in events)]
  every += [factor] if question else []
  # Equal numbers would leave open which one a step uses.
  if len(set(every)) < len(every):
    return None
  return _Plot(opening, numbers, events, question, factor)


def _content(plot: _Plot) -> str:
  """What a plot computes: its expanded sum, whatever the words and the order."""
  total = [("+", product) for product in _products(plot)]
  total += [(sign, (number,)) for sign, number in plot.events]
  times = (plot.factor,) if plot.question == "*" else ()
  parts = sorted(
    sign + "*".join(map(str, sorted(product + times))) for sign, product in total
  )
  return "".join(parts) + (f"/{plot.factor}" if plot.question == "/" else "")


def _products(plot: _Plot) -> list[tuple[int, ...]]:
  names = "a*k+b*k" if plot.opening == "(a+b)*k" else plot.opening
  return [tuple(plot.numbers[n] for n in part.split("*")) for part in names.split("+")]


def _split_of(plot: _Plot, split: str) -> str:
  """The one split that may use a plot's content."""
  digest = hashlib.blake2b(_content(plot).encode(), digest_size=8).digest()
  bucket = int.from_bytes(digest, "big") % _BUCKETS
  held_out = SPLITS[1:]
  return held_out[bucket] if bucket < len(held_out) else "train"


# --- solving it in every way ----------------------------------------------


def _ways(plot: _Plot, max_value: int, max_steps: int) -> list[Way]:
  """Every enumerated solution, the story's first; empty when the story is nonsense."""
  ways = list(_asked(plot))
  valid: dict[tuple[str, ...], Way] = {}
  for way in ways:
    # A longer way would show training what ood_steps holds out.
    if len(way) <= max_steps and all(0 < step[3] <= max_value for step in way):
      valid.setdefault(tuple(map(_canonical, way)), way)
    elif way is ways[0]:
      return []
  return list(valid.values())


def _asked(plot: _Plot):
  """The ways to the total, then the step that the question adds."""
  terms = _terms(plot)
  for steps, total in _sums(terms):
    if not plot.question:
      yield steps
    elif plot.question == "*":
      yield (*steps, _step(total, "*", plot.factor))
    elif total % plot.factor == 0:
      yield (*steps, _step(total, "/", plot.factor))
    else:
      return
  if plot.question != "*":
    return
  if len(terms) == 1 and plot.opening == "k*a":
    for first, second in (("k", "a"), ("a", "k")):
      step = _step(plot.numbers[first], "*", plot.factor)
      yield step, _step(step[3], "*", plot.numbers[second])
  if len(terms) == 2 and plot.opening == "a+b":
    yield _distribute(plot.numbers["a"], plot.numbers["b"], plot.factor)


# A term of the sum: its sign and the ways to its value, each with that value.
_Term = tuple[str, list[tuple[Way, int]]]


def _terms(plot: _Plot) -> list[_Term]:
  number = plot.numbers
  terms: list[_Term] = []
  if plot.opening == "(a+b)*k":
    first = _step(number["a"], "+", number["b"])
    sums = (first, _step(first[3], "*", number["k"]))
    products = _distribute(number["a"], number["b"], number["k"])
    terms.append(("+", [(sums, sums[-1][3]), (products, products[-1][3])]))
  else:
    for product in _products(plot):
      way = (_step(*product[:1], "*", *product[1:]),) if len(product) == 2 else ()
      terms.append(("+", [(way, way[0][3] if way else product[0])]))
  terms += [(sign, [((), value)]) for sign, value in plot.events]
  return terms


def _sums(terms: list[_Term]):
  """(steps, total) of adding up: some pair first, then the rest in story order."""
  for choice in itertools.product(*(options for _, options in terms)):
    signed = [(sign, *option) for (sign, _), option in zip(terms, choice)]
    if len(signed) == 1:
      yield signed[0][1:]
    for i, j in itertools.combinations(range(len(signed)), 2):
      merged = _merge(signed[i], signed[j])
      if merged is None or (merged[0] == "-" and i == 0):
        continue
      rest = [*signed[:i], merged, *signed[i + 1 : j], *signed[j + 1 :]]
      total = rest[0]
      for term in rest[1:]:
        total = _merge(total, term)
      yield total[1:]


def _merge(left, right):
  """One term out of two; None where their difference would be a loose end."""
  if left[0] == "-" and right[0] == "+":
    return None
  sign = "+" if left[0] == right[0] else "-"
  step = _step(left[2], sign, right[2])
  return left[0], (*left[1], *right[1], step), step[3]


def _distribute(a: int, b: int, k: int) -> Way:
  first, second = _step(a, "*", k), _step(b, "*", k)
  return first, second, _step(first[3], "+", second[3])


def _step(left: int, operator: str, right: int) -> Step:
  if operator == "+":
    result = left + right
  elif operator == "-":
    result = left - right
  elif operator == "*":
    result = left * right
  else:
    result = left // right
  return left, operator, right, result


# --- writing and reading --------------------------------------------------


def _tell(plot: _Plot, wording: str, draws: _Draws) -> str:
  kind, opening = draws.pick(stories.OPENINGS[wording][plot.opening])
  hero = draws.pick(stories.HE + stories.SHE)
  male = hero in stories.HE
  others = list(stories.SHE if male else stories.HE)
  slots: dict[str, object] = {"n": hero, "x": draws.pick(stories.THINGS[kind])}
  slots |= {person: others.pop(draws.below(len(others))) for person in "mofg"}
  slots |= {"he": "he" if male else "she", "him": "him" if male else "her"}
  slots["He"] = "He" if male else "She"
  sentences = [opening.format(**slots, **plot.numbers)]
  unused = {sign: list(texts) for sign, texts in stories.EVENTS[wording].items()}
  for sign, number in plot.events:
    text = unused[sign].pop(draws.below(len(unused[sign])))
    sentences.append(text.format(**slots, d=number))
  question = draws.pick(stories.QUESTIONS[wording][plot.question])
  sentences.append(question.format(**slots, k=plot.factor))
  return " ".join(sentences)


def _write(way: Way) -> str:
  steps = ", ".join(f"{a}{operator}{b}={c}" for a, operator, b, c in way)
  return f"{steps} #### {way[-1][3]}"


def _cost(way: Way) -> int:
  return len(_tokens(_write(way))) + 1


def _parse_step(text: str) -> Step | None:
  match = re.fullmatch(r"([0-9]{1,6})([-+*/])([0-9]{1,6})=([0-9]{1,6})", text)
  if match is None:
    return None
  return int(match[1]), match[2], int(match[3]), int(match[4])


def _canonical(step: Step) -> str:
  left, operator, right, result = step
  return chains.parse_equation(f"{left}{operator}{right}={result}").form


def _derives(steps: list[Step], given: list[int]) -> bool:
  """Whether the steps are one derivation: each holds, and nothing is idle or new."""
  known = Counter(given)
  idle = Counter(given)
  for left, operator, right, result in steps:
    if not known[left] or not known[right]:
      return False
    if operator == "/":
      holds = right != 0 and left == right * result
    else:
      holds = _step(left, operator, right)[3] == result
    if not holds:
      return False
    # A number may be used twice (a*k, b*k), but each must be used.
    idle -= Counter((left, right))
    known[result] += 1
    idle[result] += 1
  return idle == Counter((steps[-1][3],))

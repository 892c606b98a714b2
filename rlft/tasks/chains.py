"""Operation chains: the equations of a worked solution, read exactly and safely.

Two solutions are the same solution when they do the same sequence of arithmetic
operations (Havrilla et al. 2024, diversity). A solution is consistent when each of its
equations holds; a right answer reached through wrong equations is "lucky".

Equations are read from calculator annotations, `<<48/2=24>>`, where a text has any,
else from plain `48 / 2 = $24`. Only the part before the first `####` is read. Values
are exact rationals from a parser of our own: a completion is hostile input, so every
length, digit count and nesting depth is bounded and Python never evaluates any of it.
"""

from __future__ import annotations

import dataclasses
import re
from fractions import Fraction

# Nothing longer is a solution; the bounds keep all work linear in the text.
MAX_CHARS = 65_536
MAX_EQUATION_CHARS = 256
MAX_DIGITS = 24
MAX_DEPTH = 16

_ANNOTATION = re.compile(rf"<<([^<>]{{0,{MAX_EQUATION_CHARS}}})>>")
# [0-9], not \d: other alphabets have digits too.
NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
# What the text repeats after an annotation, if it does.
_SHOWN_RESULT = re.compile(rf"(?:[-−–]?\$?(?:{NUMBER}))?")
_TOKEN = re.compile(rf"[\s$]*({NUMBER}|//|[-+*/()×÷−–]|x(?=\s*[0-9(.$]))")
# The right side: one number, not the start of another expression (4000 + 2040), of a
# mixed number (3 1/2), of a spaced one (42 000), of algebra (5A), nor a percentage.
_RESULT = re.compile(
  rf"\s{{0,8}}([-−–]?\s?\$?\s?(?:{NUMBER}))"
  r"(?!\.?[0-9]|,[0-9]{3}|\s*%|\s*[-+*/x×÷−–(]\s*[0-9(.$]"
  r"| +[0-9]+/[0-9]| [0-9]{3}\b|[A-Za-z]\b)"
)
# Read leftwards from "=", these may belong to an expression.
_EXPRESSION_CHARS = frozenset("0123456789.,+-*/()$ x×÷−–")
_SIGNS = str.maketrans({"×": "*", "÷": "/", "−": "-", "–": "-", "x": "*"})
_BINARY = {"+": 1, "-": 1, "*": 2, "/": 2, "//": 2}


@dataclasses.dataclass(frozen=True)
class Equation:
  """One worked step.

  Attributes:
    form: canonical text: no spaces, numbers normalised, operands of + and * sorted,
      those of - and / in order.
    operands: the numbers on the left side, in the order they are written.
    value: what the left side is worth; None when it divides by zero.
    result: the number on the right side.
    operations: how many operators the left side has.
  """

  form: str
  operands: tuple[Fraction, ...]
  value: Fraction | None
  result: Fraction
  operations: int

  @property
  def holds(self) -> bool:
    """Whether both sides are exactly equal; false when the left divides by zero."""
    return self.value == self.result


def normalise(number: Fraction) -> str:
  """Shortest exact text of a number: 24, -0.5, or 1/3 where no decimal is exact."""
  if number.denominator == 1:
    return str(number.numerator)
  rest, places = number.denominator, 0
  for prime in (2, 5):
    power = 0
    while rest % prime == 0:
      rest, power = rest // prime, power + 1
    places = max(places, power)
  if rest != 1:
    return f"{number.numerator}/{number.denominator}"
  digits = str(abs(number.numerator) * 10**places // number.denominator)
  digits = digits.zfill(places + 1)
  sign = "-" if number < 0 else ""
  return f"{sign}{digits[:-places]}.{digits[-places:]}"


def parse_number(text: str) -> Fraction | None:
  """Reads `1,234.50`, `$18`, `-3` or `18.`; None when it is not one number.

  Args:
    text: the number, with optional sign, dollar sign, spaces around it, thousands
      separators and a full stop after it.
  """
  if len(text) > 2 * MAX_DIGITS:
    return None
  text = text.strip()
  sign = -1 if text[:1] in ("-", "−", "–") else 1
  text = text[1:].lstrip() if sign < 0 else text
  text = text.removeprefix("$").lstrip().replace(",", "")
  if len(text) > MAX_DIGITS or not re.fullmatch(r"[0-9]+\.?[0-9]*|\.[0-9]+", text):
    return None
  whole, _, decimals = text.partition(".")
  return sign * Fraction(int(whole + decimals or "0"), 10 ** len(decimals))


def parse_equation(text: str) -> Equation | None:
  """Reads a whole string `expression=number`; None when it is anything else.

  The right side may also be a fraction of two numbers (`3/4=3/4`).
  """
  if len(text) > MAX_EQUATION_CHARS:
    return None
  left, equals, right = text.partition("=")
  result = parse_number(right)
  if result is None:  # 3/4, but not another expression
    above, slash, below = right.partition("/")
    above, below = parse_number(above), parse_number(below)
    result = above / below if slash and above is not None and below else None
  tokens = _tokenise(left)
  if not equals or result is None or tokens is None:
    return None
  parser = _Parser(tokens)
  node = parser.parse()
  if node is None:
    return None
  form = f"{node[1]}={normalise(result)}"
  operands = tuple(parser.operands)
  return Equation(form, operands, node[0], result, parser.operations)


def equations(text: str) -> list[Equation] | None:
  """The equations of a worked solution, in order.

  Args:
    text: a solution; what follows its first `####` is not read.

  Returns:
    The equations; None when an annotation is malformed or the text is longer than
    MAX_CHARS, so that it cannot be judged. Without annotations, plain equations are
    read where they stand and an `=` that belongs to none (algebra, units between the
    numbers) is passed over.
  """
  if len(text) > MAX_CHARS:
    return None
  text = text.partition("####")[0]
  if "<<" in text:
    found = [parse_equation(inner) for inner in _ANNOTATION.findall(text)]
    if len(found) != text.count("<<") or None in found:
      return None
    return found
  return [equation for _, equation in _plain_equations(text)]


def steps(text: str) -> list[tuple[int, str]]:
  """Where each worked step of a solution ends, and its result.

  With calculator annotations a step ends after the number that follows its annotation,
  `<<48/2=24>>24`, or with the annotation when none does; without, after the right side
  of its equation. What cannot be read, or has no operator, is no step.

  Args:
    text: a solution; what follows its first `####` is not read.

  Returns:
    (offset after the step's last character, its result as `normalise` writes it), in
    order; nothing where there are no steps, or the text is longer than MAX_CHARS.
  """
  if len(text) > MAX_CHARS:
    return []
  text = text.partition("####")[0]
  if "<<" in text:
    found = [
      (_SHOWN_RESULT.match(text, match.end()).end(), parse_equation(match[1]))
      for match in _ANNOTATION.finditer(text)
    ]
  else:
    found = _plain_equations(text)
  return [
    (end, normalise(equation.result))
    for end, equation in found
    if equation and equation.operations
  ]


def canonical(text: str) -> tuple[str, ...] | None:
  """The sequence of operations of a solution, the key of its identity.

  Operands of + and * are sorted (3+4 is 4+3), those of - and / keep their order, and
  numbers are normalised (1,000.0 is 1000). An equation without an operator (`5=5`)
  is no operation and is left out.

  Returns:
    One string an operation; None when there is none or when they cannot be read.
    The key says nothing of the prompt: compare chains of one prompt only.

  Source: Havrilla et al. 2024, "same sequence of arithmetic operations". We keep the
  result in the key, so that 3+4=7 and 3+4=8 are two chains.
  """
  found = equations(text)
  chain = tuple(e.form for e in found or () if e.operations)
  return chain or None


def consistent(text: str, answer: str | None = None) -> bool | None:
  """Whether every equation of a solution holds and they end in its answer.

  Args:
    text: a worked solution.
    answer: what the last equation must result in; None demands nothing of it (in
      GSM8K the last annotation is not the answer in 5 % of the problems).

  Returns:
    True or False; None when the text has no equation, so nothing can be told.
  """
  found = equations(text)
  if found is None:
    return False
  if not found:
    return None
  if not all(equation.holds for equation in found):
    return False
  return answer is None or parse_number(answer) == found[-1].result


def _plain_equations(text: str) -> list[tuple[int, Equation]]:
  """The equations with the offsets at which they end."""
  found = []
  low = 0  # an expression never reaches back over the previous right side
  position = text.find("=")
  while position >= 0:
    right = _RESULT.match(text, position + 1, position + MAX_EQUATION_CHARS // 2)
    left = _left_side(text, low, position) if right else None
    equation = parse_equation(f"{left}={right[1]}") if left else None
    if equation and equation.operations:
      found.append((right.end(), equation))
    low = right.end() if right else position + 1
    position = text.find("=", low)
  return found


def _left_side(text: str, low: int, position: int) -> str | None:
  """The expression that ends at `position`, cut loose from the sentence before it.

  It is refused where the cut would read a part of something: after a letter or a
  digit ("2x-5=13", "16,0000/10="), at an operator ("2 students * 3 - 1 = 5") or in a
  mixed number ("1 1/2 + 2 =").
  """
  start = position
  while start > low and text[start - 1] in _EXPRESSION_CHARS:
    start -= 1
  window = text[start:position].rstrip()
  glued = start > low and (text[start - 1].isalnum() or text[start - 1] == "%")
  first, at, last = 0, 0, ""  # offsets in the window; the token before `at`
  while at < len(window):
    match = _TOKEN.match(window, at)
    if match is None:  # "on day 3. 3+4=", "7, 7*2=": the sentence before
      glued = at > 0 and not window[at + 1 : at + 2].isspace()
      first = at = at + 1
      last = ""
      continue
    token = match.group(1)
    if last and _is_number(last) and _is_number(token):
      if "\n" not in match.group():
        return None
      first, glued = at, False
    at, last = match.end(), token
  expression = window[first:]
  if glued and not expression[:1].isspace():
    return None
  expression = expression.strip()
  if not expression or (expression[0] not in "(-.$" and not expression[0].isdigit()):
    return None
  return None if expression.startswith("- ") else expression


def _is_number(token: str) -> bool:
  return token[-1].isdigit()


def _tokenise(text: str) -> list[str] | None:
  tokens, at = [], 0
  text = text.rstrip()
  while at < len(text):
    match = _TOKEN.match(text, at)
    if match is None or len(match.group(1)) > MAX_DIGITS:
      return None
    token = match.group(1).translate(_SIGNS)
    # 27(1/3) and (2)(3) are products.
    if token == "(" and tokens and (_is_number(tokens[-1]) or tokens[-1] == ")"):
      tokens.append("*")
    tokens.append(token)
    at = match.end()
  return tokens


class _Parser:
  """Precedence climbing over tokens; every node is (value, form, rank, kin).

  `rank` is the binding strength of the node's operator (3 for a number) and decides
  where the canonical form needs brackets; `kin` is what a + or * node is made of, so
  that nested sums flatten and sort.
  """

  def __init__(self, tokens: list[str]):
    self.tokens = tokens
    self.at = 0
    self.operands: list[Fraction] = []
    self.operations = 0

  def parse(self):
    node = self._expression(0, 0)
    return node if self.at == len(self.tokens) else None

  def _peek(self) -> str:
    return self.tokens[self.at] if self.at < len(self.tokens) else ""

  def _expression(self, least: int, depth: int):
    left = self._atom(depth)
    while left is not None and _BINARY.get(self._peek(), -1) > least:
      operator = self._peek()
      self.at += 1
      right = self._expression(_BINARY[operator], depth)
      if right is None:
        return None
      self.operations += 1
      left = _combine(operator, left, right)
    return left

  def _atom(self, depth: int):
    token = self._peek()
    self.at += 1
    if depth > MAX_DEPTH or not token:
      return None
    if token == "(":
      node = self._expression(0, depth + 1)
      if node is None or self._peek() != ")":
        return None
      self.at += 1
      return node
    negative = token == "-"
    if token in "+-":
      token = self._peek()
      self.at += 1
    if not token or not _is_number(token):
      return None
    number = parse_number(token)
    if number is None:
      return None
    number = -number if negative else number
    self.operands.append(number)
    return number, normalise(number), 3, None


def _combine(operator: str, left, right):
  value = _apply(operator, left[0], right[0])
  rank = _BINARY[operator]
  if operator in "+*":
    parts: list[str] = []
    for node in (left, right):
      if node[3] is not None and node[3][0] == operator:
        parts.extend(node[3][1])
      else:
        # Sorting may move it behind another: 1*(0/0) is not 0*1/0.
        parts.append(f"({node[1]})" if node[2] <= rank else node[1])
    parts.sort(key=lambda part: (len(part), part))
    return value, operator.join(parts), rank, (operator, parts)
  first = f"({left[1]})" if left[2] < rank else left[1]
  second = f"({right[1]})" if right[2] <= rank else right[1]
  return value, first + operator + second, rank, None


def _apply(operator: str, left: Fraction | None, right: Fraction | None):
  if left is None or right is None:
    return None
  if operator == "+":
    return left + right
  if operator == "-":
    return left - right
  if operator == "*":
    return left * right
  if right == 0:
    return None
  return Fraction(left // right) if operator == "//" else left / right

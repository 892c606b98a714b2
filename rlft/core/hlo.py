"""Optimized HLO text as instructions: who calls whom, how often loops turn, which
devices exchange data. Text in, dataclasses out: no jax.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping

import numpy as np

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{\s*$")


@dataclasses.dataclass(frozen=True)
class Array:
  """An array of a result: its dtype, shape, and whether it lies in HBM."""

  dtype: str
  shape: tuple[int, ...]
  hbm: bool

  @property
  def elements(self) -> int:
    return math.prod(self.shape)

  @property
  def bytes(self) -> float:
    return self.elements * _bits(self.dtype) / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line: `name = arrays opcode(operands), attributes`."""

  name: str
  opcode: str
  arrays: tuple[Array, ...]
  operands: tuple[str, ...]
  attributes: str
  root: bool
  literal: str  # what stands in the parentheses

  @property
  def bytes(self) -> float:
    return sum(a.bytes for a in self.arrays)

  @property
  def hbm_bytes(self) -> float:
    return sum(a.bytes for a in self.arrays if a.hbm)

  def attribute(self, name: str) -> str | None:
    """The value of `name=`, without its braces."""
    match = re.search(rf"\b{name}=(\{{[^}}]*\}}|%?[\w.-]+)", self.attributes)
    return match[1].strip("{}%") if match else None


Computation = dict[str, Instruction]


def parse(text: str) -> tuple[dict[str, Computation], str]:
  """(computations by name, name of the entry).

  Raises:
    ValueError: the text has no entry.
  """
  computations: dict[str, Computation] = {}
  entry, scope = "", None
  for line in text.splitlines():
    if scope is not None and " = " in line:
      one = _instruction(re.sub(r"/\*.*?\*/", "", line))
      scope[one.name] = one
    elif match := _HEAD.match(line):
      scope = computations.setdefault(match[2], {})
      entry = match[2] if match[1] else entry
    elif line.rstrip() == "}":  # "}}, ..." ends a kernel's attributes of several lines
      scope = None
  if not entry:
    raise ValueError("this is no HLO text: it has no ENTRY")
  return computations, entry


def _instruction(line: str) -> Instruction:
  name, _, rest = line.strip().partition(" = ")
  root = name.startswith("ROOT ")
  result, rest = _cut(rest) if rest.startswith("(") else rest.split(" ", 1)
  opcode, _, _ = rest.strip().partition("(")
  inside, attributes = _cut(rest[rest.index("(") :])
  return Instruction(
    name.removeprefix("ROOT ").lstrip("%"),
    opcode.strip(),
    tuple(_arrays(result)),
    tuple(re.findall(r"%([\w.-]+)", inside)),
    attributes,
    root,
    inside[1:-1],
  )


def _cut(text: str) -> tuple[str, str]:
  """Splits "(...) rest" behind the parenthesis that closes the first one."""
  depth = 0
  for match in re.finditer(r"[()]", text):
    depth += 1 if match[0] == "(" else -1
    if not depth:
      return text[: match.end()], text[match.end() :]
  raise ValueError(f"parentheses do not match in HLO: {text[:200]!r}")


def _arrays(text: str) -> Iterator[Array]:
  for dtype, shape, layout in _ARRAY.findall(text):
    space = _SPACE.search(layout)
    sizes = tuple(int(n.lstrip("<=")) for n in shape.split(",") if n)
    yield Array(dtype, sizes, space is None or space[1] == "0")


def _bits(dtype: str) -> int:
  if dtype in _BITS:
    return _BITS[dtype]
  size = re.match(r"[a-z]+(\d+)", dtype)
  return int(size[1]) if size else 0


def branches(one: Instruction) -> list[str]:
  """The computations of a conditional."""
  names = one.attribute("branch_computations")
  if names is not None:
    return [name.strip(" %") for name in names.split(",")]
  return [one.attribute("true_computation"), one.attribute("false_computation")]


def trip_count(
  computations: Mapping[str, Computation], scope: Computation, loop: Instruction
) -> int | None:
  """How often a while loop turns; None where the text does not say.

  From `known_trip_count`, else from a counter that the condition compares with a
  constant, that begins at a constant, and that the body adds a constant to.
  """
  if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
    return int(known[1])
  condition = computations[loop.attribute("condition")]
  compare = next(x for x in condition.values() if x.root)
  if compare.opcode == "fusion" and len(compare.operands) == 2:
    inner = computations[compare.attribute("calls")]
    inside = next(x for x in inner.values() if x.root)
    places = [inner[x].literal.strip() for x in inside.operands if x in inner]
    if inside.opcode == "compare" and sorted(places) == ["0", "1"]:
      operands = tuple(compare.operands[int(i)] for i in places)
      compare = dataclasses.replace(inside, operands=operands)
  if compare.opcode != "compare":
    return None
  sides = [condition.get(name) for name in compare.operands]
  counter = next((x for x in sides if x and x.opcode == "get-tuple-element"), None)
  limit = _constant(condition, compare.operands[1])
  direction = compare.attribute("direction")
  if counter is None or counter is not sides[0] or limit is None:
    return None
  index = int(counter.attribute("index"))
  start = _element(scope, loop.operands[0], index)
  body = computations[loop.attribute("body")]
  root = next(x for x in body.values() if x.root)
  step = _step(computations, body, root, index)
  if start is None or not step:
    return None
  ahead = {"LT": limit - start, "LE": limit - start + 1, "GT": start - limit}
  ahead |= {"GE": start - limit + 1, "NE": abs(limit - start)}
  return max(0, math.ceil(ahead[direction] / abs(step)))


def _through(scope: Computation, name: str) -> Instruction | None:
  """An instruction behind copies of it."""
  one = scope.get(name)
  while one and one.opcode in ("copy", "bitcast", "convert", "copy-done", "copy-start"):
    one = scope.get(one.operands[0])
  return one


def _constant(scope: Computation, name: str) -> int | None:
  one = _through(scope, name)
  if one is None or one.opcode != "constant":
    return None
  return int(one.literal) if re.fullmatch(r"-?\d+", one.literal.strip()) else None


def _element(scope: Computation, name: str, index: int) -> int | None:
  """The constant at a place of a tuple."""
  one = scope.get(name)
  if one is None or one.opcode != "tuple":
    return None
  return _constant(scope, one.operands[index])


def _step(computations, body: Computation, root: Instruction, index: int) -> int | None:
  """What a turn adds to the counter, which is an element of the body's tuple."""
  if root.opcode != "tuple":
    return None
  one, scope = _through(body, root.operands[index]), body
  outer: tuple[str, ...] = ()
  if one is not None and one.opcode == "fusion":
    scope, outer = computations[one.attribute("calls")], one.operands
    one = next(x for x in scope.values() if x.root)
  if one is None or one.opcode != "add":
    return None
  for name in one.operands:
    value = _constant(scope, name)
    inner = scope.get(name)
    if value is None and outer and inner and inner.opcode == "parameter":
      value = _constant(body, outer[int(inner.literal)])
    if value is not None:
      return value
  return None


# ------------------------------------------------------------------------ groups


def groups_of(one: Instruction, devices: int) -> list[list[int]]:
  """Groups of devices that exchange data, as indices into the mesh.

  Of a permutation, the pairs.
  """
  text = one.attributes
  if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", text):
    return _listed(pairs[1])
  if match := re.search(r"replica_groups=\{\{(.*?)\}\}", text):
    return _listed(match[1])
  if match := re.search(r"replica_groups=\[([\d,]+)\]<=(\S*?)(?:,\s|$)", text):
    shape = [int(n) for n in match[1].split(",")]
    return _iota(match[2]).reshape(shape).tolist()
  if match := re.search(r"replica_groups=mesh\[(.*?)\]\S* \{(.*?)\}", text):
    return _by_axes(match[1], match[2])
  return [list(range(devices))]


def _listed(text: str) -> list[list[int]]:
  return [
    [int(n) for n in group.split(",") if n]
    for group in text.strip("{}").replace(" ", "").split("},{")
  ]


def _iota(text: str) -> np.ndarray:
  """ "[4,8,8]T(2,1,0)": numbers in that shape, transposed."""
  shape, _, order = text.partition("T")
  sizes = [int(n) for n in shape.strip("[]").split(",")]
  at = np.arange(math.prod(sizes)).reshape(sizes)
  if order:
    at = at.transpose([int(n) for n in order.strip("()").split(",")])
  return at


def _by_axes(sizes: str, used: str) -> list[list[int]]:
  """Groups along axes of a mesh: "mesh['a'=2,'b'=8] {'b'}".

  A part of an axis, "'b':(m)n", is the middle of b split into (m, n, rest).
  """
  shape: list[int] = []
  members: list[int] = []
  parts: dict[str, list[tuple[int, int]]] = defaultdict(list)
  for name, before, size in re.findall(r"'([\w.]+)'(?::\((\d+)\)(\d+))?", used):
    parts[name].append((int(before or 1), int(size or 0)))
  for name, size in re.findall(r"'([\w.]+)'=(\d+)", sizes):
    left, taken = int(size), 1
    for before, own in sorted(parts.get(name, [])):
      own = own or left
      if before > taken:
        shape.append(before // taken)
        left //= before // taken
        taken = before
      members.append(len(shape))
      shape.append(own)
      left, taken = left // own, taken * own
    if left > 1 or name not in parts:
      shape.append(left)
  at = np.arange(math.prod(shape)).reshape(shape)
  rest = [i for i in range(len(shape)) if i not in members]
  width = math.prod(shape[i] for i in members)
  return at.transpose([*rest, *members]).reshape(-1, width).tolist()

"""What a compiled program does, counted from its optimized HLO text.

XLA's own cost analysis takes the body of a loop once; here a loop counts as often as it
turns. Text in, numbers out: no jax.

  FLOPs        of matrix products (dot, convolution): 2 for a multiply-add
  HBM bytes    what instructions read and write outside on-chip memory
  collectives  bytes that a chip sends, by kind and by axis of the mesh

A loop without a static length (decoding) is not multiplied: what one turn of it does is
kept apart, in `Cost.turn`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{\s*$")
_CALLS = re.compile(r"(?:calls|to_apply|called_computations=\{)=?%?([\w.-]+)")
_COLLECTIVES = (
  "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
  "collective-permute", "collective-broadcast",
)  # fmt: skip
# They name memory that another instruction made, or hold none.
_FREE = {
  "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all",
  "opt-barrier", "partition-id", "replica-id", "copy-done", "slice-done", "async-done",
  "domain", "while", "conditional", "call",
}  # fmt: skip


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


@dataclasses.dataclass
class Cost:
  """What a program, or a part of it, does on one chip.

  Attributes:
    flops: of matrix products.
    vector_flops: sums and element-wise operations on floating-point numbers; a small
      product that the compiler made a sum of products is here.
    hbm_bytes: read and written outside on-chip memory.
    collectives: (kind, axis) -> bytes that a chip sends.
    turn: what one turn of a loop without a static length does; None without one.
    kernels: names of custom kernels, whose inside is not counted.
  """

  flops: float = 0.0
  vector_flops: float = 0.0
  hbm_bytes: float = 0.0
  collectives: dict[tuple[str, str], float] = dataclasses.field(
    default_factory=lambda: defaultdict(float)
  )
  turn: Cost | None = None
  kernels: set[str] = dataclasses.field(default_factory=set)

  def add(self, other: Cost, times: float = 1.0) -> None:
    """Adds `times` another cost."""
    self.flops += times * other.flops
    self.vector_flops += times * other.vector_flops
    self.hbm_bytes += times * other.hbm_bytes
    for key, value in other.collectives.items():
      self.collectives[key] += times * value
    self.kernels |= other.kernels
    if other.turn is not None:
      self.turn = self.turn or Cost()
      self.turn.add(other.turn, times)

  def total(self, turns: int = 1) -> Cost:
    """With `turns` of the loop that has no static length."""
    out = Cost()
    out.add(dataclasses.replace(self, turn=None))
    if self.turn is not None:
      out.add(self.turn.total(), turns)
    return out

  def by_axis(self) -> dict[str, float]:
    """Bytes that a chip sends along each axis."""
    out: dict[str, float] = defaultdict(float)
    for (_, axis), value in self.collectives.items():
      out[axis] += value
    return dict(out)


def count(text: str, mesh: Mapping[str, int]) -> Cost:
  """Counts a program.

  Args:
    text: `compiled.as_text()`.
    mesh: axis -> size, in the order of the mesh's devices.

  Returns:
    The cost of one run on one chip, whose loops without a static length turn zero
    times; see `Cost.turn` and `Cost.total`.
  """
  computations, entry = parse(text)
  return _Counter(computations, mesh).of(entry)


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
    elif line.startswith("}"):
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


class _Counter:
  """Costs of computations, each found once."""

  def __init__(self, computations: Mapping[str, Computation], mesh: Mapping[str, int]):
    self.computations = computations
    self.mesh = {axis: size for axis, size in mesh.items()}
    self.found: dict[str, Cost] = {}

  def of(self, name: str) -> Cost:
    if name in self.found:
      return self.found[name]
    scope, out = self.computations[name], Cost()
    channels: set[str] = set()
    for one in scope.values():
      if one.opcode == "while":
        self._loop(scope, one, out)
      elif one.opcode == "conditional":
        branches = [self.of(b) for b in _branches(one)]
        out.add(max(branches, key=lambda c: (c.flops, c.hbm_bytes)))
      elif one.opcode == "call":
        out.add(self.of(one.attribute("to_apply")))
      else:
        self._compute(scope, one, out, channels)
        out.hbm_bytes += self._traffic(scope, one)
    self.found[name] = out
    return out

  # ------------------------------------------------------------------------ loops

  def _loop(self, scope: Computation, one: Instruction, out: Cost) -> None:
    body, condition = one.attribute("body"), one.attribute("condition")
    turn = Cost()
    turn.add(self.of(body))
    turn.add(self.of(condition))
    turns = trip_count(self.computations, scope, one)
    if turns is not None:
      out.add(turn, turns)
    else:
      out.turn = out.turn or Cost()
      out.turn.add(turn)

  # ---------------------------------------------------------------------- products

  def _compute(
    self, scope: Computation, one: Instruction, out: Cost, channels: set[str]
  ) -> None:
    """FLOPs and collectives of an instruction, and of what it is fused of."""
    code = one.opcode
    if code in ("fusion", "async-start", "custom-call"):
      name = one.attribute("calls") or one.attribute("called_computations")
      if code == "custom-call" and "tpu_custom_call" in one.attributes:
        out.kernels.add(one.name)
      inner = self.computations.get(name or "", {})
      for part in inner.values():
        self._compute(inner, part, out, channels)
    elif code == "dot":
      out.flops += 2 * one.arrays[0].elements * _contracted(scope, one)
    elif code == "convolution":
      out.flops += _convolution(scope, one)
    elif code.removesuffix("-start") in _COLLECTIVES:
      channel = one.attribute("channel_id")
      # An asynchronous collective that the compiler fuses into other work stands in
      # each of those fusions, under one channel.
      if channel is None or channel not in channels:
        channels.add(channel or one.name)
        self._collective(scope, one, out)
    elif code in ("reduce", "reduce-window"):
      source = scope.get(one.operands[0])
      out.vector_flops += source.arrays[0].elements if source else 0
    elif code in _ELEMENTWISE and one.arrays[0].dtype[0] in "bf":
      out.vector_flops += one.arrays[0].elements

  def _collective(self, scope: Computation, one: Instruction, out: Cost) -> None:
    kind = one.opcode.removesuffix("-start")
    groups = _groups(one, math.prod(self.mesh.values()))
    axis = self._axes(groups)
    size = max((len(group) for group in groups), default=1)
    sent = sum(scope[name].bytes for name in one.operands if name in scope)
    if kind == "collective-permute":
      out.collectives[kind, axis] += sent
      return
    share = (size - 1) / size
    if kind == "all-gather":
      sent *= size * share
    elif kind == "all-reduce":
      users = [x for x in scope.values() if one.name in x.operands]
      # The compiler writes some reduce-scatters as a fused all-reduce with a slice.
      sliced = users and all(x.opcode == "dynamic-slice" for x in users)
      kind = "reduce-scatter" if sliced else kind
      sent *= share if sliced else 2 * share
    else:
      sent *= share
    out.collectives[kind, axis] += sent

  def _axes(self, groups: Sequence[Sequence[int]]) -> str:
    """Which axes of the mesh the members of a group differ in: "fsdp+tensor"."""
    sizes = tuple(self.mesh.values())
    differ = np.zeros(len(sizes), bool)
    for group in groups:
      at = np.stack(np.unravel_index(np.asarray(group), sizes), axis=-1)
      differ |= (at != at[:1]).any(0)
    return "+".join(axis for axis, yes in zip(self.mesh, differ) if yes) or "none"

  # ---------------------------------------------------------------------- traffic

  def _traffic(self, scope: Computation, one: Instruction) -> float:
    """Bytes that an instruction moves to and from HBM."""
    code = one.opcode
    if code in _FREE or code.endswith("-done"):
      return 0.0
    operands = [scope[name] for name in one.operands if name in scope]
    if code == "fusion":
      name = one.attribute("calls")
      read = sum(
        min(source.hbm_bytes, self._read(name, i)) for i, source in enumerate(operands)
      )
      return read + self._written(name, one)
    if code in ("copy-start", "slice-start"):
      target = one.arrays[0]
      source = operands[0].arrays[0].hbm if operands else True
      return target.bytes * (int(target.hbm) + int(source))
    if code == "dynamic-update-slice":
      return 2 * operands[1].hbm_bytes
    if code == "scatter":
      return 2 * operands[-1].hbm_bytes
    if code in ("dynamic-slice", "slice", "gather"):
      moved = one.arrays[0].bytes
      return moved * (int(operands[0].arrays[0].hbm) + int(one.arrays[0].hbm))
    return sum(x.hbm_bytes for x in operands) + one.hbm_bytes

  def _read(self, name: str, index: int) -> float:
    """Bytes of its operand that a fused computation reads."""
    scope = self.computations[name]
    start = next(
      (
        x
        for x in scope.values()
        if x.opcode == "parameter" and x.literal.strip() == str(index)
      ),
      None,
    )
    return self._read_value(scope, start) if start else 0.0

  def _read_value(self, scope: Computation, value: Instruction) -> float:
    total = 0.0
    for user in scope.values():
      if value.name not in user.operands:
        continue
      at = user.operands.index(value.name)
      if user.opcode == "bitcast":
        total += self._read_value(scope, user)
      elif user.opcode == "fusion":
        total += self._read(user.attribute("calls"), at)
      elif user.opcode in ("dynamic-slice", "slice", "gather") and at == 0:
        total += user.bytes
      elif user.opcode not in ("dynamic-update-slice", "scatter") or at:
        total += value.bytes
    return min(total, value.bytes)

  def _written(self, name: str, one: Instruction) -> float:
    """Bytes of its result that a fused computation writes: of an update in place, the
    update."""
    scope = self.computations[name]
    root = next(x for x in scope.values() if x.root)
    parts = [root]
    if root.opcode == "tuple":
      parts = [scope[x] for x in root.operands]
    if len(parts) != len(one.arrays):
      return one.hbm_bytes
    return sum(
      self._update(scope, part) for part, at in zip(parts, one.arrays) if at.hbm
    )

  def _update(self, scope: Computation, value: Instruction) -> float:
    while value.opcode == "bitcast" and value.operands[0] in scope:
      value = scope[value.operands[0]]
    if value.opcode == "dynamic-update-slice":
      return scope[value.operands[1]].bytes
    if value.opcode == "scatter":
      return scope[value.operands[-1]].bytes
    if value.opcode == "fusion":
      return self._written(value.attribute("calls"), value)
    return value.bytes


_ELEMENTWISE = {
  "add", "subtract", "multiply", "divide", "maximum", "minimum", "exponential", "log",
  "rsqrt", "sqrt", "tanh", "power", "negate", "exponential-minus-one", "log-plus-one",
}  # fmt: skip


def _branches(one: Instruction) -> list[str]:
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


def _sizes(scope: Computation, name: str) -> tuple[int, ...]:
  return scope[name].arrays[0].shape


def _contracted(scope: Computation, one: Instruction) -> int:
  axes = one.attribute("lhs_contracting_dims") or ""
  shape = _sizes(scope, one.operands[0])
  return math.prod(shape[int(axis)] for axis in axes.split(",") if axis)


def _convolution(scope: Computation, one: Instruction) -> float:
  """FLOPs of a convolution: a product only where the window meets the input.

  The TPU compiler writes matrix products as convolutions; those with batch axes have
  windows that mostly lie on padding.
  """
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
  left, right, result = labels.groups()
  window = one.attribute("window") or ""
  fields = dict(re.findall(r"(\w+)=([\w.x-]+)", window))
  lhs, rhs = (_sizes(scope, name) for name in one.operands[:2])
  out = one.arrays[0].shape
  spatial = [label for label in result if label.isdigit()]
  number = len(spatial)
  ints = lambda key, default: (
    [int(x) for x in fields[key].split("x")] if key in fields else [default] * number
  )
  stride, dilate, lhs_dilate = ints("stride", 1), ints("rhs_dilate", 1), ints(
    "lhs_dilate", 1
  )
  pads = fields.get("pad", "x".join(["0_0"] * number)).split("x")
  pairs = 1
  for i, label in enumerate(sorted(spatial)):
    pairs *= _meetings(
      lhs[left.index(label)],
      rhs[right.index(label)],
      out[result.index(label)],
      stride[i],
      int(pads[i].split("_")[0]),
      lhs_dilate[i],
      dilate[i],
    )
  batch, features = out[result.index("b")], out[result.index("f")]
  # The kernel has the input features of one group, and so has each output feature.
  depth = rhs[right.index("i")]
  groups = int(one.attribute("batch_group_count") or 1)
  return 2.0 * batch * features * depth * pairs * groups / groups


def _meetings(size, kernel, out, stride, pad, spread, dilate) -> int:
  """Pairs (place of the result, place of the kernel) that fall on an input element."""
  places = np.arange(out)[:, None] * stride + np.arange(kernel) * dilate - pad
  inside = (places >= 0) & (places < (size - 1) * spread + 1)
  return int((inside & (places % spread == 0)).sum())


# ------------------------------------------------------------------------ groups


def _groups(one: Instruction, devices: int) -> list[list[int]]:
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
  """"[4,8,8]T(2,1,0)": numbers in that shape, transposed."""
  shape, _, order = text.partition("T")
  sizes = [int(n) for n in shape.strip("[]").split(",")]
  at = np.arange(math.prod(sizes)).reshape(sizes)
  if order:
    at = at.transpose([int(n) for n in order.strip("()").split(",")])
  return at


def _by_axes(sizes: str, used: str) -> list[list[int]]:
  """"mesh['a'=2,'b'=8] {'b'}"; a part of an axis is "'b':(2)4", 4 places of stride 8/8.

  The part `'b':(m)n` splits b into (m, n, rest) and takes the middle.
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

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
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from rlft.core.hlo import (
  Computation,
  Instruction,
  branches,
  groups_of,
  parse,
  trip_count,
)

_COLLECTIVES = (
  "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
  "collective-permute", "collective-broadcast",
)  # fmt: skip
_STARTS = '"AsyncCollectiveStart"'
# They name memory that another instruction made, or hold none.
_FREE = {
  "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all",
  "opt-barrier", "partition-id", "replica-id", "copy-done", "slice-done", "async-done",
  "async-update", "domain", "while", "conditional", "call",
}  # fmt: skip


_ELEMENTWISE = {
  "add", "subtract", "multiply", "divide", "maximum", "minimum", "exponential", "log",
  "rsqrt", "sqrt", "tanh", "power", "negate", "exponential-minus-one", "log-plus-one",
}  # fmt: skip


# Forward: scores, and weights with values. Backwards each kernel makes the scores again
# and the gradients of the weights; dq then has one more product, dk and dv two.
_SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}


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
    kernels: names of custom kernels whose inside is not counted; the attention kernel
      of `models.attention` is, by hand.
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


class _Counter:
  """Costs of computations, each found once."""

  def __init__(self, computations: Mapping[str, Computation], mesh: Mapping[str, int]):
    self.computations = computations
    self.mesh = dict(mesh)
    self.found: dict[str, Cost] = {}
    # A collective that the TPU compiler runs beside other work stands, under one
    # channel, in every fusion that moves it on, in inner loops too: it counts where it
    # is started.
    self.started = {
      scope[name].attribute("channel_id")
      for scope in computations.values()
      for one in scope.values()
      if _STARTS in one.attributes
      for name in one.operands
      if name in scope
    } - {None}

  def of(self, name: str) -> Cost:
    if name in self.found:
      return self.found[name]
    scope, out = self.computations[name], Cost()
    for one in scope.values():
      if one.opcode == "while":
        self._loop(scope, one, out)
      elif one.opcode == "conditional":
        arms = [self.of(name) for name in branches(one)]
        out.add(max(arms, key=lambda c: (c.flops, c.hbm_bytes)))
      elif one.opcode == "call":
        out.add(self.of(one.attribute("to_apply")))
      else:
        self._compute(scope, one, out)
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

  def _compute(self, scope: Computation, one: Instruction, out: Cost) -> None:
    """FLOPs and collectives of an instruction, and of what it is fused of."""
    code = one.opcode
    if code in ("fusion", "async-start", "custom-call"):
      name = one.attribute("calls") or one.attribute("called_computations")
      if code == "custom-call" and "tpu_custom_call" in one.attributes:
        flops = _splash(scope, one)
        if flops is None:
          out.kernels.add(one.name)
        out.flops += flops or 0.0
      inner = self.computations.get(name or "", {})
      for part in inner.values():
        self._compute(inner, part, out)
    elif code == "dot":
      out.flops += 2 * one.arrays[0].elements * _contracted(scope, one)
    elif code == "convolution":
      out.flops += _convolution(scope, one)
    elif code.removesuffix("-start") in _COLLECTIVES:
      if one.attribute("channel_id") not in self.started or any(
        _STARTS in x.attributes for x in scope.values()
      ):
        self._collective(scope, one, out)
    elif code in ("reduce", "reduce-window"):
      source = scope.get(one.operands[0])
      out.vector_flops += source.arrays[0].elements if source else 0
    elif code in _ELEMENTWISE and one.arrays[0].dtype[0] in "bf":
      out.vector_flops += one.arrays[0].elements

  def _collective(self, scope: Computation, one: Instruction, out: Cost) -> None:
    kind = one.opcode.removesuffix("-start")
    groups = groups_of(one, math.prod(self.mesh.values()))
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
    if code == "async-start":
      inner = self.computations.get(one.attribute("calls") or "", {})
      return sum(self._traffic(inner, part) for part in inner.values())
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


def _splash(scope: Computation, one: Instruction) -> float | None:
  """FLOPs of a splash attention kernel, by hand; None for another kernel.

  2 b Q T T H for each product, over the tiles that are not above the diagonal:
  (n + 1) / 2n of n x n.
  """
  match = re.match(r"splash_mha_(fwd|dq|dkv)_", one.name)
  if match is None:
    return None
  arrays = [scope[name].arrays[0] for name in one.operands if name in scope]
  tiles = next((a.shape[-1] for a in arrays if a.dtype == "s8"), 1)
  # Queries come first; the axis of rows is left out where a chip has one row.
  queries = next(a.shape for a in arrays if a.dtype[0] in "bf" and len(a.shape) > 2)
  batch, heads, length, size = queries if len(queries) == 4 else (1, *queries)
  products = _SPLASH_PRODUCTS[match[1]] * (tiles + 1) / (2 * tiles)
  return products * 2.0 * batch * heads * length * length * size


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
  stride, dilate, lhs_dilate = (
    ints("stride", 1),
    ints("rhs_dilate", 1),
    ints("lhs_dilate", 1),
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

"""HLO text: instructions, lengths of loops, groups of devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from rlft.core import hlo

LOOP = """HloModule loop

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[]{:T(128)}, f32[4]{0:T(128)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[4]{0} get-tuple-element(%p), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %y = f32[4]{0} add(%x, %x), metadata={op_name="a(b){c} = d(e)"}
  ROOT %t = (s32[], f32[4]{0}) tuple(%next, /*index=1*/%y)
}

%condition (p.1: (s32[], f32[4])) -> pred[] {
  %p.1 = (s32[], f32[4]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %limit = s32[] constant(LIMIT)
  ROOT %less = pred[] compare(%i.1, %limit), direction=DIRECTION
}

ENTRY %main (x: f32[4]) -> (s32[], f32[4]) {
  %x.1 = f32[4]{0} parameter(0)
  %start = s32[] constant(1)
  %copied = s32[] copy(%start)
  %init = (s32[], f32[4]{0}) tuple(%copied, %x.1)
  ROOT %loop = (s32[], f32[4]{0}) while(%init), condition=%condition, body=%body
}
"""


def turns(text):
  computations, entry = hlo.parse(text)
  loop = next(x for x in computations[entry].values() if x.opcode == "while")
  return hlo.trip_count(computations, computations[entry], loop)


def test_instructions():
  computations, entry = hlo.parse(LOOP)
  assert entry == "main" and set(computations) == {"main", "body", "condition"}
  body = computations["body"]
  p, t = body["p"], body["t"]
  assert [a.shape for a in p.arrays] == [(), (4,)]
  assert [a.hbm for a in p.arrays] == [True, False]  # S(1) is on the chip
  assert t.root and t.operands == ("next", "y") and t.bytes == 4 + 16
  assert body["i"].attribute("index") == "0"
  assert body["y"].operands == ("x", "x")
  with pytest.raises(ValueError, match="no ENTRY"):
    hlo.parse("HloModule nothing")


@pytest.mark.parametrize(
  ("limit", "direction", "expected"),
  [(9, "LT", 4), (10, "LT", 5), (9, "LE", 5), (9, "NE", 4), (0, "LT", 0)],
)
def test_length_of_a_counted_loop(limit, direction, expected):
  """From 1 by steps of 2: what the condition, the start and the body say."""
  text = LOOP.replace("LIMIT", str(limit)).replace("DIRECTION", direction)
  assert turns(text) == expected


def test_known_length_wins():
  text = LOOP.replace("LIMIT", "9").replace("DIRECTION", "LT")
  known = 'body=%body, backend_config={"known_trip_count":{"n":"7"},"x":"y"}'
  assert turns(text.replace("body=%body", known)) == 7


@pytest.mark.parametrize(
  ("old", "new"),
  [
    ("%copied = s32[] copy(%start)", "%copied = s32[] parameter(1)"),
    ("%next = s32[] add(%i, %two)", "%next = s32[] multiply(%i, %two)"),
    ("%limit = s32[] constant(9)", "%limit = s32[] parameter(1)"),
  ],
)
def test_a_length_that_is_not_said_is_not_guessed(old, new):
  text = LOOP.replace("LIMIT", "9").replace("DIRECTION", "LT")
  assert turns(text) == 4
  assert old in text and turns(text.replace(old, new)) is None


def test_loops_of_this_compiler():
  def run(x, n):
    x = jax.lax.fori_loop(0, 5, lambda i, x: jnp.tanh(x @ x), x)
    return jax.lax.while_loop(lambda x: x[0, 0] < n, lambda x: x + 1, x)

  x = jax.ShapeDtypeStruct((8, 8), jnp.float32)
  text = jax.jit(run).lower(x, jnp.float32(0)).compile().as_text()
  computations, _ = hlo.parse(text)
  found = [
    hlo.trip_count(computations, scope, one)
    for scope in computations.values()
    for one in scope.values()
    if one.opcode == "while"
  ]
  assert sorted(found, key=str) == [5, None]


def groups(attributes, devices=16):
  line = f"  %x = f32[4]{{0}} all-reduce(%y), channel_id=1, {attributes}, to_apply=%add"
  text = f"ENTRY %main (y: f32[4]) -> f32[4] {{\n{line}\n}}"
  computations, entry = hlo.parse(text)
  return hlo.groups_of(computations[entry]["x"], devices)


def test_groups():
  assert groups("replica_groups={{0,1},{2,3}}") == [[0, 1], [2, 3]]
  assert groups("replica_groups=[2,2]<=[4]") == [[0, 1], [2, 3]]
  assert groups("replica_groups=[2,2]<=[2,2]T(1,0)") == [[0, 2], [1, 3]]
  assert groups("replica_groups={}", 3) == [[0, 1, 2]]
  named = "replica_groups=mesh['a'=2,'b'=4] "
  assert groups(named + "{'b'}") == [[0, 1, 2, 3], [4, 5, 6, 7]]
  assert groups(named + "{'a'}") == [[0, 4], [1, 5], [2, 6], [3, 7]]
  assert groups(named + "{'a','b'}") == [list(range(8))]
  # Parts of an axis: the outer half of b, then its inner one.
  assert groups(named + "{'b':(1)2}") == [[0, 2], [1, 3], [4, 6], [5, 7]]
  assert groups(named + "{'b':(2)2}") == [[0, 1], [2, 3], [4, 5], [6, 7]]
  pairs = "source_target_pairs={{0,1},{1,0}}"
  assert groups(pairs) == [[0, 1], [1, 0]]

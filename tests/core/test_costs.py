"""Counts of compiled programs against counts by hand."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlft.core import costs
from rlft.core.mesh import make_mesh

ONE = {"data": 1, "fsdp": 1, "tensor": 1}


def compiled(run, *shapes):
  return jax.jit(run).lower(*shapes).compile().as_text()


def count(run, *shapes):
  return costs.count(compiled(run, *shapes), ONE)


def floats(*shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


# ------------------------------------------------------------------------ FLOPs


def test_a_loop_counts_as_often_as_it_turns():
  """5 turns of [24, 32] @ [32, 32], and in each 3 of [24, 32] @ [32, 16] @ [16, 32]."""

  def inner(x, w):
    return jnp.tanh((x @ w) @ w.T), None

  def outer(x, ws):
    square, thin = ws
    x = jnp.tanh(x @ square)
    return jax.lax.scan(inner, x, thin)[0], None

  run = lambda x, ws: jax.lax.scan(outer, x, ws)[0]
  found = count(run, floats(24, 32), (floats(5, 32, 32), floats(5, 3, 32, 16)))
  assert found.flops == 5 * (2 * 24 * 32 * 32 + 3 * 2 * 2 * 24 * 32 * 16)
  assert found.turn is None


def test_a_loop_without_a_length_is_kept_apart():
  def turn(state):
    x, w, i = state
    x = jax.lax.fori_loop(0, 4, lambda _, x: jnp.tanh(x @ w), x)
    return x, w, i + 1

  def run(x, w, n):
    x = x @ w
    return jax.lax.while_loop(lambda s: s[2] < n, turn, (x, w, 0))[0]

  found = count(run, floats(8, 16), floats(16, 16), floats(dtype=jnp.int32))
  one = 2 * 8 * 16 * 16
  assert found.flops == one and found.turn.flops == 4 * one
  assert found.total(10).flops == 41 * one and found.total(10).turn is None


def test_the_dearer_branch_counts():
  def run(x, yes):
    return jax.lax.cond(yes, lambda x: x @ x, lambda x: x @ x @ x @ x, x)

  found = count(run, floats(16, 16), floats(dtype=jnp.bool_))
  assert found.flops == 3 * 2 * 16**3


CONVOLUTION = """ENTRY %main (a: f32[6,128], b: f32[128,32]) -> f32[6,32] {{
  %a = f32[{lhs}]{{1,0}} parameter(0)
  %b = f32[{rhs}]{{1,0}} parameter(1)
  ROOT %c = f32[{out}]{{1,0}} convolution(%a, %b), {attributes}
}}"""


@pytest.mark.parametrize(
  ("lhs", "rhs", "out", "attributes", "flops"),
  [
    # As the TPU compiler writes x @ w ...
    ("6,128", "128,32", "6,32", "dim_labels=bf_io->bf", 2 * 6 * 128 * 32),
    # ... a product whose heads are a spatial axis that the window meets once ...
    (
      "16,64", "4,64,128", "16,4,128",
      "window={size=4 pad=3_3 rhs_reversal=1}, dim_labels=bf_0io->b0f",
      None,
    ),
    # ... and 8 products of [5, 7] @ [7, 3] as one, spread so that each meets its own.
    (
      "5,8,7", "8,7,3", "5,8,3",
      "window={size=8 stride=7 lhs_dilate=8}, dim_labels=b0f_0io->b0f",
      8 * 2 * 5 * 7 * 3,
    ),
    # A real one: of 4 places with a window of 3, the outer two meet one pad.
    (
      "1,4,2", "3,2,5", "1,4,5",
      "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f",
      2 * 5 * 2 * (3 * 4 - 2),
    ),
  ],
)  # fmt: skip
def test_convolutions(lhs, rhs, out, attributes, flops):
  if flops is None:
    lhs, flops = "16,1,64", 2 * 16 * 64 * 4 * 128
    attributes = attributes.replace("bf_0io", "b0f_0io")
  text = CONVOLUTION.format(lhs=lhs, rhs=rhs, out=out, attributes=attributes)
  assert costs.count(text, ONE).flops == flops


# -------------------------------------------------------------------- collectives

MESH = {"data": 2, "fsdp": 2, "tensor": 2}


def test_collectives_by_kind_and_axis():
  mesh = make_mesh(2, 2, 2)
  spec = PartitionSpec(("data", "fsdp", "tensor"))
  x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=NamedSharding(mesh, spec))
  shard = 64 // 8 * 32 * 4
  turn = lambda axis: functools.partial(
    jax.lax.ppermute, axis_name=axis, perm=[(0, 1), (1, 0)]
  )
  cases = {
    ("all-reduce", "tensor", 2 * shard / 2): lambda x: jax.lax.psum(x, "tensor"),
    ("all-reduce", "data+fsdp", 2 * shard * 3 / 4): lambda x: jax.lax.psum(
      x, ("data", "fsdp")
    ),
    ("all-gather", "fsdp", shard): lambda x: jax.lax.all_gather(x, "fsdp"),
    ("reduce-scatter", "data", shard / 2): lambda x: jax.lax.psum_scatter(x, "data"),
    ("collective-permute", "fsdp", shard): turn("fsdp"),
    ("all-to-all", "tensor", shard / 2): lambda x: jax.lax.all_to_all(
      x.reshape(2, -1), "tensor", 0, 0
    ),
  }
  for (kind, axis, sent), one in cases.items():
    if kind == "reduce-scatter":
      one = lambda x, one=one: one(x.reshape(2, -1))

    def run(x, one=one):
      # In a loop: what a layer sends, every layer sends.
      again = lambda _, y: y + one(x + y[0, 0]).sum()
      return jax.lax.fori_loop(0, 3, again, x)

    mapped = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec)
    mapped = jax.shard_map(
      run, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
    )
    found = costs.count(compiled(mapped, x), MESH)
    large = {key: value for key, value in found.collectives.items() if value > 100}
    assert large == {(kind, axis): 3 * sent}, (kind, axis)


FUSED = """%start (p: bf16[1,8]) -> (bf16[1,8], bf16[1,32]) {
  %p = bf16[1,8]{1,0} parameter(0)
  %g = bf16[1,32]{1,0} all-gather(%p), channel_id=7, replica_groups=[1,4]<=[4]
  ROOT %c = (bf16[1,8]{1,0}, bf16[1,32]{1,0}) custom-call(%p, %g), custom_call_target="AsyncCollectiveStart"
}

%moved (q: bf16[1,8]) -> bf16[1,32] {
  %q = bf16[1,8]{1,0} parameter(0)
  ROOT %h = bf16[1,32]{1,0} all-gather(%q), channel_id=7, replica_groups=[1,4]<=[4]
}

%scattered (r: f32[16]) -> f32[4] {
  %r = f32[16]{0} parameter(0)
  %i = s32[] constant(0)
  %sum = f32[16]{0} all-reduce(%r), channel_id=8, replica_groups=[1,4]<=[4]
  ROOT %s = f32[4]{0} dynamic-slice(%sum, %i), dynamic_slice_sizes={4}
}

ENTRY %main (x: bf16[1,8], y: f32[16]) -> f32[4] {
  %x = bf16[1,8]{1,0} parameter(0)
  %y = f32[16]{0} parameter(1)
  %a = (bf16[1,8]{1,0}, bf16[1,32]{1,0}) fusion(%x), kind=kCustom, calls=%start
  %b = bf16[1,32]{1,0} fusion(%x), kind=kOutput, calls=%moved
  %d = bf16[1,32]{1,0} fusion(%x), kind=kOutput, calls=%moved
  ROOT %e = f32[4]{0} fusion(%y), kind=kCustom, calls=%scattered
}"""  # noqa: E501


def test_collectives_that_the_tpu_compiler_fuses():
  """A gather beside other work is one gather; a reduce with a slice is a scatter."""
  found = costs.count(FUSED, {"data": 4}).collectives
  assert found == {
    ("all-gather", "data"): 3 * 8 * 2,
    ("reduce-scatter", "data"): 16 * 4 * 3 / 4,
  }


# ------------------------------------------------------------------------ traffic


def test_traffic_of_updates_in_place_is_the_update():
  """A cache of 4 MB, of which a turn reads one row and writes one."""

  def turn(i, cache):
    row = jax.lax.dynamic_slice(cache, (i, 0), (1, 1024))
    return jax.lax.dynamic_update_slice(cache, row * 2, (i + 1, 0))

  run = lambda cache: jax.lax.fori_loop(0, 100, turn, cache)
  cache = floats(1024, 1024)
  text = jax.jit(run, donate_argnums=0).lower(cache).compile().as_text()
  moved = costs.count(text, ONE).hbm_bytes
  assert 100 * 2 * 4096 <= moved < 100 * 5 * 4096


ON_CHIP = """ENTRY %main (a: f32[1024]) -> f32[1024] {
  %a = f32[1024]{0:T(1024)} parameter(0)
  %s = (f32[1024]{0:T(1024)S(1)}, f32[1024]{0}, u32[]{:S(2)}) copy-start(%a)
  %v = f32[1024]{0:T(1024)S(1)} copy-done(%s)
  %w = f32[1024]{0:T(1024)S(1)} add(%v, %v)
  ROOT %o = f32[1024]{0} copy(%w)
}"""


def test_on_chip_memory_is_not_hbm():
  """Read once, written once; the sum stays on the chip."""
  assert costs.count(ON_CHIP, ONE).hbm_bytes == 2 * 4096


SPLASH = """ENTRY %main (q: bf16[8,4,1024,128]) -> bf16[8,4,1024,128] {
  %q = bf16[8,4,1024,128]{3,2,1,0} parameter(0)
  %k = bf16[8,2,1024,128]{3,2,1,0} parameter(1)
  %m = s8[1,2,2]{2,1,0} parameter(2)
  %splash_mha_NAME_segmented.1 = bf16[8,4,1024,128]{3,2,1,0} custom-call(%m, %q, %k), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="x"}
  ROOT %o = bf16[8,4,1024,128]{3,2,1,0} copy(%splash_mha_NAME_segmented.1)
}"""  # noqa: E501


@pytest.mark.parametrize(("name", "products"), [("fwd", 2), ("dq", 3), ("dkv", 4)])
def test_the_attention_kernel_is_counted_by_hand(name, products):
  """8 rows, 4 heads: 3 of 2 x 2 tiles of 512 x 512 pairs are not above the diagonal."""
  cost = costs.count(SPLASH.replace("NAME", name), ONE)
  assert cost.flops == products * 2 * 8 * 4 * 3 * 512**2 * 128
  assert not cost.kernels


def test_the_attention_kernel_of_one_row():
  one_row = SPLASH.replace("bf16[8,", "bf16[").replace("{3,2,1,0}", "{2,1,0}")
  assert costs.count(one_row, ONE).flops == 0  # another name is another kernel
  cost = costs.count(one_row.replace("NAME", "fwd"), ONE)
  assert cost.flops == 2 * 2 * 4 * 3 * 512**2 * 128


def test_another_kernel_is_named_and_not_counted():
  cost = costs.count(SPLASH.replace("splash_mha_NAME", "mine"), ONE)
  assert (cost.flops, cost.kernels) == (0, {"mine_segmented.1"})

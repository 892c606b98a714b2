"""What the compiled programs hold in memory, read from their optimized HLO text.

Decoding must not copy the cache, whole or a layer of it, for a token; log-probs must
not hold `[B, T, V]`; what is donated must be reused.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlft.algorithms.sft import make_train_step
from rlft.core.mesh import AXES
from rlft.models import cache as kv_cache
from rlft.models.decoder import Decoder, DecoderConfig, init_params, param_shapes
from rlft.sampling import decode
from rlft.sampling.generate import rollout_layout
from rlft.sampling.score import token_logp
from rlft.training.data import TrainBatch
from rlft.training.optimizer import OptimizerConfig
from rlft.training.step import init_state

pytestmark = pytest.mark.usefixtures("optimized")

# ------------------------------------------------------------- reading HLO

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4}
_BYTES |= {"f32": 4, "s64": 8, "u64": 8, "f64": 8}
_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_LINE = re.compile(
  r"^\s+(ROOT )?%?([\w.-]+) = (\(.*?\)|\w+\[[\d,]*\]\S*) ([\w-]+)\((.*)$"
)
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_RUNS = re.compile(r"(?:body|condition|to_apply|calls|\w+_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
# They name memory that another instruction made.
_NAMES = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional"}
_NAMES |= {"call", "opt-barrier", "copy-done", "async-done"}
_UPDATES = {"scatter": 2, "dynamic-update-slice": 1}  # which operand is the update


@dataclasses.dataclass(frozen=True)
class Instruction:
  name: str
  opcode: str
  arrays: tuple[tuple[str, tuple[int, ...]], ...]  # of the result
  operands: tuple[str, ...]
  runs: tuple[str, ...]  # computations
  root: bool
  text: str

  @property
  def bytes(self) -> int:
    return sum(_BYTES[kind] * math.prod(shape) for kind, shape in self.arrays)


class Program:
  """Computations of a program; the inside of a fusion holds no memory."""

  def __init__(self, compiled):
    self.compiled, self.text = compiled, compiled.as_text()
    self.computations: dict[str, dict[str, Instruction]] = {}
    for raw in self.text.splitlines():
      if match := _HEAD.match(raw):
        scope = self.computations.setdefault(match[2], {})
        if match[1]:
          self.entry = match[2]
      elif match := _LINE.match(re.sub(r"/\*.*?\*/", "", raw)):
        line = _parse(match)
        scope[line.name] = line
    assert self.computations[self.entry], "HLO text is not what it was"

  def reached(self, start: list[str]) -> list[tuple[dict, Instruction]]:
    """(scope, instruction) of all that runs from these computations on."""
    seen, found, queue = set(), [], list(start)
    while queue:
      name = queue.pop()
      if name not in seen:
        seen.add(name)
        for line in self.computations[name].values():
          found.append((self.computations[name], line))
          if line.opcode in ("while", "conditional", "call"):
            queue += line.runs
    return found

  def everywhere(self):
    return self.reached([self.entry])

  def in_loops(self):
    """What runs in a while loop, at any depth."""
    loops = [line for _, line in self.everywhere() if line.opcode == "while"]
    return self.reached([name for line in loops for name in line.runs])

  def update_bytes(self, scope, line: Instruction) -> int | None:
    """Bytes written by an update of an operand in place; None when it is none."""
    if line.opcode == "fusion":
      scope = self.computations[line.runs[0]]
      line = next(x for x in scope.values() if x.root)
    while line.opcode == "bitcast" and line.operands[0] in scope:
      line = scope[line.operands[0]]
    if line.opcode not in _UPDATES:
      return None
    return scope[line.operands[_UPDATES[line.opcode]]].bytes

  def aliased(self) -> set[int]:
    """Parameters whose memory a result takes over."""
    table = re.search(r"input_output_alias=\{(.*?)\}[,\s]*\w+=", self.text)
    found = re.findall(r"\{[\d, ]*\}: \((\d+), ", table[1] + "}" if table else "")
    return {int(number) for number in found}


def _parse(match: re.Match) -> Instruction:
  root, name, result, opcode, rest = match.groups()
  arrays = tuple(
    (kind, tuple(int(n) for n in shape.split(",") if n))
    for kind, shape in _ARRAY.findall(re.sub(r"\{.*?\}", "", result))
    if kind in _BYTES
  )
  runs = _RUNS.findall(rest)
  if branches := _BRANCHES.search(rest):
    runs += [branch.strip(" %") for branch in branches[1].split(",")]
  operands = re.findall(r"%([\w.-]+)", rest.split("), ")[0])
  text = match[0].strip()[:200]
  return Instruction(
    name, opcode, arrays, tuple(operands), tuple(runs), bool(root), text
  )


def copies(program: Program, lines, least: int, token: int, vmem: bool = False):
  """What makes `least` bytes or more and is no update of at most `token` bytes.

  Args:
    vmem: allow results in a TPU's VMEM (memory space 1), which are prefetches.
  """
  found = []
  for scope, line in lines:
    if line.opcode in _NAMES or line.bytes < least:
      continue
    if vmem and re.search(r"S\(1\)", line.text.split(line.opcode + "(")[0]):
      continue
    update = program.update_bytes(scope, line)
    if update is None or update > token:
      found.append(line.text)
  return found


def holds(program: Program, size: int, axis: int) -> list[str]:
  """Arrays of at least `size` elements with an axis of this length."""
  return [
    line.text
    for _, line in program.everywhere()
    if any(axis in shape and math.prod(shape) >= size for _, shape in line.arrays)
  ]


# ------------------------------------------------------------- decode, on this machine

S, K, P, C = 4, 2, 128, 64
CONFIG = DecoderConfig(
  vocab_size=128,
  width=64,
  layers=3,
  heads=4,
  kv_heads=2,
  head_dim=16,
  mlp_width=128,
  max_positions=512,
  windows=(0, 40, 0),
)
# Of one layer: own completions and shared prompts are equally large.
LAYER = 4 * S * K * CONFIG.kv_heads * C * CONFIG.head_dim
TOKEN = 4 * S * K * CONFIG.kv_heads * CONFIG.head_dim  # of one layer
assert K * C == P


def rules_of(vocab: int) -> decode.Rules:
  return decode.Rules(
    np.full((8,), -1, np.int32),
    np.zeros((16, vocab), np.int32),
    np.int32(1),
    np.bool_(False),
  )


def fresh_jit_decode():
  """`jit` of a new function: a known one is not traced again when a test breaks it."""
  run = lambda *arguments: decode.jit_decode.__wrapped__(*arguments)
  return jax.jit(run, static_argnums=0, donate_argnums=2)


def compile_decode(jitted):
  model = Decoder(CONFIG)
  model, params = rollout_layout(model, init_params(model, jax.random.key(0)))
  state = decode.jit_empty(model, S, K, P, C, 4)
  lowered = jitted.lower(
    model, params, state, rules_of(128), np.int32(5), np.int32(S + 1)
  )
  return Program(lowered.compile()), params, state


@pytest.fixture(scope="module")
def decoding():
  return compile_decode(decode.jit_decode)


def test_decode_copies_no_cache(decoding):
  program, _, _ = decoding
  loops = program.in_loops()
  assert len(loops) > 200
  assert copies(program, loops, LAYER, TOKEN) == []
  assert copies(program, program.everywhere(), LAYER, TOKEN) == []
  updates = [
    program.update_bytes(scope, line)
    for scope, line in loops
    if line.opcode not in _NAMES and line.bytes >= LAYER
  ]
  # Keys and values of each layer: exactly these are written, a token each.
  assert updates == [TOKEN] * 2 * CONFIG.layers
  # Were the updates not in place, their results would be memory of their own.
  assert program.compiled.memory_analysis().temp_size_in_bytes < 2 * LAYER


def test_the_state_is_donated(decoding):
  program, params, state = decoding
  first = len(jax.tree.leaves(params))
  leaves = jax.tree.leaves(state)
  kept = {first + i for i in range(len(leaves))}
  assert kept <= program.aliased()
  stats = program.compiled.memory_analysis()
  assert stats.alias_size_in_bytes >= sum(x.nbytes for x in leaves)


def test_a_copy_would_be_seen(monkeypatch):
  """The test above, of a write that replaces the layer: it must not pass."""

  def rewrite(cache, layer, k_BNH, v_BNH):
    here_BC = jnp.arange(C) == cache.cursor_B[:, None]
    put = lambda store, new: jnp.where(
      here_BC[:, None, :, None], new[:, :, None].astype(store.dtype), store
    )
    k, v = list(cache.k), list(cache.v)
    k[layer], v[layer] = put(k[layer], k_BNH), put(v[layer], v_BNH)
    return cache.replace(k=tuple(k), v=tuple(v))

  monkeypatch.setattr(kv_cache, "write", rewrite)
  program, _, _ = compile_decode(fresh_jit_decode())
  assert len(copies(program, program.in_loops(), LAYER, TOKEN)) >= CONFIG.layers


# ------------------------------------------------------------- decode, for a TPU


@functools.cache
def tpu_devices():
  """Devices of a v5e that need not be there: libtpu compiles for them."""
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("no libtpu: the TPU's decode program was NOT checked")
  from jax.experimental import topologies

  # Without them libtpu asks the cloud's metadata server where it runs.
  for name, value in (
    ("TPU_SKIP_MDS_QUERY", "1"),
    ("TPU_WORKER_HOSTNAMES", "localhost"),
  ):
    os.environ.setdefault(name, value)
  try:
    found = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
  except Exception as error:  # libtpu is held by another process, or has no v5e
    pytest.skip(f"libtpu gives no topology, the program was NOT checked: {error}")
  return found.devices


# So large that a device's keys, or values, do not fit into VMEM (128 MiB), where the
# compiler would keep a small cache, and copy it there before the loop.
TPU_S, TPU_K, TPU_P, TPU_C = 16, 8, 512, 512
TPU_CONFIG = dataclasses.replace(
  CONFIG,
  vocab_size=1024,
  width=512,
  layers=32,
  heads=8,
  kv_heads=4,
  mlp_width=1024,
  max_positions=2048,
  windows=(0, 400) * 16,
)


@pytest.mark.parametrize(
  ("head_dim", "shape"),
  [
    (128, (1, 1, 1)),  # a head as wide as a tile
    (64, (2, 1, 2)),  # half as wide: the compiler turns the cache's axes around
    pytest.param(64, (1, 1, 1), marks=pytest.mark.slow),
    pytest.param(128, (2, 1, 2), marks=pytest.mark.slow),
  ],
)
def test_decode_copies_no_cache_on_tpu(head_dim, shape):
  devices = tpu_devices()
  count = math.prod(shape)
  mesh = Mesh(np.array(devices[:count]).reshape(shape), AXES)
  config = dataclasses.replace(TPU_CONFIG, head_dim=head_dim)
  model = Decoder(config, dtype=jnp.bfloat16, mesh=mesh if count > 1 else None)
  bare = model.clone(mesh=None)
  everywhere = NamedSharding(mesh, PartitionSpec())
  place = lambda tree: jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), tree
  )
  state = jax.eval_shape(
    lambda: decode.empty_state(bare, TPU_S, TPU_K, TPU_P, TPU_C, 4)
  )
  split = PartitionSpec(None, ("data", "fsdp"), "tensor")
  kv = lambda x: jax.ShapeDtypeStruct(
    x.shape, x.dtype, sharding=NamedSharding(mesh, split)
  )
  arguments = place(state)
  cache = state.cache
  arguments = arguments.replace(
    cache=arguments.cache.replace(
      prompt_k=kv(cache.prompt_k),
      prompt_v=kv(cache.prompt_v),
      k=kv(cache.k),
      v=kv(cache.v),
    )
  )
  params = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), param_shapes(bare)
  )
  lowered = fresh_jit_decode().lower(
    model,
    place(params),
    arguments,
    place(rules_of(config.vocab_size)),
    *place((np.int32(5), np.int32(TPU_S + 1))),
  )
  program = Program(lowered.compile())
  layer = 2 * TPU_S * TPU_K * config.kv_heads * TPU_C * head_dim // count
  token = layer // TPU_C
  assert cache.stacked and program.in_loops()
  assert copies(program, program.in_loops(), layer // 2, token, vmem=True) == []
  # Nor before or after the loop, where a copy would double the cache's memory.
  whole = config.layers * layer
  assert copies(program, program.everywhere(), whole, token, vmem=True) == []
  stats = program.compiled.memory_analysis()
  assert stats.temp_size_in_bytes < whole // 2
  assert stats.alias_size_in_bytes > 2 * whole


# ------------------------------------------------------------- log-probs in chunks

# 4096 tokens are two chunks; 509, a prime, is nobody else's axis.
ROWS, LENGTH, VOCAB = 4, 1024, 509
SCORED = dataclasses.replace(
  CONFIG, vocab_size=VOCAB, width=16, layers=1, head_dim=8, windows=(), mlp_width=24
)


def batch_shapes():
  tokens = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
  return tokens, jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.bool_)


def score_program(tie: bool, grad: bool) -> Program:
  model = Decoder(dataclasses.replace(SCORED, tie_embeddings=tie))
  run = lambda params, *batch: token_logp(model, params, *batch).sum()
  run = jax.jit(jax.value_and_grad(run) if grad else run)
  return Program(run.lower(param_shapes(model), *batch_shapes()).compile())


@pytest.mark.parametrize(("tie", "grad"), [(True, False), (True, True), (False, True)])
def test_scoring_holds_no_logits(tie, grad):
  program = score_program(tie, grad)
  assert holds(program, ROWS * LENGTH * VOCAB, VOCAB) == []
  assert holds(program, ROWS * LENGTH * VOCAB // 2, VOCAB)  # a chunk's are there


def test_the_train_step_holds_no_logits():
  model = Decoder(SCORED)
  config = OptimizerConfig()
  state = init_state(init_params(model, jax.random.key(0)), config, 10)
  tokens, mask = batch_shapes()
  batch = TrainBatch(tokens, mask, jax.ShapeDtypeStruct(tokens.shape, jnp.float32))
  step = make_train_step(model, config)
  program = Program(step.lower(state, batch).compile())
  assert holds(program, ROWS * LENGTH * VOCAB, VOCAB) == []
  assert set(range(len(jax.tree.leaves(state)))) - program.aliased() == set()


def test_whole_logits_would_be_seen(monkeypatch):
  """With one chunk for all tokens the reader finds [B, T, V]."""
  from rlft.sampling import score

  whole = functools.partial(score.lm_logp, chunk_tokens=ROWS * LENGTH)
  monkeypatch.setattr(score, "lm_logp", whole)
  assert holds(score_program(True, True), ROWS * LENGTH * VOCAB, VOCAB)

"""`rlft plan --search`: meshes, micro-batches and remat, ranked by an estimate.

The estimate is arithmetic on the config, not the compiler's word: it ranks, and the
best few are compiled. Letters: T tokens of a row, D width, F MLP width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp

from rlft.cli import planning
from rlft.cli.compiling import OnProgram, Report, Target, compile_plan
from rlft.cli.runs import weight_count
from rlft.core.errors import ConfigError
from rlft.core.mesh import make_mesh
from rlft.models.decoder import DecoderConfig
from rlft.training.parts import inner_bytes, kept_bytes, score_bytes

CHUNK = 2048  # tokens of a chip whose logits are held at once; see `models.heads`
# Compiled programs were up to this much larger than the estimate.
MARGIN = 1.15


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A choice of knobs.

  Attributes:
    mesh: data, fsdp, tensor.
    micro_batches, remat: of the train steps.
    method: "ppo", "grpo" or "sft".
    bytes: of a chip where it is fullest, estimated.
    seconds: of an iteration, estimated.
    report: what the compiler says; None where it was not asked.
  """

  mesh: tuple[int, int, int]
  micro_batches: int
  remat: str
  method: str
  bytes: float
  seconds: float
  report: Report | None = None


def search(
  settings: planning.Run,
  target: Target,
  prompt: int,
  count: int,
  cache: Path | None = None,
  on_program: OnProgram | None = None,
) -> list[Candidate]:
  """Ranks candidates and compiles the best ones.

  Args:
    settings: of the run; its mesh, micro_batches and remat are replaced.
    target: what for.
    prompt: the longest prompt, tokens.
    count: how many are compiled.
    cache, on_program: see `compile_plan`.

  Returns:
    The compiled ones: those that fit first, the shortest iteration first.

  Raises:
    ConfigError: no mesh divides the rows.
  """
  ranked = rank(settings, target, prompt)
  if not ranked:
    raise ConfigError(
      f"no mesh of {len(target.devices)} chips divides the rows of this config; make "
      "prompts_per_iteration x samples_per_prompt / minibatches (or batch_size) a "
      "multiple of more powers of two"
    )
  done = []
  for one in ranked[:count]:
    run = with_knobs(settings, one.mesh, one.micro_batches, one.remat)
    report = compile_plan(run, target, prompt, cache=cache, on_program=on_program)
    done.append(dataclasses.replace(one, report=report))
  key = lambda one: (not one.report.fits, one.report.seconds)
  return sorted(done, key=key)


def rank(settings: planning.Run, target: Target, prompt: int) -> list[Candidate]:
  """All candidates: those that should fit by time, then the others by memory."""
  found = []
  for mesh in meshes(len(target.devices), target.slices):
    try:
      run = with_knobs(settings, mesh, 1, "none")
      plan = planning.make_plan(run, make_mesh(*mesh, target.devices), prompt)
    except ConfigError:  # the rows do not divide this mesh
      continue
    most = plan.rows // (mesh[0] * mesh[1])  # one row a chip and micro-batch
    for micro_batches in _powers(most):
      for remat in ("none", "dots", "full"):
        if most % micro_batches == 0:
          run = with_knobs(settings, mesh, micro_batches, remat)
          found.append(_estimate(run, plan, target, mesh, micro_batches, remat))
  limit = target.chip.hbm / MARGIN
  key = lambda one: (
    one.bytes > limit,
    one.seconds if one.bytes <= limit else one.bytes,
  )
  return sorted(found, key=key)


def meshes(chips: int, slices: int = 1) -> Iterator[tuple[int, int, int]]:
  """(data, fsdp, tensor) of powers of two; tensor within a host's reach, 16."""
  for tensor in _powers(min(16, chips)):
    for fsdp in _powers(chips // tensor):
      data, rest = divmod(chips, tensor * fsdp)
      if not rest and data % slices == 0:
        yield data, fsdp, tensor


def _powers(most: int) -> list[int]:
  return [2**i for i in range(most.bit_length()) if 2**i <= most]


def with_knobs(
  settings: planning.Run, mesh: tuple[int, int, int], micro_batches: int, remat: str
) -> planning.Run:
  """The run with other knobs."""
  name = planning.name_of(settings)
  method = dataclasses.replace(
    getattr(settings, name), micro_batches=micro_batches, remat=remat
  )
  sizes = dict(zip(("data", "fsdp", "tensor"), mesh))
  sizes = dataclasses.replace(settings.mesh, **sizes)
  return dataclasses.replace(settings, **{name: method, "mesh": sizes})


def _estimate(run, plan, target: Target, mesh, micro_batches, remat) -> Candidate:
  name = planning.name_of(run)
  config = planning.architecture(run.model)
  method = getattr(run, name)
  size = jnp.dtype(method.compute_dtype).itemsize
  residents = sum(plan.residents.values())
  rows, width = plan.rows // micro_batches // (mesh[0] * mesh[1]), plan.width
  step = residents + step_bytes(config, mesh, rows, width, size, micro_batches, remat)
  return Candidate(
    mesh,
    micro_batches,
    remat,
    name,
    max(step, residents + plan.cache_bytes),
    _seconds(config, plan, target, mesh, rows, width, size, micro_batches, remat),
  )


def step_bytes(
  config: DecoderConfig,
  mesh: tuple[int, int, int],
  rows: int,
  width: int,
  size: int,
  micro_batches: int,
  remat: str,
) -> float:
  """What a train step adds to the models on a chip.

  Args:
    config: the architecture.
    mesh: data, fsdp, tensor.
    rows: of a chip in a micro-batch.
    width: T.
    size: bytes of a number of the computation.
    micro_batches: above 1, gradients are summed in a buffer of their own.
    remat: "none", "dots" or "full".
  """
  _, fsdp, tensor = mesh
  tokens = rows * width
  # The attention kernel of TPUs holds tiles of the scores, on the chip.
  tiled = width % 128 == 0 and config.head_dim % 128 == 0
  kept = kept_bytes(config, tensor, rows, width, size, remat, tiled)
  inner = inner_bytes(config, tensor, tokens, size)
  scores = 0.0 if tiled else score_bytes(config, tensor, rows, width, size)
  activations = config.layers * kept + inner + 2 * scores
  weights = weight_count(config)
  layer = (weights - 2 * config.vocab_size * config.width) / config.layers
  gathered = 2 * layer * size / tensor
  shard = 4.0 * weights / (fsdp * tensor)
  gradients = shard * (3 if micro_batches > 1 else 2)
  # The table's gradient is summed before it is scattered over fsdp.
  table = config.vocab_size * config.output_width / tensor * (size + 4)
  logits = 3 * 4 * min(tokens, CHUNK) * config.vocab_size / tensor
  return activations + gathered + gradients + table + logits


def _seconds(
  config, plan, target: Target, mesh, rows, width, size, micro_batches, remat
) -> float:
  """An iteration at the rooflines."""
  _, fsdp, tensor = mesh
  chip, chips = target.chip, len(target.devices)
  link = chip.ici_bytes / chip.torus
  weights = weight_count(config) * size / tensor
  stream = rows * width * config.width * size
  again = {"none": 1.0, "dots": 1.05, "full": 4 / 3}[remat]
  reduced = 2 * (tensor - 1) / tensor * config.layers
  gathered = weights * (fsdp - 1) / fsdp
  total = 0.0
  for program in plan.programs:
    flops = program.model_flops * program.turns / chips
    if program.phase == "update":
      compute = flops * again / chip.flops
      passes = 3 + (remat != "none")
      network = gathered * passes + stream * reduced * (4 + 2 * (remat == "full"))
      network *= micro_batches
      network += 2 * 4 * weights / size / fsdp * (mesh[0] > 1)
      memory = weights * passes * micro_batches
    elif program.name == "decode":
      compute = flops / chip.flops
      memory = program.turns * (weights + plan.cache_bytes)
      own = plan.in_flight / (mesh[0] * mesh[1])
      network = program.turns * reduced * 2 * own * config.width * size
    else:
      compute = flops / chip.flops
      tokens = flops / (2 * weight_count(config) / tensor)
      network = tokens * config.width * size * reduced * 2
      network += 0.0 if program.phase == "rollout" else gathered
      memory = weights
    total += program.runs * max(compute, memory / chip.hbm_bytes, network / link)
  return total

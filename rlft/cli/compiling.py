"""Compiles the programs of a plan for a TPU topology, and measures them."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from rlft.cli import planning, runs
from rlft.cli.estimates import CHIPS, GIB, Chip, roofline
from rlft.cli.planning import Program
from rlft.core import costs
from rlft.core.errors import ConfigError
from rlft.core.mesh import make_mesh

OnProgram = Callable[[str, float, bool], None]  # name, seconds, from the cache


@dataclasses.dataclass(frozen=True)
class Target:
  """Devices to compile for.

  Attributes:
    topology, slices: as they were asked for.
    chip: what one of them can do.
    devices: of all slices; they need not be there.
  """

  topology: str
  slices: int
  chip: Chip
  devices: Any


@dataclasses.dataclass(frozen=True)
class Measured:
  """A compiled program; bytes and work of one chip.

  Attributes:
    name, phase, runs, turns: see `planning.Program`.
    arguments, temporaries, output, aliased: bytes, as the compiler has them.
    others: bytes of residents that are not among its arguments.
    needs: bytes of a program that the compiler refused, as it said; else 0.
    flops, vector_flops, hbm_bytes: of one run.
    per_turn: (FLOPs, bytes of HBM, bytes sent) of a turn of a loop without a length.
    collectives: (kind, axis, bytes sent) of one run.
    kernels: custom kernels, whose FLOPs are not counted.
    model_flops: of one run, by hand.
    compute, hbm, network: seconds of one run, see `estimates.Roofline`.
    compile_seconds: of the compiler, also where the result came from the cache.
  """

  name: str
  phase: str
  runs: int
  turns: int
  arguments: float = 0.0
  temporaries: float = 0.0
  output: float = 0.0
  aliased: float = 0.0
  others: float = 0.0
  needs: float = 0.0
  flops: float = 0.0
  vector_flops: float = 0.0
  hbm_bytes: float = 0.0
  per_turn: tuple[float, float, float] | None = None
  collectives: tuple[tuple[str, str, float], ...] = ()
  kernels: tuple[str, ...] = ()
  model_flops: float = 0.0
  compute: float = 0.0
  hbm: float = 0.0
  network: float = 0.0
  compile_seconds: float = 0.0

  @property
  def own(self) -> float:
    """Bytes that lie on a chip for this program alone, residents included."""
    if self.needs:
      return self.needs
    return self.arguments + self.temporaries + self.output - self.aliased

  @property
  def peak(self) -> float:
    """Bytes on a chip while it runs, all models counted."""
    return self.own + self.others

  @property
  def seconds(self) -> float:
    """Of all its runs in an iteration, at least."""
    return self.runs * max(self.compute, self.hbm, self.network)

  @property
  def bound(self) -> str:
    parts = {"compute": self.compute, "hbm": self.hbm, "network": self.network}
    return max(parts, key=parts.get)


@dataclasses.dataclass(frozen=True)
class Report:
  """A plan, compiled.

  Attributes:
    mesh: axis -> size.
    settings: of the method that a person may turn.
    residents: name -> bytes of a chip.
    programs: in the order of an iteration.
    available: bytes of a chip.
    tokens: sampled (of SFT: trained on) in an iteration at most.
    complete: whether all programs were compiled.
  """

  mesh: Mapping[str, int]
  settings: Mapping[str, Any]
  residents: Mapping[str, float]
  programs: tuple[Measured, ...]
  available: float
  tokens: int
  complete: bool = True

  @property
  def worst(self) -> Measured:
    """The program that needs the most memory."""
    return max(self.programs, key=lambda one: one.peak)

  @property
  def fits(self) -> bool:
    return all(one.peak <= self.available for one in self.programs)

  @property
  def seconds(self) -> float:
    """Of an iteration, at least."""
    return sum(one.seconds for one in self.programs)


def target(topology: str, slices: int = 1) -> Target:
  """The devices of a topology.

  Raises:
    ConfigError: no such topology, no libtpu, or another process holds it.
  """
  name, _, shape = topology.partition(":")
  if name not in CHIPS or not re.fullmatch(r"\d+(x\d+)+", shape):
    raise ConfigError(
      f"--topology={topology!r}: give a chip of {tuple(CHIPS)} and the shape of a "
      "slice, such as v5e:16x16, v5p:4x4x4 or v6e:8x8"
    )
  if importlib.util.find_spec("libtpu") is None:
    raise ConfigError(
      'rlft plan needs the TPU compiler, libtpu: pip install "rlft[plan]"'
    )
  # libtpu would ask the cloud's metadata server where it runs, and log that it failed.
  quiet = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "2",
  }
  for key, value in quiet.items():
    os.environ.setdefault(key, value)
  from jax.experimental import topologies

  more = {"num_slices": slices} if slices > 1 else {}
  try:
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **more)
  except Exception as error:
    text = str(error)
    if "lockfile" in text or "already in use" in text or "in use by" in text:
      raise ConfigError(
        "libtpu is held by another process, and one at a time may use it: wait for "
        f"the other `rlft plan`, or see what it says: {text:.300}"
      ) from error
    raise ConfigError(f"--topology={topology!r} is refused: {text:.300}") from error
  return Target(topology, slices, CHIPS[name], found.devices)


def compile_plan(
  settings: planning.Run,
  target: Target,
  prompt: int,
  only: Sequence[str] = (),
  cache: Path | None = None,
  hlo_dir: Path | None = None,
  on_program: OnProgram | None = None,
) -> Report:
  """Compiles every program of a run.

  Args:
    settings: of the run.
    target: what for.
    prompt: the longest prompt, tokens.
    only: names of programs; all of them when empty.
    cache: directory of compiled programs, to read and to write.
    hlo_dir: where the optimized HLO texts go.
    on_program: called after each.

  Raises:
    ConfigError: before anything is compiled.
  """
  sizes = settings.mesh
  weights = runs.weight_count(planning.architecture(settings.model))
  trained = getattr(settings, "trained", 1)
  fsdp = runs.shards_needed(sizes, weights, trained, target.devices, target.chip.hbm)
  mesh = make_mesh(sizes.data, fsdp, sizes.tensor, target.devices)
  plan = planning.make_plan(settings, mesh, prompt)
  names = [program.name for program in plan.programs]
  for name in only:
    if name not in names:
      raise ConfigError(f"--programs: there is no {name!r}; there are {names}")
  chosen = [p for p in plan.programs if not only or p.name in only]
  measured = []
  for program in chosen:
    one, cached = _measure(program, plan, target, mesh, cache, hlo_dir)
    measured.append(one)
    if on_program is not None:
      on_program(one.name, one.compile_seconds, cached)
  return Report(
    mesh=dict(mesh.shape),
    settings=planning.knobs(settings, plan, mesh),
    residents=plan.residents,
    programs=tuple(measured),
    available=target.chip.hbm,
    tokens=plan.tokens,
    complete=len(chosen) == len(names),
  )


def _measure(
  program: Program, plan: planning.Plan, target: Target, mesh, cache, hlo_dir
) -> tuple[Measured, bool]:
  lowered = program.lower()
  found, cached = _compiled(lowered, target, mesh, cache)
  others = sum(b for name, b in plan.residents.items() if name not in program.holds)
  base = Measured(
    program.name,
    program.phase,
    program.runs,
    program.turns,
    others=others,
    model_flops=program.model_flops * program.turns,
    compile_seconds=found["seconds"],
  )
  if "text" not in found:
    return dataclasses.replace(base, needs=found["needs"]), cached
  if hlo_dir is not None:
    hlo_dir.mkdir(parents=True, exist_ok=True)
    file = hlo_dir / f"{program.name.replace(' ', '_')}.txt"
    file.write_text(found["text"])
  cost = costs.count(found["text"], dict(mesh.shape))
  total = cost.total(program.turns)
  bounds = roofline(target.chip, total, dict(mesh.shape), target.slices)
  turn = None
  if cost.turn is not None:
    each = cost.turn.total()
    turn = each.flops, each.hbm_bytes, sum(each.collectives.values())
  return dataclasses.replace(
    base,
    **{name: float(found[name]) for name in _STATS},
    flops=total.flops,
    vector_flops=total.vector_flops,
    hbm_bytes=total.hbm_bytes,
    per_turn=turn,
    collectives=tuple((*key, x) for key, x in sorted(total.collectives.items())),
    kernels=tuple(sorted(total.kernels)),
    compute=bounds.compute,
    hbm=bounds.hbm,
    network=bounds.network,
  ), cached


_STATS = {
  "arguments": "argument_size_in_bytes",
  "temporaries": "temp_size_in_bytes",
  "output": "output_size_in_bytes",
  "aliased": "alias_size_in_bytes",
}
_NEEDS = re.compile(r"Used ([\d.]+)([KMG]) of|required[^(]*\(([\d.]+)([KMG])\)")


def _compiled(lowered: Any, target: Target, mesh, cache: Path | None):
  """({memory statistics, "text", "seconds"}, whether the cache had it).

  jax's own cache cannot read back what was compiled without a device, so the text is
  kept, under a hash of all that it depends on.
  """
  path = None
  if cache is not None:
    versions = [importlib.metadata.version(x) for x in ("jax", "jaxlib", "libtpu")]
    flags = [os.environ.get(x, "") for x in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    places = [(device.id, device.process_index) for device in mesh.devices.flat]
    parts = [target.topology, str(target.slices), str(dict(mesh.shape)), str(places)]
    text = "\n".join([*versions, *flags, *parts, lowered.as_text()])
    path = cache / f"{hashlib.sha256(text.encode()).hexdigest()}.json.gz"
    if path.is_file():
      try:
        return json.loads(gzip.decompress(path.read_bytes())), True
      except (OSError, ValueError, EOFError):
        path.unlink()  # damaged: made again
  began = time.perf_counter()
  found: dict[str, Any] = {}
  dump = tempfile.TemporaryDirectory(prefix="rlft_plan_")
  try:
    compiled = lowered.compile(
      compiler_options={"xla_dump_to": dump.name, "xla_dump_hlo_as_text": True}
    )
  except jax.errors.JaxRuntimeError as error:
    sizes = _NEEDS.search(str(error))
    if "RESOURCE_EXHAUSTED" not in str(error) or not sizes:
      raise
    number, unit = [x for x in sizes.groups() if x]
    found["needs"] = float(number) * {"K": 2**10, "M": 2**20, "G": GIB}[unit]
  else:
    stats = compiled.memory_analysis()
    found |= {name: getattr(stats, field) for name, field in _STATS.items()}
    # As the compiler wrote it: `compiled.as_text()` of jaxlib 0.10.2 cannot read what
    # libtpu 0.0.52 gives for a chip with sparse cores.
    (file,) = Path(dump.name).glob("*.after_optimizations.txt")
    found["text"] = file.read_text()
  finally:
    dump.cleanup()
  found["seconds"] = time.perf_counter() - began
  if path is not None:
    cache.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_bytes(gzip.compress(json.dumps(found).encode(), 3))
    part.replace(path)
  return found, False

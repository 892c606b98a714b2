"""What `rlft plan` prints: tables, one verdict, and the knob to turn."""

from __future__ import annotations

import sys
from collections import defaultdict

from rlft.cli import show
from rlft.cli.compiling import Measured, Report, Target
from rlft.cli.estimates import GIB

PHASES = ("rollout", "score", "update")


def on_program(name: str, seconds: float, cached: bool) -> None:
  """Progress, to stderr."""
  how = "from the cache, took" if cached else "compiled in"
  print(f"{name}: {how} {seconds:.1f} s", file=sys.stderr, flush=True)


def print_report(report: Report, target: Target) -> None:
  """Everything of a compiled plan."""
  print(head(report, target))
  gib = lambda x: x / GIB
  show.table(
    "stays on a chip (GiB)",
    ["what", "GiB"],
    [
      *((name, gib(x)) for name, x in report.residents.items()),
      ("together", gib(sum(report.residents.values()))),
    ],
  )
  show.table(
    f"memory of a chip (GiB), of {gib(report.available):.2f}",
    ["program", "arguments", "temporaries", "output", "aliased", "others", "peak"],
    [
      [one.name, None, None, None, None, gib(one.others), gib(one.peak)]
      if one.needs
      else [one.name]
      + [gib(getattr(one, x)) for x in ("arguments", "temporaries", "output")]
      + [gib(one.aliased), gib(one.others), gib(one.peak)]
      for one in report.programs
    ],
  )
  chips = len(target.devices)
  done = [one for one in report.programs if not one.needs]
  show.table(
    "work of a chip, one run",
    ["program", "runs", "TFLOP", "by hand", "compiled/hand", "HBM GB", "sent GB"]
    + ["compute s", "HBM s", "network s", "bound by", "compile s"],
    [
      [
        one.name,
        one.runs,
        one.flops / 1e12,
        one.model_flops / chips / 1e12,
        one.flops / (one.model_flops / chips) if one.model_flops else None,
        one.hbm_bytes / 1e9,
        sum(x for _, _, x in one.collectives) / 1e9,
        one.compute,
        one.hbm,
        one.network,
        one.bound,
        f"{one.compile_seconds:.1f}",
      ]
      for one in done
    ],
  )
  for one in done:
    if one.per_turn is not None:
      flops, hbm, sent = one.per_turn
      print(
        f"{one.name}, a token of each row: {flops / 1e9:.2f} GFLOP, {hbm / 1e9:.3f} GB "
        f"of HBM, {sent / 1e6:.2f} MB sent; its run is {one.turns} tokens"
      )
    if one.kernels:
      print(f"{one.name}: kernels {one.kernels}, whose work is not counted")
  _print_collectives(done)
  if report.complete and not any(one.needs for one in report.programs):
    _print_phases(report)
  if report.complete:
    print(verdict(report))


def head(report: Report, target: Target) -> str:
  """What was compiled, in a line."""
  mesh = " x ".join(f"{axis} {size}" for axis, size in report.mesh.items())
  knobs = ", ".join(f"{name}={value}" for name, value in report.settings.items())
  slices = f"{target.slices} slices of " if target.slices > 1 else ""
  return f"{slices}{target.topology}, {len(target.devices)} chips: {mesh}; {knobs}"


def _print_collectives(programs: list[Measured], least: float = 1e6) -> None:
  """Bytes sent by kind and axis; those below `least` together."""
  rows = []
  for one in programs:
    small = 0.0
    for kind, axis, sent in one.collectives:
      if sent >= least:
        rows.append([one.name, kind, axis, sent / 1e6])
      else:
        small += sent
    if small:
      rows.append([one.name, "smaller ones", "", small / 1e6])
  show.table(
    "sent by a chip, one run (MB)", ["program", "collective", "axis", "MB"], rows
  )


def _print_phases(report: Report) -> None:
  rows = []
  for phase in PHASES:
    own = [one for one in report.programs if one.phase == phase]
    if own:
      rows.append([phase, *_phase(own)])
  rows.append(["iteration", *_phase(list(report.programs))])
  show.table(
    "an iteration, at least (roofline)",
    ["phase", "seconds", "bound by", "of the FLOPs' peak"],
    rows,
  )
  print(
    f"{report.tokens:,} tokens an iteration: at most "
    f"{report.tokens / report.seconds:,.0f} a second"
  )


def _phase(programs: list[Measured]) -> list:
  seconds = sum(one.seconds for one in programs)
  by: dict[str, float] = defaultdict(float)
  for one in programs:
    by[one.bound] += one.seconds
  busy = sum(one.runs * one.compute for one in programs)
  return [seconds, max(by, key=by.get), f"{busy / seconds:.0%}"]


def verdict(report: Report) -> str:
  """Fits or not, by how much, and which knob to turn."""
  worst = report.worst
  spare = (report.available - worst.peak) / GIB
  where = (
    f"{worst.name} needs {worst.peak / GIB:.2f} of {report.available / GIB:.2f} GiB"
  )
  if spare >= 0:
    return f"verdict: FITS with {spare:.2f} GiB a chip to spare ({where})"
  return (
    f"verdict: DOES NOT FIT, by {-spare:.2f} GiB a chip ({where}); {advice(report)}"
  )


def advice(report: Report) -> str:
  """The knob for what is largest where the most memory is needed."""
  worst, mesh, set_ = report.worst, report.mesh, report.settings
  residents = dict(report.residents)
  copy = residents.pop("rollout copy", 0.0)
  together = sum(residents.values())
  # What the program itself adds to what stays.
  own = worst.peak - together - copy
  sharded = "mesh.fsdp up (mesh.data down)"
  if mesh["data"] == 1:
    sharded = "more chips: mesh.data is 1, all of them share the parameters already"
  parts = {"models": together, "copy": copy, "own": own}
  largest = max(parts, key=parts.get)
  if largest == "models":
    return f"the models take {together / GIB:.2f} GiB: turn {sharded}"
  if largest == "copy":
    return (
      f"the rollout's copy of the policy takes {copy / GIB:.2f} GiB, shared by "
      f"mesh.tensor={mesh['tensor']} chips: turn mesh.tensor up"
    )
  if worst.phase == "rollout":
    return (
      f"keys and values of the rows in flight and the program take {own / GIB:.2f} "
      f"GiB: turn max_rows={set_['max_rows']} down, or mesh.tensor up"
    )
  if worst.phase == "score":
    return (
      f"a block of rows takes {own / GIB:.2f} GiB: turn "
      f"max_tokens={set_['max_tokens']} down"
    )
  knob = f"micro_batches={set_['micro_batches']} up"
  if set_["remat"] != "full":
    knob = f"remat={set_['remat']} to full, or {knob}"
  return f"the step itself takes {own / GIB:.2f} GiB: turn {knob}, or {sharded}"


def print_search(found: list, target: Target) -> None:
  """The candidates of a search, fitting ones first, best first."""
  rows = []
  for one in found:
    report = one.report
    mesh = "x".join(str(size) for size in one.mesh)
    rows.append(
      [
        f"{mesh} micro_batches={one.micro_batches} remat={one.remat}",
        one.bytes / GIB,
        one.seconds,
        None if report is None else report.worst.peak / GIB,
        None if report is None or report.worst.needs else report.seconds,
        "-" if report is None else "fits" if report.fits else "DOES NOT FIT",
      ]
    )
  show.table(
    f"{target.topology}: data x fsdp x tensor; estimates, then what was compiled",
    ["candidate", "est. GiB", "est. s", "GiB", "s", ""],
    rows,
  )
  best = next((one for one in found if one.report and one.report.fits), None)
  if best is None:
    print("verdict: none of them fits; the best one's knobs:")
    worst = next((one.report for one in found if one.report), None)
    if worst is not None:
      print(verdict(worst))
    return
  print(head(best.report, target))
  print(verdict(best.report))
  data, fsdp, tensor = best.mesh
  print(
    f"--config.mesh.data={data} --config.mesh.fsdp={fsdp} "
    f"--config.mesh.tensor={tensor} --config.{best.method}.micro_batches="
    f"{best.micro_batches} --config.{best.method}.remat={best.remat}"
  )

"""Compiles an algorithm for TPUs that are not there, and says whether it fits.

  rlft plan --config=configs/plan_7b_ppo.py --topology=v5e:16x16
  rlft plan --config=configs/plan_7b_ppo.py --topology=v5p:4x4x4 --search
  rlft plan --config=configs/arithmetic_grpo.py --topology=v6e:4x4 --slices=2

Every program of an iteration, of the config's algorithm (ppo, grpo or sft) with all its
models, is lowered and compiled by the real TPU compiler (`pip install "rlft[plan]"`);
no weights are made and no TPU is needed. Bytes are of one chip, FLOPs are counted from
the compiled program with the lengths of its loops, and times are rooflines: lower
bounds from the chip's peaks, not measurements.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from rlft.cli import config as configs
from rlft.core.errors import ConfigError

SUMMARY = "does a run fit a TPU pod, and what bounds it; compiled without a TPU"
GROUP = "look and plan"
KEEP_COMPILED = False  # a plan keeps its own, see `--cache`


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "--config",
    metavar="FILE[:ARG]",
    required=True,
    help="config of ppo, grpo or sft; any field can be set by --config.FIELD=VALUE",
  )
  parser.add_argument(
    "--topology",
    required=True,
    metavar="CHIP:SHAPE",
    help="v5e, v5p or v6e and the shape of a slice: v5e:16x16, v5p:4x4x4, v6e:8x8",
  )
  parser.add_argument("--slices", type=int, default=1, help="slices of that shape")
  parser.add_argument(
    "--prompt_tokens",
    type=int,
    default=512,
    help="the longest prompt (default: %(default)s)",
  )
  parser.add_argument(
    "--programs",
    default="",
    metavar="NAME,...",
    help='only these, such as "decode,policy step"; then no verdict is given',
  )
  parser.add_argument(
    "--search",
    action="store_true",
    help="rank meshes, micro_batches and remat by an estimate, and compile the best",
  )
  parser.add_argument(
    "--compile",
    type=int,
    default=4,
    metavar="N",
    help="how many that --search compiles (default: %(default)s)",
  )
  parser.add_argument("--json", metavar="FILE", help="writes every number there too")
  parser.add_argument("--hlo", metavar="DIR", help="writes the compiled programs there")
  parser.add_argument(
    "--cache",
    metavar="DIR",
    default=str(Path.home() / ".cache" / "rlft" / "plan"),
    help='compiled programs are kept there; "" is off (default: %(default)s)',
  )


def run(args: argparse.Namespace) -> int:
  from rlft.cli import compiling, reports, searching

  for name in ("slices", "prompt_tokens", "compile"):
    if getattr(args, name) < 1:
      raise ConfigError(f"--{name}={getattr(args, name)}: at least 1")
  settings = _settings(args)
  target = compiling.target(args.topology, args.slices)
  cache = Path(args.cache).expanduser() if args.cache else None
  hlo = Path(args.hlo).expanduser() if args.hlo else None
  if args.search:
    found = searching.search(
      settings, target, args.prompt_tokens, args.compile, cache, reports.on_program
    )
    reports.print_search(found, target)
    result: Any = [
      dataclasses.asdict(one) | _verdict(one.report) for one in found if one.report
    ]
    fits = any(one.report is not None and one.report.fits for one in found)
  else:
    only = tuple(name.strip() for name in args.programs.split(",") if name.strip())
    report = compiling.compile_plan(
      settings, target, args.prompt_tokens, only, cache, hlo, reports.on_program
    )
    reports.print_report(report, target)
    result = dataclasses.asdict(report) | _verdict(report)
    fits = report.fits or bool(only)
  if args.json:
    from rlft.cli.runs import write_json

    print("json:", write_json(Path(args.json), result))
  return 0 if fits else 1


def _verdict(report: Any) -> dict[str, Any]:
  from rlft.cli import reports

  if not report.complete:
    return {}
  return {"fits": report.fits, "verdict": reports.verdict(report)}


def _settings(args: argparse.Namespace) -> Any:
  """The config as the dataclass of its command: ppo, grpo or sft."""
  from rlft.cli.planning import RUNS

  config = configs.load(args.config)
  named = [name for name in RUNS if name in config]
  if len(named) != 1:
    raise ConfigError(
      f"--config={args.config} sets {named or 'none'} of {tuple(RUNS)}: a plan is of "
      "one of these algorithms"
    )
  cls = RUNS[named[0]]
  return configs.resolve(config, args.overrides, cls)

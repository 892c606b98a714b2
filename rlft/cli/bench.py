"""Measures how fast this machine samples and trains, and what bounds it.

  rlft bench sample                                  # shape S, random weights
  rlft bench sample --shape=shared                   # 8 samples of each prompt
  rlft bench sample --model=smollm2 --rows=32 --new=64
  rlft bench train --rows=32 --length=192 --json=bench.json
  rlft bench grpo                                    # 4 prompts x 8 samples
  rlft bench ppo --remat=full                        # value model, reference, one epoch
  rlft bench reward                                  # a reward model scoring rollouts

Every row runs to its full length. One call warms up (what it takes longer is the
compilation); the table has the median, the least and the most of the others. "bound" is
the time that the arithmetic or the memory traffic of the work would take alone, at the
speed that this machine reaches on one large matrix product and one large copy: a rough
floor.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rlft
from rlft.algorithms.sft import make_train_step
from rlft.cli import bench_rl, runs, show
from rlft.core import rng
from rlft.core.errors import ConfigError
from rlft.models.decoder import Decoder, DecoderConfig, init_params, param_shapes
from rlft.models.hub import Policy
from rlft.training.data import TrainBatch
from rlft.training.optimizer import OptimizerConfig
from rlft.training.step import init_state

SUMMARY = "measure sampling or training speed, and what bounds it"
GROUP = "look and plan"
KEEP_COMPILED = False  # compiling is measured too

# A small Llama: what all speeds in this project are quoted for.
MODEL_S = DecoderConfig(
  vocab_size=4096,
  width=256,
  layers=6,
  heads=4,
  kv_heads=4,
  head_dim=64,
  mlp_width=1024,
  max_positions=1024,
  tie_embeddings=False,
)
SHAPES = {
  "S": {"rows": 32, "samples": 1, "prompt": 64, "new": 128},
  "shared": {"rows": 64, "samples": 8, "prompt": 512, "new": 128},
}
_PARTS = "of an update; 0: as a run chooses (default: 0)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
  kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
  sample = kinds.add_parser("sample", help="rlft.generate, end to end")
  sample.add_argument("--shape", choices=SHAPES, default="S", help="of the defaults")
  sample.add_argument("--rows", type=int, help="prompts x samples")
  sample.add_argument("--samples", type=int, help="of each prompt")
  sample.add_argument("--prompt", type=int, help="tokens of a prompt")
  sample.add_argument("--new", type=int, help="tokens sampled by each row")
  train = kinds.add_parser("train", help="one supervised update")
  train.add_argument("--rows", type=int, default=32)
  train.add_argument("--length", type=int, default=192, help="tokens of a row")
  train.add_argument("--micro_batches", type=int, default=0, help=_PARTS)
  train.add_argument("--remat", choices=("none", "full", "dots"), default="none")
  rl = [
    kinds.add_parser(kind, help=text)
    for kind, text in (
      ("grpo", "one iteration of GRPO, by phase"),
      ("ppo", "one iteration of PPO, by phase"),
      ("reward", "a reward model scoring rollouts"),
    )
  ]
  for one in rl:
    one.add_argument("--rows", type=int, default=32, help="prompts x samples")
    one.add_argument("--samples", type=int, default=8, help="of each prompt")
    one.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    one.add_argument("--new", type=int, default=128, help="tokens sampled by each row")
    one.add_argument("--micro_batches", type=int, default=0, help=_PARTS)
    one.add_argument("--remat", choices=("none", "full", "dots"), default="none")
  for one in (sample, train, *rl):
    one.add_argument(
      "--model",
      default="S",
      help="S (random weights), mini, smollm2, a directory, hub id or GGUF file",
    )
    one.add_argument(
      "--dtype",
      choices=("float32", "bfloat16"),
      default="float32",
      help="of the computation",
    )
    one.add_argument("--repeats", type=int, default=5)
    one.add_argument("--json", type=Path, metavar="FILE", help="where all numbers go")


def run(args: argparse.Namespace) -> int:
  sizes = _sizes(args)
  if args.model == "S":
    model = Decoder(MODEL_S)
    params = init_params(model, rng.key(0, rng.Purpose.INIT))
    policy = Policy(model=model, params=params, tokenizer=None, config=MODEL_S)
  else:
    policy = runs.make_policy(runs.ModelConfig(path=args.model), runs.MeshConfig())
    # Without an end of sequence every row runs to its full length.
    policy = dataclasses.replace(policy, tokenizer=None, eos_ids=())
  by_phase = None
  if args.kind in ("grpo", "ppo"):
    tokens, flops, traffic = _iteration_work(policy, sizes, args.kind)
    found = bench_rl.iterations(policy, args.kind, sizes, args)
    by_phase = bench_rl.phases(found)
    each = [
      sum(one[f"time/{p}"] for p in by_phase if f"time/{p}" in one) for one in found
    ]
    first, seconds = each[0], each[1:]
  else:
    measure = {"sample": _sample, "train": _train, "reward": _reward}[args.kind]
    tokens, call, flops, traffic = measure(policy, sizes, args)
    first, *seconds = [_seconds(call, i) for i in range(args.repeats + 1)]
  median = statistics.median(seconds)
  memory, memory_of = _peak_memory()
  peak_flops, peak_bytes = _ceilings(args.dtype)
  floors = {"arithmetic": flops / peak_flops, "memory": traffic / peak_bytes}
  bound = max(floors, key=floors.get)
  device = jax.devices()[0]
  result = {
    "kind": args.kind,
    "model": args.model,
    "parameters": _count(policy.model),
    "dtype": args.dtype,
    **sizes,
    "tokens": tokens,
    "tokens_per_second": {
      "median": tokens / median,
      "min": tokens / max(seconds),
      "max": tokens / min(seconds),
    },
    "seconds": seconds,
    "compile_seconds": max(0.0, first - median),
    **({"phases": by_phase} if by_phase else {}),
    "peak_memory_bytes": memory,
    "peak_memory_of": memory_of,
    "gflops_per_second": flops / median / 1e9,
    "gigabytes_per_second": traffic / median / 1e9,
    "machine_gflops_per_second": peak_flops / 1e9,
    "machine_gigabytes_per_second": peak_bytes / 1e9,
    "bound": bound,
    "bound_share": floors[bound] / median,
    "device": device.device_kind,
    "devices": jax.device_count(),
    "cores": os.cpu_count(),
    "load": os.getloadavg()[0],
    "jax": jax.__version__,
  }
  _show(result, sizes)
  if by_phase:
    bench_rl.show_phases(by_phase)
  if args.json:
    runs.write_json(args.json, result)
  return 0


def _seconds(call: Callable[[int], Any], step: int) -> float:
  began = time.perf_counter()
  call(step)
  return time.perf_counter() - began


def _sizes(args: argparse.Namespace) -> dict[str, int]:
  """The shape: a preset's, where the command line does not say otherwise."""
  if args.kind == "train":
    sizes = {
      "rows": args.rows, "length": args.length, "micro_batches": args.micro_batches
    }  # fmt: skip
  elif args.kind != "sample":
    names = ("rows", "samples", "prompt", "new", "micro_batches")
    sizes = {name: getattr(args, name) for name in names}
  else:
    preset = SHAPES[args.shape]
    given = {name: getattr(args, name) for name in preset}
    sizes = {n: preset[n] if x is None else x for n, x in given.items()}
  for name, value in (*sizes.items(), ("repeats", args.repeats)):
    least = int(name != "micro_batches")  # 0 chooses
    if value < least:
      raise ConfigError(f"--{name}={value}: at least {least}")
  for part in ("samples", "micro_batches"):
    if sizes["rows"] % max(1, sizes.get(part, 1)):
      raise ConfigError(f"--rows={sizes['rows']} must be a multiple of --{part}")
  return sizes


def _sample(policy: Policy, sizes: dict[str, int], args: argparse.Namespace):
  """(tokens, call, floating-point operations, bytes moved) of sampling."""
  rows, samples, prompt, new = (
    sizes[name] for name in ("rows", "samples", "prompt", "new")
  )
  config, prompts = policy.config, rows // samples
  ids = np.random.default_rng(0).integers(0, config.vocab_size, (prompts, prompt))
  prompt_ids = ids.tolist()

  def call(step: int) -> None:
    rollout = rlft.generate(
      policy,
      prompt_ids,
      samples=samples,
      max_new_tokens=new,
      step=step,
      max_rows=rows,
      dtype=args.dtype,
    )
    assert int(rollout.lengths.sum()) == rows * new

  flops, traffic = _sampling_work(policy, sizes, jnp.dtype(args.dtype).itemsize)
  return rows * new, call, flops, traffic


def _sampling_work(policy, sizes: dict[str, int], itemsize: int) -> tuple[float, float]:
  """(floating-point operations, bytes moved) of sampling."""
  rows, prompt, new = (sizes[name] for name in ("rows", "prompt", "new"))
  config, prompts = policy.config, rows // sizes["samples"]
  weights = _matrix_weights(policy.model)
  attention = 4 * config.layers * config.heads * config.head_dim  # per token attended
  key_values = 2 * config.layers * config.kv_heads * config.head_dim * itemsize
  flops = 2 * weights * (prompts * prompt + rows * new)
  flops += attention * (prompts * prompt * prompt / 2 + rows * new * (prompt + new / 2))
  traffic = new * (
    weights * itemsize + key_values * (prompts * prompt + rows * new / 2)
  )
  return flops, traffic


def _iteration_work(policy, sizes: dict[str, int], kind: str):
  """(tokens, floating-point operations, bytes moved) of an RL iteration: sampling, and
  an update of every model; PPO scores with a reference and a value model too.
  """
  flops, traffic = _sampling_work(policy, sizes, 4)
  forward = _forward_flops(policy, sizes["rows"], sizes["prompt"] + sizes["new"])
  passes = 3 if kind == "grpo" else 3 + 3 + 1 + 1
  updated = 1 if kind == "grpo" else 2
  return (
    sizes["rows"] * sizes["new"],
    flops + passes * forward,
    traffic + updated * 9 * 4 * _count(policy.model),
  )


def _forward_flops(policy, rows: int, length: int) -> float:
  config = policy.config
  attention = 4 * config.layers * config.heads * config.head_dim * length / 2
  return rows * length * (2 * _matrix_weights(policy.model) + attention)


def _reward(policy: Policy, sizes: dict[str, int], args: argparse.Namespace):
  """(tokens, call, floating-point operations, bytes moved) of scoring rollouts."""
  rows, length = sizes["rows"], sizes["prompt"] + sizes["new"]
  flops = _forward_flops(policy, rows, length)
  call = bench_rl.reward_call(policy, sizes, args)
  return rows * length, call, flops, 4 * _count(policy.model)


def _train(policy: Policy, sizes: dict[str, int], args: argparse.Namespace):
  """(tokens, call, floating-point operations, bytes moved) of one update."""
  rows, length = sizes["rows"], sizes["length"]
  config = policy.config
  model = policy.model.clone(dtype=jnp.dtype(args.dtype), remat=args.remat)
  optimizer = OptimizerConfig()
  step = make_train_step(model, optimizer, sizes["micro_batches"])
  ids = np.random.default_rng(0).integers(0, config.vocab_size, (rows, length))
  batch = TrainBatch(
    tokens=ids.astype(np.int32),
    mask=np.ones((rows, length), bool),
    weight=np.ones((rows, length), np.float32),
  )
  state = init_state(policy.params, optimizer, 1000)

  def call(_: int) -> None:
    nonlocal state
    state, metrics = step(state, batch)
    jax.block_until_ready(metrics)

  tokens = rows * length
  attention = 4 * config.layers * config.heads * config.head_dim * length / 2
  # Forward once, backward twice; remat's second forward is cost, not work.
  flops = 3 * tokens * (2 * _matrix_weights(model) + attention)
  # Weights are read forward and backward and gradients written; the update reads and
  # writes weights and both moments. Activations are left out.
  return tokens, call, flops, 9 * 4 * _count(model)


def _count(model: Decoder) -> int:
  return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(param_shapes(model)))


def _matrix_weights(model: Decoder) -> int:
  """Weights that take part in a matrix product for each token."""
  shapes = param_shapes(model)
  looked_up = ["position_embedding"]
  if not model.config.tie_embeddings:
    looked_up.append("embedding")
  rows = [shapes[name].shape for name in looked_up if name in shapes]
  return _count(model) - sum(int(np.prod(shape)) for shape in rows)


def _ceilings(dtype: str) -> tuple[float, float]:
  """Floating-point operations and bytes per second that this machine reaches."""
  small = jax.devices()[0].platform == "cpu"
  side, count = (1024, 1 << 25) if small else (8192, 1 << 28)
  square = jnp.ones((side, side), dtype)
  line = jnp.ones((count,), jnp.float32)
  product = jax.jit(lambda x: x @ x)
  # In place: a fresh result would measure how fast the system hands out pages.
  copy = jax.jit(lambda x: x + 1, donate_argnums=0)

  def touch():
    nonlocal line
    line = copy(line)
    return line

  return (
    2 * side**3 / _least_seconds(lambda: product(square)),
    8 * count / _least_seconds(touch),
  )


def _least_seconds(call: Callable[[], Any], repeats: int = 7) -> float:
  jax.block_until_ready(call())
  seconds = []
  for _ in range(repeats):
    began = time.perf_counter()
    jax.block_until_ready(call())
    seconds.append(time.perf_counter() - began)
  return min(seconds)


def _peak_memory() -> tuple[int, str]:
  """The most memory used so far, and whose."""
  stats = jax.local_devices()[0].memory_stats()
  if stats and "peak_bytes_in_use" in stats:
    return stats["peak_bytes_in_use"], "device 0"
  import resource

  unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "the process"


def _show(result: dict[str, Any], sizes: dict[str, int]) -> None:
  rate = result["tokens_per_second"]
  shape = ", ".join(f"{name} {value}" for name, value in sizes.items())
  reached = lambda unit: (
    f"{result[unit + '_per_second']:.1f} of {result[f'machine_{unit}_per_second']:.0f}"
  )
  show.table(
    f"{result['kind']}: {result['model']} ({result['parameters'] / 1e6:.1f} M "
    f"parameters, {result['dtype']}), {shape}",
    ["", "value"],
    [
      ["tokens/s", f"{rate['median']:.0f} ({rate['min']:.0f} to {rate['max']:.0f})"],
      ["compilation", f"{result['compile_seconds']:.1f} s"],
      [
        f"peak memory of {result['peak_memory_of']}",
        f"{result['peak_memory_bytes'] / 2**20:.0f} MiB",
      ],
      ["GFLOP/s, of the machine's", reached("gflops")],
      ["GB/s, of the machine's", reached("gigabytes")],
      ["bound", f"{result['bound']}, {result['bound_share']:.0%} of the time"],
      ["device", f"{result['devices']} x {result['device']}, {result['cores']} cores"],
      ["load", f"{result['load']:.1f}"],
    ],
  )

"""Samples completions of a prompt, to see what a model does.

rlft sample "Tom has 3 red pens and 4 blue pens. How many pens does Tom have?"
rlft sample --model=smollm2 --chat --samples=4 "Why is the sky blue?"
"""

from __future__ import annotations

import argparse
import sys

import rlft
from rlft.cli import runs
from rlft.cli.overrides import unescape
from rlft.core.errors import DataError

SUMMARY = "sample completions of a prompt"
GROUP = "sample and evaluate"


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("prompt", nargs="*", help="prompts; - reads one from stdin")
  parser.add_argument(
    "--model", default="mini", help="mini, smollm2, a directory, hub id or GGUF file"
  )
  parser.add_argument("--samples", type=int, default=2, help="of each prompt")
  parser.add_argument("--max_new_tokens", type=int, default=64)
  parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
  parser.add_argument("--top_p", type=float, default=1.0)
  parser.add_argument("--top_k", type=int, default=0)
  parser.add_argument("--min_p", type=float, default=0.0)
  parser.add_argument(
    "--stop",
    action="append",
    default=[],
    type=unescape,
    help=r"text that ends a completion, \n is a new line; may be repeated",
  )
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--chat", action="store_true", help="use the chat template")


def run(args: argparse.Namespace) -> int:
  prompts = [sys.stdin.read() if p == "-" else p for p in args.prompt]
  if not prompts:
    raise DataError('no prompt: rlft sample "Tom has 3 apples ..."')
  policy = runs.make_policy(runs.ModelConfig(path=args.model), runs.MeshConfig())
  rollout = rlft.generate(
    policy,
    prompts,
    chat=args.chat,
    samples=args.samples,
    max_new_tokens=args.max_new_tokens,
    temperature=args.temperature,
    top_p=args.top_p,
    top_k=args.top_k,
    min_p=args.min_p,
    stop=args.stop,
    seed=args.seed,
  )
  for i, prompt in enumerate(prompts):
    print(f"> {prompt.rstrip()}")
    for k in range(args.samples):
      row = i * args.samples + k
      chosen = rollout.completion_mask[row]
      per_token = rollout.raw_logp[row][chosen].mean()
      end = "" if rollout.finished[row] else " ... (cut by max_new_tokens)"
      print(f"[{per_token:.2f} nats/token] {rollout.completions[row].strip()}{end}")
  return 0

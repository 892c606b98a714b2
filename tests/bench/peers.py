"""Sampling speed of rlft beside its peers: `transformers` generate and Tunix's Sampler.

  python tests/bench/peers.py --transformers-python TORCH_ENV/bin/python \
    --tunix-python TUNIX_ENV/bin/python --json peers.json

Run by the interpreter that has rlft; each peer lives in an environment of its own
(torch and transformers; google-tunix), and one that is not given is left out. Each is
one process for the whole run. Rounds are interleaved (A B C A B C ...), so that what
else the machine does falls on all alike, and ratios are taken within a round. Yet on a
machine whose cores are taken, torch's threads wait for each other and it falls several
times behind: compare on cores that are free.

What is equal: the Llama architecture (gated SiLU, rotary positions, untied head) at the
same sizes, hence the same floating-point operations for a token; random float32
weights; the same prompts; every row runs to its full length (no end-of-sequence);
sampling at temperature 1 without filters; each library's own default for threads. What
is not: rlft records two log-probabilities for each token, which the peers are not asked
for; and only rlft keeps one copy of a prompt's cache for all of its samples:
transformers expands prompts by `num_return_sequences`, Tunix is given each K times.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIZES = {
  "vocab": 4096, "width": 256, "layers": 6, "heads": 4, "head": 64, "mlp": 1024,
}  # fmt: skip
SHAPES = {
  "S": {"prompts": 32, "samples": 1, "prompt": 64, "new": 128},
  "shared": {"prompts": 8, "samples": 8, "prompt": 512, "new": 128},
}
POSITIONS = 1024
# The goals: shape -> peer -> rlft's tokens/s over the peer's.
TARGETS = {
  "S": {"transformers": 1.5, "transformers-static": 1.2, "tunix": 1.6},
  "shared": {"transformers": 3.0, "transformers-static": 3.0, "tunix": 3.0},
}


# ------------------------------------------------------------------ the peers
#
# Each takes a shape and prompts (lists of token ids) and returns a function of the
# round's number that samples and returns how many tokens it chose. Their models are
# those of peers_rl.py too.


def rlft_policy():
  """The model of rlft, without a tokenizer."""
  sys.path.insert(0, str(Path(__file__).parents[2]))
  import rlft
  from rlft.core import platform

  platform.choose()
  import jax

  from rlft.models.decoder import Decoder, DecoderConfig, init_params

  config = DecoderConfig(
    vocab_size=SIZES["vocab"],
    width=SIZES["width"],
    layers=SIZES["layers"],
    heads=SIZES["heads"],
    kv_heads=SIZES["heads"],
    head_dim=SIZES["head"],
    mlp_width=SIZES["mlp"],
    max_positions=POSITIONS,
    tie_embeddings=False,
  )
  model = Decoder(config)
  params = init_params(model, jax.random.key(0))
  return rlft.Policy(model=model, params=params, tokenizer=None, config=config)


def _rlft(shape, prompts):
  policy = rlft_policy()
  import rlft

  def sample(number):
    rollout = rlft.generate(
      policy,
      prompts,
      samples=shape["samples"],
      max_new_tokens=shape["new"],
      temperature=1.0,
      step=number,
    )
    return int(rollout.lengths.sum())

  return sample


def torch_model():
  """The model of transformers."""
  import torch
  import transformers

  torch.manual_seed(0)
  config = transformers.LlamaConfig(
    vocab_size=SIZES["vocab"],
    hidden_size=SIZES["width"],
    num_hidden_layers=SIZES["layers"],
    num_attention_heads=SIZES["heads"],
    num_key_value_heads=SIZES["heads"],
    head_dim=SIZES["head"],
    intermediate_size=SIZES["mlp"],
    max_position_embeddings=POSITIONS,
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
  )
  return transformers.LlamaForCausalLM(config)


def _transformers(shape, prompts, static=False):
  import torch
  import transformers

  model = torch_model().eval()
  ids = torch.tensor(prompts)
  settings = {
    "do_sample": True,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "max_new_tokens": shape["new"],
    "num_return_sequences": shape["samples"],
    "eos_token_id": None,
    "pad_token_id": 0,
  }
  if static:
    # `generate` compiles the step by itself on accelerators; this asks for it on a CPU.
    compiled = transformers.CompileConfig(mode="default", fullgraph=True)
    compiled._compile_all_devices = True
    settings |= {"cache_implementation": "static", "compile_config": compiled}

  def sample(number):
    with torch.inference_mode():
      out = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    return (out.shape[1] - ids.shape[1]) * out.shape[0]

  return sample


def tunix_model():
  """The model of Tunix."""
  import jax
  import numpy as np
  from flax import nnx
  from tunix.models.llama3 import model as llama

  config = llama.ModelConfig(
    num_layers=SIZES["layers"],
    vocab_size=SIZES["vocab"],
    embed_dim=SIZES["width"],
    hidden_dim=SIZES["mlp"],
    num_heads=SIZES["heads"],
    head_dim=SIZES["head"],
    num_kv_heads=SIZES["heads"],
    rope_theta=10000,
    norm_eps=1e-6,
    weight_tying=False,
  )
  model = llama.Llama3(config, rngs=nnx.Rngs(0))
  # Its MLPs start at zero; random weights, as the others have.
  generator = np.random.default_rng(0)

  def weights(x):
    if x.ndim == 1:  # a norm's scale: 1
      return x
    return jax.numpy.asarray(0.02 * generator.standard_normal(x.shape), x.dtype)

  state = jax.tree.map(weights, nnx.state(model, nnx.Param))
  nnx.update(model, state)
  return model


class Tokenizer:
  """Tunix's: texts are token ids in decimal."""

  encode = staticmethod(lambda text: [int(word) for word in text.split()])
  decode = staticmethod(lambda ids: "")
  bos_id = staticmethod(lambda: None)
  eos_id = staticmethod(lambda: -1)
  pad_id = staticmethod(lambda: 0)


def _tunix(shape, prompts):
  from tunix.generate import sampler

  cache = sampler.CacheConfig(
    cache_size=shape["prompt"] + shape["new"],
    num_layers=SIZES["layers"],
    num_kv_heads=SIZES["heads"],
    head_dim=SIZES["head"],
  )
  run = sampler.Sampler(tunix_model(), Tokenizer(), cache)
  texts = [" ".join(map(str, ids)) for ids in prompts for _ in range(shape["samples"])]

  def sample(number):
    out = run(
      texts,
      max_generation_steps=shape["new"],
      max_prompt_length=shape["prompt"],
      eos_tokens=[-1],
      temperature=1.0,
      top_p=1.0,
      seed=number,
    )
    return sum(len(tokens) for tokens in out.tokens)

  return sample


PEERS = {
  "rlft": _rlft,
  "transformers": _transformers,
  "transformers-static": lambda *args: _transformers(*args, static=True),
  "tunix": _tunix,
}


def _versions(peer):
  from importlib import metadata

  names = {"rlft": ("jax",), "tunix": ("google-tunix", "jax")}
  return {n: metadata.version(n) for n in names.get(peer, ("transformers", "torch"))}


def peak_gb() -> float:
  """The most memory that this process has held."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # of KiB


def work(peer: str, shape_name: str) -> None:
  """One peer's process: answers each line of stdin with a line of JSON."""
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)  # what a library prints must not mix with the answers
  import random

  shape = SHAPES[shape_name]
  generator = random.Random(0)
  prompts = [
    [generator.randrange(3, SIZES["vocab"]) for _ in range(shape["prompt"])]
    for _ in range(shape["prompts"])
  ]
  sample = PEERS[peer](shape, prompts)
  for number, _ in enumerate(sys.stdin):
    began = time.perf_counter()
    tokens = sample(number)
    seconds = time.perf_counter() - began
    answer = {"tokens": int(tokens), "seconds": seconds, "versions": _versions(peer)}
    answer["peak_gb"] = peak_gb()
    print(json.dumps(answer), file=answers, flush=True)


# ------------------------------------------------------------------ the comparison


class Worker:
  """A peer's process: `command` answers each line of stdin with a line of JSON."""

  def __init__(self, peer: str, command: list[str]):
    self.name = peer
    # Not a pipe: nobody would empty it.
    self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
    environ = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    self.process = subprocess.Popen(
      command,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self.log,
      text=True,
      env=environ,
    )

  def ask(self) -> dict:
    with contextlib.suppress(BrokenPipeError):  # its last words follow
      self.process.stdin.write("go\n")
      self.process.stdin.flush()
    line = self.process.stdout.readline()
    if not line:
      self.process.wait()
      self.log.seek(0)
      raise RuntimeError(f"{self.name} died:\n{self.log.read()[-3000:]}")
    answer = json.loads(line)
    rate = answer["tokens"] / answer["seconds"]
    print(f"{self.name} {rate:.0f} tokens/s", file=sys.stderr, flush=True)
    return answer

  def close(self) -> None:
    with contextlib.suppress(BrokenPipeError):  # it died: `ask` has said so
      self.process.stdin.close()
    self.process.wait()
    self.log.close()


def compare(
  shape: dict, commands: dict[str, list[str]], rounds: int, targets: dict[str, float]
) -> dict:
  """Asks each peer in turn, `rounds` times; medians, and ratios to rlft."""
  expected = shape["prompts"] * shape["samples"] * shape["new"]
  workers = {peer: Worker(peer, command) for peer, command in commands.items()}
  first, rates, last, loads = {}, {p: [] for p in workers}, {}, []
  try:
    for peer, worker in workers.items():  # one at a time: they compile
      first[peer] = worker.ask()["seconds"]
      worker.ask()
    for _ in range(rounds):
      loads.append(os.getloadavg()[0])
      for peer, worker in workers.items():
        answer = worker.ask()
        if answer["tokens"] != expected:
          raise RuntimeError(
            f"{peer} sampled {answer['tokens']} tokens, not {expected}"
          )
        last[peer] = answer
        rates[peer].append(answer["tokens"] / answer["seconds"])
  finally:
    for worker in workers.values():
      worker.close()
  results = {}
  for peer in workers:
    ratios = [ours / theirs for ours, theirs in zip(rates["rlft"], rates[peer])]
    results[peer] = {
      "tokens_per_second": statistics.median(rates[peer]),
      "min": min(rates[peer]),
      "max": max(rates[peer]),
      "first_call_seconds": first[peer],
      "rlft_is_faster_by": statistics.median(ratios),
      "ratio_min": min(ratios),
      "ratio_max": max(ratios),
      "target": targets.get(peer),
      "peak_gb": last[peer]["peak_gb"],
      "all": rates[peer],
      "versions": last[peer]["versions"],
    }
  return {"shape": shape, "rounds": rounds, "load": loads, "peers": results}


def markdown(name: str, result: dict) -> str:
  """The comparison as a Markdown table."""
  shape, load = result["shape"], result["load"]
  lines = [
    f"Shape {name}: {shape['prompts']} prompts x {shape['samples']} samples, "
    f"{shape['prompt']} prompt tokens, {shape['new']} new; {result['rounds']} rounds, "
    f"{os.cpu_count()} cores, load {min(load):.1f} to {max(load):.1f}.",
    "",
    "| | tokens/s, median (min to max) | rlft / it (min to max) | target | first | "
    "peak memory |",
    "|---|---|---|---|---|---|",
  ]
  for peer, r in result["peers"].items():
    versions = ", ".join(f"{n} {v}" for n, v in r["versions"].items())
    ratio = (
      f"{r['rlft_is_faster_by']:.2f} ({r['ratio_min']:.2f} to {r['ratio_max']:.2f})"
    )
    target = f">= {r['target']}" if r["target"] else ""
    lines.append(
      f"| {peer} ({versions}) | {r['tokens_per_second']:.0f} ({r['min']:.0f} to "
      f"{r['max']:.0f}) | {ratio if peer != 'rlft' else ''} | {target} | "
      f"{r['first_call_seconds']:.1f} s | {r['peak_gb']:.2f} GB |"
    )
  return "\n".join(lines) + "\n"


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--transformers-python", help="has torch and transformers")
  parser.add_argument("--tunix-python", help="has google-tunix")
  parser.add_argument("--shape", choices=SHAPES, action="append", help="default: all")
  parser.add_argument("--rounds", type=int, default=7)
  parser.add_argument("--json", type=Path, help="where all numbers go")
  parser.add_argument("--worker", choices=PEERS, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.worker:
    return work(args.worker, args.shape[0])
  pythons = {"rlft": sys.executable}
  if args.transformers_python:
    pythons["transformers"] = args.transformers_python
    pythons["transformers-static"] = args.transformers_python
  if args.tunix_python:
    pythons["tunix"] = args.tunix_python
  results = {}
  for name in args.shape or SHAPES:
    commands = {
      peer: [python, __file__, "--worker", peer, "--shape", name]
      for peer, python in pythons.items()
    }
    results[name] = compare(SHAPES[name], commands, args.rounds, TARGETS[name])
    print(markdown(name, results[name]), flush=True)
  if args.json:
    args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
  main()

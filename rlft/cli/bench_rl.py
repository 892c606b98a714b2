"""`rlft bench ppo | grpo | reward`: an iteration of RL, split into its phases."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

import jax.numpy as jnp
import numpy as np

from rlft.algorithms import grpo, ppo
from rlft.cli import show
from rlft.core.types import Example, Reward
from rlft.models.hub import Policy
from rlft.models.scalar import init_scalar
from rlft.rewards.learned import final_values
from rlft.training.optimizer import OptimizerConfig

PHASES = ("rollout", "reward", "score", "advantages", "update", "idle")


def iterations(
  policy: Policy, kind: str, sizes: dict[str, int], args: Any
) -> list[dict[str, float]]:
  """Metrics of `repeats + 1` iterations of PPO or GRPO; the first one compiles.

  Prompts are random words; every row runs to its full length; rewards are random. PPO
  has a separate value model, a reference and one epoch; GRPO no reference.
  """
  rows, samples = sizes["rows"], sizes["samples"]
  policy = worded(policy)
  source = np.random.default_rng(0)
  words = policy.tokenizer.convert_ids_to_tokens(range(policy.config.vocab_size))
  examples = [
    Example(i, " ".join(source.choice(words, sizes["prompt"])), "", "")
    for i in range((args.repeats + 1) * rows // samples)
  ]
  shared = {
    "iterations": args.repeats + 1,
    "prompts_per_iteration": rows // samples,
    "samples_per_prompt": samples,
    "max_new_tokens": sizes["new"],
    "micro_batches": sizes["micro_batches"],
    "compute_dtype": args.dtype,
    "remat": args.remat,
    "max_rows": rows,
    "optimizer": OptimizerConfig(learning_rate=1e-6, eps=1e-5),
  }
  # No row ends before the limit, and all of them train.
  if kind == "grpo":
    config = grpo.preset("dr_grpo", mask_truncated=False, **shared)
    return grpo.run(policy, examples, _random_reward, config).iterations
  config = ppo.PPOConfig(epochs=1, minibatches=1, truncated="score", **shared)
  return ppo.run(policy, examples, _random_reward, config).iterations


def worded(policy: Policy) -> Policy:
  """The policy with a word for every token id, and without an end of sequence."""
  import tokenizers
  from transformers import PreTrainedTokenizerFast

  vocab = {f"w{i}": i for i in range(policy.config.vocab_size)}
  core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w0"))
  core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
  return dataclasses.replace(policy, tokenizer=tokenizer, eos_ids=(-1,))


def _random_reward(rollout, examples) -> Reward:
  rows = len(rollout.finished)
  value = np.random.default_rng(0).normal(size=rows).astype(np.float32)
  return Reward(value=value, judged=np.ones(rows, bool))


def phases(found: list[dict[str, float]]) -> dict[str, float]:
  """Median seconds of each phase, over the iterations after the first."""
  return {
    name: statistics.median(one.get(f"time/{name}", 0.0) for one in found[1:])
    for name in PHASES
  }


def show_phases(seconds: dict[str, float]) -> None:
  """Prints where an iteration's time goes."""
  total = sum(seconds.values())
  show.table(
    "one iteration, medians",
    ["phase", "seconds", "share"],
    [[name, x, x / total] for name, x in seconds.items() if x > 0],
  )


def reward_call(policy: Policy, sizes: dict[str, int], args: Any):
  """A call that scores rows with a reward model of the policy's size."""
  scalar = init_scalar(policy)
  model = scalar.model.clone(dtype=jnp.dtype(args.dtype))
  scalar = dataclasses.replace(scalar, model=model)
  shape = sizes["rows"], sizes["prompt"] + sizes["new"]
  tokens = np.random.default_rng(0).integers(0, policy.config.vocab_size, shape)
  mask = np.ones(shape, bool)
  return lambda step: final_values(scalar, tokens.astype(np.int32), mask)

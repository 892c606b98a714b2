"""Long runs of tiny steps hold nothing: memory, files, threads, arrays, programs."""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlft.algorithms import grpo, ppo
from rlft.core.types import Example, Reward
from rlft.models.decoder import Decoder, DecoderConfig, init_params
from rlft.models.hub import Policy
from rlft.tasks import arithmetic
from rlft.tasks.tokenizer import word_tokenizer
from rlft.training import metrics
from rlft.training.checkpoint import Checkpointer
from rlft.training.divergence import Guard
from rlft.training.epochs import Order, fit
from rlft.training.optimizer import OptimizerConfig
from rlft.training.saving import Saving
from rlft.training.step import init_state, make_step

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]


def held():
  """What this process holds now."""
  gc.collect()
  pages = int(Path("/proc/self/statm").read_text().split()[1])
  return {
    "MiB": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
    "files": len(os.listdir("/proc/self/fd")),
    "threads": threading.active_count(),
    "arrays": len(jax.live_arrays()),
  }


def assert_flat(early, late, mib):
  print(early, late)
  assert late["arrays"] <= early["arrays"] + 2
  assert late["files"] <= early["files"] + 2
  assert late["threads"] <= early["threads"] + 2
  assert late["MiB"] <= early["MiB"] + mib


def test_two_thousand_updates(tmp_path):
  """C17: with a record, tensorboard, and a checkpoint in every 50 of them."""
  config, seen = OptimizerConfig(learning_rate=1e-3), {}
  loss = lambda params, batch: {
    "loss": (jnp.sum((batch["x"] @ params["w"]) ** 2), jnp.float32(8))
  }
  batch_of = lambda i: {"x": np.full((8, 16), i % 7, np.float32)}
  with metrics.MetricWriter(tmp_path) as writer, Checkpointer(tmp_path) as checkpoints:

    def on_step(update, of, found):
      writer.write(update, found)
      if update in (200, 1900):
        seen[update] = held()

    fit(
      make_step(loss, config),
      init_state({"w": jnp.ones((16, 16))}, config, 2000),
      lambda epoch, seen: map(batch_of, range(2000)),
      Order([1] * 2000, batch_size=1, seed=0),
      1,
      Guard(config),
      on_step=on_step,
      saving=Saving(checkpoints, every=50),
    )
  assert len(metrics.read(tmp_path)) == 2000
  assert_flat(seen[200], seen[1900], mib=32)


@pytest.fixture(scope="module")
def policy():
  tokenizer = word_tokenizer(arithmetic.words())
  config = DecoderConfig(
    vocab_size=len(tokenizer), width=16, layers=1, heads=2, kv_heads=2, head_dim=8,
    mlp_width=32, max_positions=128,
  )  # fmt: skip
  model = Decoder(config)
  params = init_params(model, jax.random.key(0))
  return Policy(model=model, params=params, tokenizer=tokenizer, config=config)


def pay(rollout, examples):
  value = (rollout.lengths % 3).astype(np.float32)
  return Reward(value=value, judged=np.ones(len(value), bool))


def settings(module, **changes):
  kind = {ppo: ppo.PPOConfig, grpo: grpo.GRPOConfig}[module]
  common = {
    "prompts_per_iteration": 2, "samples_per_prompt": 4, "epochs": 1, "minibatches": 1,
    "max_rows": 8, "max_new_tokens": 8, "old_logp": "recompute",
  }  # fmt: skip
  return kind(**common | changes)


def prompts(lengths):
  word = arithmetic.words()[0]
  return [Example(i, " ".join([word] * n), "", "") for i, n in enumerate(lengths)]


def test_two_hundred_iterations(policy, tmp_path):
  """C17, of PPO: samplers, scores, two models, rewards and checkpoints."""
  seen = {}
  with metrics.MetricWriter(tmp_path) as writer, Checkpointer(tmp_path) as checkpoints:

    def on_event(kind, values):
      if kind == "iteration":
        done = len(seen)
        seen[done] = held() if done in (50, 190) else None
        writer.write(done, values)

    ppo.run(
      policy,
      prompts([3] * 8),
      pay,
      settings(ppo, iterations=200),
      on_event=on_event,
      saving=Saving(checkpoints, every=20),
    )
  assert len(seen) == 200
  assert_flat(seen[50], seen[190], mib=48)


@pytest.mark.parametrize("module", [ppo, grpo])
def test_programs_are_as_many_as_buckets(module, policy, tmp_path):
  """C15: rows of any length; no program is compiled twice for one shape."""
  lengths = [1, 3, 5, 9, 14, 20, 27, 33, 40, 50, 60, 70, 80, 90, 99, 110]
  log = tmp_path / "compiles.jsonl"
  with metrics.compiles_logged(log):
    module.run(policy, prompts(lengths), pay, settings(module, iterations=20))
  lines = [json.loads(line) for line in log.read_text().splitlines()]
  steps = [line for line in lines if "train_step" in line["program"]]
  models = 2 if module is ppo else 1
  widths = 8  # of 16 to 128 columns, in buckets
  assert models <= len(steps) <= models * widths
  shapes = [(line["program"], line["arguments"], tuple(line["last"])) for line in steps]
  assert len(set(shapes)) == len(shapes)
  assert len(set(shapes)) > models  # lengths differ

"""Tiny policies: on the arithmetic task, and on tasks whose optimum is known."""

from __future__ import annotations

import dataclasses
import itertools
import types

import jax
import numpy as np
import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from rlft.core.mesh import make_mesh, tree_shardings
from rlft.core.types import Reward
from rlft.models.decoder import (
  Decoder,
  DecoderConfig,
  init_params,
  param_axes,
  param_shapes,
)
from rlft.models.hub import Policy
from rlft.sampling.score import score
from rlft.tasks import arithmetic
from rlft.tasks.tokenizer import word_tokenizer


@pytest.fixture(scope="package")
def policy() -> Policy:
  """Random weights: what it samples is noise."""
  tokenizer = word_tokenizer(arithmetic.words())
  config = DecoderConfig(
    vocab_size=len(tokenizer),
    width=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp_width=64,
    max_positions=128,
  )
  model = Decoder(config)
  params = init_params(model, jax.random.key(0))
  return Policy(model=model, params=params, tokenizer=tokenizer, config=config)


# ----------------------------------------------------- tasks whose optimum is known

EOS, A, B = 0, 1, 2


@pytest.fixture(scope="package")
def tiny() -> Policy:
  """Three tokens: end, a, b. Its distribution is far from uniform."""
  vocab = {"<eos>": EOS, "a": A, "b": B}
  core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="b"))
  core.pre_tokenizer = tokenizers.pre_tokenizers.Split(
    tokenizers.Regex("[ab]"), behavior="isolated"
  )
  tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
  config = DecoderConfig(
    vocab_size=3,
    width=16,
    layers=1,
    heads=2,
    kv_heads=2,
    head_dim=8,
    mlp_width=32,
    max_positions=16,
    tie_embeddings=False,
    positions="learned",  # with rotary ones "a" and "aa" are the same state
  )
  model = Decoder(config)
  params = init_params(model, jax.random.key(0))
  params["head"] = params["head"] * 10
  return Policy(model=model, params=params, tokenizer=tokenizer, config=config)


@pytest.fixture(scope="package")
def spread(tiny) -> Policy:
  """The same policy on a mesh of 2 x 2 x 2 devices."""
  mesh = make_mesh(2, 2, 2, devices=jax.devices()[:8])
  model = tiny.model.clone(mesh=mesh)
  layout = tree_shardings(mesh, param_axes(model), param_shapes(model))
  params = jax.device_put(tiny.params, layout)
  return dataclasses.replace(tiny, model=model, params=params)


@pytest.fixture(scope="package")
def toy() -> types.SimpleNamespace:
  """Rewards of sampled tokens, and exact distributions over completions."""
  return types.SimpleNamespace(
    paying=paying,
    probabilities=probabilities,
    optimum=optimum,
    total_variation=total_variation,
  )


def paying(worth):
  """A reward that looks at the sampled tokens: worth(tuple of ids) -> number."""

  def reward(rollout, examples):
    rows = [
      tuple(row[mask].tolist())
      for row, mask in zip(rollout.tokens, rollout.completion_mask)
    ]
    value = np.array([worth(ids) for ids in rows], np.float32)
    return Reward(value=value, judged=np.ones(len(value), bool))

  return reward


def sequences(length):
  """Every completion of at most `length` tokens: ended by EOS, or cut."""
  for n in range(1, length + 1):
    for body in itertools.product((A, B), repeat=n - 1):
      yield (*body, EOS)
  yield from itertools.product((A, B), repeat=length)


def probabilities(policy, length):
  """Of every completion of the prompt "a"."""
  every = list(sequences(length))
  tokens = np.zeros((len(every), 1 + length), np.int32)
  mask = np.zeros(tokens.shape, bool)
  for i, ids in enumerate(every):
    tokens[i, : 1 + len(ids)] = (A, *ids)
    mask[i, : 1 + len(ids)] = True
  p = np.exp(score(policy, tokens, mask).sum(1))
  assert abs(p.sum() - 1) < 1e-4
  return dict(zip(every, p))


def optimum(start, worth, beta):
  """pi* of a KL-regularised reward: pi_ref exp(r / beta) / Z."""
  p = {ids: q * np.exp(worth(ids) / beta) for ids, q in start.items()}
  return {ids: q / sum(p.values()) for ids, q in p.items()}


def total_variation(p, q):
  return 0.5 * sum(abs(p[ids] - q[ids]) for ids in p)

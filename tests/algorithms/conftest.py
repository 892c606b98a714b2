"""A tiny policy on the arithmetic task, and quick compilation."""

from __future__ import annotations

import jax
import pytest

from rlft.models.decoder import Decoder, DecoderConfig, init_params
from rlft.models.hub import Policy
from rlft.tasks import arithmetic
from rlft.tasks.tokenizer import word_tokenizer


@pytest.fixture(scope="package", autouse=True)
def _quick_compilation():
  """Tiny programs that run a few times: compiling them is nearly all of the time."""
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", before)


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

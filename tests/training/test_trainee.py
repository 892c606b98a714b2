"""What trains, and what is safe to hold while it does."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlft.models.decoder import Decoder, DecoderConfig, init_params
from rlft.models.hub import Policy
from rlft.models.lora import LoRAConfig
from rlft.sampling.score import token_logp
from rlft.training.optimizer import OptimizerConfig
from rlft.training.step import make_step
from rlft.training.trainee import Trainee

CONFIG = DecoderConfig(
  vocab_size=8, width=16, layers=1, heads=2, kv_heads=2, head_dim=8, mlp_width=16,
  max_positions=8,
)  # fmt: skip
RATE = OptimizerConfig(learning_rate=0.1)
LORA = LoRAConfig(rank=2, targets=("attention/q", "mlp/up"))


@pytest.fixture(scope="module")
def policy():
  model = Decoder(CONFIG)
  params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
  return Policy(model=model, params=params, tokenizer=None, config=CONFIG)


@pytest.fixture(scope="module")
def step():
  """Moves every parameter."""

  def loss(params, batch):
    total = sum(jnp.sum(jnp.sin(3 * x + 1)) for x in jax.tree.leaves(params))
    return {"loss": (total * batch[0, 0], jnp.float32(1))}

  return make_step(loss, RATE)


def update(trainee, step):
  trainee.state, _ = step(trainee.state, np.ones((1, 1), np.float32))


def copies(params):
  return [np.array(x) for x in jax.tree.leaves(params)]


def equal(params, arrays):
  return all(
    np.array_equal(x, y) for x, y in zip(jax.tree.leaves(params), arrays, strict=True)
  )


@pytest.mark.parametrize("lora", [None, LORA])
def test_what_was_given_and_what_was_exported_outlive_updates(policy, step, lora):
  before = copies(policy.params)
  trainee = Trainee(policy, RATE, 3, lora=lora)
  update(trainee, step)
  kept = trainee.export()
  then = copies(kept.params)
  assert not equal(kept.params, before)
  update(trainee, step)
  assert equal(kept.params, then)  # donated buffers would be gone
  assert not equal(trainee.merged().params, then)
  assert equal(policy.params, before) and equal(trainee.start.params, before)


def test_adapters_begin_as_nothing_and_merge_as_they_score(policy, step):
  trainee = Trainee(policy, RATE, 3, lora=LORA, seed=1)
  assert equal(trainee.merged().params, copies(policy.params))
  other = Trainee(policy, RATE, 3, lora=LORA, seed=2)
  assert not equal(trainee.adapted()[1], copies(other.adapted()[1]))
  update(trainee, step)
  tokens = np.arange(8, dtype=np.int32)[None]
  logp = lambda policy, lora=None: np.asarray(
    token_logp(policy.model, policy.params, tokens, np.ones((1, 8), bool), lora=lora)
  )
  apart = logp(*trainee.adapted())
  np.testing.assert_allclose(logp(trainee.merged()), apart, atol=1e-5)
  assert np.abs(apart - logp(trainee.start)).max() > 0.01  # the reference: no adapters
  np.testing.assert_array_equal(logp(trainee.start), logp(policy))


def test_an_exported_policy_has_the_model_that_was_given(policy):
  """A dev score compares it with the start: both in one dtype."""
  trainee = Trainee(
    policy, RATE, 1, lora=LORA, dtype="bfloat16", remat="full", head={"kernel": 1.0}
  )
  assert trainee.start.model.dtype == jnp.bfloat16
  assert trainee.export().model == policy.model
  assert trainee.state.params["head"]["kernel"].dtype == jnp.float32  # a master

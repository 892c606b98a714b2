"""Randomness addressed by integers.

Noise is a function of `(seed, purpose, step, prompt_id, sample, t)` and of nothing
else: it does not depend on the number of devices, on how a batch was split, or on what
was drawn before, so a resumed run draws what the killed one would have drawn.
"""

from __future__ import annotations

import enum

import jax
import jax.numpy as jnp
import numpy as np

from rlft.core.errors import ConfigError


class Purpose(enum.IntEnum):
  """What noise is for. Two purposes never share a stream; values never change."""

  ROLLOUT = 1
  EVALUATION = 2
  SHUFFLE = 3
  INIT = 4
  OUTCOME = 5


class Stream(enum.IntEnum):
  """What the host's streams are for; see `numpy`."""

  PROMPTS = 3
  MINIBATCHES = 6
  ROWS = 7
  BATCHES = 8
  BALANCE = 9


def check_seed(seed: int) -> int:
  """Returns the seed, or raises `ConfigError` when it is not a 32-bit integer."""
  whole = isinstance(seed, (int, np.integer)) and not isinstance(seed, bool)
  if not whole or not 0 <= seed < 2**32:
    raise ConfigError(f"seed={seed!r}: a seed is an integer from 0 to 2**32 - 1")
  return int(seed)


def key(seed: int | jax.Array, purpose: Purpose | jax.Array, step: int | jax.Array = 0):
  """The key of one purpose at one step (threefry, whatever jax's default is)."""
  base = jax.random.key(jnp.asarray(seed, jnp.uint32), impl="threefry2x32")
  return jax.random.fold_in(jax.random.fold_in(base, purpose), step)


def numpy(seed: int, stream: Stream, *index: int) -> np.random.Generator:
  """A stream of the host, at an index of integers.

  A stream has one number of them: numpy takes [s, 3, e] and [s, 3, e, 0] for the same.
  """
  return np.random.default_rng([seed, stream, *index])


def row_keys(base: jax.Array, prompt_ids_B: jax.Array, samples_B: jax.Array):
  """One key for each row, from the data set's index of its prompt and its sample."""
  fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
  return jax.vmap(jax.random.fold_in)(fold(base, prompt_ids_B), samples_B)


def uniforms(keys_B: jax.Array, t_B: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The uniform of each row at its token t, as two independent float32 halves.

  One 64-bit uniform is drawn and split: inverse-CDF sampling spends the high half on
  choosing a block of the vocabulary and the low half inside the block, where the
  residue of a single float32 would leave a rare block only a few distinct values.

  Args:
    keys_B: typed keys [B].
    t_B: int32 [B], index of the token in its row.

  Returns:
    Two float32 arrays [B] in [0, 1), with steps of 2**-24.
  """
  draw = lambda k, t: jax.random.bits(jax.random.fold_in(k, t), (2,), jnp.uint32)
  bits_B2 = jax.vmap(draw)(keys_B, t_B)
  unit_B2 = (bits_B2 >> 8).astype(jnp.float32) * jnp.float32(2**-24)
  return unit_B2[:, 0], unit_B2[:, 1]

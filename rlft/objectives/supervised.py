"""Supervised losses, as a sum and its denominator.

Letters: B rows, T tokens.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp


def cross_entropy(
  logp_BT: jax.Array, weight_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Weighted negative log-likelihood: sum(-w * logp) and sum(w).

  The mean is their quotient over the *global* batch. Both are returned, so that
  splitting a batch into micro-batches or over devices cannot change the loss.

  Args:
    logp_BT: float, log-probability of each token, nats.
    weight_BT: float or bool, at least 0; what lies under weight 0 is not read.

  Returns:
    (sum, denominator), float32 scalars.
  """
  chex.assert_rank([logp_BT, weight_BT], 2)
  chex.assert_equal_shape([logp_BT, weight_BT])
  weight_BT = weight_BT.astype(jnp.float32)
  # `where` on the input: 0 * NaN would leak into the sum and its gradient.
  logp_BT = jnp.where(weight_BT > 0, logp_BT, 0.0)
  return -jnp.sum(weight_BT * logp_BT), jnp.sum(weight_BT)

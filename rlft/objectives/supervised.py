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


def binary_cross_entropy(
  logit_BT: jax.Array, label_BT: jax.Array, weight_BT: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], dict[str, tuple[jax.Array, jax.Array]]]:
  """Weighted binary cross-entropy of logits: an outcome reward model's loss.

      sum(w * (-y log sigmoid(z) - (1 - y) log sigmoid(-z))) and sum(w)

  Args:
    logit_BT: float [B, T].
    label_BT: float or bool [B, T], in [0, 1]; the outcome of the row repeated, or the
      share of correct continuations.
    weight_BT: float or bool [B, T], at least 0: 1 at the ends of steps, or at all
      tokens; what lies under weight 0 is not read.

  Returns:
    (sum, denominator), float32 scalars, and stats: accuracy, logit > 0 against
    label > 0.5, weighted.

  Source: Cobbe et al. 2021 (arXiv:2110.14168), whose verifiers are trained at all
  tokens (with a squared error).
  """
  chex.assert_rank([logit_BT, label_BT, weight_BT], 2)
  chex.assert_equal_shape([logit_BT, label_BT, weight_BT])
  weight_BT = weight_BT.astype(jnp.float32)
  logit_BT = jnp.where(weight_BT > 0, logit_BT, 0.0).astype(jnp.float32)
  label_BT = jnp.where(weight_BT > 0, label_BT, 0.0).astype(jnp.float32)
  loss_BT = -label_BT * jax.nn.log_sigmoid(logit_BT)
  loss_BT -= (1.0 - label_BT) * jax.nn.log_sigmoid(-logit_BT)
  total = jnp.sum(weight_BT)
  right_BT = (logit_BT > 0) == (label_BT > 0.5)
  stats = {"accuracy": (jnp.sum(weight_BT * right_BT), total)}
  return (jnp.sum(weight_BT * loss_BT), total), stats

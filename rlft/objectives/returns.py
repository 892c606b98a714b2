"""Offline learning from returns: labels to condition on, and weighted regression.

Letters: B rows, S steps of a solution, T tokens.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from rlft.objectives.supervised import cross_entropy


def step_labels(
  value_BS: jax.Array, valid_BS: jax.Array, threshold: float
) -> jax.Array:
  """Which steps lead somewhere good: value >= threshold.

  Args:
    value_BS: float [B, S], value of the solution up to and with step s: an ORM's
      probability, the share of correct continuations, or the outcome.
    valid_BS: bool [B, S], False where there is no step.
    threshold: in the unit of the values.

  Returns:
    bool [B, S], True is GOOD; False where there is no step.

  Source: Havrilla et al. 2024 (arXiv:2403.04642), return-conditioned RL.
  """
  chex.assert_rank([value_BS, valid_BS], 2)
  chex.assert_equal_shape([value_BS, valid_BS])
  chex.assert_type(valid_BS, bool)
  return valid_BS & (jnp.asarray(value_BS) >= threshold)


def weighted_cross_entropy(
  logp_BT: jax.Array, weight_BT: jax.Array, row_weight_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Cross-entropy of the tokens, each row counting as much as it is worth.

      sum_b u_b sum_t w_bt (-logp_bt),    and the sum of all u_b w_bt

  The mean is self-normalised: only how the rows compare to each other matters.

  Args:
    logp_BT: float [B, T], log-probability of each token, nats.
    weight_BT: float or bool [B, T], at least 0; what lies under 0 is not read.
    row_weight_B: float [B], at least 0: a balance of labels, or of a reward
      exp(r / temperature).

  Returns:
    (sum, denominator), float32 scalars.

  Source: reward-weighted regression, Peters and Schaal 2007.
  """
  chex.assert_rank([logp_BT, weight_BT, row_weight_B], [2, 2, 1])
  chex.assert_equal_shape_prefix([logp_BT, row_weight_B], 1)
  weight_BT = jnp.asarray(weight_BT, jnp.float32)
  weight_BT = jnp.where(weight_BT > 0, weight_BT * row_weight_B[:, None], 0.0)
  return cross_entropy(logp_BT, weight_BT)

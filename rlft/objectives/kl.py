"""KL to a reference policy: as a reward, as a loss, and its controller.

Letters: B rows, C tokens of the completion region.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from rlft.core import masked
from rlft.core.errors import ConfigError
from rlft.objectives import policy

Pair = tuple[jax.Array, jax.Array]


def kl_token(logp_BC: jax.Array, ref_logp_BC: jax.Array, kind: str = "k1") -> jax.Array:
  """Estimate of KL(policy || reference) from one token sampled by the policy.

      k1 = logp - ref        unbiased, of either sign
      k2 = k1^2 / 2          biased, small variance, never negative
      k3 = exp(-k1) - 1 + k1 unbiased, small variance, never negative

  Mind the sign inside k3: exp(ref - logp), the other one is no estimate of anything.
  Its exponent is cut at +-`policy.MAX_LOG_RATIO`.

  Args:
    logp_BC, ref_logp_BC: float, any equal shape, nats.
    kind: "k1", "k2" or "k3".

  Returns:
    float32 of the same shape; nothing is masked.

  Raises:
    ConfigError: an unknown kind.

  Source: Schulman 2020, "Approximating KL divergence".
  """
  chex.assert_equal_shape([logp_BC, ref_logp_BC])
  k1_BC = jnp.asarray(logp_BC, jnp.float32) - jnp.asarray(ref_logp_BC, jnp.float32)
  if kind == "k1":
    return k1_BC
  if kind == "k2":
    return k1_BC**2 / 2
  if kind != "k3":
    raise ConfigError(f"kind of KL is {kind!r}, not 'k1', 'k2' or 'k3'.")
  bound = policy.MAX_LOG_RATIO
  # expm1: near k1 = 0, exp(-k1) - 1 + k1 is all rounding.
  return jnp.expm1(jnp.clip(-k1_BC, -bound, bound)) + k1_BC


def kl_loss(
  logp_BC: jax.Array,
  ref_logp_BC: jax.Array,
  mask_BC: jax.Array,
  kind: str = "k2",
  aggregate: str = "token",
  constant_length: int = 0,
) -> Pair:
  """KL to the reference as a loss term on sampled tokens.

  A good estimate of the value is not a good loss. On tokens sampled by the policy
  the mean gradient is, of

      k1  0: nothing at all is regularised
      k2  that of KL(policy || reference), the one that is meant
      k3  that of KL(reference || policy): the minimum is the same, the way is not

  GRPO's published form is k3.

  Args:
    logp_BC: float [B, C], nats, differentiated.
    ref_logp_BC: float [B, C]; no gradient.
    mask_BC: bool [B, C]; off it nothing is read.
    kind: as for `kl_token`.
    aggregate, constant_length: as for `policy.aggregate`.

  Returns:
    (sum, denominator), float32 scalars.

  Raises:
    ConfigError: an unknown kind or aggregation.

  Source: DeepSeekMath (arXiv:2402.03300), eq. 4, is k3.
  """
  chex.assert_rank([logp_BC, ref_logp_BC, mask_BC], 2)
  chex.assert_equal_shape([logp_BC, ref_logp_BC, mask_BC])
  # `where` on the inputs: 0 * NaN would leak into the gradient.
  logp_BC = jnp.where(mask_BC, logp_BC, 0.0)
  ref_logp_BC = jax.lax.stop_gradient(jnp.where(mask_BC, ref_logp_BC, 0.0))
  kl_BC = kl_token(logp_BC, ref_logp_BC, kind)
  return policy.aggregate(kl_BC, mask_BC, aggregate, constant_length)


def sequence_kl(
  logp_BC: jax.Array, ref_logp_BC: jax.Array, mask_BC: jax.Array
) -> jax.Array:
  """Mean over rows of the row's summed k1: what the adaptive controller is fed.

  Args:
    logp_BC, ref_logp_BC: float [B, C], nats.
    mask_BC: bool [B, C]; a row without a token under it is no row.

  Returns:
    float32 scalar, nats a completion.
  """
  chex.assert_rank([logp_BC, ref_logp_BC, mask_BC], 2)
  chex.assert_equal_shape([logp_BC, ref_logp_BC, mask_BC])
  chex.assert_type(mask_BC, bool)
  rows = masked.count(jnp.any(mask_BC, axis=1))
  return masked.total(kl_token(logp_BC, ref_logp_BC), mask_BC) / jnp.maximum(rows, 1.0)


def adaptive_kl_coef(
  coef: jax.Array | float,
  kl: jax.Array | float,
  target: float,
  horizon: float,
  episodes: int,
) -> jax.Array:
  """The KL coefficient after one batch: a proportional controller in log space.

      coef * (1 + clip(kl / target - 1, -0.2, 0.2) * episodes / horizon)

  Args:
    coef: the coefficient of the batch, at least 0.
    kl: its KL, nats a completion, of `sequence_kl`.
    target: the KL that is wanted, above 0.
    horizon: episodes in which the error's full effect is reached, above 0.
    episodes: completions of the batch.

  Returns:
    float32 scalar.

  Raises:
    ConfigError: a target or horizon that is not above 0.

  Source: Ziegler et al. 2019 (arXiv:1909.08593), section 2.2.
  """
  if target <= 0 or horizon <= 0:
    raise ConfigError(f"target is {target} and horizon {horizon}; both are above 0.")
  error = jnp.clip(jnp.asarray(kl, jnp.float32) / target - 1.0, -0.2, 0.2)
  return jnp.asarray(coef, jnp.float32) * (1.0 + error * (episodes / horizon))

"""Policy losses: the clipped surrogate with its variants, and the entropy bonus.

Letters: B rows, C tokens of the completion region.

A loss is `(sum, denominator)`: their quotient over the *global* batch is what is
minimised, so micro-batches and devices cannot change it.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from rlft.core import masked
from rlft.core.errors import ConfigError

Pair = tuple[jax.Array, jax.Array]

# exp of a log-ratio beyond this says nothing but overflows: e^20 is 5e8.
MAX_LOG_RATIO = 20.0


def aggregate(
  x_BC: jax.Array, mask_BC: jax.Array, mode: str = "token", constant_length: int = 0
) -> Pair:
  """One number of a per-token quantity, as a sum and its denominator.

      token     sum of x                              / tokens of the batch
      sequence  sum over rows of the row's mean of x  / rows
      constant  sum of x / constant_length            / rows

  Rows without a token under the mask (padding, not judged) are no rows.

  Args:
    x_BC: float [B, C]; not read off the mask.
    mask_BC: bool [B, C].
    mode: "token" (PPO, DAPO), "sequence" (GRPO) or "constant" (Dr. GRPO).
    constant_length: tokens, for "constant"; the completion budget.

  Returns:
    (sum, denominator), float32 scalars.

  Raises:
    ConfigError: an unknown mode, or "constant" without its length.

  Source: DAPO (arXiv:2503.14476), section 3.3; Dr. GRPO (arXiv:2503.20783).
  """
  chex.assert_rank([x_BC, mask_BC], 2)
  chex.assert_equal_shape([x_BC, mask_BC])
  chex.assert_type(mask_BC, bool)
  if mode == "token":
    return masked.total(x_BC, mask_BC), masked.count(mask_BC)
  rows = masked.count(jnp.any(mask_BC, axis=1))
  if mode == "sequence":
    return jnp.sum(masked.mean(x_BC, mask_BC, axis=1)), rows
  if mode != "constant":
    raise ConfigError(f"aggregate is {mode!r}, not 'token', 'sequence' or 'constant'.")
  if constant_length < 1:
    raise ConfigError(
      f"constant_length is {constant_length}; aggregate 'constant' needs a number of"
      " tokens, such as the completion budget."
    )
  return masked.total(x_BC, mask_BC) / constant_length, rows


_aggregate = aggregate  # the losses have a setting of that name


def policy_loss(
  logp_BC: jax.Array,
  old_logp_BC: jax.Array,
  advantage_BC: jax.Array,
  mask_BC: jax.Array,
  *,
  clip_low: float = 0.2,
  clip_high: float = 0.2,
  dual_clip: float = 0.0,
  aggregate: str = "token",
  constant_length: int = 0,
  importance: str = "token",
  behaviour_logp_BC: jax.Array | None = None,
  importance_cap: float = 0.0,
  clip: bool = True,
) -> tuple[Pair, dict[str, Pair]]:
  """Clipped importance-weighted policy loss.

      max(-rho A, -clip(rho, 1 - clip_low, 1 + clip_high) A),   rho = exp(logp - old)

  Settings, each off by default: dual_clip c bounds it by -c A where A < 0; importance
  "sequence" takes for rho the geometric mean of the row's ratios (GSPO); behaviour and
  cap weigh each token by min(exp(old - behaviour), cap), where old log-probs were
  recomputed and sampler and trainer disagree; clip=False leaves -rho A.

  Differentiable in logp_BC only: the gradient stops at everything else, so strictly
  on-policy steps may pass logp_BC itself as old_logp_BC. Log-ratios are cut at
  +-`MAX_LOG_RATIO` before exp, beyond which there is no gradient.

  Args:
    logp_BC, old_logp_BC: float [B, C], nats, of the policy and of the policy that the
      first step of this batch started from.
    advantage_BC: float [B, C], broadcast by the caller where it is one per row.
    mask_BC: bool [B, C], True where the policy chose the token; off it nothing is read.
    clip_low, clip_high: how far rho may go below and above 1; at least 0.
    dual_clip: above 1, or 0 for none.
    aggregate, constant_length: see the function `aggregate`.
    importance: "token" or "sequence"; for the latter take aggregate "sequence".
    behaviour_logp_BC: float [B, C], log-probs that the sampler reported.
    importance_cap: above 0, or 0 for no correction.
    clip: False for the plain surrogate.

  Returns:
    (sum, denominator), float32 scalars, and stats over tokens: clip_fraction (tokens
    without gradient because of a clip), approx_kl (k3 of KL(old || new)), ratio_mean,
    ratio_max, mult_prob_error (mean of exp|log ratio|), and importance_weight where it
    is used.

  Raises:
    ConfigError: settings out of range or contradicting each other.

  Source: PPO (arXiv:1707.06347), eq. 7; clip-higher DAPO (arXiv:2503.14476); dual clip
  arXiv:1912.09729; GSPO (arXiv:2507.18071), in the GSPO-token form, which allows an
  advantage per token and is GSPO where all of a row are equal; truncated importance
  sampling after Yao et al. 2025, "Your efficient RL framework secretly brings you
  off-policy RL training".
  """
  arrays = [logp_BC, old_logp_BC, advantage_BC, mask_BC]
  if behaviour_logp_BC is not None:
    arrays.append(behaviour_logp_BC)
  chex.assert_rank(arrays, 2)
  chex.assert_equal_shape(arrays)
  chex.assert_type(mask_BC, bool)
  if min(clip_low, clip_high, importance_cap) < 0 or 0 != dual_clip <= 1:
    raise ConfigError(
      f"clip_low {clip_low}, clip_high {clip_high} and importance_cap {importance_cap}"
      f" are at least 0; dual_clip {dual_clip} is 0 (off) or above 1."
    )
  if dual_clip and not clip:
    raise ConfigError(f"dual_clip {dual_clip} has no meaning with clip=False.")
  if importance not in ("token", "sequence"):
    raise ConfigError(f"importance is {importance!r}, not 'token' or 'sequence'.")

  # `where` on the inputs: 0 * NaN would leak into the gradient.
  logp_BC = _kept(logp_BC, mask_BC)
  old_logp_BC = jax.lax.stop_gradient(_kept(old_logp_BC, mask_BC))
  advantage_BC = jax.lax.stop_gradient(_kept(advantage_BC, mask_BC))

  log_ratio_BC = _bounded(logp_BC - old_logp_BC)
  if importance == "token":
    ratio_BC = jnp.exp(log_ratio_BC)
  else:
    mean_B1 = masked.mean(log_ratio_BC, mask_BC, axis=1)[:, None]
    # The value is the row's ratio; the gradient goes to each token by its own logp.
    own_BC = log_ratio_BC - jax.lax.stop_gradient(log_ratio_BC)
    ratio_BC = jnp.exp(jax.lax.stop_gradient(mean_B1) + own_BC)

  loss_BC = -ratio_BC * advantage_BC
  cut_BC = jnp.zeros_like(mask_BC)
  if clip:
    # Written with `where`, not `maximum`: at a tie that halves the gradient of each.
    clipped_BC = -jnp.clip(ratio_BC, 1.0 - clip_low, 1.0 + clip_high) * advantage_BC
    cut_BC = clipped_BC > loss_BC
    loss_BC = jnp.where(cut_BC, clipped_BC, loss_BC)
  if dual_clip:
    bound_BC = -dual_clip * advantage_BC
    far_BC = (advantage_BC < 0) & (loss_BC > bound_BC)
    cut_BC, loss_BC = cut_BC | far_BC, jnp.where(far_BC, bound_BC, loss_BC)

  def mean_of(x_BC):
    return jax.lax.stop_gradient(_aggregate(x_BC, mask_BC))

  stats = {
    "clip_fraction": mean_of(cut_BC),
    # expm1: near ratio 1, ratio - 1 - log ratio is all rounding.
    "approx_kl": mean_of(jnp.expm1(log_ratio_BC) - log_ratio_BC),
    "ratio_mean": mean_of(ratio_BC),
    "mult_prob_error": mean_of(jnp.exp(jnp.abs(log_ratio_BC))),
    "ratio_max": (
      jax.lax.stop_gradient(jnp.max(ratio_BC, initial=0.0, where=mask_BC)),
      jnp.float32(1.0),
    ),
  }
  if behaviour_logp_BC is not None and importance_cap > 0:
    gap_BC = _bounded(old_logp_BC - _kept(behaviour_logp_BC, mask_BC))
    weight_BC = jax.lax.stop_gradient(jnp.minimum(jnp.exp(gap_BC), importance_cap))
    loss_BC = loss_BC * weight_BC
    stats["importance_weight"] = mean_of(weight_BC)
  return _aggregate(loss_BC, mask_BC, aggregate, constant_length), stats


def entropy_loss(
  entropy_BC: jax.Array,
  mask_BC: jax.Array,
  aggregate: str = "token",
  constant_length: int = 0,
) -> Pair:
  """The policy's entropy, to be *subtracted* from its loss times a coefficient.

  Args:
    entropy_BC: float [B, C], nats, of the distribution that token c was chosen from.
    mask_BC, aggregate, constant_length: as for `policy_loss`, whose denominator it
      then shares.

  Returns:
    (sum, denominator), float32 scalars; the sum is not negative.
  """
  return _aggregate(entropy_BC, mask_BC, aggregate, constant_length)


def _kept(x_BC: jax.Array, mask_BC: jax.Array) -> jax.Array:
  return jnp.where(mask_BC, x_BC, 0.0).astype(jnp.float32)


def _bounded(log_ratio_BC: jax.Array) -> jax.Array:
  return jnp.clip(log_ratio_BC, -MAX_LOG_RATIO, MAX_LOG_RATIO)

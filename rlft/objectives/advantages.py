"""Credit: how much better than expected each chosen token, or each sample, was.

Letters: B rows (samples of a prompt adjacent), C tokens of the completion region,
G groups (prompts), K samples of a group.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from rlft.core import masked
from rlft.core.errors import ConfigError

_BASELINES = ("group", "leave_one_out", "batch", "none")
_SCALES = ("group_std", "batch_std", "none")


def gae(
  reward_BC: jax.Array,
  value_BC: jax.Array,
  mask_BC: jax.Array,
  gamma: float = 1.0,
  lam: float = 0.95,
  bootstrap_B: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Generalised advantage estimation over the trainable tokens of each row.

      delta_t = r_t + gamma V_t' - V_t,    A_t = delta_t + gamma lam A_t'

  where t' is the next *trainable* token: tokens under mask 0 (a tool's output) are
  jumped over, so they neither decay the credit nor cost a value.

  Args:
    reward_BC: float [B, C], paid when token c is chosen; rewards under mask 0 are not
      read, so pay at a trainable token.
    value_BC: float [B, C], value of the state before token c is chosen.
    mask_BC: bool [B, C], True where the policy chose the token.
    gamma: discount per trainable token.
    lam: 1 is the return minus the value, 0 the one-step error.
    bootstrap_B: float [B], value of the state after the last trainable token, for rows
      that were cut; None is 0, an end.

  Returns:
    advantage_BC and returns_BC = advantage_BC + value_BC, float32 [B, C], 0 off the
    mask. Whiten the advantage afterwards, never the returns.

  Source: Schulman et al. 2015 (arXiv:1506.02438), eq. 16; the jump is ours.
  """
  chex.assert_rank([reward_BC, value_BC, mask_BC], 2)
  chex.assert_equal_shape([reward_BC, value_BC, mask_BC])
  chex.assert_type(mask_BC, bool)
  reward_BC = jnp.where(mask_BC, reward_BC, 0.0).astype(jnp.float32)
  value_BC = jnp.where(mask_BC, value_BC, 0.0).astype(jnp.float32)
  zero_B = jnp.zeros(reward_BC.shape[0], jnp.float32)
  if bootstrap_B is None:
    bootstrap_B = zero_B
  chex.assert_shape(bootstrap_B, zero_B.shape)

  def back(carry, step):
    next_value_B, next_advantage_B = carry
    reward_B, value_B, mask_B = step
    advantage_B = reward_B + gamma * next_value_B - value_B
    advantage_B += gamma * lam * next_advantage_B
    carry = (
      jnp.where(mask_B, value_B, next_value_B),
      jnp.where(mask_B, advantage_B, next_advantage_B),
    )
    return carry, jnp.where(mask_B, advantage_B, 0.0)

  start = jnp.asarray(bootstrap_B, jnp.float32), zero_B
  steps = reward_BC.T, value_BC.T, jnp.asarray(mask_BC).T
  _, advantage_CB = jax.lax.scan(back, start, steps, reverse=True)
  return advantage_CB.T, advantage_CB.T + value_BC


def discounted_returns(
  reward_BC: jax.Array, mask_BC: jax.Array, gamma: float
) -> jax.Array:
  """Sum of the rewards from each trainable token on, discounted per trainable token.

      R_t = r_t + gamma R_t'

  Args:
    reward_BC, mask_BC, gamma: as for `gae`.

  Returns:
    float32 [B, C], 0 off the mask.
  """
  return gae(reward_BC, jnp.zeros_like(reward_BC), mask_BC, gamma, lam=1.0)[1]


def group_advantage(
  reward_B: jax.Array,
  judged_B: jax.Array,
  group_size: int,
  baseline: str = "group",
  scale: str = "group_std",
  eps: float = 1e-4,
) -> tuple[jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
  """Advantage of each sample over the others of its prompt, or of its batch.

      (r_i - b_i) / (s_i + eps)

  with b the mean of the judged rows of the group ("group"), of its other judged rows
  ("leave_one_out"), of the batch, or 0; and s the standard deviation of the judged rows
  of the group or of the batch, with n - 1 in its denominator as torch.std, so as TRL
  and verl. Where the rows that s is taken over are all equal nothing is divided:
  a deviation of 0 would multiply whatever is left by 1 / eps.

  Args:
    reward_B: float [B], rows of a group adjacent; not read where not judged.
    judged_B: bool [B]; a row that was not judged is in no baseline and gets 0.
    group_size: K, static, divides B.
    baseline, scale: as above. GRPO is ("group", "group_std"), Dr. GRPO ("group",
      "none"), RLOO ("leave_one_out", "none"), REINFORCE ("none" or "batch", "none").
    eps: keeps nearly equal groups from being blown up.

  Returns:
    advantage_B, float32 [B], and stats: equal_groups, the share of groups without any
    signal (all judged rows equal, one row included) of those with a judged row; and
    judged, the share of judged rows.

  Raises:
    ConfigError: an unknown name, B that is no multiple of group_size, or groups of one
      with a baseline that is then always the reward itself.

  Source: DeepSeekMath (arXiv:2402.03300), section 4.1.2; Dr. GRPO (arXiv:2503.20783);
  RLOO (arXiv:2402.14740), eq. 7.
  """
  chex.assert_rank([reward_B, judged_B], 1)
  chex.assert_equal_shape([reward_B, judged_B])
  chex.assert_type(judged_B, bool)
  if baseline not in _BASELINES or scale not in _SCALES:
    raise ConfigError(
      f"baseline is {baseline!r}, of {_BASELINES}; scale is {scale!r}, of {_SCALES}."
    )
  if group_size < 1 or reward_B.shape[0] % group_size:
    raise ConfigError(
      f"{reward_B.shape[0]} rows are no whole number of groups of {group_size}; give"
      " every prompt the same number of samples."
    )
  if group_size == 1 and baseline in ("group", "leave_one_out"):
    raise ConfigError(
      f"baseline {baseline!r} with a group of one is the reward itself, so nothing is"
      " learned; sample at least 2 a prompt, or use baseline 'batch'."
    )
  judged_GK = judged_B.reshape(-1, group_size)
  reward_GK = jnp.asarray(reward_B, jnp.float32).reshape(judged_GK.shape)
  group_mean_G1, group_std_G1, equal_G1 = _moments(reward_GK, judged_GK, axis=1)
  mean_11, std_11, equal_11 = _moments(reward_GK, judged_GK, axis=(0, 1))

  if baseline == "none":
    advantage_GK = reward_GK
  elif baseline == "batch":
    advantage_GK = reward_GK - mean_11
  else:
    # Exactly 0 where all are equal: Adam would blow up what rounding leaves.
    advantage_GK = jnp.where(equal_G1, 0.0, reward_GK - group_mean_G1)
  if baseline == "leave_one_out":
    # r_i - mean of the others = n / (n - 1) (r_i - mean of all); alone it is 0.
    n_G1 = jnp.sum(judged_GK, axis=1, keepdims=True, dtype=jnp.float32)
    advantage_GK *= n_G1 / jnp.maximum(n_G1 - 1.0, 1.0)
  if scale == "group_std":
    advantage_GK /= jnp.where(equal_G1, 1.0, group_std_G1 + eps)
  elif scale == "batch_std":
    advantage_GK /= jnp.where(equal_11, 1.0, std_11 + eps)

  any_G = jnp.any(judged_GK, axis=1)
  stats = {
    "equal_groups": (masked.count(equal_G1[:, 0] & any_G), masked.count(any_G)),
    "judged": (masked.count(judged_B), jnp.float32(judged_B.size)),
  }
  return jnp.where(judged_GK, advantage_GK, 0.0).reshape(-1), stats


def whiten(x: jax.Array, mask: jax.Array, shift_mean: bool = True) -> jax.Array:
  """x with standard deviation 1, and mean 0 or its own, over the whole array.

      (x - mean) / sqrt(variance + 1e-8)  [+ mean]

  Moments are over the mask, with n in the variance's denominator. Call it on the global
  batch, not on a micro-batch of it.

  Args:
    x: float, any shape.
    mask: bool, the same shape.
    shift_mean: False keeps the mean, for scores; advantages lose it.

  Returns:
    float32 of the same shape, 0 off the mask.

  Source: Ziegler et al. 2019 (arXiv:1909.08593) and its code.
  """
  chex.assert_equal_shape([x, mask])
  chex.assert_type(mask, bool)
  x = jnp.where(mask, x, 0.0).astype(jnp.float32)
  mean = masked.mean(x, mask)
  white = (x - mean) * jax.lax.rsqrt(masked.mean((x - mean) ** 2, mask) + 1e-8)
  return jnp.where(mask, white if shift_mean else white + mean, 0.0)


def _moments(x_GK, mask_GK, axis):
  """Mean, sample standard deviation and whether all are equal, kept dimensions."""
  n = jnp.sum(mask_GK, axis=axis, keepdims=True, dtype=jnp.float32)
  mean = jnp.sum(x_GK, axis=axis, keepdims=True, where=mask_GK) / jnp.maximum(n, 1.0)
  squares = jnp.sum((x_GK - mean) ** 2, axis=axis, keepdims=True, where=mask_GK)
  # By comparison: rounding gives equal rewards of .1 a deviation that is not 0.
  highest = jnp.max(x_GK, axis=axis, keepdims=True, where=mask_GK, initial=-jnp.inf)
  lowest = jnp.min(x_GK, axis=axis, keepdims=True, where=mask_GK, initial=jnp.inf)
  return mean, jnp.sqrt(squares / jnp.maximum(n - 1.0, 1.0)), highest <= lowest

"""Losses on pairs of which one side is preferred: reward models, DPO, IPO.

Letters: B pairs.
"""

from __future__ import annotations

import math

import chex
import jax
import jax.numpy as jnp

from rlft.core import masked
from rlft.core.errors import ConfigError

Pair = tuple[jax.Array, jax.Array]


def bradley_terry(
  chosen_B: jax.Array,
  rejected_B: jax.Array,
  margin_B: jax.Array | None = None,
  valid_B: jax.Array | None = None,
) -> tuple[Pair, dict[str, Pair]]:
  """Negative log-likelihood that the chosen side wins, under a Bradley-Terry model.

      -log sigmoid(chosen - rejected - margin)

  Args:
    chosen_B, rejected_B: float [B], scores of the two sides.
    margin_B: float [B], by how much the chosen side is better; None is 0.
    valid_B: bool [B], False on padding, which is not read; None is all.

  Returns:
    (sum, pairs), float32 scalars, and stats: accuracy (equal scores count half) and
    reward_gap, chosen - rejected.

  Source: Stiennon et al. 2020 (arXiv:2009.01325), section 3.4; the margin Llama 2
  (arXiv:2307.09288), eq. 2.
  """
  if margin_B is None:
    margin_B = jnp.zeros_like(chosen_B)
  valid_B, chosen_B, rejected_B, margin_B = _real(
    valid_B, chosen_B, rejected_B, margin_B
  )
  gap_B = chosen_B - rejected_B
  loss_B = -jax.nn.log_sigmoid(gap_B - margin_B)
  stats = {"accuracy": _wins(gap_B), "reward_gap": gap_B}
  return _summed(loss_B, valid_B), _stats(stats, valid_B)


def dpo(
  chosen_logp_B: jax.Array,
  rejected_logp_B: jax.Array,
  ref_chosen_logp_B: jax.Array,
  ref_rejected_logp_B: jax.Array,
  beta: float = 0.1,
  kind: str = "dpo",
  label_smoothing: float = 0.0,
  valid_B: jax.Array | None = None,
) -> tuple[Pair, dict[str, Pair]]:
  """Preference optimisation without a reward model.

      h = (chosen - ref_chosen) - (rejected - ref_rejected)
      dpo  -(1 - s) log sigmoid(beta h) - s log sigmoid(-beta h)
      ipo  (h - 1 / (2 beta))^2

  Args:
    chosen_logp_B, rejected_logp_B: float [B], nats, of whole completions, summed over
      tokens. For IPO some (TRL) take the mean over tokens; the caller decides.
    ref_chosen_logp_B, ref_rejected_logp_B: the same under the reference; no gradient.
    beta: strength of the tie to the reference, above 0.
    kind: "dpo" or "ipo".
    label_smoothing: s, probability that a label is wrong, 0 to 0.5; DPO only.
    valid_B: bool [B], False on padding, which is not read; None is all.

  Returns:
    (sum, pairs), float32 scalars, and stats: chosen_reward and rejected_reward, beta
    times the log-ratio of each side, their margin, and accuracy (equal counts half).

  Raises:
    ConfigError: an unknown kind, or a setting out of its range.

  Source: DPO (arXiv:2305.18290), eq. 7; IPO (arXiv:2310.12036), eq. 17; smoothing
  Mitchell 2023, "A note on DPO with noisy preferences".
  """
  check_dpo(beta, kind, label_smoothing)
  valid_B, chosen_B, rejected_B, ref_chosen_B, ref_rejected_B = _real(
    valid_B, chosen_logp_B, rejected_logp_B, ref_chosen_logp_B, ref_rejected_logp_B
  )
  chosen_B -= jax.lax.stop_gradient(ref_chosen_B)
  rejected_B -= jax.lax.stop_gradient(ref_rejected_B)
  h_B = chosen_B - rejected_B
  if kind == "ipo":
    loss_B = (h_B - 1 / (2 * beta)) ** 2
  else:
    loss_B = -(1 - label_smoothing) * jax.nn.log_sigmoid(beta * h_B)
    loss_B -= label_smoothing * jax.nn.log_sigmoid(-beta * h_B)
  stats = {
    "accuracy": _wins(h_B),
    "margin": beta * h_B,
    "chosen_reward": beta * chosen_B,
    "rejected_reward": beta * rejected_B,
  }
  return _summed(loss_B, valid_B), _stats(stats, valid_B)


def check_dpo(beta: float, kind: str, label_smoothing: float) -> None:
  """Raises `ConfigError` when these are no settings of `dpo`."""
  if kind not in ("dpo", "ipo"):
    raise ConfigError(f"kind is {kind!r}, not 'dpo' or 'ipo'.")
  if not 0 < beta < math.inf or not 0 <= label_smoothing < 0.5:
    raise ConfigError(
      f"beta is {beta} (above 0), label_smoothing {label_smoothing} (0 to below 0.5)."
    )
  if kind == "ipo" and label_smoothing:
    raise ConfigError(f"label_smoothing is {label_smoothing}; with 'ipo' it is 0.")


def _real(valid_B, *arrays):
  """The mask, and the arrays in float32 with 0 where it is False."""
  valid_B = jnp.ones(arrays[0].shape, bool) if valid_B is None else valid_B
  chex.assert_rank([valid_B, *arrays], 1)
  chex.assert_equal_shape([valid_B, *arrays])
  chex.assert_type(valid_B, bool)
  # `where` on the inputs: 0 * NaN would leak into the gradient.
  return valid_B, *(jnp.where(valid_B, x, 0.0).astype(jnp.float32) for x in arrays)


def _wins(gap_B):
  return (jnp.sign(gap_B) + 1) / 2


def _summed(x_B, valid_B) -> Pair:
  return masked.total(x_B, valid_B), masked.count(valid_B)


def _stats(arrays, valid_B) -> dict[str, Pair]:
  return {
    name: jax.lax.stop_gradient(_summed(x_B, valid_B)) for name, x_B in arrays.items()
  }

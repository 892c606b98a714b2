"""What must hold of a first update, asserted at run time; and how far engines disagree.

Before any update the policy is what sampled, and where the reference is the start, it
is the reference: every ratio is 1, nothing is clipped, their KL is 0. A run that begins
otherwise trains on wrong numbers, and nothing else would say so.

Letters: B rows, C completion columns.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from rlft.core.errors import DivergenceError
from rlft.core.hosts import everyone

log = logging.getLogger(__name__)

# Of log-probabilities between two programs that compute the same thing, nats.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
AGREE = 1e-4  # sampler and scorer, float32
MULT_PROB_ERROR = 1.05


def check_reference(old_logp_BC, ref_logp_BC, mask_BC, dtype: str) -> None:
  """Raises `DivergenceError` where a policy is not the reference it starts from, in
  rows of any process.
  """
  apart = np.abs(np.where(mask_BC, old_logp_BC - ref_logp_BC, 0.0)).max(initial=0.0)
  apart = np.max(everyone(float(apart)))
  if not apart <= TOLERANCE[dtype]:
    raise DivergenceError(
      f"before the first update the policy's log-probabilities are {apart:.2g} nats "
      "from those of the reference, which is the same model: sampler or scorer "
      "disagree on temperature, dtype or padding"
    )


def check_first_update(metrics: Mapping[str, Any], dtype: str, measured: bool) -> None:
  """Ratio 1 and nothing clipped, on the first minibatch of a run.

  Args:
    metrics: of that update: "ratio_max", "approx_kl", "clip_fraction".
    dtype: of the computation.
    measured: whether old log-probabilities were computed by the scorer, or the
      sampler's were found to agree with it; then a deviation is an error, else a
      warning.

  Raises:
    DivergenceError: see above.
  """
  ratio, apart, clipped = (
    float(metrics[name]) for name in ("ratio_max", "approx_kl", "clip_fraction")
  )
  limit = TOLERANCE[dtype]
  if ratio - 1 <= limit and apart <= limit and clipped == 0:
    return
  message = (
    f"on the first minibatch the largest ratio is {ratio:.4g}, approx_kl {apart:.2g} "
    f"and {clipped:.2%} of the tokens are clipped, but no update has been made"
  )
  if measured:
    raise DivergenceError(f"{message}: score and loss take different paths")
  log.warning("%s: the sampler's log-probabilities are off; recompute them", message)


def mismatch(sampler_BC, trainer_BC, mask_BC) -> dict[str, float]:
  """How far sampler and trainer disagree on what was sampled.

  Args:
    sampler_BC, trainer_BC: log-probabilities, nats.
    mask_BC: bool, tokens that the policy chose.

  Returns:
    "mismatch/max", the largest |d|, and "mismatch/token_mult_prob_error", the mean of
    exp|d|: 1 when they agree. Above 1.05 the ratios of an update are biased, and a
    warning says so. Both are of the rows of all processes.
  """
  d = np.abs(sampler_BC - trainer_BC)[mask_BC]
  most, total, count = float(d.max(initial=0.0)), np.exp(np.minimum(d, 20.0)), d.size
  said = np.array(everyone([most, float(total.sum(dtype=np.float64)), count]))
  most, total, count = said[:, 0].max(), said[:, 1].sum(), said[:, 2].sum()
  error = float(total / count) if count else 1.0
  if error > MULT_PROB_ERROR:
    log.warning(
      "sampler and trainer disagree: token_mult_prob_error is %.3f. Use "
      "old_logp='recompute', and loss.importance_cap=2 to weight them by importance",
      error,
    )
  return {
    "mismatch/max": float(most),
    "mismatch/token_mult_prob_error": error,
  }

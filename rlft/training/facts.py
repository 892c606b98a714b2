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

import jax
import numpy as np

from rlft.core.errors import DivergenceError
from rlft.core.hosts import everyone

log = logging.getLogger(__name__)

# Of a mean over tokens of |d|, nats: of log-probabilities that two programs, or the
# sampler and the scorer, compute of the same weights. A mean does not grow with the
# tokens, as a maximum does. In roundings of the arithmetic: bfloat16 8 (of 2^-7), of
# which the embedded model had 0.4 with a largest |d| of 0.17; float32 128 (of 2^-23),
# for its sums round too, of which it had 2.3. TF32 has roundings of 2^-10.
TOLERANCE = {"float32": 2**-16, "tf32": 2**-7, "bfloat16": 2**-4}
MOST = 8  # of a maximum that nobody warns of, in tolerances of the mean
AGREE = 1e-4  # sampler and scorer, float32
MULT_PROB_ERROR = 1.05


def tolerance(dtype: str, temperature: float = 1.0) -> float:
  """The largest mean of |d| that rounding explains, nats.

  Args:
    dtype: of the computation. Accelerators multiply float32 matrices in less unless
      `jax_default_matmul_precision` asks for it.
    temperature: divides the logits, and with them what they are off by.
  """
  if dtype == "float32" and jax.config.jax_default_matmul_precision in (
    None,
    "default",
  ):
    dtype = {"tpu": "bfloat16", "gpu": "tf32"}.get(jax.default_backend(), dtype)
  return TOLERANCE[dtype] / min(1.0, temperature)


def check_reference(
  old_logp_BC,
  ref_logp_BC,
  mask_BC,
  dtype: str,
  temperature: float = 1.0,
  same_path: bool = False,
) -> None:
  """Raises `DivergenceError` where a policy is not the reference it starts from, in
  rows of any process.

  Args:
    old_logp_BC, ref_logp_BC: nats; not read off the mask.
    mask_BC: bool, tokens that the policy chose.
    dtype, temperature: of the computation.
    same_path: whether one program computed both of equal numbers: then they are equal
      in every dtype.
  """
  d = np.abs(old_logp_BC - ref_logp_BC)[mask_BC]
  total, count = np.sum(everyone([float(d.sum(dtype=np.float64)), d.size]), axis=0)
  apart = total / max(count, 1)
  limit = TOLERANCE["float32"] if same_path else tolerance(dtype, temperature)
  if not apart <= limit:
    raise DivergenceError(
      f"before the first update the policy's log-probabilities are {apart:.2g} nats "
      f"(the mean; rounding explains {limit:.2g}) from those of the reference, which "
      "is the same model: sampler or scorer disagree on temperature, dtype or padding"
    )


def check_first_update(
  metrics: Mapping[str, Any], dtype: str, measured: bool, temperature: float = 1.0
) -> None:
  """Ratio 1 and nothing clipped, on the first minibatch of a run, but for rounding.

  Judged are means: the largest ratio of so many tokens only warns.

  Args:
    metrics: of that update: "mult_prob_error", "approx_kl", "clip_fraction",
      "ratio_max".
    dtype, temperature: of the computation.
    measured: whether old log-probabilities were computed by the scorer, or the
      sampler's were found to agree with it; then a deviation is an error, else a
      warning.

  Raises:
    DivergenceError: see above.
  """
  error, apart, clipped, most = (
    float(metrics[name])
    for name in ("mult_prob_error", "approx_kl", "clip_fraction", "ratio_max")
  )
  limit = tolerance(dtype, temperature)
  # Of the same |d|: its mean, its mean square by half, the share beyond the clip.
  sound = error - 1 <= limit and apart <= limit**2 and clipped <= limit
  if sound and most - 1 <= MOST * limit:
    return
  message = (
    f"on the first minibatch the ratios are off by {error - 1:.2g} in the mean "
    f"(rounding explains {limit:.2g}), the largest is {most:.4g}, approx_kl "
    f"{apart:.2g} and {clipped:.2%} of the tokens are clipped, but no update has been "
    "made"
  )
  if measured and not sound:
    raise DivergenceError(f"{message}: score and loss take different paths")
  log.warning("%s: are they the sampler's log-probabilities, recompute them", message)


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

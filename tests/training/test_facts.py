"""First-step facts: what they let pass, and what they stop."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from rlft.core.errors import DivergenceError
from rlft.training import facts

MASK = np.array([[True, True, False], [True, False, False]])
LOGP = np.array([[-1.0, -2.0, np.nan], [-0.5, np.nan, np.nan]], np.float32)


def test_the_policy_is_its_reference():
  facts.check_reference(LOGP, LOGP, MASK, "float32")  # NaN off the mask is not read
  facts.check_reference(LOGP, LOGP + 1e-5, MASK, "float32")
  facts.check_reference(LOGP, LOGP + 0.05, MASK, "bfloat16")
  facts.check_reference(LOGP, LOGP + 1, np.zeros_like(MASK), "float32")
  for wrong in (LOGP + 1e-3, np.full_like(LOGP, np.nan)):
    with pytest.raises(DivergenceError, match="the same model"):
      facts.check_reference(LOGP, wrong, MASK, "float32")


def test_one_token_of_many_that_rounding_moved_is_no_other_model():
  """A maximum grows with the tokens, a mean does not; one path moves nothing."""
  logp = np.full((64, 32), -1.0, np.float32)
  moved = logp.copy()
  moved[0, 0] += 0.5
  mask = np.ones_like(logp, bool)
  facts.check_reference(logp, moved, mask, "bfloat16")
  with pytest.raises(DivergenceError, match="the same model"):
    facts.check_reference(logp, moved, mask, "bfloat16", same_path=True)
  with pytest.raises(DivergenceError, match="the same model"):
    facts.check_reference(logp, logp + 0.07, mask, "bfloat16")


def test_a_low_temperature_enlarges_what_rounding_does():
  apart = LOGP + 0.1
  with pytest.raises(DivergenceError):
    facts.check_reference(LOGP, apart, MASK, "bfloat16")
  facts.check_reference(LOGP, apart, MASK, "bfloat16", temperature=0.5)
  with pytest.raises(DivergenceError):
    facts.check_reference(LOGP, apart, MASK, "bfloat16", temperature=2.0)


def test_accelerators_multiply_float32_in_less(monkeypatch):
  assert facts.tolerance("float32") == facts.TOLERANCE["float32"]
  for backend, kind in (("tpu", "bfloat16"), ("gpu", "tf32")):
    monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
    assert facts.tolerance("float32") == facts.TOLERANCE[kind]
    with jax.default_matmul_precision("highest"):
      assert facts.tolerance("float32") == facts.TOLERANCE["float32"]


FIRST = {
  "ratio_max": 1.00001, "mult_prob_error": 1 + 1e-6, "approx_kl": 1e-12,
  "clip_fraction": 0.0,
}  # fmt: skip
# Of the embedded model in bfloat16, 32 x 8 rows, and of bfloat16 that is wrong.
ROUNDED = {
  "ratio_max": 1.4, "mult_prob_error": 1.0033, "approx_kl": 7e-5, "clip_fraction": 1e-4,
}  # fmt: skip


@pytest.mark.parametrize(
  "dtype, wrong",
  [
    ("float32", {"mult_prob_error": 1.0001}),
    ("float32", {"approx_kl": 1e-8}),  # a few tokens that are far off show here
    ("float32", {"clip_fraction": 0.1}),
    ("float32", {"mult_prob_error": np.nan}),
    ("bfloat16", {"mult_prob_error": 1.1}),
    ("bfloat16", {"approx_kl": 0.01}),
    ("bfloat16", {"clip_fraction": 0.1}),
  ],
)
def test_the_first_update(dtype, wrong, caplog):
  first = FIRST if dtype == "float32" else ROUNDED
  facts.check_first_update(first, dtype, measured=True)
  assert not caplog.text
  with pytest.raises(DivergenceError, match="no update has been made"):
    facts.check_first_update(first | wrong, dtype, measured=True)
  facts.check_first_update(first | wrong, dtype, measured=False)
  assert "recompute them" in caplog.text


@pytest.mark.parametrize("dtype, most", [("float32", 1.001), ("bfloat16", 1.7)])
def test_the_largest_ratio_only_warns(dtype, most, caplog):
  first = FIRST if dtype == "float32" else ROUNDED
  facts.check_first_update(first | {"ratio_max": most}, dtype, measured=True)
  assert f"the largest is {most}" in caplog.text


def test_mismatch_by_hand(caplog):
  apart = np.array([[0.03, -0.01, 9], [0.02, 9, 9]], np.float32)
  found = facts.mismatch(LOGP, LOGP + apart, MASK)
  assert found["mismatch/max"] == pytest.approx(0.03, abs=1e-6)
  error = np.exp([0.03, 0.01, 0.02]).mean()  # of |d|: signs do not cancel
  assert found["mismatch/token_mult_prob_error"] == pytest.approx(error, abs=1e-6)
  assert not caplog.text
  facts.mismatch(LOGP, LOGP + 0.06, MASK)
  assert "old_logp='recompute'" in caplog.text
  nothing = facts.mismatch(LOGP, LOGP, np.zeros_like(MASK))
  assert list(nothing.values()) == [0.0, 1.0]

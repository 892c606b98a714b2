"""First-step facts: what they let pass, and what they stop."""

from __future__ import annotations

import numpy as np
import pytest

from rlft.core.errors import DivergenceError
from rlft.training import facts

MASK = np.array([[True, True, False], [True, False, False]])
LOGP = np.array([[-1.0, -2.0, np.nan], [-0.5, np.nan, np.nan]], np.float32)


def test_the_policy_is_its_reference():
  facts.check_reference(LOGP, LOGP, MASK, "float32")  # NaN off the mask is not read
  facts.check_reference(LOGP, LOGP + 5e-4, MASK, "float32")
  facts.check_reference(LOGP, LOGP + 0.05, MASK, "bfloat16")
  facts.check_reference(LOGP, LOGP + 1, np.zeros_like(MASK), "float32")
  for wrong in (LOGP + 0.05, np.full_like(LOGP, np.nan)):
    with pytest.raises(DivergenceError, match="the same model"):
      facts.check_reference(LOGP, wrong, MASK, "float32")


FIRST = {"ratio_max": 1.00001, "approx_kl": 1e-9, "clip_fraction": 0.0}


@pytest.mark.parametrize(
  "wrong",
  [
    {"ratio_max": 1.01},
    {"approx_kl": 0.01},  # a ratio far below 1 shows here
    {"clip_fraction": 0.1},
    {"ratio_max": np.nan},
  ],
)
def test_the_first_update(wrong, caplog):
  facts.check_first_update(FIRST, "float32", measured=True)
  assert not caplog.text
  with pytest.raises(DivergenceError, match="no update has been made"):
    facts.check_first_update(FIRST | wrong, "float32", measured=True)
  facts.check_first_update(FIRST | wrong, "float32", measured=False)
  assert "recompute them" in caplog.text


def test_bfloat16_is_allowed_more():
  facts.check_first_update(FIRST | {"ratio_max": 1.05}, "bfloat16", measured=True)


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

"""What is measured of reward models: area under the curve, and intervals."""

from __future__ import annotations

import numpy as np
import pytest

from rlft.core.errors import ConfigError, DataError
from rlft.probes import reward_models
from rlft.training.outcomes import Outcome


def test_auc_is_the_share_of_pairs_in_order():
  rng = np.random.default_rng(0)
  score = rng.integers(0, 6, 80) / 4  # many ties
  label = rng.random(80) < 0.3
  pairs = [
    float(a > b) + 0.5 * float(a == b) for a in score[label] for b in score[~label]
  ]
  assert reward_models._auc(score, label) == pytest.approx(np.mean(pairs))
  assert np.isnan(reward_models._auc(score, np.ones(80, bool)))


def test_interval_resamples_prompts():
  """Copies of an item under its own prompt tell nothing new."""
  values = np.random.default_rng(1).random(50)
  prompts = [f"p{i}" for i in range(50)]
  mean, low, high = reward_models._interval(np.mean, (values,), prompts, 0)
  assert mean == pytest.approx(values.mean())
  half = 1.96 * values.std() / np.sqrt(50)
  assert low == pytest.approx(mean - half, abs=0.02)
  assert high == pytest.approx(mean + half, abs=0.02)
  _, low9, high9 = reward_models._interval(
    np.mean, (np.repeat(values, 9),), np.repeat(prompts, 9), 0
  )
  assert high9 - low9 == pytest.approx(high - low, rel=0.01)


def test_bad_questions():
  row = Outcome(0, "p", (1, 2), (), 1.0)
  with pytest.raises(ConfigError, match="at='start'"):
    reward_models.auc(None, [row], at="start")
  with pytest.raises(DataError, match="no outcomes"):
    reward_models.auc(None, [])

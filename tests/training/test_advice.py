"""Advice comes early, once, and only where there is no signal."""

from __future__ import annotations

import types

import pytest

from rlft.training.advice import early

CONFIG = types.SimpleNamespace(
  iterations=9, temperature=0.7, max_new_tokens=5, samples_per_prompt=4
)
SOUND = {
  "completion/truncated": 0.5, "reward/judged": 1.0, "reward/std": 0.3,
  "reward/mean": 0.2, "groups/equal": 0.5, "advantage/std": 1.0,
}  # fmt: skip
FLAT = SOUND | {"groups/equal": 1.0, "advantage/std": 0.0}
PPO = {k: x for k, x in SOUND.items() if k != "groups/equal"} | {"reward/std": 0.0}


def said(*iterations, config=CONFIG):
  """Advice after each of the iterations."""
  return [early(iterations[: i + 1], config) for i in range(len(iterations))]


@pytest.mark.parametrize(
  "useless, words",
  [
    (FLAT, "temperature=0.7 or samples_per_prompt=4"),
    (PPO, "temperature=0.7"),
    (SOUND | {"completion/truncated": 1.0}, "max_new_tokens=5"),
    (SOUND | {"reward/judged": 0.0}, "could be judged"),
  ],
)
def test_twice_in_a_row_and_once(useless, words):
  first, second, *rest = said(useless, useless, useless, SOUND, useless, useless)
  assert not first and not any(rest)
  assert len(second) == 1 and words in second[0] and "iterations 1 to 2" in second[0]
  assert [len(x) for x in said(useless, SOUND, useless, useless)] == [0, 0, 0, 1]
  one = types.SimpleNamespace(**vars(CONFIG) | {"iterations": 1})
  assert len(said(useless, config=one)[0]) == 1


@pytest.mark.parametrize(
  "fine",
  [
    SOUND,
    SOUND | {"groups/equal": 1.0},  # a baseline over the batch
    PPO | {"reward/steps/std": 0.1},  # dense rewards differ
    FLAT | {"groups/equal": 0.9},
  ],
)
def test_some_signal_is_enough(fine):
  assert not any(said(fine, fine, fine))

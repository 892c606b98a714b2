"""The report of an evaluation: each definition by hand, intervals, pairing."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest

from rlft.core.errors import ConfigError
from rlft.core.types import Example, Verdict
from rlft.objectives import estimates
from rlft.probes import reasoning


def right(*chain: str) -> Verdict:
  return Verdict("7", True, True, chain)


LUCKY = Verdict("7", True, False, ("3+3=7",))
UNTOLD = Verdict("7", True, None, ("1+6=7",))
NO_CHAIN = Verdict("7", True, True, None)
EIGHT = Verdict("8", False, True, ("4+4=8",))
NINE = Verdict("9", False, False, ("4+4=9",))
SILENT = Verdict(None, False, False, None)


def problems(n: int) -> list[Example]:
  return [Example(10 + i, "", "", "7") for i in range(n)]


VERDICTS = [
  [right("3+4=7"), right("3+4=7"), right("2+5=7"), EIGHT],
  [LUCKY, right("3+4=7"), EIGHT, EIGHT],
  [SILENT, NINE, NINE, SILENT],
  [UNTOLD, NO_CHAIN, EIGHT, SILENT],
]
GREEDY = [right("3+4=7"), EIGHT, SILENT, LUCKY]


def test_every_metric_by_hand():
  known = {10: [("3+4=7",)], 99: [("1+6=7",)]}
  result = reasoning.report(
    VERDICTS, problems(4), GREEDY, ks=(1, 2, 4, 8), known_chains=known
  )
  expected = {
    "greedy@1": [1, 0, 0, 1],
    "maj@1": [1, 0, 0, 1],
    "pass@1": [3 / 4, 2 / 4, 0, 2 / 4],
    "pass@2": [1, 5 / 6, 0, 5 / 6],
    "pass@4": [1, 1, 0, 1],
    "pass@8": [np.nan] * 4,
    "maj@4": [1, 0.5, 0, 1],
    "maj@8": [np.nan] * 4,
    "unique_chains": [2, 1, 0, 1],
    "novel_chains": [1, 1, 0, 1],
    "lucky": [0, 1 / 2, np.nan, 0],
    "no_answer": [0, 0, 1 / 2, 1 / 4],
  }
  values = result["per_prompt"]
  assert set(values) == {*expected, "maj@2"} == set(result["metrics"])
  for name, value in expected.items():
    np.testing.assert_allclose(values[name], value, atol=1e-6, err_msg=name)
    known_values = np.array(value)[~np.isnan(value)]
    metric = result["metrics"][name]
    assert metric["prompts"] == len(known_values)
    if len(known_values):
      assert metric["mean"] == pytest.approx(known_values.mean(), abs=1e-6)
      assert metric["low"] <= metric["mean"] <= metric["high"]
    else:
      assert math.isnan(metric["mean"]) and math.isnan(metric["low"])
  # maj@2 by hand: two votes tie unless equal. Prompt 0: 3 pairs of 7, 3 of 7 and 8.
  exact = [(3 + 3 / 2) / 6, (1 + 4 / 2) / 6, 0, (1 + 2 / 2 + 2) / 6]
  np.testing.assert_allclose(values["maj@2"], exact, atol=0.12)
  assert result["prompt_ids"] == [10, 11, 12, 13]
  assert result["totals"] == {
    "samples": 16,
    "correct": 7,
    "lucky": 1,
    "lucky_share": pytest.approx(1 / 7),
    "no_answer": 3,
    "not_judged": 0,
    "unique_chains": 4,
    "novel_chains": 3,
  }


def test_what_is_not_given_is_not_reported():
  result = reasoning.report(VERDICTS, problems(4), ks=(1, 4))
  assert not {"greedy@1", "maj@1", "novel_chains"} & set(result["metrics"])
  assert "novel_chains" not in result["totals"]


def test_prompts_may_have_different_numbers_of_samples():
  verdicts = [[EIGHT, right("3+4=7")], [right("3+4=7")], []]
  values = reasoning.report(verdicts, problems(3), ks=(1, 2))["per_prompt"]
  np.testing.assert_allclose(values["pass@1"], [0.5, 1, np.nan])
  np.testing.assert_allclose(values["pass@2"], [1, np.nan, np.nan])
  np.testing.assert_allclose(values["maj@2"], [0.5, np.nan, np.nan])
  np.testing.assert_allclose(values["no_answer"], [0, 0, np.nan])
  np.testing.assert_allclose(values["unique_chains"], [1, 1, 0])
  empty = reasoning.report([[], []], problems(2), ks=(1, 2))
  assert math.isnan(empty["metrics"]["pass@1"]["mean"])
  assert math.isnan(empty["totals"]["lucky_share"])


def test_a_prompt_that_comes_twice_has_its_chains_counted_once_in_the_total():
  twice = [problems(1)[0]] * 2
  result = reasoning.report([[right("3+4=7")], [right("3+4=7")]], twice, ks=(1,))
  assert result["totals"]["unique_chains"] == 1
  assert result["metrics"]["unique_chains"]["mean"] == 1


def test_correct_chains_are_what_a_later_report_knows():
  known = reasoning.correct_chains(VERDICTS, problems(4))
  assert known == {
    10: {("3+4=7",), ("2+5=7",)},
    11: {("3+4=7",)},  # not the lucky one
    12: set(),
    13: {("1+6=7",)},
  }
  later = reasoning.report(VERDICTS, problems(4), ks=(1,), known_chains=known)
  assert later["totals"]["novel_chains"] == 0
  none = reasoning.report(VERDICTS, problems(4), ks=(1,), known_chains={})
  assert none["totals"]["novel_chains"] == 4


def random_model(rng, skill_P, samples=16):
  verdicts = []
  for skill in skill_P:
    wrong = [Verdict(str(a), False, True, None) for a in rng.integers(8, 30, samples)]
    solved = rng.random(samples) < skill
    verdicts.append([right("3+4=7") if s else w for s, w in zip(solved, wrong)])
  return verdicts


def test_maj_of_subsets_is_near_enumeration():
  rng = np.random.default_rng(0)
  verdicts = random_model(rng, rng.random(30), samples=10)
  values = reasoning.report(verdicts, problems(30), ks=(4,))["per_prompt"]["maj@4"]
  answer_PK, valid_PK = reasoning._answer_ids(verdicts)
  exact = estimates.maj_subset_exact(answer_PK, np.zeros(30, int), valid_PK, 4)
  np.testing.assert_allclose(values, exact, atol=0.12)  # 256 subsets, 4 errors of .03
  assert abs(np.mean(values - exact)) < 0.02


def test_compare_pairs_prompts():
  rng = np.random.default_rng(0)
  skill = rng.random(100)
  examples = problems(100)
  before = reasoning.report(random_model(rng, skill), examples, ks=(1, 16))
  after = reasoning.report(
    random_model(rng, np.minimum(skill + 0.15, 1)), examples, ks=(1, 16)
  )
  change = reasoning.compare(before, after)["pass@1"]
  assert change["difference"] == pytest.approx(change["b"] - change["a"], abs=1e-5)
  assert 0 < change["low"] < change["difference"] < change["high"]
  assert change["prompts"] == 100
  metric = before["metrics"]["pass@1"]
  assert change["high"] - change["low"] < 0.8 * (metric["high"] - metric["low"])
  same = reasoning.compare(before, before)
  assert all(c["difference"] == c["low"] == c["high"] == 0 for c in same.values())


def test_compare_uses_prompts_that_have_a_value_in_both():
  first = reasoning.report([[LUCKY], [EIGHT], [right("a")]], problems(3), ks=(1,))
  second = reasoning.report([[right("a")], [LUCKY], [EIGHT]], problems(3), ks=(1,))
  lucky = reasoning.compare(first, second)["lucky"]
  assert (lucky["a"], lucky["b"], lucky["prompts"]) == (1.0, 0.0, 1)


def test_a_report_is_repeatable_and_compiles_nothing_twice():
  rng = np.random.default_rng(1)
  first, second = (random_model(rng, rng.random(12)) for _ in range(2))
  one = reasoning.report(first, problems(12), first[0][:12], seed=5)
  sizes = [f._cache_size() for f in (estimates.pass_at_k, estimates.maj_at_k)]
  again = reasoning.report(first, problems(12), first[0][:12], seed=5)
  reasoning.report(second, problems(12), seed=6)
  after = [f._cache_size() for f in (estimates.pass_at_k, estimates.maj_at_k)]
  assert sizes == after
  for name, metric in one["metrics"].items():
    np.testing.assert_equal(metric, again["metrics"][name])
  assert isinstance(jax.tree.leaves(one["metrics"])[0], (int, float))


def test_wrong_requests_are_named():
  with pytest.raises(ConfigError, match="'verdicts': 4, 'examples': 3"):
    reasoning.report(VERDICTS, problems(3))
  with pytest.raises(ConfigError, match="'greedy': 3"):
    reasoning.report(VERDICTS, problems(4), GREEDY[:3])
  with pytest.raises(ConfigError, match="no prompts"):
    reasoning.report([], [])
  with pytest.raises(ConfigError, match="each k is at least 1"):
    reasoning.report(VERDICTS, problems(4), ks=(0,))
  a = reasoning.report(VERDICTS, problems(4), ks=(1,))
  b = reasoning.report(VERDICTS[:3], problems(3), ks=(1,))
  with pytest.raises(ConfigError, match="not of the same prompts"):
    reasoning.compare(a, b)


def test_scores_rerank():
  scores = [[0.1, 0.2, 0.3, 0.9], [0.9, 0.5, 0.6, 0.7], [9, 9, 9, 9], [0, 1, 2, 3]]
  result = reasoning.report(VERDICTS, problems(4), ks=(1, 2, 4), scores=scores)
  values = result["per_prompt"]
  np.testing.assert_allclose(values["rerank@4"], [0, 1, 0, 0])
  # 7: .1 + .2 + .3 against 8: .9; .9 + .5 against .6 + .7; nobody; 0 + 1 against 2.
  np.testing.assert_allclose(values["weighted@4"], [0, 1, 0, 0])
  # The best of two: prompt 0 is right in the 3 pairs of 6 without the last sample.
  np.testing.assert_allclose(values["rerank@2"], [1 / 2, 1 / 2, 0, 1 / 6], atol=0.12)
  assert {"rerank@1", "weighted@1"}.isdisjoint(values)
  assert result["metrics"]["rerank@4"]["mean"] == 0.25
  without = reasoning.report(VERDICTS, problems(4), ks=(1, 2, 4))["per_prompt"]
  assert set(values) - set(without) == {
    f"{name}@{k}" for name in ("rerank", "weighted") for k in (2, 4)
  }
  for name, value_P in without.items():
    np.testing.assert_array_equal(values[name], value_P)


def test_scores_of_uneven_rows_and_wrong_ones():
  verdicts = [[EIGHT, right("3+4=7")], [right("3+4=7")], []]
  values = reasoning.report(verdicts, problems(3), ks=(2,), scores=[[1, 2], [3], []])
  np.testing.assert_allclose(values["per_prompt"]["rerank@2"], [1, np.nan, np.nan])
  for scores in ([[1, 2], [3]], [[1], [3], []], [[1, math.nan], [3], []]):
    with pytest.raises(ConfigError, match="scores"):
      reasoning.report(verdicts, problems(3), ks=(2,), scores=scores)

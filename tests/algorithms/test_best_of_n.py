"""Best-of-n: what is kept, what becomes training data, and drawing from samples."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from rlft.algorithms import best_of_n as bon
from rlft.algorithms.sft import SFTConfig
from rlft.core.errors import ConfigError, DataError
from rlft.core.types import Example, Reward
from rlft.objectives.estimates import best_of_n_value
from rlft.sampling.generate import generate
from rlft.training.optimizer import OptimizerConfig
from rlft.training.rollouts import prompt_columns

A = 1
EXAMPLES = [Example(10 + i, "ab"[i % 2] * (1 + i // 2), "", "") for i in range(6)]
CONFIG = bon.BestOfNConfig(n=4, max_new_tokens=3)
TRAIN = SFTConfig(
  optimizer=OptimizerConfig(learning_rate=2e-2, schedule="constant"), batch_size=8
)


def reward_of(value, judged=None):
  """A reward with these values, whatever was sampled."""
  value = np.asarray(value, np.float32).ravel()
  judged = np.ones(len(value), bool) if judged is None else np.ravel(judged)
  return lambda rollout, examples: Reward(value=value, judged=judged)


def shorter(rollout, examples):
  """Ended completions pay, short ones more."""
  value = np.where(rollout.finished, 4 - rollout.lengths, -1).astype(np.float32)
  return Reward(value=value, judged=np.ones(len(value), bool))


@pytest.fixture(scope="module")
def sampled(tiny):
  """The same samples, from the sampler itself."""
  from rlft.core.rng import Purpose

  return generate(
    tiny,
    [e.prompt for e in EXAMPLES],
    samples=4,
    max_new_tokens=3,
    prompt_ids=[e.id for e in EXAMPLES],
    purpose=Purpose.ROLLOUT,
  )


def test_keeps_the_best_and_the_first_of_equal_ones(tiny, sampled):
  value = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
  value[1] = [0, 2, 2, 1]
  value[2] = -7
  result = bon.best_of_n(tiny, EXAMPLES, reward_of(value), CONFIG)
  assert result.kept.tolist() == value.argmax(1).tolist()
  assert (result.kept[1], result.kept[2]) == (1, 0)
  np.testing.assert_array_equal(result.rewards, value.max(1))
  np.testing.assert_array_equal(result.reward, value)
  texts = np.array(sampled.completions, object).reshape(6, 4)
  assert result.texts == [texts[p, k] for p, k in enumerate(result.kept)]
  assert result.completions == texts.tolist()
  assert result.sampled_solutions == 24 and result.unjudged == 0


def test_what_is_not_judged_is_never_kept(tiny, caplog):
  value = np.full((6, 4), 9, np.float32)
  value[:, 2] = -5
  judged = np.zeros((6, 4), bool)
  judged[:5, 2] = True
  result = bon.best_of_n(tiny, EXAMPLES, reward_of(value, judged), CONFIG)
  assert result.kept.tolist() == [2] * 5 + [-1]
  assert result.texts[5] is None and np.isnan(result.rewards[5])
  assert result.unjudged == 1 and "1 of 6 prompts have no sample" in caplog.text
  (one, at_one), *more = result.curve()
  assert one == 1 and at_one[0] == -5  # of the judged samples only
  assert np.isnan([x for _, interval in more for x in interval]).all()


def test_rewards_of_steps_count(tiny):
  def reward(rollout, examples):
    step = np.zeros((24, rollout.tokens.shape[1] - prompt_columns(rollout)), np.float32)
    step[3::4, 0] = 0.5
    value = np.tile(np.float32([0, 0.3, 0, 0.25]), 6)
    return Reward(value=value, judged=np.ones(24, bool), step=step)

  result = bon.best_of_n(tiny, EXAMPLES, reward, CONFIG)
  assert result.kept.tolist() == [3] * 6
  assert result.rewards.tolist() == [0.75] * 6


def test_rows_are_the_tokens_that_ended(tiny, sampled):
  everything = reward_of(np.tile([0, 0, 0, 1], 6))  # the last sample of each
  result = bon.best_of_n(tiny, EXAMPLES, everything, CONFIG)
  expected, cut = [], 0
  for p, example in enumerate(EXAMPLES):
    row = 4 * p + 3
    ids = tuple(sampled.tokens[row][sampled.completion_mask[row]].tolist())
    cut += not sampled.finished[row]
    if sampled.finished[row] and sampled.completions[row].strip():
      assert ids[-1] in tiny.eos_ids
      expected.append((example.prompt, ids))
  assert 0 < len(expected) < 6 and cut > 0  # or nothing is tested
  assert result.rows == expected and result.truncated == cut
  high = dataclasses.replace(CONFIG, threshold=1.5)
  assert bon.best_of_n(tiny, EXAMPLES, everything, high).rows == []
  level = dataclasses.replace(CONFIG, threshold=1.0)
  assert bon.best_of_n(tiny, EXAMPLES, everything, level).rows == expected


def test_after_a_stop_string_rows_are_texts(tiny):
  config = dataclasses.replace(CONFIG, stop=("b",), max_new_tokens=8)
  longer = lambda rollout, examples: reward_of(rollout.lengths)(rollout, examples)
  result = bon.best_of_n(tiny, EXAMPLES, longer, config)
  kinds = {type(completion) for _, completion in result.rows}
  assert kinds == {str, tuple}
  assert all("b" not in c for _, c in result.rows if isinstance(c, str))


def test_curve_grows_and_ends_at_what_was_kept(tiny, sampled):
  result = bon.best_of_n(tiny, EXAMPLES, shorter, CONFIG)
  curve = result.curve()
  assert [k for k, _ in curve] == [1, 2, 4]
  means = [mean for _, (mean, _, _) in curve]
  assert means == sorted(means) and means[0] < means[-1]
  assert means[0] == pytest.approx(result.reward.mean(), abs=1e-6)
  assert means[-1] == pytest.approx(result.rewards.mean(), abs=1e-6)
  other = result.curve(-result.reward)
  assert other[-1][1][0] == pytest.approx(-result.rewards.mean(), abs=1e-6)
  assert bon.sizes(1) == [1] and bon.sizes(12) == [1, 2, 4, 8, 12]


# --------------------------------------------------------------------- distillation


def test_distilled_one_sample_is_worth_more(tiny):
  """Training on the best makes the mean of one sample rise."""
  before = [np.array(x) for x in np.ravel(tiny.params["head"])]
  config = dataclasses.replace(CONFIG, n=8, threshold=0.0)
  events = []
  train = dataclasses.replace(TRAIN, epochs=10)
  result, best = bon.distill(
    tiny, EXAMPLES, shorter, config, train, lambda kind, v: events.append((kind, v))
  )
  np.testing.assert_array_equal(before, np.ravel(tiny.params["head"]))
  assert best.sampled_solutions == 48 and 0 < len(best.rows) <= 6
  assert result.update_tokens == 10 * sum(len(ids) for _, ids in best.rows)
  assert {kind for kind, _ in events} == {"sample", "train"}
  again = dataclasses.replace(config, seed=1)
  start = bon.best_of_n(tiny, EXAMPLES, shorter, again).reward.mean()
  end = bon.best_of_n(result.policy, EXAMPLES, shorter, again).reward.mean()
  assert end > start + 0.3


def test_nothing_to_distill(tiny):
  nobody = reward_of(np.zeros(24), np.zeros(24, bool))
  with pytest.raises(DataError, match=r"none of 6 kept .* 6 prompts have no judged"):
    bon.distill(tiny, EXAMPLES, nobody, CONFIG, TRAIN)
  high = dataclasses.replace(CONFIG, threshold=99.0)
  with pytest.raises(DataError, match="threshold"):
    bon.distill(tiny, EXAMPLES, shorter, high, TRAIN)
  chat = dataclasses.replace(TRAIN, chat=True)
  with pytest.raises(ConfigError, match="must be the same in both"):
    bon.distill(tiny, EXAMPLES, shorter, CONFIG, chat)


# ----------------------------------------------------------------------- simulation


def test_simulated_draws_agree_with_the_closed_form():
  rng = np.random.default_rng(0)
  reward = rng.normal(size=(3, 8)).astype(np.float32)
  reward[1] = rng.integers(0, 2, 8)  # ties
  reward[2, [0, 5]] = np.nan
  index, value = bon.simulate(reward, 3, 4000)
  assert index.shape == value.shape == (3, 4000)
  assert not np.isin(index[2], [0, 5]).any()
  np.testing.assert_array_equal(np.take_along_axis(reward, index, 1), value)
  exact = np.asarray(best_of_n_value(reward, ~np.isnan(reward), 3))
  error = value.std(1) / np.sqrt(4000)
  assert (np.abs(value.mean(1) - exact) < 4 * error).all()
  # The rank decides how often a sample is kept; equal ones are kept equally often.
  order = np.argsort(-reward[0])
  share = np.bincount(index[0], minlength=8)[order] / 4000
  by_hand = [21 / 56, 15 / 56, 10 / 56, 6 / 56, 3 / 56, 1 / 56, 0, 0]
  np.testing.assert_allclose(share, by_hand, atol=0.035)
  right = np.bincount(index[1], minlength=8)[reward[1] == 1]
  assert right.min() > 0.8 * right.max()


def test_simulation_of_all_samples_and_of_too_few():
  reward = np.array([[1, 3, 2], [0, np.nan, 5]], np.float32)
  index, value = bon.simulate(reward, 3, 5)
  assert index.tolist() == [[1] * 5, [-1] * 5]
  assert (value[0] == 3).all() and np.isnan(value[1]).all()
  first, _ = bon.simulate(reward, 1, 50, seed=1)
  assert set(first[1]) == {0, 2}
  again, _ = bon.simulate(reward, 1, 50, seed=1)
  other, _ = bon.simulate(reward, 1, 50, seed=2)
  assert (again == first).all() and (other != first).any()
  for n, reps in ((0, 1), (4, 1), (1, 0)):
    with pytest.raises(ConfigError, match=f"n={n}"):
      bon.simulate(reward, n, reps)
  with pytest.raises(DataError, match="prompts, samples"):
    bon.simulate(reward[0], 1, 1)


# ------------------------------------------------------------------------ bad input


def test_prompts_and_rewards_that_cannot_be(tiny):
  with pytest.raises(DataError, match="no prompts"):
    bon.best_of_n(tiny, [], shorter, CONFIG)
  with pytest.raises(DataError, match="same id"):
    bon.best_of_n(tiny, EXAMPLES[:1] * 2, shorter, CONFIG)
  with pytest.raises(DataError, match="is nan"):
    bon.best_of_n(tiny, EXAMPLES, reward_of([np.nan] * 24), CONFIG)


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("n", 0),
    ("temperature", 0.0),
    ("max_new_tokens", 0),
    ("max_rows", 0),
    ("threshold", float("nan")),
    ("seed", -1),
  ],
)
def test_settings_that_cannot_be(field, value):
  with pytest.raises(ConfigError, match=field):
    bon.BestOfNConfig(**{field: value})

"""Learned rewards: what they read, where they pay, and whom they refuse."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlft.core.errors import ConfigError, DataError, RewardError
from rlft.core.mesh import make_mesh
from rlft.core.types import Example, Rollout
from rlft.models.decoder import Decoder, DecoderConfig, init_params
from rlft.models.hub import Policy
from rlft.models.scalar import init_scalar, place
from rlft.rewards import learned
from rlft.rewards.contract import RewardConfig
from rlft.tasks import arithmetic
from rlft.tasks.tokenizer import word_tokenizer

TOKENIZER = word_tokenizer(arithmetic.words())
EXAMPLES = [Example(3, "12", "", "9"), Example(5, "7", "", "9")]
TEXTS = ["3-2=1, 1+8=9 #### 9", "9", "1+1=2,", "4+5=9"]  # two samples of each prompt
FINISHED = [True, True, True, False]


@pytest.fixture(scope="module", autouse=True)
def _quick_compilation():
  """Tiny programs that run a few times: compiling them is nearly all of the time."""
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def policy():
  config = DecoderConfig(
    vocab_size=len(TOKENIZER),
    width=16,
    layers=1,
    heads=2,
    kv_heads=2,
    head_dim=8,
    mlp_width=32,
    max_positions=64,
  )
  model = Decoder(config)
  params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
  return Policy(model, params, TOKENIZER, config)


@pytest.fixture(scope="module")
def reward_model(policy):
  return dataclasses.replace(init_scalar(policy, 1), mean=0.25, std=2.0)


@pytest.fixture(scope="module")
def orm(policy):
  return init_scalar(policy, 2, kind="outcome")


def ids(text):
  return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def rollout(texts=TEXTS, prompt_columns=4, columns=32, eos=True):
  """Left-padded prompts, right-padded completions, noise under the pads."""
  count = len(texts)
  tokens = np.random.default_rng(0).integers(0, 99, (count, prompt_columns + columns))
  mask, chosen = np.zeros(tokens.shape, bool), np.zeros(tokens.shape, bool)
  prompts, lengths = [], []
  for row, text in enumerate(texts):
    prompt = ids(EXAMPLES[row * len(EXAMPLES) // count].prompt)
    answer = ids(text) + [TOKENIZER.eos_token_id] * (eos and FINISHED[row])
    prompts.append(len(prompt))
    lengths.append(len(answer))
    tokens[row, prompt_columns - len(prompt) : prompt_columns] = prompt
    tokens[row, prompt_columns : prompt_columns + len(answer)] = answer
    mask[row, prompt_columns - len(prompt) : prompt_columns + len(answer)] = True
    chosen[row, prompt_columns : prompt_columns + len(answer)] = True
  logp = np.zeros(tokens.shape, np.float32)
  return Rollout(
    tokens=tokens.astype(np.int32),
    mask=mask,
    completion_mask=chosen,
    logp=logp,
    raw_logp=logp,
    finished=np.array(FINISHED[:count]),
    prompt_lengths=np.array(prompts, np.int32),
    lengths=np.array(lengths, np.int32),
    prompt_ids=np.repeat(np.int32([3, 5]), count // 2),
    completions=list(texts),
    samples=count // len(EXAMPLES),
  )


def alone(scalar, rolled, row):
  """Raw values at the tokens of one row, without padding."""
  tokens = rolled.tokens[row, rolled.mask[row]][None]
  positions, mask = np.arange(tokens.size)[None], np.ones_like(tokens, bool)
  hidden = jax.jit(scalar.model.apply)(
    {"params": scalar.params["trunk"]}, tokens, positions, mask
  ).hidden[0]
  head = scalar.params["head"]
  return np.asarray(hidden @ head["kernel"] + head["bias"])


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def test_reward_is_the_normalised_value_at_the_last_token(policy, reward_model):
  rolled = rollout()
  reward = learned.reward_model_reward(reward_model, policy)(rolled, EXAMPLES)
  expected = [(alone(reward_model, rolled, row)[-1] - 0.25) / 2 for row in range(4)]
  np.testing.assert_allclose(reward.value, expected, atol=1e-5)
  assert type(reward.value) is np.ndarray and reward.value.dtype == np.float32
  assert reward.judged.all() and reward.step is None and reward.seconds > 0
  np.testing.assert_array_equal(reward.each["reward_model"], reward.value)
  # Columns and noise under pads change nothing.
  wide = learned.reward_model_reward(reward_model)(rollout(columns=40), EXAMPLES)
  np.testing.assert_allclose(wide.value, reward.value, atol=1e-5)


def test_rules_for_scores_and_for_completions_that_did_not_end(reward_model, orm):
  score = learned.reward_model_reward(reward_model)(rollout(), EXAMPLES).value
  give = lambda **rule: learned.reward_model_reward(
    reward_model, config=RewardConfig(**rule)
  )(rollout(), EXAMPLES)
  replaced = give(missing_eos="replace", missing_eos_value=-1.0)
  np.testing.assert_allclose(replaced.value, [*score[:3], -1], atol=1e-6)
  np.testing.assert_array_equal(replaced.each["reward_model"], score)
  limit = float(np.abs(score).min()) / 2
  assert np.abs(give(score_clip=limit).value).tolist() == pytest.approx([limit] * 4)
  masked = learned.orm_reward(
    orm, "step", lambda text: [(1, "x")], config=RewardConfig(missing_eos="mask")
  )(rollout(), EXAMPLES)
  assert masked.judged.tolist() == FINISHED
  assert masked.value[3] == 0 and not masked.step[3].any() and masked.step[0].any()
  assert masked.counts == {"not_judged": 1, "truncated": 1}


def test_orm_pays_a_probability_at_the_end(orm):
  rolled = rollout()
  reward = learned.orm_reward(orm)(rolled, EXAMPLES)
  expected = [sigmoid(alone(orm, rolled, row)[-1]) for row in range(4)]
  np.testing.assert_allclose(reward.value, expected, atol=1e-5)
  assert reward.step is None


def test_orm_pays_at_the_ends_of_steps_and_nothing_twice(orm):
  rolled = rollout()
  reward = learned.orm_reward(orm, "step", arithmetic.steps)(rolled, EXAMPLES)
  final = learned.orm_reward(orm)(rolled, EXAMPLES)
  np.testing.assert_allclose(reward.value, final.value, atol=1e-6)
  assert reward.step.shape == (4, 32) and reward.step.dtype == np.float32
  paid = np.zeros((4, 32))
  # "3-2=1" is five tokens, ", " one, "1+8=9" five; row 1 has no steps; the step of
  # row 3 ends with the text, which was cut: it may go on.
  for row, column in ((0, 4), (0, 10), (2, 4)):
    before = rolled.prompt_lengths[row]
    paid[row, column] = sigmoid(alone(orm, rolled, row)[before + column])
  np.testing.assert_allclose(reward.step, paid, atol=1e-5)
  np.testing.assert_allclose(reward.each["steps"], paid.sum(1), atol=1e-5)
  # A step that ends with the last token (a stop string did it) is paid by `value`.
  bare = rollout(["1+1=2", "4+5=9"], eos=False)
  reward = learned.orm_reward(orm, "step", arithmetic.steps)(bare, EXAMPLES)
  assert reward.value.min() > 0 and not reward.step.any()


def test_shapes_of_one_bucket_compile_once(reward_model):
  reward = learned.reward_model_reward(reward_model)
  reward(rollout(columns=36), EXAMPLES)
  before = learned._jit_last_value._cache_size()
  for columns in (33, 41, 44):
    reward(rollout(columns=columns), EXAMPLES)
  assert learned._jit_last_value._cache_size() == before


def test_rows_in_blocks_and_on_a_mesh(reward_model):
  rolled = rollout()
  whole = learned.final_values(reward_model, rolled.tokens, rolled.mask)
  parts = learned.final_values(reward_model, rolled.tokens, rolled.mask, max_tokens=1)
  np.testing.assert_allclose(parts, whole, atol=1e-5)
  mesh = make_mesh(4, 1, 2, devices=jax.devices()[:8])
  spread = learned.final_values(place(reward_model, mesh), rolled.tokens, rolled.mask)
  np.testing.assert_allclose(spread, whole, atol=1e-5)


def test_rows_of_any_length(reward_model):
  rows = [list(range(2, 2 + n)) for n in (3, 20, 1, 16, 17)]
  for row, values in zip(rows, learned.row_values(reward_model, rows), strict=True):
    tokens = np.array([row])
    one = learned.every_value(reward_model, tokens, np.ones_like(tokens, bool))
    np.testing.assert_allclose(values, one[0], atol=1e-5)
    assert len(values) == len(row)


def test_probability_does_not_overflow():
  got = learned.probability(np.array([-1e4, -2, 0, 2, 1e4], np.float32))
  np.testing.assert_allclose(got, [0, sigmoid(-2), 0.5, sigmoid(2), 1], rtol=1e-6)


def test_models_that_do_not_fit(policy, reward_model, orm):
  other = dataclasses.replace(policy, tokenizer=word_tokenizer(["pear"]))
  with pytest.raises(ConfigError, match="different tokenizers"):
    learned.reward_model_reward(reward_model, other)
  with pytest.raises(ConfigError, match="different tokenizers"):
    learned.orm_reward(orm, policy=other)
  with pytest.raises(ConfigError, match="kind 'outcome'; give one of 'reward'"):
    learned.reward_model_reward(orm)
  with pytest.raises(ConfigError, match="kind 'reward'; give one of 'outcome'"):
    learned.orm_reward(reward_model)
  with pytest.raises(ConfigError, match="mode='dense'"):
    learned.orm_reward(orm, "dense")
  with pytest.raises(ConfigError, match="needs steps"):
    learned.orm_reward(orm, "step")
  foreign = dataclasses.replace(rollout(), tokens=rollout().tokens + 5000)
  with pytest.raises(DataError, match="made by another tokenizer"):
    learned.reward_model_reward(reward_model)(foreign, EXAMPLES)


def test_a_value_that_is_not_finite_is_an_error(reward_model):
  head = {**reward_model.params["head"], "bias": jnp.float32(np.nan)}
  params = {**reward_model.params, "head": head}
  broken = dataclasses.replace(reward_model, params=params)
  with pytest.raises(RewardError, match=r"row 0 \(prompt 3\) is not finite"):
    learned.reward_model_reward(broken)(rollout(), EXAMPLES)


def test_a_score_after_a_stop_string_is_read_at_an_end(policy, reward_model, orm):
  """Where the model was trained to read it; what was cut is read where it was cut."""
  ended, stopped = rollout(), rollout(eos=False)
  assert not (stopped.tokens[stopped.completion_mask] == TOKENIZER.eos_token_id).any()
  for give in (
    learned.reward_model_reward(reward_model, policy),
    learned.orm_reward(orm, policy=policy),
    learned.orm_reward(orm, "step", arithmetic.steps, policy),
  ):
    due, found = give(ended, EXAMPLES), give(stopped, EXAMPLES)
    np.testing.assert_allclose(found.value, due.value, atol=1e-5)
    if due.step is not None:
      assert found.step.shape == due.step.shape
      paid = stopped.completion_mask[:, 4:]
      assert not found.step[~paid].any()
      last = paid.shape[1] - 1 - np.argmax(paid[:, ::-1], axis=1)
      assert not found.step[np.arange(4), last].any()  # `value` pays there


def test_a_vote_is_weighted_by_probabilities(orm, reward_model):
  rows = [ids("1+1=2"), ids("4+5=9")]
  for scalar, read in ((orm, sigmoid), (reward_model, lambda x: x)):
    raw = [value[-1] for value in learned.row_values(scalar, rows)]
    found = learned.score_rows(scalar)(rows)
    np.testing.assert_allclose(found, [read(x) for x in raw], rtol=1e-5)

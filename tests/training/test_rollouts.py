"""From rollouts to rows that train: what is kept, where it lies, what is said of it."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from rlft.core.errors import ConfigError, DataError
from rlft.core.types import Example, Reward, Rollout
from rlft.models.decoder import Decoder, DecoderConfig, init_params
from rlft.models.hub import Policy
from rlft.models.scalar import init_scalar, token_values
from rlft.sampling.score import score
from rlft.training import rollouts
from rlft.training.rollouts import RLBatch

FORCED = (4, 0)  # a token that the policy did not choose
# (prompt, completion as (token, chosen), whether it ended)
ROWS = [
  ([5, 6, 7], [(1, 1), (2, 1), (0, 1)], True),
  ([5, 6, 7], [(1, 1), FORCED, FORCED, (3, 1), (2, 1)], False),
  ([8], [(0, 1)], True),
  ([8], [(2, 1), (2, 1), FORCED], False),
]


def rollout_of(rows=ROWS, samples=2, wide=4, capacity=7) -> Rollout:
  """As the sampler gives it: prompts end at one column; 99 lies under the pads."""
  count = len(rows)
  tokens = np.full((count, wide + capacity), 99, np.int32)
  mask = np.zeros(tokens.shape, bool)
  chosen, logp = np.zeros_like(mask), np.zeros(tokens.shape, np.float32)
  for i, (prompt, completion, _) in enumerate(rows):
    ids = [token for token, _ in completion]
    tokens[i, wide - len(prompt) : wide + len(ids)] = prompt + ids
    mask[i, wide - len(prompt) : wide + len(ids)] = True
    chosen[i, wide : wide + len(ids)] = [own for _, own in completion]
  logp[chosen] = -1 - np.arange(chosen.sum())
  lengths = [len(completion) for _, completion, _ in rows]
  return Rollout(
    tokens=tokens,
    mask=mask,
    completion_mask=chosen,
    logp=logp,
    raw_logp=logp,
    finished=np.array([ended for _, _, ended in rows]),
    prompt_lengths=np.array([len(prompt) for prompt, _, _ in rows], np.int32),
    lengths=np.array(lengths, np.int32),
    prompt_ids=np.repeat(np.arange(count // samples), samples).astype(np.int32),
    completions=["x", "y", "z", "z"][:count],
    samples=samples,
    stats={"tokens_per_second": 10.0},
  )


def reward_of(value, judged=None, **more) -> Reward:
  value = np.array(value, np.float32)
  judged = np.ones(len(value), bool) if judged is None else np.array(judged)
  return Reward(value=value, judged=judged, **more)


@pytest.fixture(scope="module")
def policy() -> Policy:
  config = DecoderConfig(
    vocab_size=9, width=16, layers=1, heads=2, kv_heads=2, head_dim=8, mlp_width=16,
    max_positions=16,
  )  # fmt: skip
  model = Decoder(config)
  params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
  return Policy(model=model, params=params, tokenizer=None, config=config, eos_ids=(0,))


# ---------------------------------------------------------------------- prompts


def test_every_prompt_once_an_epoch_in_another_order_each():
  examples = [Example(i, "", "", "") for i in range(7)]
  taken = [
    [e.id for e in rollouts.prompts_of(examples, i, 2, seed=3)] for i in range(6)
  ]
  first, second = ([i for part in x for i in part] for x in (taken[:3], taken[3:]))
  assert len(set(first)) == len(set(second)) == 6 and first != second
  other = [e.id for e in rollouts.prompts_of(examples, 0, 2, seed=4)]
  assert other != taken[0]
  # Alone, as a resumed run asks.
  assert [e.id for e in rollouts.prompts_of(examples, 4, 2, seed=3)] == taken[4]
  with pytest.raises(ConfigError, match="only 7 training prompts"):
    rollouts.prompts_of(examples, 0, 8, seed=3)


def test_prompts_without_room_are_left_out_and_counted(policy, caplog):
  """The tokenizer gives a token for each character; the model has 16 positions."""
  core = tokenizers.Tokenizer(tokenizers.models.WordLevel({"x": 1}, unk_token="x"))
  core.pre_tokenizer = tokenizers.pre_tokenizers.Split("x", behavior="isolated")
  tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
  policy = dataclasses.replace(policy, tokenizer=tokenizer)
  examples = [Example(i, "x" * size, "", "") for i, size in enumerate((3, 11, 0, 12))]
  kept = rollouts.usable(policy, examples, max_new_tokens=5)
  assert [e.id for e in kept] == [0, 1]
  assert "2 of 4 prompts" in caplog.text and "(ids 2, 3)" in caplog.text
  with pytest.raises(DataError, match="all of 4 prompts"):
    rollouts.usable(policy, examples, max_new_tokens=14)


# ------------------------------------------------------------------------- rows


def test_region_is_the_rows_without_the_padding_inside():
  rollout = rollout_of()
  found = rollouts.region(rollout)
  at = 0
  for i, (prompt, completion, _) in enumerate(ROWS):
    ids = prompt + [token for token, _ in completion]
    np.testing.assert_array_equal(found.tokens[i, : len(ids)], ids)
    np.testing.assert_array_equal(
      found.mask[i], np.arange(found.mask.shape[1]) < len(ids)
    )
    own = np.array([own for _, own in completion], bool)
    assert found.start[i] == len(prompt)
    np.testing.assert_array_equal(found.chosen[i, : len(own)], own)
    assert not found.chosen[i, len(own) :].any()
    expected = -1 - np.arange(at, at + own.sum())
    np.testing.assert_array_equal(found.logp[i, : len(own)][own], expected)
    at += own.sum()
  assert not found.tokens[~found.mask].any()  # 99 is no id of a small model
  assert found.columns == found.chosen.shape[1] == 7


def test_scores_and_values_are_those_of_the_rows_alone(policy):
  """In blocks, with rows that only fill the last one."""
  rollout = rollout_of()
  rows = rollouts.region(rollout)
  small = 3 * rows.tokens.shape[1]  # two blocks of two rows; of three, if uneven
  logp = rollouts.start_logp(policy, rows, 0.7, max_tokens=small)()
  due = score(policy, np.where(rollout.mask, rollout.tokens, 0), rollout.mask, 0.7)
  np.testing.assert_allclose(logp[rows.chosen], due[rollout.completion_mask], atol=1e-5)
  scalar = init_scalar(policy, seed=1)
  value = rollouts.start_values(scalar, rows, max_tokens=small)()
  assert value.shape == (4, rows.columns + 1)
  every = token_values(policy.model, scalar.params, rows.tokens, rows.mask)
  for i, length in enumerate(rollout.lengths):
    # Before the first token is the prompt's end; after the last one, the last token.
    before = rows.start[i] - 1 + np.arange(length + 1)
    np.testing.assert_allclose(value[i, : length + 1], every[i, before], atol=1e-5)


def test_the_reward_is_paid_at_the_last_chosen_token():
  chosen = np.array([[1, 1, 1, 0], [1, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]], bool)
  paid = rollouts.final_rewards(np.array([0.75, 2, -3, 9], np.float32), chosen)
  expected = [[0, 0, 0.75, 0], [0, 0, 2, 0], [0, -3, 0, 0], [0, 0, 0, 0]]
  np.testing.assert_array_equal(paid, expected)


# ---------------------------------------------------------------------- updates


def batch_of(rows, loss_mask=None):
  zeros = np.zeros((rows, 2), np.float32)
  mask = np.ones((rows, 2), bool) if loss_mask is None else loss_mask
  tokens = np.repeat(np.arange(rows, dtype=np.int32)[:, None], 2, axis=1)
  return RLBatch(
    tokens=tokens, mask=mask, start=tokens[:, 0], loss_mask=mask, old_logp=zeros,
    advantage=zeros,
  )  # fmt: skip


def test_every_epoch_takes_each_row_once_in_its_own_order():
  batch = batch_of(12)
  order = lambda iteration, epoch: [
    part.tokens[:, 0].tolist()
    for part in rollouts.minibatches(batch, 3, 0, iteration, epoch, None)
  ]
  orders = [order(0, 0), order(0, 1), order(1, 0)]
  for parts in orders:
    assert [len(part) for part in parts] == [4, 4, 4]
    assert sorted(i for part in parts for i in part) == list(range(12))
  assert orders[0] != orders[1] != orders[2] != orders[0]
  assert order(0, 1) == orders[1]


def test_a_part_without_tokens_is_no_update():
  mask = np.zeros((4, 2), bool)
  mask[2, 0] = True
  parts = list(rollouts.minibatches(batch_of(4, mask), 4, 0, 0, 0, None))
  assert [part.tokens[0, 0] for part in parts] == [2]


def test_means_of_updates():
  means = rollouts.Means()
  means.add({"loss": np.float32(1), "ratio_max": np.float32(5)})
  means.add({"loss": np.float32(2), "ratio_max": np.float32(3), "rare": 4.0})
  assert means.read() == {"loss": 1.5, "ratio_max": 5.0, "rare": 4.0, "skipped": 0.0}


def test_one_update_that_was_skipped_hides_no_other():
  means = rollouts.Means()
  means.add({"loss": np.float32(1), "skipped": np.float32(0)})
  means.add({"loss": np.float32(np.nan), "skipped": np.float32(1)})
  means.add({"loss": np.float32(3), "skipped": np.float32(0)})
  assert means.read() == {"loss": 2.0, "skipped": 1.0}
  means = rollouts.Means()
  means.add({"loss": np.float32(np.inf), "skipped": np.float32(1)})
  assert means.read() == {"loss": np.inf, "skipped": 1.0}
  assert rollouts.Means().read() == {}


def test_means_weigh_tokens_not_minibatches():
  means = rollouts.Means()
  for value, count in ((1.0, 30.0), (5.0, 10.0)):
    means.add({"entropy": value, "count/entropy": count, "grad_norm": value})
  assert means.read() == {"skipped": 0.0, "entropy": 2.0, "grad_norm": 3.0}


# ---------------------------------------------------------------------- rewards


def test_rewards_that_do_not_fit():
  rollout = rollout_of()
  check = lambda reward: rollouts.check_reward(reward, rollout)
  good = reward_of([0.5, 0, 1, np.nan], [True, True, True, False])
  check(good)  # nobody reads what was not judged
  with pytest.raises(DataError, match="4 rows"):
    check(reward_of([1, 2]))
  with pytest.raises(DataError, match=r"row 3 \(prompt 1\) is nan"):
    check(dataclasses.replace(good, judged=np.ones(4, bool)))

  def paying(row, column, amount):
    step = np.zeros((4, 7), np.float32)
    step[row, column] = amount
    return dataclasses.replace(good, step=step)

  check(paying(1, 3, 0.5))
  for wrong, message in (
    (paying(1, 1, 0.5), r"row 1 .*0.5 at completion token 1"),  # forced
    (paying(2, 1, 0.5), r"row 2 .* at completion token 1"),  # after the end
    (paying(1, 3, np.inf), r"row 1 .*inf at completion token 3"),
    (dataclasses.replace(good, step=np.zeros((4, 3))), r"shape \(4, 3\)"),
  ):
    with pytest.raises(DataError, match=message):
      check(wrong)


def test_steps_are_added_to_their_row():
  step = np.zeros((4, 7), np.float32)
  step[0, :2] = 0.25
  found = rollouts.with_steps_added(reward_of([1, 0, 0, 0], step=step), rollout_of())
  assert found.step is None and found.value.tolist() == [1.5, 0, 0, 0]
  assert found.value.dtype == np.float32


def test_metrics_are_of_what_they_say():
  reward = reward_of(
    [1, 0, 0.5, 1e6],
    [True, False, True, False],
    each={"f": np.array([1, np.nan, 0.5, 7], np.float32)},
    counts={"not_judged": 2},
  )
  found = rollouts.rollout_metrics(rollout_of(), reward)
  due = {
    "reward/mean": 0.75,
    "reward/std": 0.25,
    "reward/judged": 0.5,
    "reward/f/mean": 8.5 / 3,
    "reward/not_judged": 2,
    "completion/length_mean": 3,
    "completion/length_max": 5,
    "completion/truncated": 0.5,
    "completion/ended": 0.5,
    "completion/unique": 0.75,
    "rollout/tokens_per_second": 10,
  }
  for name, value in due.items():
    assert found[name] == pytest.approx(value), name
  one = rollout_of()
  last = one.tokens[0][one.completion_mask[0]][-1]
  ended = rollouts.rollout_metrics(one, reward, eos_ids=(int(last),))
  shares = [ended[f"completion/{n}"] for n in ("eos", "stopped", "truncated")]
  by_hand = [int(t[m][-1]) == last for t, m in zip(one.tokens, one.completion_mask)]
  eos = float(np.mean(np.array(by_hand) & one.finished))
  assert shares == pytest.approx([eos, 0.5 - eos, 0.5]) and eos > 0
  nothing = rollouts.rollout_metrics(rollout_of(), reward_of([0] * 4, [False] * 4))
  assert np.isnan(nothing["reward/mean"])  # None is never 0
  # Equal texts of other prompts are no repetition.
  texts = dataclasses.replace(rollout_of(), completions=["x", "y", "x", "y"])
  assert rollouts.rollout_metrics(texts, reward)["completion/unique"] == 1


def test_joined_rewards_keep_their_counts():
  first, second = rollout_of(), rollout_of()
  one = reward_of([1, 2, 3, 4], counts={"failed": 1}, seconds=0.5)
  two = reward_of([5, 6, 7, 8], counts={"failed": 2}, seconds=0.25)
  groups = [(first, one, 1), (second, two, 0), (second, two, 1)]
  rollout, reward = rollouts.join_groups(groups, 2)
  assert reward.value.tolist() == [3, 4, 5, 6, 7, 8]
  assert reward.counts == {"failed": 3} and reward.seconds == 0.75
  assert rollout.prompt_ids.tolist() == [1, 1, 0, 0, 1, 1]

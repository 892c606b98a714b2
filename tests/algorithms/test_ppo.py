"""PPO: the exact optimum where it is known, first-step facts, what is logged."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from rlft.algorithms import ppo
from rlft.core.errors import ConfigError, DataError, DivergenceError
from rlft.core.types import Example, Reward, Rollout
from rlft.models import scalar
from rlft.models.lora import LoRAConfig
from rlft.training import rollouts
from rlft.training.optimizer import OptimizerConfig

EOS, A, B = 0, 1, 2


def settings(**changes):
  # Short completions, most of them cut, are all there is to learn from.
  changes = {"truncated": "score"} | changes
  rate = lambda x: OptimizerConfig(
    learning_rate=x, schedule="linear", eps=1e-5, b2=0.99
  )
  defaults = {
    "optimizer": rate(1e-2),
    "value_optimizer": rate(1e-2),
    "iterations": 30,
    "prompts_per_iteration": 1,
    "samples_per_prompt": 512,
    "max_new_tokens": 1,
    "epochs": 2,
    "minibatches": 2,
    "gae_lambda": 1.0,
    "kl_coef": 0.5,
    "max_rows": 512,
  }
  return ppo.PPOConfig(**(defaults | changes))


PROMPT = [Example(0, "a", "", "")]
WORTH = {EOS: 0.0, A: 0.6, B: 1.0}.__getitem__


def test_three_armed_bandit_reaches_the_regularised_optimum(tiny, toy):
  worth = lambda ids: WORTH(ids[0])
  start = toy.probabilities(tiny, 1)
  goal = toy.optimum(start, worth, 0.5)
  assert toy.total_variation(start, goal) > 0.2  # else standing still would pass
  result = ppo.run(tiny, PROMPT, toy.paying(worth), settings())
  found = toy.probabilities(result.policy, 1)
  assert toy.total_variation(found, goal) < 0.02
  assert result.sampled_solutions == 30 * 512
  kl = sum(p * np.log(p / start[ids]) for ids, p in found.items())
  assert result.iterations[-1]["kl/sequence"] == pytest.approx(kl, abs=0.05)


@pytest.mark.slow
def test_two_tokens_reach_the_regularised_optimum(tiny, toy):
  """Credit over two tokens, rows that end early, and the KL of whole sequences."""
  value = {(EOS,): 0.3, (A, EOS): 0.0, (A, A): 1.0, (A, B): 0.0}
  value |= {(B, EOS): 0.8, (B, A): 0.0, (B, B): 0.4}
  worth = value.__getitem__
  start = toy.probabilities(tiny, 2)
  goal = toy.optimum(start, worth, 0.4)
  assert toy.total_variation(start, goal) > 0.2
  config = settings(
    iterations=25, samples_per_prompt=512, max_new_tokens=2, kl_coef=0.4, max_rows=512
  )
  result = ppo.run(tiny, PROMPT, toy.paying(worth), config)
  assert toy.total_variation(toy.probabilities(result.policy, 2), goal) < 0.02


# ---------------------------------------------------------------- one iteration

TOY = {
  "iterations": 1,
  "samples_per_prompt": 8,
  "max_new_tokens": 4,
  "epochs": 1,
  "minibatches": 1,
}


def pay(rollout, examples):
  """More for longer completions, and for every "a"."""
  chosen = rollout.completion_mask
  value = chosen.sum(1) + 0.25 * ((rollout.tokens == A) & chosen).sum(1)
  return Reward(value=value.astype(np.float32), judged=np.ones(len(value), bool))


def one(tiny, reward=pay, critic=None, **changes):
  return ppo.run(tiny, PROMPT, reward, settings(**(TOY | changes)), value=critic)


def test_first_update_has_ratio_one_and_the_second_epoch_has_not(tiny):
  first = one(tiny, epochs=1, temperature=0.6).iterations[0]
  assert first["ratio_max"] == pytest.approx(1, abs=1e-5)
  assert first["clip_fraction"] == 0
  assert first["kl/sequence"] == pytest.approx(0, abs=1e-5)
  second = one(tiny, epochs=2).iterations[0]
  assert second["ratio_max"] > 1.05 and second["clip_fraction"] > 0


@pytest.mark.parametrize("old_logp", ["auto", "recompute", "sampler"])
def test_a_loss_that_does_not_score_what_was_sampled(
  tiny, old_logp, monkeypatch, caplog
):
  """Another temperature in the loss than in the sampler."""
  right = ppo.hidden_logp
  wrong = lambda *args: right(*args[:-1], np.float32(3.0))
  monkeypatch.setattr(ppo, "hidden_logp", wrong)
  ppo.make_policy_step.cache_clear()
  try:
    if old_logp == "sampler":  # never measured: it is said, and training goes on
      one(tiny, old_logp=old_logp)
      assert "no update has been made" in caplog.text
    else:
      with pytest.raises(DivergenceError, match="no update has been made"):
        one(tiny, old_logp=old_logp)
  finally:
    ppo.make_policy_step.cache_clear()


def test_a_reference_that_is_not_the_start_is_noticed(tiny, monkeypatch):
  right = rollouts.start_logp

  def wrong(policy, rows, temperature, **kwargs):
    return right(policy, rows, 2 * temperature, **kwargs)

  monkeypatch.setattr(rollouts, "start_logp", wrong)
  with pytest.raises(DivergenceError, match="the same model"):
    one(tiny, old_logp="sampler")


LOGGED = """
reward/mean reward/std reward/judged kl/sequence kl/token kl/coef approx_kl
entropy clip_fraction ratio_mean ratio_max value/explained_variance
advantage/mean advantage/std completion/length_mean completion/length_max
completion/truncated completion/ended completion/unique mismatch/max
mismatch/token_mult_prob_error grad_norm learning_rate rollout/tokens_per_second
update/tokens_per_second sampled_solutions policy_loss value_loss
value_clip_fraction time/rollout time/reward time/score time/update
"""


def test_every_number_that_people_look_at_is_logged(tiny):
  stats, later = one(tiny, iterations=2, epochs=2, minibatches=2).iterations
  due = set(LOGGED.split())
  assert not due - set(stats)
  # Not scored again: seen by the first update, before anything moved.
  assert due - set(later) == {"mismatch/max"}
  assert later["mismatch/token_mult_prob_error"] == pytest.approx(1, abs=1e-4)
  assert later["mult_prob_error"] > 1.01
  assert all(np.isfinite(x) for x in stats.values())
  assert stats["mismatch/max"] < 1e-4
  assert 0 < stats["entropy"] < np.log(3)


GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "ppo_iteration.json"


def test_golden_metrics_of_two_iterations(tiny):
  """What PPO computes has changed if this fails.

  Where that was meant, write `golden_metrics` of the fixture to the file, and say in
  the commit why they moved.
  """
  due = json.loads(GOLDEN.read_text())
  found = golden_metrics(tiny)
  assert len(found) == len(due)
  for ours, theirs in zip(found, due):
    assert ours.keys() == theirs.keys()
    for name in theirs:
      assert ours[name] == pytest.approx(theirs[name], rel=2e-3, abs=2e-5), name


def golden_metrics(tiny):
  result = one(tiny, iterations=2, epochs=2, minibatches=2)
  timed = ("time/", "tokens_per_second", "mismatch/")  # not of what is computed
  return [
    {k: x for k, x in stats.items() if not any(word in k for word in timed)}
    for stats in result.iterations
  ]


def leaves(policy):
  return jax.tree.leaves(policy.params)


def largest_change(a, b):
  pairs = zip(leaves(a), leaves(b))
  return max(float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in pairs)


def test_micro_batches_change_nothing(tiny):
  whole = one(tiny, epochs=2, minibatches=2)
  parts = one(tiny, epochs=2, minibatches=2, micro_batches=4)
  assert largest_change(whole.policy, parts.policy) < 1e-5
  assert largest_change(whole.policy, tiny) > 1e-2
  for name in ("ratio_max", "entropy", "approx_kl", "value_loss", "grad_norm"):
    ours, theirs = whole.iterations[0][name], parts.iterations[0][name]
    assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-6), name


def nothing(rollout, examples):
  return Reward(value=np.zeros(8, np.float32), judged=np.zeros(8, bool))


def test_rows_without_judgement_teach_nothing(tiny):
  """Their tokens are in no loss, whitening or statistic."""

  def partly(rollout, examples):
    full = pay(rollout, examples)
    judged = np.arange(len(full.value)) % 2 == 0
    return Reward(value=np.where(judged, full.value, 1e6), judged=judged)

  stats = one(tiny, reward=partly).iterations[0]
  assert stats["reward/judged"] == 0.5 and stats["reward/mean"] < 10
  assert stats["advantage/std"] < 100

  result = one(tiny, reward=nothing)
  assert largest_change(result.policy, tiny) == 0
  assert result.iterations[0]["update/skipped"] == 1


def test_what_is_cut_can_be_left_out_or_bootstrapped(tiny):
  plain, masked = one(tiny), one(tiny, truncated="mask")
  assert 0 < plain.iterations[0]["completion/truncated"] < 1
  assert masked.update_tokens < plain.update_tokens
  value = scalar.init_scalar(tiny, kind="value")
  value = dataclasses.replace(
    value, params=value.params | {"head": {"kernel": value.params["head"]["kernel"],
                                           "bias": np.float32(5)}}
  )  # fmt: skip
  cut = one(tiny, critic=value).iterations[0]
  more = one(tiny, critic=value, truncated="bootstrap").iterations[0]
  assert more["advantage/mean"] > cut["advantage/mean"] + 0.5


@pytest.mark.parametrize("value", ["separate", "shared"])
def test_lora_leaves_the_base_alone(tiny, value):
  before = [np.array(x) for x in leaves(tiny)]
  config = {"lora": LoRAConfig(rank=2, targets=("attention/q", "mlp/up")), "epochs": 2}
  result = one(tiny, value=value, **config)
  for x, y in zip(before, leaves(tiny)):
    np.testing.assert_array_equal(x, y)
  moved = {
    "/".join(p.key for p in path)
    for (path, x), y in zip(
      jax.tree_util.tree_leaves_with_path(result.policy.params), leaves(tiny)
    )
    if not np.array_equal(x, y)
  }
  assert moved == {"layers/attention/q/kernel", "layers/mlp/up/kernel"}
  assert result.iterations[0]["ratio_max"] > 1


def test_a_shared_trunk_learns_values(tiny):
  loss = ppo.PPOLoss(value_coef=1.0, value_clip=0.0)
  result = one(
    tiny, value="shared", iterations=6, epochs=4, samples_per_prompt=64, loss=loss
  )
  first, last = result.iterations[0], result.iterations[-1]
  assert last["value_loss"] < 0.5 * first["value_loss"]
  assert result.value is None


def test_critic_warmup_moves_the_value_model_only(tiny):
  result = one(tiny, critic_warmup=1, epochs=2)
  assert largest_change(result.policy, tiny) == 0
  assert result.update_tokens == 0
  assert np.abs(result.value.params["head"]["kernel"]).max() > 0


def test_the_controller_holds_the_kl(tiny):
  config = {
    "iterations": 3,
    "samples_per_prompt": 64,
    "kl_target": 0.01,
    "kl_horizon": 64,
  }
  stats = one(tiny, **config).iterations
  assert stats[0]["kl/coef"] == 0.5 and stats[1]["kl/coef"] == pytest.approx(0.4)
  assert stats[1]["kl/sequence"] > 0.012 and stats[2]["kl/coef"] > stats[1]["kl/coef"]


def test_the_controller_waits_for_a_policy_that_moves(tiny):
  """During the critic's warm-up, or without judgement, no KL of 0 was measured."""
  config = {"iterations": 2, "kl_target": 0.01, "kl_horizon": 64}
  stats = one(tiny, critic_warmup=1, **config).iterations
  assert stats[1]["kl/coef"] == 0.5
  result = one(tiny, reward=nothing, **config)
  assert result.iterations[1]["kl/coef"] == 0.5 and result.update_tokens == 0


def test_step_rewards_are_paid_where_they_fall(tiny):
  def dense(rollout, examples):
    plain = pay(rollout, examples)
    prompt = 1 + int(np.argmax(rollout.mask[0]))
    step = np.zeros((len(plain.value), rollout.mask.shape[1] - prompt), np.float32)
    step[:, 0] = 3.0
    return dataclasses.replace(plain, step=step)

  sparse = one(tiny).iterations[0]["reward/with_kl"]
  assert one(tiny, reward=dense).iterations[0]["reward/with_kl"] == pytest.approx(
    sparse + 3, abs=1e-4
  )


# ---------------------------------------------------- credit, with numbers by hand


def by_hand(tiny, completions, finished, scores, after=0.0, steps=None, **changes):
  """Batch and numbers of rows whose values are 0.5, and `after` behind the last token.

  A completion is a string: "a" was chosen, "t" is the output of a tool.
  """
  count, wide = len(completions), max(map(len, completions))
  chosen = np.zeros((count, 2 + wide), bool)
  mask = np.zeros_like(chosen)
  lengths = np.array([len(text) for text in completions], np.int32)
  value = np.full((count, wide + 1), np.nan, np.float32)  # nobody reads the others
  for i, text in enumerate(completions):
    own = np.array(list(text)) == "a"
    mask[i, : 2 + len(text)] = True
    chosen[i, 2 : 2 + len(text)] = own
    value[i, : len(text)][own] = 0.5
    value[i, len(text)] = after
  logp = np.where(chosen[:, 2:], np.float32(-1), np.float32(np.nan))
  rollout = Rollout(
    tokens=np.ones_like(chosen, dtype=np.int32),
    mask=mask,
    completion_mask=chosen,
    logp=np.where(chosen, -1.0, 0.0),
    raw_logp=np.where(chosen, -1.0, 0.0),
    finished=np.array(finished),
    prompt_lengths=np.full(count, 2, np.int32),
    lengths=lengths,
    prompt_ids=np.zeros(count, np.int32),
    completions=list(completions),
    samples=count,
  )
  config = settings(
    **(TOY | {"whiten_advantages": False, "gae_lambda": 0.95} | changes)
  )
  run = ppo._Run(tiny, config, None, None)
  judged = np.array([x is not None for x in scores])
  reward = Reward(np.array([x or 0 for x in scores], np.float32), judged, steps)
  rows = rollouts.region(rollout)
  rows = dataclasses.replace(rows, logp=logp, columns=wide)
  return run._batch(rollout, reward, rows, logp, logp, value)


GAE = [0.4286875, 0.45125, 0.475, 0.5]  # gamma 1, lambda 0.95, V 0.5, 1 at the end


def test_whitening_leaves_the_returns(tiny):
  rows = [["aaaa", "aa"], [True, True], [1.0, -2.0]]
  plain, said = by_hand(tiny, *rows)
  white, also = by_hand(tiny, *rows, whiten_advantages=True)
  np.testing.assert_array_equal(white.returns, plain.returns)
  own = white.advantage[white.loss_mask]
  assert own.mean() == pytest.approx(0, abs=1e-6) and own.std() == pytest.approx(1)
  assert said["advantage/std"] == also["advantage/std"] != pytest.approx(1)


@pytest.mark.parametrize("completion", ["aaaa", "aataa", "aattttaa", "taataatt"])
def test_what_a_tool_said_breaks_no_credit(tiny, completion):
  """Neither values, KL nor rewards are read there, be they NaN."""
  batch, stats = by_hand(tiny, [completion], [True], [1.0])
  own = np.array(list(completion)) == "a"
  np.testing.assert_array_equal(batch.loss_mask[0], own)
  np.testing.assert_allclose(batch.advantage[0][own], GAE, rtol=1e-6)
  np.testing.assert_allclose(batch.returns[0][own], np.array(GAE) + 0.5, rtol=1e-6)
  assert not batch.advantage[0][~own].any()
  assert stats["reward/with_kl"] == 1 and stats["kl/sequence"] == 0


def test_what_follows_a_row_that_was_cut(tiny):
  """Bootstrapped by the value behind its last token, also where a tool wrote that."""
  rows = ["aaaa", "aaaa", "aaaat"]
  cut = {"finished": [True, False, False], "scores": [1.0, 0.0, 0.0], "after": 1.0}
  batch, _ = by_hand(tiny, rows, truncated="bootstrap", **cut)
  for row in batch.advantage:
    np.testing.assert_allclose(row[:4], GAE, rtol=1e-6)
  batch, _ = by_hand(tiny, rows, truncated="score", **cut)
  assert batch.advantage[1, 3] == pytest.approx(-0.5)
  batch, _ = by_hand(tiny, rows, truncated="mask", **cut)
  assert batch.loss_mask.any(1).tolist() == [True, False, False]


def test_scores_are_scaled_and_keep_their_mean(tiny):
  scores = [0.0, 0.0, 4.0, None]
  rows, ended = ["a"] * 4, [True] * 4
  batch, stats = by_hand(tiny, rows, ended, scores, scale_rewards=True)
  got = batch.advantage[:3, 0] + 0.5  # the value
  assert got.mean() == pytest.approx(4 / 3) and got.std() == pytest.approx(1)
  assert stats["reward/with_kl"] == pytest.approx(4 / 3)  # of rows that were judged
  # Equal scores have no deviation to divide by.
  batch, _ = by_hand(tiny, rows, ended, [0.5] * 4, scale_rewards=True)
  np.testing.assert_allclose(batch.advantage[:, 0], 0, atol=1e-6)


def test_a_row_that_was_cut_is_not_paid_for_a_lucky_prefix(tiny):
  """By default it is left out; bootstrapped, its value stands in place of its score."""
  assert ppo.PPOConfig().truncated == "mask"
  rows, cut = ["aaaa", "aaaa"], {"finished": [True, False], "scores": [0.0, 1.0]}
  batch, said = by_hand(tiny, rows, truncated="mask", **cut)
  assert batch.loss_mask.any(1).tolist() == [True, False]
  assert said["reward/with_kl"] == 0
  lucky, _ = by_hand(tiny, rows, truncated="bootstrap", **cut)
  honest, _ = by_hand(tiny, rows, [True, False], [0.0, 0.0], truncated="bootstrap")
  np.testing.assert_array_equal(lucky.advantage, honest.advantage)
  taught, _ = by_hand(tiny, rows, truncated="score", **cut)
  assert taught.advantage[1, 3] > 0


def test_scaling_covers_the_rewards_of_steps(tiny):
  """Sums of rows have deviation 1 and their mean; shares of steps are kept."""
  steps = np.array([[1, 0], [0, 2], [3, 0], [9, 9]], np.float32)
  how = {"completions": ["aa"] * 4, "finished": [True] * 4, "steps": steps}
  scores = [0.5, 1.0, -1.0, None]
  batch, _ = by_hand(tiny, scores=scores, scale_rewards=True, gae_lambda=1.0, **how)
  paid = batch.advantage[:, 0] + 0.5  # of the whole row, as gamma is 1
  due = np.array([1.5, 3.0, 2.0])
  np.testing.assert_allclose(
    paid[:3], (due - due.mean()) / due.std() + due.mean(), rtol=1e-5
  )
  later = batch.advantage[:, 1] + 0.5  # without what the first token was paid
  np.testing.assert_allclose(
    paid[[0, 2]] - later[[0, 2]], np.array([1, 3]) / due.std(), rtol=1e-5
  )


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"minibatches": 3}, "multiple of minibatches"),
    ({"prompts_per_iteration": 2}, "only 1 training prompts"),
    ({"temperature": 0.0}, "must be positive"),
    ({"kl_coef": 0.0, "kl_target": 1.0}, "start above 0"),
    ({"value": "shared", "loss": ppo.PPOLoss(aggregate="sequence")}, "separate"),
    ({"old_logp": "guess"}, "choose one of"),
    ({"gamma": 1.5}, "from 0 to 1"),
    ({"value": "shared", "critic_warmup": 1}, "needs value='separate'"),
    ({"loss": ppo.PPOLoss(aggregate="tokens")}, "aggregate is 'tokens'"),
    ({"loss": ppo.PPOLoss(dual_clip=0.5)}, "dual_clip 0.5"),
    ({"loss": ppo.PPOLoss(value_clip=-1)}, "clip_range is -1"),
  ],
)
def test_settings_that_cannot_be(tiny, changes, message, monkeypatch):
  monkeypatch.setattr(rollouts, "sample", lambda *args, **kwargs: 1 / 0)  # before it
  with pytest.raises(ConfigError, match=message):
    one(tiny, **changes)


def test_another_run_compiles_nothing(tiny):
  """Temperature, coefficients, seeds, lengths inside a bucket: all are traced."""
  run = ppo._Run(tiny, settings(**TOY), None, None)
  programs = [run.step, run.value_step, ppo.estimate_advantages]
  programs += [rollouts._logp_block, rollouts._value_block]
  compiled = lambda: [program._cache_size() for program in programs]
  one(tiny)
  before = compiled()
  assert min(before) > 0
  one(
    tiny, iterations=3, epochs=2, temperature=0.7, max_new_tokens=6, seed=5,
    kl_coef=0.1, kl_target=1.0, gamma=0.9, truncated="bootstrap",
  )  # fmt: skip
  assert compiled() == before


def test_rewards_that_do_not_fit(tiny):
  short = lambda rollout, examples: Reward(np.zeros(3, np.float32), np.ones(3, bool))
  nan = lambda rollout, examples: Reward(
    np.full(8, np.nan, np.float32), np.ones(8, bool)
  )
  with pytest.raises(DataError, match="8 rows"):
    one(tiny, reward=short)
  with pytest.raises(DataError, match="prompt 0"):
    one(tiny, reward=nan)
  with pytest.raises(DataError, match="no training prompts"):
    ppo.run(tiny, [], pay, settings())
  with pytest.raises(DataError, match=r"all of 1 .* longer than the 12 tokens"):
    ppo.run(tiny, [Example(0, "a" * 13, "", "")], pay, settings(**TOY))
  for policy, config in (("mini", settings()), (tiny, {"iterations": 3})):
    with pytest.raises(ConfigError, match="and no P"):
      ppo.run(policy, [Example(0, "a", "", "")], pay, config)
  with pytest.raises(ConfigError, match="no PPOLoss"):
    settings(loss={"clip_range": 0.2})
  with pytest.raises(ConfigError, match="as_value"):
    one(tiny, critic=scalar.init_scalar(tiny))  # a reward model, not normalised


# ---------------------------------------------------------------- many devices


@pytest.mark.slow
@pytest.mark.parametrize("value", ["separate", "shared"])
def test_on_a_mesh(tiny, spread, value):
  config = {"iterations": 2, "epochs": 2, "minibatches": 2, "value": value}
  ppo.make_policy_step.cache_clear()  # with and without a head it is one function
  alone, many = one(tiny, **config), one(spread, **config)
  same_metrics(alone, many)
  assert largest_change(alone.policy, many.policy) < 1e-4
  kernel = many.policy.params["layers"]["mlp"]["up"]["kernel"]
  assert not kernel.sharding.is_fully_replicated
  # Nothing lies elsewhere after an update than before the first one.
  run = ppo._Run(spread, settings(**(TOY | config)), None, None)
  assert run.step._cache_size() == 1
  assert value == "shared" or run.value_step._cache_size() == 1


def same_metrics(a, b):
  for ours, theirs in zip(a.iterations, b.iterations, strict=True):
    assert ours.keys() == theirs.keys()
    for name in ours:
      if not any(word in name for word in ("time/", "tokens_per_second")):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-4), name

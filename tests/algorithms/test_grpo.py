"""GRPO and its relatives: the optimum, groups without signal, dynamic sampling."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from rlft.algorithms import grpo
from rlft.core.errors import ConfigError, DataError
from rlft.core.types import Example, Reward
from rlft.models.lora import LoRAConfig
from rlft.training import rollouts
from rlft.training.optimizer import OptimizerConfig

A = 1
PROMPT = [Example(0, "a", "", "")]
PROMPTS = [Example(i, "a" if i % 2 else "b", "", "") for i in range(6)]
TOY = {
  "iterations": 1,
  "prompts_per_iteration": 2,
  "samples_per_prompt": 8,
  "max_new_tokens": 4,
}


def settings(name="grpo", **changes):
  # Short completions, most of them cut, are all there is to learn from.
  changes = {"mask_truncated": False} | changes
  optimizer = OptimizerConfig(learning_rate=1e-2, schedule="linear", eps=1e-5, b2=0.99)
  return grpo.preset(name, **({"optimizer": optimizer} | TOY | changes))


def pay(rollout, examples):
  chosen = rollout.completion_mask
  value = chosen.sum(1) + 0.25 * ((rollout.tokens == A) & chosen).sum(1)
  return Reward(value=value.astype(np.float32), judged=np.ones(len(value), bool))


def change(a, b):
  pairs = zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params))
  return max(float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in pairs)


def test_rloo_reaches_the_regularised_optimum(tiny, toy):
  """The KL in the reward, a leave-one-out baseline, no clipping: an exact gradient."""
  worth = lambda ids: {0: 0.0, 1: 0.6, 2: 1.0}[ids[0]]
  start = toy.probabilities(tiny, 1)
  goal = toy.optimum(start, worth, 0.5)
  assert toy.total_variation(start, goal) > 0.2
  config = settings(
    "rloo", iterations=40, prompts_per_iteration=1, samples_per_prompt=256,
    max_new_tokens=1, kl_reward=0.5, max_rows=256,
  )  # fmt: skip
  result = grpo.run(tiny, PROMPT, toy.paying(worth), config)
  assert toy.total_variation(toy.probabilities(result.policy, 1), goal) < 0.02


LOGGED = """
reward/mean reward/std reward/judged approx_kl entropy clip_fraction ratio_mean
ratio_max advantage/mean advantage/std groups/equal completion/length_mean
completion/length_max completion/truncated completion/ended completion/unique
mismatch/max mismatch/token_mult_prob_error grad_norm learning_rate sampled_solutions
rollout/tokens_per_second update/tokens_per_second policy_loss time/rollout time/reward
time/score time/update
"""


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "rloo", "reinforce"])
def test_every_preset_takes_a_step_towards_more_reward(tiny, name):
  config = settings(name, iterations=3, samples_per_prompt=32)
  result = grpo.run(tiny, PROMPTS, pay, config)
  first, last = result.iterations[0], result.iterations[-1]
  assert last["reward/mean"] > first["reward/mean"] + 0.1
  assert first["ratio_max"] == pytest.approx(1, abs=1e-5)
  assert all(np.isfinite(x) for x in last.values())
  assert not set(LOGGED.split()) - set(first)
  assert set(LOGGED.split()) - set(last) == {"mismatch/max"}  # not scored again
  assert last["mismatch/token_mult_prob_error"] == pytest.approx(1, abs=1e-4)
  assert "kl/sequence" in first and "kl/sequence" in last


def test_groups_without_signal_change_nothing(tiny):
  flat = lambda rollout, examples: Reward(
    value=np.full(16, 0.7, np.float32), judged=np.ones(16, bool)
  )
  result = grpo.run(tiny, PROMPTS, flat, settings("dr_grpo"))
  stats = result.iterations[0]
  assert stats["groups/equal"] == 1 and stats["advantage/equal_groups"] == 1
  assert stats["grad_norm"] == 0
  assert change(result.policy, tiny) == 0


def only_prompt_three(rollout, examples):
  """One prompt's samples differ; those of all others are worth 0.75."""
  full = pay(rollout, examples)
  value = np.where(rollout.prompt_ids == 3, full.value, np.float32(0.75))
  return Reward(value=value, judged=full.judged, each={"x": value})


def test_every_rollout_has_new_noise(tiny, monkeypatch):
  """Draws and iterations alike; a run that is resumed asks for the same again."""
  steps, right = [], rollouts.generate

  def recorded(*args, step, **kwargs):
    steps.append((step, kwargs["seed"]))
    return right(*args, step=step, **kwargs)

  monkeypatch.setattr(rollouts, "generate", recorded)
  config = settings("dr_grpo", iterations=2, dynamic_sampling=2, seed=7)
  flat = lambda rollout, examples: Reward(np.ones(16, np.float32), np.ones(16, bool))
  grpo.run(tiny, PROMPTS, flat, config)
  assert steps == [(i, 7) for i in range(6)]


def test_dynamic_sampling_draws_until_groups_differ(tiny):
  plain = grpo.run(tiny, PROMPTS, only_prompt_three, settings("dr_grpo"))
  assert plain.sampled_solutions == 16
  config = settings("dr_grpo", dynamic_sampling=5)
  result = grpo.run(tiny, PROMPTS, only_prompt_three, config)
  stats = result.iterations[0]
  order = [rollouts.prompts_of(PROMPTS, i, 2, 0) for i in range(6)]
  has_signal = [any(e.id == 3 for e in prompts) for prompts in order]
  draws = [i + 1 for i, has in enumerate(has_signal) if has][1]  # two groups are needed
  assert stats["groups/draws"] == draws and result.sampled_solutions == draws * 16
  assert stats["advantage/equal_groups"] == 0  # it came up in both passes
  # Said of all samples, of which most are of the other prompts; trained on 16.
  assert stats["reward/x/mean"] == stats["reward/mean"]
  others = 0.75 * (2 * draws - 2) / (2 * draws)
  assert 0 < (stats["reward/mean"] - others) * draws < 5  # prompt 3's mean
  config = settings("dr_grpo", dynamic_sampling=5)
  enough = grpo.run(tiny, PROMPTS, pay, config)
  assert enough.iterations[0]["groups/draws"] == 1


def test_a_group_that_differs_in_cut_rows_alone_is_an_equal_one(tiny):
  """Where those do not train, it has no gradient: others are drawn in its place."""

  def ended(rollout, examples):
    value = np.where(rollout.finished, np.float32(0), np.arange(16, dtype=np.float32))
    return Reward(value, np.ones(16, bool))

  for masks, draws in ((True, 3), (False, 1)):
    config = settings("dapo", dynamic_sampling=2, mask_truncated=masks)
    (stats,) = grpo.run(tiny, PROMPTS, ended, config).iterations
    assert stats["groups/draws"] == draws
    assert stats["groups/equal"] == stats["advantage/equal_groups"] == masks


def test_joined_groups_are_the_rows_that_were_sampled(tiny):
  """Prompts of other lengths in the second draw: nothing moves against its mask."""
  sample = lambda texts, step: rollouts.sample(
    tiny,
    [Example(i, text, "", "") for i, text in enumerate(texts)],
    samples=2, temperature=1.0, max_new_tokens=3 + step, seed=0, step=step,
  )  # fmt: skip
  first, second = sample(["a", "b"], 0), sample(["aab" * 3, "b"], 1)
  reward = lambda r: pay(r, None)
  groups = [(second, reward(second), 0), (first, reward(first), 1)]
  joined, judged = rollouts.join_groups(groups, 2)
  assert joined.completions == second.completions[:2] + first.completions[2:]
  for row, (source, at) in enumerate(
    [(second, 0), (second, 1), (first, 2), (first, 3)]
  ):
    for name in ("tokens", "raw_logp"):
      ours = getattr(joined, name)[row][joined.mask[row]]
      np.testing.assert_array_equal(ours, getattr(source, name)[at][source.mask[at]])
    chosen = joined.tokens[row][joined.completion_mask[row]]
    np.testing.assert_array_equal(chosen, source.tokens[at][source.completion_mask[at]])
  np.testing.assert_array_equal(judged.value, pay(joined, None).value)
  rows = rollouts.region(joined)
  assert (rows.chosen.sum(1) == joined.lengths).all()


def test_when_all_rows_are_cut_nothing_is_updated(tiny, caplog):
  """B5: not even by the optimiser's momentum; and it is counted."""
  config = settings(iterations=2, max_new_tokens=1, mask_truncated=True, minibatches=2)
  tiny = dataclasses.replace(tiny, eos_ids=(7,))  # no token of its vocabulary
  result = grpo.run(tiny, PROMPTS, pay, config)
  for stats in result.iterations:
    assert stats["completion/truncated"] == 1
    assert stats["update/skipped"] == 2 * config.epochs
  assert change(tiny, result.policy) == 0
  assert "nothing is updated" in caplog.text


def test_a_row_that_was_cut_teaches_nothing_by_default(tiny):
  """Whatever its prefix is worth: not by itself, and in no baseline."""
  assert grpo.GRPOConfig().mask_truncated

  def lucky(worth):
    def reward(rollout, examples):
      value = np.where(rollout.finished, pay(rollout, examples).value, worth)
      return Reward(value.astype(np.float32), np.ones(len(value), bool))

    return reward

  config = settings(mask_truncated=True)
  one, other = (grpo.run(tiny, PROMPTS, lucky(x), config) for x in (0.0, 100.0))
  assert 0 < one.iterations[0]["completion/truncated"] < 1
  assert change(one.policy, tiny) > 0 and change(one.policy, other.policy) == 0
  taught = grpo.run(tiny, PROMPTS, lucky(100.0), settings())
  assert change(taught.policy, other.policy) > 0


def test_the_kl_to_the_start_is_measured_without_a_term_of_it(tiny):
  stats = grpo.run(
    tiny, PROMPTS, pay, settings("dr_grpo", iterations=4, kl_every=2)
  ).iterations
  has = ["kl/sequence" in one for one in stats]
  assert has == [True, False, True, True]
  assert stats[0]["kl/sequence"] == pytest.approx(0, abs=1e-5)
  assert stats[3]["kl/sequence"] > 1e-4
  never = grpo.run(tiny, PROMPTS, pay, settings("dr_grpo", kl_every=0)).iterations
  assert "kl/sequence" not in never[0]


def test_rows_without_judgement_are_in_no_baseline(tiny):
  def partly(rollout, examples):
    full = pay(rollout, examples)
    judged = np.arange(len(full.value)) % 4 != 0
    return Reward(value=np.where(judged, full.value, 1e6), judged=judged)

  stats = grpo.run(tiny, PROMPTS, partly, settings()).iterations[0]
  assert stats["advantage/judged"] == 0.75
  # Of the rows that train alone: three of four would have sqrt(3/4) of it.
  assert stats["advantage/std"] == pytest.approx((5 / 6) ** 0.5, abs=0.01)


def test_micro_batches_change_nothing(tiny):
  each = [
    grpo.run(tiny, PROMPTS, pay, settings(micro_batches=n, epochs=2)) for n in (1, 4)
  ]
  assert change(each[0].policy, each[1].policy) < 1e-5
  tokens = 16 * each[0].iterations[0]["completion/length_mean"]  # of both epochs
  assert each[0].update_tokens == each[1].update_tokens == 2 * round(tokens)
  assert each[0].iterations[0]["ratio_max"] > 1.001  # the second epoch


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"samples_per_prompt": 1}, "its own baseline"),
    ({"prompts_per_iteration": 7}, "only 6 training prompts"),
    ({"minibatches": 3}, "multiple of minibatches"),
    ({"baseline": "mean"}, "choose one of"),
    ({"loss": grpo.GRPOLoss(aggregate="rows")}, "aggregate is 'rows'"),
    ({"loss": grpo.GRPOLoss(kl_estimator="k4")}, "'k4'"),
    ({"loss": grpo.GRPOLoss(clip=False, dual_clip=2.0)}, "no meaning"),
    ({"temperature": 0.0}, "must be positive"),
  ],
)
def test_settings_that_cannot_be(tiny, changes, message, monkeypatch):
  monkeypatch.setattr(rollouts, "sample", lambda *args, **kwargs: 1 / 0)  # before it
  with pytest.raises(ConfigError, match=message):
    grpo.run(tiny, PROMPTS, pay, settings(**changes))


def test_prompts_and_presets_that_cannot_be(tiny):
  with pytest.raises(ConfigError, match="choose one of"):
    grpo.preset("gspo2")
  for name, meant in (
    ("iteration", "did you mean 'iterations'"),
    ("kl_coef", r"loss=GRPOLoss\(kl_coef=\.\.\.\)"),
    ("learning_rate", r"optimizer=OptimizerConfig\(learning_rate=\.\.\.\)"),
    ("group_size", r"\(settings: .*samples_per_prompt"),
  ):
    with pytest.raises(ConfigError, match=f"no setting '{name}'.*{meant}"):
      grpo.preset("grpo", **{name: 1})
  with pytest.raises(DataError, match="same id"):
    grpo.run(tiny, PROMPT * 2, pay, settings())
  with pytest.raises(ConfigError, match=r"loss is .*no GRPOLoss"):
    grpo.preset("grpo", loss={"kl_coef": 0.1})
  with pytest.raises(ConfigError, match=r"policy is 'mini', and no Policy: rlft\.load"):
    grpo.run("mini", PROMPTS, pay, settings())
  with pytest.raises(ConfigError, match=r"config is .*no GRPOConfig: grpo\.preset"):
    grpo.run(tiny, PROMPTS, pay, {"iterations": 3})


@pytest.mark.slow
def test_on_a_mesh(tiny, spread):
  """With adapters, and with draws that are joined."""
  config = settings(
    "rloo", iterations=2, epochs=2, minibatches=2, dynamic_sampling=5,
    lora=LoRAConfig(rank=2, targets=("attention/q", "mlp/up")),
  )  # fmt: skip
  alone, many = (
    grpo.run(policy, PROMPTS, only_prompt_three, config) for policy in (tiny, spread)
  )
  for ours, theirs in zip(alone.iterations, many.iterations, strict=True):
    assert ours.keys() == theirs.keys() and ours["groups/draws"] > 1
    for name in ours:
      if not any(word in name for word in ("time/", "tokens_per_second")):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-4), name
  assert change(alone.policy, many.policy) < 1e-4
  kernel = many.policy.params["layers"]["mlp"]["up"]["kernel"]
  assert not kernel.sharding.is_fully_replicated

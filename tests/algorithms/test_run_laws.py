"""Laws of whole runs: what PPO and GRPO hand to their updates, written out here.

From the rows of a batch alone: rewards, log-probabilities, values and baselines are
made anew, by loops over rows, and nothing of `rlft.objectives` or of
`rlft.sampling.score` is used. A setting that a run drops, or a column that is read one
place off, is seen.
"""

from __future__ import annotations

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlft.algorithms import grpo, ppo
from rlft.core.errors import StoppedError
from rlft.core.types import Example, Reward
from rlft.models import scalar
from rlft.training import rollouts
from rlft.training.checkpoint import Checkpointer
from rlft.training.optimizer import OptimizerConfig
from rlft.training.saving import Saving

EOS, A, B = 0, 1, 2
HEAT = 1.5
LONGEST = 6
# Prompts of unequal length, so that completions begin in different columns.
EXAMPLES = [Example(i, prompt, "", "") for i, prompt in enumerate(("a", "bb", "aba"))]
SMALL = {
  "iterations": 2, "prompts_per_iteration": 3, "samples_per_prompt": 8,
  "max_new_tokens": LONGEST, "temperature": HEAT, "epochs": 1, "minibatches": 1,
  "optimizer": OptimizerConfig(learning_rate=2e-2, schedule="constant", eps=1e-5),
}  # fmt: skip
STILL = OptimizerConfig(learning_rate=1e-12, schedule="constant")

Handed = collections.namedtuple("Handed", "loss batch params")


def worth(ids):
  return len(ids) + 0.25 * ids.count(A)


def pay(rollout, examples):
  rows = zip(rollout.tokens, rollout.completion_mask)
  value = np.array([worth(row[chosen].tolist()) for row, chosen in rows], np.float32)
  return Reward(value=value, judged=np.ones(len(value), bool))


@pytest.fixture
def handed(monkeypatch):
  """(loss, batch, parameters before it) of every update of a run's policy."""
  seen = []
  for module, name in ((grpo, "make_train_step"), (ppo, "make_policy_step")):
    make = getattr(module, name)

    def recorded(model, loss, *rest, make=make):
      step = make(model, loss, *rest)

      def update(state, batch, *frozen):
        seen.append(Handed(loss, *jax.device_get((batch, state.params))))
        return step(state, batch, *frozen)

      return update

    monkeypatch.setattr(module, name, recorded)
  return seen


@functools.partial(jax.jit, static_argnums=0)
def _forward(model, params, kernel, tokens, mask):
  positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
  hidden = model.apply({"params": params}, tokens, positions, mask).hidden
  return jax.nn.log_softmax(hidden @ params["head"] / HEAT), hidden @ kernel + 0.5


def rows_of(policy, params, batch, kernel=0.0):
  """(ids of the prompt, of the completion, its log-probs, values) of each row; of
  values there is one more, of the state after the last token."""
  kernel = jnp.broadcast_to(jnp.float32(kernel), policy.config.width)
  logp, value = _forward(policy.model, params, kernel, batch.tokens, batch.mask)
  logp, value, out = np.asarray(logp), np.asarray(value), []
  for i, start in enumerate(batch.start):
    ids = batch.tokens[i][batch.mask[i]].tolist()
    at = range(start - 1, len(ids) - 1)
    own = np.array([logp[i, t, ids[t + 1]] for t in at])
    out.append((tuple(ids[:start]), ids[start:], own, value[i, start - 1 : len(ids)]))
  return out


def kl(kind, apart):
  return {"k1": apart, "k3": np.exp(-apart) - 1 + apart}[kind]


def mean_over(rows, mode):
  """Of a quantity of each token, over the rows that have any."""
  rows = [row for row in rows if len(row)]
  if mode == "token":
    return np.concatenate(rows).mean()
  return np.mean([row.mean() if mode == "sequence" else row.sum() / LONGEST
                  for row in rows])  # fmt: skip


def same(found_BC, rows):
  """Row by row, and nothing behind them."""
  for found, right in zip(found_BC, rows, strict=True):
    right = np.pad(np.asarray(right, np.float64), (0, len(found) - len(right)))
    np.testing.assert_allclose(found, right, atol=2e-4)


PPO = {
  "bootstrap": {
    "truncated": "bootstrap", "gamma": 0.9, "gae_lambda": 0.6, "kl_estimator": "k3",
    "whiten_advantages": False, "kl_target": 1.0, "kl_horizon": 96,
    "loss": ppo.PPOLoss(aggregate="constant"),
  },
  "mask": {"gamma": 0.8},
}  # fmt: skip


@pytest.mark.parametrize("name", PPO)
def test_ppo_hands_on_what_is_paid_later_less_what_was_expected(tiny, handed, name):
  """A_t = d_t + gamma lambda A_t', d_t = r_t - coef KL_t + gamma V_t' - V_t."""
  config = ppo.PPOConfig(**SMALL, **PPO[name], kl_coef=0.5, value_optimizer=STILL)
  kernel = np.random.default_rng(0).normal(size=tiny.config.width) * 0.3
  critic = scalar.init_scalar(tiny, init="zero")
  head = {"kernel": jnp.float32(kernel), "bias": jnp.float32(0.5)}
  critic = dataclasses.replace(critic, params=critic.params | {"head": head})
  stats = ppo.run(tiny, EXAMPLES, pay, config, value=critic).iterations
  # Before anything moved the KL is 0 and the controller's error is cut at -0.2.
  coefs = (0.5, 0.5 * (1 - 0.2 * 24 / 96) if config.kl_target else 0.5)
  ends = []
  for one, coef, stat in zip(handed, coefs, stats, strict=True):
    batch = one.batch
    now = rows_of(tiny, one.params["policy"], batch)
    start = rows_of(tiny, tiny.params, batch, kernel)
    advantages, returns, values, trained = [], [], [], []
    for (_, ids, logp, _), (_, _, ref_logp, value) in zip(now, start):
      ended = ids[-1] == EOS
      ends.append(ended)
      paid = -coef * kl(config.kl_estimator, logp - ref_logp)
      after = value[-1] if config.truncated == "bootstrap" and not ended else 0.0
      paid[-1] += worth(ids) if ended else 0.0
      advantage, carried = [], 0.0
      for r, v, v_next in zip(paid[::-1], value[-2::-1], [after, *value[:0:-1][1:]]):
        carried *= config.gamma * config.gae_lambda
        carried += r + config.gamma * v_next - v
        advantage.insert(0, carried)
      kept = len(ids) if ended or config.truncated == "bootstrap" else 0
      advantages.append(np.array(advantage[:kept]))
      returns.append(np.array(advantage[:kept]) + value[:kept])
      values.append(value[:-1])
      trained.append(np.ones(kept))
    if config.whiten_advantages:
      each = np.concatenate(advantages)
      advantages = [(row - each.mean()) / each.std() for row in advantages]
    same(batch.loss_mask, trained)
    same(batch.old_logp, [logp for _, _, logp, _ in now])
    same(batch.old_value, values)
    same(batch.returns, returns)
    same(batch.advantage, advantages)
    # Nothing has moved since these rows were sampled: every ratio is 1.
    loss = -mean_over(advantages, config.loss.aggregate)
    assert stat["policy_loss"] == pytest.approx(loss, abs=1e-4)
  assert 0 < np.mean(ends) < 1
  moved = [a[2] - b[2] for a, b in zip(now, start)]
  assert np.abs(np.concatenate(moved)).max() > 0.05  # or the KL was about nothing


GRPO = {
  "grpo": {"mask_truncated": True},
  "rloo": {"mask_truncated": False, "kl_reward": 0.5},
  "reinforce": {"mask_truncated": True, "scale": "batch_std"},
}


@pytest.mark.parametrize("name", GRPO)
def test_grpo_hands_on_the_reward_less_its_baseline(tiny, handed, name):
  config = grpo.preset(name, **SMALL, **GRPO[name])
  stats = grpo.run(tiny, EXAMPLES, pay, config).iterations
  for one, stat in zip(handed, stats, strict=True):
    batch = one.batch
    now = rows_of(tiny, one.params["policy"], batch)
    start = rows_of(tiny, tiny.params, batch)
    apart = [a[2] - b[2] for a, b in zip(now, start)]
    groups = collections.defaultdict(dict)
    for i, (prompt, ids, _, _) in enumerate(now):
      if ids[-1] == EOS or not config.mask_truncated:
        groups[prompt][i] = worth(ids) - config.kl_reward * apart[i].sum()
    every = [x for group in groups.values() for x in group.values()]
    assert len(groups) == 3 and min(map(len, groups.values())) > 1
    advantage = np.zeros(len(now))
    for group in groups.values():
      own = list(group.values())
      for i, x in group.items():
        others = [y for j, y in group.items() if j != i]
        baseline = {"grpo": own, "rloo": others, "reinforce": every}[name]
        scale = {"grpo": own, "rloo": None, "reinforce": every}[name]
        scale = 1.0 if scale is None else np.std(scale, ddof=1) + 1e-4
        advantage[i] = (x - np.mean(baseline)) / scale
    counted = {i for group in groups.values() for i in group}
    kept = [len(ids) if i in counted else 0 for i, (_, ids, _, _) in enumerate(now)]
    assert (len(counted) < len(now)) == config.mask_truncated
    advantages = [np.full(n, x) for n, x in zip(kept, advantage)]
    same(batch.loss_mask, [np.ones(n) for n in kept])
    same(batch.old_logp, [logp for _, _, logp, _ in now])
    same(batch.advantage, advantages)
    mean = lambda rows: mean_over(rows, config.loss.aggregate)
    assert stat["policy_loss"] == pytest.approx(-mean(advantages), abs=1e-4)
    if config.loss.kl_coef:
      same(batch.ref_logp, [logp for _, _, logp, _ in start])
      each = [kl("k3", row[:n]) for row, n in zip(apart, kept)]
      assert stat["kl_loss"] == pytest.approx(mean(each), rel=1e-2, abs=1e-5)
  assert np.abs(np.concatenate(apart)).max() > 0.05


def run(module, policy, dev_score=None, saving=None, **changes):
  """With a critic that barely moves."""
  if module is grpo:
    config = grpo.preset("reinforce", **SMALL | changes)
  else:
    config = ppo.PPOConfig(**SMALL | changes, value_optimizer=STILL)
  return module.run(policy, EXAMPLES, pay, config, dev_score=dev_score, saving=saving)


@pytest.mark.parametrize("module", [grpo, ppo])
def test_what_a_sampler_rounds_is_weighed(tiny, handed, module, monkeypatch):
  """min(pi_old / pi_sampler, cap), of a sampler that is 0.3 nats off at every token."""
  right = rollouts.generate
  off = np.array([0.0, 0.3, -0.3], np.float32)  # of EOS, a and b

  def rounded(*args, **kwargs):
    rollout = right(*args, **kwargs)
    noise = np.where(rollout.completion_mask, off[rollout.tokens], 0.0)
    return dataclasses.replace(rollout, raw_logp=rollout.raw_logp + noise)

  monkeypatch.setattr(rollouts, "generate", rounded)
  Loss = grpo.GRPOLoss if module is grpo else ppo.PPOLoss
  loss = Loss(importance_cap=1.2, aggregate="token")
  stats = run(module, tiny, loss=loss, old_logp="recompute").iterations
  for one, stat in zip(handed, stats, strict=True):
    batch = one.batch
    now = rows_of(tiny, one.params["policy"], batch)
    same(batch.old_logp, [logp for _, _, logp, _ in now])
    same(batch.behaviour_logp, [logp + off[ids] for _, ids, logp, _ in now])
    kept = [n for n, trains in enumerate(batch.loss_mask.any(1)) if trains]
    weight = [np.minimum(np.exp(-off[now[i][1]]), 1.2) for i in kept]
    gain = [w * batch.advantage[i, : len(w)] for i, w in zip(kept, weight)]
    found = stat["importance_weight"], stat["policy_loss"]
    due = mean_over(weight, "token"), -mean_over(gain, "token")
    assert found == pytest.approx(due, abs=1e-4)


@pytest.mark.parametrize("module", [grpo, ppo])
def test_a_stop_string_ends_what_is_trained_on(tiny, handed, module):
  run(module, tiny, stop=("b",), iterations=1)
  (one,) = handed
  rows = [ids for _, ids, *_ in rows_of(tiny, one.params["policy"], one.batch)]
  assert any(ids[-1] == B for ids in rows) and not any(B in ids[:-1] for ids in rows)


@pytest.mark.parametrize("module", [grpo, ppo])
def test_a_seed_is_of_prompts_noise_and_minibatches(tiny, handed, module, monkeypatch):
  """Each alone: the noise is asked for by seed and step, and where it is taken away
  the order of prompts and of rows still differ."""
  right, asked = rollouts.generate, []

  def silent(*args, seed, step, **kwargs):
    asked.append((seed, step, *kwargs["prompt_ids"]))
    return right(*args, seed=0, step=0, **kwargs)

  monkeypatch.setattr(rollouts, "generate", silent)
  shape = {"prompts_per_iteration": 1, "minibatches": 2, "optimizer": STILL}
  for seed in (3, 6):
    run(module, tiny, seed=seed, **shape)
  of = lambda i, seed: rollouts.prompts_of(EXAMPLES, i, 1, seed)[0].id
  assert asked == [(seed, i, of(i, seed)) for seed in (3, 6) for i in (0, 1)]
  assert of(0, 3) == of(0, 6) and of(1, 3) != of(1, 6)
  # The first iterations have the same rows; their halves are others.
  halves = [sorted(one.batch.tokens.tolist()) for one in handed]
  assert sorted(halves[0] + halves[1]) == sorted(halves[4] + halves[5])
  assert halves[0] != halves[4]


@pytest.mark.parametrize("module", [grpo, ppo])
@pytest.mark.parametrize(
  ("scores", "best"), [((1, 0, 3, 2), 2), ((3, 2, 1, 0), 0), ((1, 1, 1, 1), 0)]
)
def test_a_run_returns_what_was_best_on_the_dev_split(tiny, module, scores, best):
  """The start counts, and of equal ones the first."""
  seen, left = [], iter(scores)

  def dev_score(policy):
    seen.append(jax.device_get(policy.params))
    return next(left)

  result = run(module, tiny, iterations=3, eval_every=1, dev_score=dev_score)
  jax.tree.map(np.testing.assert_array_equal, result.policy.params, seen[best])
  assert not np.array_equal(seen[1]["head"], seen[2]["head"])
  assert [score for _, score in result.history] == list(scores)


def test_what_was_best_before_a_stop_is_still_returned(tiny, tmp_path):
  seen, left = [], iter((1, 3, 2))  # of the start and of two iterations

  def dev_score(policy):
    seen.append(jax.device_get(policy.params))
    return next(left)

  go = lambda saving: run(grpo, tiny, dev_score, saving, eval_every=1)
  with Checkpointer(tmp_path) as checkpoints, pytest.raises(StoppedError):
    go(Saving(checkpoints, every=100, stop=lambda: True))
  with Checkpointer(tmp_path) as checkpoints:
    result = go(Saving(checkpoints))
  assert len(seen) == 3 and not np.array_equal(seen[0]["head"], seen[1]["head"])
  jax.tree.map(np.testing.assert_array_equal, result.policy.params, seen[1])

"""Laws of PPO and GRPO: steps and whole runs against formulas written out here.

The oracle shares nothing with `rlft.objectives`: the whole logits of the tiny model,
then each loss as its paper prints it. A setting that is dropped, ignored or has the
wrong sign changes the gradient, and is seen.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlft.algorithms import grpo, ppo
from rlft.core.types import Example, Reward
from rlft.models import scalar
from rlft.models.lora import LoRAConfig
from rlft.training.optimizer import OptimizerConfig
from rlft.training.rollouts import RLBatch
from rlft.training.step import init_state

HEAT = 0.7
# Adam's first moment after an update is (1 - b1) * gradient: that is how it is read.
PLAIN = OptimizerConfig(learning_rate=1e-2, schedule="constant", clip_norm=0.0, b1=0.5)
LENGTHS = (4, 1, 3, 2)  # of completions; the prompt has 2 tokens


def make_batch(advantage=(1.0, -1.5, 0.5, -0.25)):
  """Rows of unequal length whose ratios lie on all sides of the clips."""
  rng = np.random.default_rng(0)
  rows, columns = len(LENGTHS), max(LENGTHS)
  mask = np.zeros((rows, 2 + columns), bool)
  for i, n in enumerate(LENGTHS):
    mask[i, : 2 + n] = True
  shape = (rows, columns)
  return RLBatch(
    tokens=rng.integers(0, 3, mask.shape).astype(np.int32),
    mask=mask,
    start=np.full(rows, 2, np.int32),
    loss_mask=mask[:, 2:],
    old_logp=None,
    advantage=np.broadcast_to(np.float32(advantage)[:, None], shape).copy(),
    returns=rng.normal(size=shape).astype(np.float32),
    old_value=rng.normal(size=shape).astype(np.float32),
  )


def logits_of(policy, params, batch):
  """float32 [B, C, V] at the places from which completions were chosen."""
  positions = np.maximum(np.cumsum(batch.mask, 1) - 1, 0)
  tokens = np.where(batch.mask, batch.tokens, 0)
  hidden = policy.model.apply({"params": params}, tokens, positions, batch.mask).hidden
  return (hidden @ params["head"])[:, 1:-1] / HEAT


def logp_and_entropy(policy, params, batch):
  every = jax.nn.log_softmax(logits_of(policy, params, batch))
  logp = jnp.take_along_axis(every, batch.tokens[:, 2:, None], axis=2)[..., 0]
  return logp, -jnp.sum(jnp.exp(every) * every, axis=2)


def complete(policy, batch):
  """The batch with log-probs of policies that stood apart from this one."""
  rng = np.random.default_rng(1)
  now = np.asarray(logp_and_entropy(policy, policy.params, batch)[0])
  apart = lambda size: now + rng.uniform(-size, size, now.shape).astype(np.float32)
  return batch.replace(
    old_logp=apart(0.6), ref_logp=apart(0.5), behaviour_logp=apart(0.5)
  )


def mean_over(x, mask, mode, constant):
  if mode == "token":
    return jnp.sum(x * mask) / mask.sum()
  if mode == "sequence":
    return jnp.mean(jnp.sum(x * mask, 1) / mask.sum(1))
  return jnp.mean(jnp.sum(x * mask, 1)) / constant


def surrogate(logp, batch, low, high, loss):
  """- min(rho A, clip(rho) A) of each token, with what the settings ask besides."""
  mask, advantage = batch.loss_mask, batch.advantage
  apart = logp - batch.old_logp
  if getattr(loss, "importance", "token") == "sequence":
    mean = jnp.sum(apart * mask, 1, keepdims=True) / mask.sum(1, keepdims=True)
    apart = jax.lax.stop_gradient(mean - apart) + apart
  rho = jnp.exp(apart)
  gain = rho * advantage
  if getattr(loss, "clip", True):
    gain = jnp.minimum(gain, jnp.clip(rho, 1 - low, 1 + high) * advantage)
  if loss.dual_clip:
    bounded = jnp.maximum(gain, loss.dual_clip * advantage)
    gain = jnp.where(advantage < 0, bounded, gain)
  if loss.importance_cap:
    weight = jnp.exp(batch.old_logp - batch.behaviour_logp)
    gain = gain * jnp.minimum(weight, loss.importance_cap)
  return -gain


def kl(kind, logp, ref_logp):
  apart = logp - ref_logp
  return {
    "k1": apart, "k2": apart**2 / 2, "k3": jnp.exp(-apart) - 1 + apart
  }[kind]  # fmt: skip


def gradient_of(state):
  """What Adam was given."""
  moments = [x for x in jax.tree.leaves(state.opt_state, is_leaf=_has_mu) if _has_mu(x)]
  return jax.tree.map(lambda m: np.asarray(m) / (1 - PLAIN.b1), moments[0].mu)


def _has_mu(x):
  return hasattr(x, "mu")


def check_gradient(found, loss, params):
  right = jax.grad(loss)(params)
  largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(right))
  assert largest > 1e-3  # a law about nothing holds always
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest), found, right
  )


GRPO = {
  "clip_high_entropy": {"clip_low": 0.1, "clip_high": 0.4, "entropy_coef": 0.2},
  "no_clip_k1": {
    "clip": False, "aggregate": "token", "kl_coef": 0.3, "kl_estimator": "k1",
  },
  "constant_k2_cap": {
    "aggregate": "constant", "constant_length": 7, "importance_cap": 1.2,
    "kl_coef": 0.3, "kl_estimator": "k2",
  },
  "k3_dual_clip": {
    "kl_coef": 0.3, "kl_estimator": "k3", "dual_clip": 1.1, "clip_low": 0.5,
  },
  "sequence_ratio": {"importance": "sequence", "clip_low": 0.05},
}  # fmt: skip


@pytest.mark.parametrize("name", GRPO)
def test_the_step_of_grpo_has_the_papers_gradient(tiny, name):
  loss = grpo.GRPOLoss(**GRPO[name])
  batch = complete(tiny, make_batch())

  def written_out(params):
    logp, entropy = logp_and_entropy(tiny, params, batch)
    mean = lambda x: mean_over(x, batch.loss_mask, loss.aggregate, loss.constant_length)
    total = mean(surrogate(logp, batch, loss.clip_low, loss.clip_high, loss))
    total += loss.kl_coef * mean(kl(loss.kl_estimator, logp, batch.ref_logp))
    return total - loss.entropy_coef * mean(entropy)

  step = grpo.make_train_step(tiny.model, loss, PLAIN)
  state = init_state({"policy": tiny.params}, PLAIN, 1)
  state, metrics = step(state, batch, None, np.float32(HEAT))
  assert float(metrics["loss"]) == pytest.approx(
    float(written_out(tiny.params)), abs=1e-5
  )
  check_gradient(gradient_of(state)["policy"], written_out, tiny.params)


PPO = {
  "clip_range_entropy": {"clip_range": 0.4, "entropy_coef": 0.2},
  "sequence": {"aggregate": "sequence"},
  "constant_dual_clip_cap": {
    "aggregate": "constant", "constant_length": 7, "importance_cap": 1.2,
    "dual_clip": 1.1, "clip_range": 0.5,
  },
}  # fmt: skip


@pytest.mark.parametrize("name", PPO)
def test_the_step_of_ppo_has_the_papers_gradient(tiny, name):
  loss = ppo.PPOLoss(**PPO[name])
  batch = complete(tiny, make_batch())

  def written_out(params):
    logp, entropy = logp_and_entropy(tiny, params, batch)
    mean = lambda x: mean_over(x, batch.loss_mask, loss.aggregate, loss.constant_length)
    total = mean(surrogate(logp, batch, loss.clip_range, loss.clip_range, loss))
    return total - loss.entropy_coef * mean(entropy)

  step = ppo.make_policy_step(tiny.model, loss, PLAIN)
  state = init_state({"policy": tiny.params}, PLAIN, 1)
  state, _ = step(state, batch, None, np.float32(HEAT))
  check_gradient(gradient_of(state)["policy"], written_out, tiny.params)


@pytest.mark.parametrize("value_clip", [0.0, 0.2])
@pytest.mark.parametrize("shared", [True, False])
def test_values_have_the_papers_gradient(tiny, shared, value_clip):
  """1/2 max((V - R)^2, (clip(V) - R)^2), alone or beside the policy's loss."""
  loss = ppo.PPOLoss(value_clip=value_clip, value_coef=0.3)
  batch = complete(tiny, make_batch())
  model = scalar.init_scalar(tiny, init="zero")
  noise = np.random.default_rng(2).normal(size=model.params["head"]["kernel"].shape)
  head = model.params["head"] | {"kernel": jnp.float32(noise * 0.3)}
  trunk_name = "policy" if shared else "trunk"
  params = {trunk_name: tiny.params, "head": head}

  def written_out(params):
    trunk = params[trunk_name]
    positions = np.maximum(np.cumsum(batch.mask, 1) - 1, 0)
    tokens = np.where(batch.mask, batch.tokens, 0)
    hidden = tiny.model.apply({"params": trunk}, tokens, positions, batch.mask).hidden
    value = (hidden @ params["head"]["kernel"].reshape(-1))[:, 1:-1]
    value = value + params["head"]["bias"].reshape(()) if "bias" in head else value
    error = (value - batch.returns) ** 2
    if value_clip:
      near = jnp.clip(value, batch.old_value - 0.2, batch.old_value + 0.2)
      error = jnp.maximum(error, (near - batch.returns) ** 2)
    critic = mean_over(error / 2, batch.loss_mask, "token", 0)
    if not shared:
      return critic
    logp, _ = logp_and_entropy(tiny, trunk, batch)
    actor = mean_over(
      surrogate(logp, batch, 0.2, 0.2, loss), batch.loss_mask, "token", 0
    )
    return actor + 0.3 * critic

  state = init_state(params, PLAIN, 1)
  if shared:
    step = ppo.make_policy_step(tiny.model, loss, PLAIN)
    state, _ = step(state, batch, None, np.float32(HEAT))
  else:
    state, _ = ppo.make_value_step(tiny.model, loss, PLAIN)(state, batch)
  check_gradient(gradient_of(state), written_out, params)


# ---------------------------------------------------------------------- whole runs

EXAMPLES = [Example(i, "ab"[i % 2], "", "") for i in range(6)]
SMALL = {
  "iterations": 2,
  "prompts_per_iteration": 2,
  "samples_per_prompt": 8,
  "max_new_tokens": 4,
  "temperature": HEAT,
}
# Many completions here are cut by the limit, and are to count as any other.
GRPO_RUN = SMALL | {"mask_truncated": False}
PPO_RUN = SMALL | {"truncated": "score"}
FAST = OptimizerConfig(learning_rate=3e-2, schedule="linear", eps=1e-5)


def pay(rollout, examples):
  chosen = rollout.completion_mask
  value = chosen.sum(1) + 0.25 * ((rollout.tokens == 1) & chosen).sum(1)
  return Reward(value=value.astype(np.float32), judged=np.ones(len(value), bool))


@pytest.fixture
def batches(monkeypatch):
  """(loss, optimizer, batch) of every update of the policy in a run."""
  seen = []
  for module, name in ((grpo, "make_train_step"), (ppo, "make_policy_step")):
    make = getattr(module, name)

    def recorded(model, loss, optimizer, micro_batches=1, make=make):
      step = make(model, loss, optimizer, micro_batches)

      def update(state, batch, *rest):
        seen.append((loss, optimizer, jax.device_get(batch)))
        return step(state, batch, *rest)

      return update

    monkeypatch.setattr(module, name, recorded)
  return seen


def test_dr_grpo_divides_by_nothing_and_grpo_by_the_groups_spread(tiny, batches):
  for name in ("dr_grpo", "grpo"):
    config = grpo.preset(name, **(GRPO_RUN | {"iterations": 1}))
    grpo.run(tiny, EXAMPLES[:2], pay, config)  # a group of "a" and one of "b"
  for (_, _, batch), scaled in zip(batches, (False, True)):
    value = batch.loss_mask.sum(1)
    chosen_a = ((batch.tokens[:, 1:] == 1) & batch.mask[:, 1:])[:, : value.max()]
    reward = value + 0.25 * chosen_a.sum(1)
    groups = reward[np.argsort(batch.tokens[:, 0], kind="stable")].reshape(2, -1)
    right = groups - groups.mean(1, keepdims=True)
    if scaled:
      right = right / (groups.std(1, ddof=1, keepdims=True) + 1e-4)
    found = batch.advantage[:, 0][np.argsort(batch.tokens[:, 0], kind="stable")]
    assert np.ptp(right) > 0.5
    np.testing.assert_allclose(found.reshape(2, -1), right, rtol=2e-3)


def test_dapo_lets_a_ratio_of_1_25_learn_and_grpo_does_not(tiny):
  """Clip-higher: 1.25 is inside [1 - 0.2, 1 + 0.28]."""
  batch = make_batch(advantage=(1.0, 1.0, 1.0, 1.0))
  now = np.asarray(logp_and_entropy(tiny, tiny.params, batch)[0])
  for name, moves in (("dapo", True), ("grpo", False)):
    loss = dataclasses.replace(grpo.preset(name).loss, kl_coef=0.0)
    for ratio, inside in ((1.25, moves), (1.3, False), (1.19, True)):
      step = grpo.make_train_step(tiny.model, loss, PLAIN)
      state = init_state({"policy": tiny.params}, PLAIN, 1)
      old = batch.replace(old_logp=now - np.float32(np.log(ratio)))
      _, metrics = step(state, old, None, np.float32(HEAT))
      assert (float(metrics["grad_norm"]) > 0) == inside, (name, ratio)


@pytest.mark.parametrize("module", [grpo, ppo])
def test_adam_divides_by_the_gradient_and_1e_minus_5(tiny, module):
  """The default eps of RL, seen in an update of gradients as small as it is."""
  config = (module.GRPOConfig if module is grpo else module.PPOConfig)()
  optimizer = dataclasses.replace(config.optimizer, schedule="constant", clip_norm=0.0)
  make = grpo.make_train_step if module is grpo else ppo.make_policy_step
  step = make(tiny.model, dataclasses.replace(config.loss, **(
    {"kl_coef": 0.0} if module is grpo else {}
  )), optimizer)  # fmt: skip
  batch = complete(tiny, make_batch())
  batch = batch.replace(advantage=batch.advantage * np.float32(1e-5))
  before = np.asarray(tiny.params["head"])
  state = init_state({"policy": tiny.params}, optimizer, 1)
  state, _ = step(state, batch, None, np.float32(HEAT))
  moments = [x for x in jax.tree.leaves(state.opt_state, is_leaf=_has_mu) if _has_mu(x)]
  g = np.asarray(moments[0].mu["policy"]["head"]) / (1 - optimizer.b1)
  assert 1e-7 < np.abs(g).max() < 1e-4
  moved = np.asarray(state.params["policy"]["head"]) - before
  right = -optimizer.learning_rate * g / (np.abs(g) + 1e-5)
  scale = np.abs(right).max()
  wrong = -optimizer.learning_rate * g / (np.abs(g) + 1e-8)
  assert np.abs(wrong - right).max() > 0.2 * scale
  np.testing.assert_allclose(moved, right, atol=0.05 * scale)


def test_the_rate_decays_to_nothing_at_the_last_update(tiny):
  """The schedule is as long as the run: iterations x epochs x minibatches."""
  shape = {"iterations": 3, "epochs": 2, "minibatches": 2, "optimizer": FAST}
  of = 3 * 2 * 2
  mean = lambda i: np.mean([1 - u / of for u in range(4 * i, 4 * i + 4)])
  runs = [grpo.run(tiny, EXAMPLES, pay, grpo.preset("dr_grpo", **GRPO_RUN | shape))]
  config = ppo.PPOConfig(**PPO_RUN | shape, value_optimizer=FAST)
  runs.append(ppo.run(tiny, EXAMPLES, pay, config))
  for result in runs:
    rates = [one["learning_rate"] for one in result.iterations]
    np.testing.assert_allclose(rates, [3e-2 * mean(i) for i in range(3)], rtol=1e-5)
  critic = [one["value/learning_rate"] for one in runs[1].iterations]
  np.testing.assert_allclose(critic, [3e-2 * mean(i) for i in range(3)], rtol=1e-5)


def test_a_critics_warmup_does_not_spend_the_policys_rate(tiny):
  shape = PPO_RUN | {"iterations": 4, "epochs": 1, "minibatches": 2, "optimizer": FAST}
  slower = dataclasses.replace(FAST, learning_rate=1e-2)  # and each has its own
  config = ppo.PPOConfig(**shape, value_optimizer=slower, critic_warmup=2)
  last = ppo.run(tiny, EXAMPLES, pay, config).iterations
  rates = [one["learning_rate"] for one in last[2:]]
  np.testing.assert_allclose(
    rates, [3e-2 * (1 + 3 / 4) / 2, 3e-2 * (1 / 2 + 1 / 4) / 2]
  )
  critic = [one["value/learning_rate"] for one in last]
  right = [1e-2 * (1 - (2 * i + 0.5) / 8) for i in range(4)]
  np.testing.assert_allclose(critic, right, rtol=1e-5)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_ppo_pays_the_kl_that_was_asked_for(kind):
  """Of tokens with their rewards: the last one's return is r - coef * kl."""
  logp = jnp.float32([[-1.0, -2.0]])
  ref = jnp.float32([[-1.5, -1.2]])
  found = ppo.estimate_advantages(
    jnp.float32([[0.0, 1.0]]), jnp.zeros((1, 2)), logp, ref, jnp.ones((1, 2), bool),
    jnp.zeros(1), jnp.float32(0.1), jnp.float32(1), jnp.float32(1),
    estimator=kind, whiten=False,
  )  # fmt: skip
  paid = np.asarray(kl(kind, logp, ref))[0]
  right = [1.0 - 0.1 * paid.sum(), 1.0 - 0.1 * paid[1]]
  np.testing.assert_allclose(found["returns"][0], right, rtol=1e-5)
  assert float(found["kl/sequence"]) == pytest.approx(0.5 - 0.8, abs=1e-6)  # k1 always


def test_the_kl_controller_counts_rows_that_trained(tiny):
  """Half of the rows have no judgement: the KL is a mean of the others."""

  def half(rollout, examples):
    full = pay(rollout, examples)
    return Reward(full.value, np.arange(len(full.value)) % 2 == 0)

  config = ppo.PPOConfig(
    **PPO_RUN, optimizer=FAST, value_optimizer=FAST, epochs=1, minibatches=1,
    kl_coef=0.5, kl_target=1.0, kl_horizon=64,
  )  # fmt: skip
  stats = ppo.run(tiny, EXAMPLES, half, config).iterations
  # The start is the reference: the error is -1, and is cut at -0.2.
  assert stats[0]["kl/sequence"] == pytest.approx(0, abs=1e-5)
  assert stats[1]["kl/coef"] == pytest.approx(0.5 * (1 - 0.2 * 8 / 64))


@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_the_reference_of_adapters_is_the_base_without_them(tiny, method):
  shape = {"iterations": 4, "optimizer": FAST, "lora": LoRAConfig(rank=4)}
  if method == "grpo":
    result = grpo.run(tiny, EXAMPLES, pay, grpo.preset("grpo", **GRPO_RUN | shape))
  else:
    config = ppo.PPOConfig(
      **PPO_RUN | shape, value_optimizer=FAST, epochs=2, minibatches=1
    )
    result = ppo.run(tiny, EXAMPLES, pay, config)
  assert result.iterations[0]["kl/sequence"] == pytest.approx(0, abs=1e-5)
  assert abs(result.iterations[-1]["kl/sequence"]) > 1e-3

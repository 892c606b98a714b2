"""A run that is stopped and goes on gives what one that was left alone gives."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlft.algorithms import dpo, grpo, ppo, reward_model, sft
from rlft.algorithms import expert_iteration as ei
from rlft.algorithms import return_conditioned as rc
from rlft.core.errors import CheckpointError, StoppedError
from rlft.core.mesh import make_mesh, tree_shardings
from rlft.core.types import Example, Reward, Verdict
from rlft.models.decoder import param_axes, param_shapes
from rlft.models.lora import LoRAConfig
from rlft.tasks.preferences import Preference
from rlft.training.checkpoint import Checkpointer
from rlft.training.optimizer import OptimizerConfig
from rlft.training.saving import Saving

A = 1
PROMPTS = [Example(i, "a" if i % 2 else "b", "", "") for i in range(6)]
ITERATIONS = 5
SHARED = {
  "iterations": ITERATIONS,
  "prompts_per_iteration": 2,
  "samples_per_prompt": 4,
  "max_new_tokens": 4,
  "eval_every": 2,
  "optimizer": OptimizerConfig(learning_rate=1e-2, schedule="cosine", eps=1e-5),
}
# Nearly all completions here are cut: left out, nothing would train.
CUT_COUNT = {"truncated": "score"}
RUNS = {
  # Adaptive KL, warm-up of the value model, two networks.
  "ppo": (
    ppo.run,
    ppo.PPOConfig(
      **SHARED, epochs=2, critic_warmup=1, kl_target=0.1, kl_horizon=20, **CUT_COUNT
    ),
  ),
  "ppo, LoRA, shared trunk": (
    ppo.run,
    ppo.PPOConfig(**SHARED, value="shared", lora=LoRAConfig(rank=2), **CUT_COUNT),
  ),
  "grpo, an optax transformation": (
    grpo.run,
    grpo.preset(
      "grpo",
      **SHARED
      | {"optimizer": optax.chain(optax.add_noise(1e-4, 0.5, 7), optax.adamw(1e-2))},
      mask_truncated=False,
    ),
  ),
  # Draws more prompts than it trains on.
  "dapo": (grpo.run, grpo.preset("dapo", **SHARED, mask_truncated=False)),
}


def pay(rollout, examples):
  """Few distinct values, so that some groups are equal."""
  value = ((rollout.tokens == A) & rollout.completion_mask).sum(1) > 1
  return Reward(value=value.astype(np.float32), judged=np.ones(len(value), bool))


def dev_score(policy):
  """Of the weights: better, worse, better, so that the best is an earlier one."""
  return float(
    np.sin(sum(1e3 * float(x.sum()) for x in jax.tree.leaves(policy.params)))
  )


def go(name, tiny, saving=None):
  run, config = RUNS[name]
  return run(tiny, PROMPTS, pay, config, dev_score=dev_score, saving=saving)


def assert_equal(due, found):
  """Bit for bit."""
  jax.tree.map(np.testing.assert_array_equal, due, found)


def untimed(lines):
  timed = ("time/", "seconds", "tokens_per_second")
  return [
    {k: x for k, x in one.items() if not any(word in k for word in timed)}
    for one in lines
  ]


@pytest.mark.parametrize("name", RUNS)
def test_going_on_is_bit_exact(name, tiny, tmp_path):
  """Weights, metrics, scores and counts; stopped after iterations 1 and 3."""
  straight = go(name, tiny)
  for stops in (1, 3):
    asked = iter([False] * (0 if stops == 1 else 1) + [True])
    with (
      Checkpointer(tmp_path) as checkpoints,
      pytest.raises(StoppedError, match=f"after iteration {stops} of 5"),
    ):
      go(
        name, tiny, Saving(checkpoints, every=100, stop=functools.partial(next, asked))
      )
  seen = []
  with Checkpointer(tmp_path) as checkpoints:
    resumed = go(name, tiny, Saving(checkpoints, on_restore=seen.append))
  assert [found.step for found in seen] == [3]
  assert untimed(resumed.iterations) == untimed(straight.iterations)
  assert resumed.history == straight.history
  assert len({score for _, score in straight.history}) > 1
  assert resumed.sampled_solutions == straight.sampled_solutions
  assert resumed.update_tokens == straight.update_tokens
  assert_equal(straight.policy.params, resumed.policy.params)


def test_a_finished_run_gives_its_result_again(tiny, tmp_path):
  with Checkpointer(tmp_path) as checkpoints:
    first = go("dapo", tiny, Saving(checkpoints, every=2))
    assert checkpoints.steps() == [4, 5]  # every second, and the last
  with Checkpointer(tmp_path) as checkpoints:
    again = go("dapo", tiny, Saving(checkpoints))
  assert untimed(again.iterations) == untimed(first.iterations)
  assert again.history == first.history


@pytest.mark.parametrize("more", [5, 2])
@pytest.mark.parametrize("name", ["ppo", "dapo"])
def test_the_schedule_is_that_of_the_configuration(name, more, tiny, tmp_path, caplog):
  """Three iterations of a linear decay, then more or fewer: by the new schedule."""
  run, config = RUNS[name]
  linear = dataclasses.replace(SHARED["optimizer"], schedule="linear")
  config = dataclasses.replace(config, optimizer=linear)
  if name == "ppo":
    config = dataclasses.replace(config, value_optimizer=linear, critic_warmup=0)

  def rates(iterations, saving=None):
    longer = dataclasses.replace(config, iterations=iterations)
    stats = run(tiny, PROMPTS, pay, longer, saving=saving).iterations
    names = [n for n in stats[0] if n.endswith("learning_rate")]
    assert len(names) == (2 if name == "ppo" else 1)
    return [[one[n] for n in names] for one in stats]

  begun = 1 if more == 2 else 3
  asked = iter([False] * (begun - 1) + [True])
  stop = (lambda: next(asked)) if more == 2 else (lambda: False)
  with Checkpointer(tmp_path) as checkpoints:
    if more == 2:
      with pytest.raises(StoppedError):
        rates(3, Saving(checkpoints, stop=stop))
    else:
      rates(3, Saving(checkpoints))
  with Checkpointer(tmp_path) as checkpoints:
    resumed = rates(more, Saving(checkpoints))
  assert "the schedule that is configured now" in caplog.text
  due = rates(more)
  assert resumed[begun:] == due[begun:] and len(resumed) == more
  assert min(min(one) for one in due) > 0


def test_a_run_with_other_models_is_refused(tiny, tmp_path):
  with Checkpointer(tmp_path) as checkpoints:
    go("dapo", tiny, Saving(checkpoints))
  with (
    Checkpointer(tmp_path) as checkpoints,
    pytest.raises(CheckpointError, match="another model or optimiser"),
  ):
    go("ppo", tiny, Saving(checkpoints))


# ------------------------------------------------------------- updates over epochs

WORDS = ["".join(w) for n in (1, 2, 3) for w in itertools.product("ab", repeat=n)]
TEXTS = [(p, w) for p in "ab" for w in WORDS][:26]
PAIRS = [Preference(i, p, w, w + "a") for i, (p, w) in enumerate(TEXTS)]
COMMON = {
  "optimizer": OptimizerConfig(learning_rate=1e-2, schedule="cosine", eps=1e-5),
  "batch_size": 8,
  "epochs": 2,
}
SFT = sft.SFTConfig(**COMMON)


def supervised(name, tiny, **how):
  """(what was trained, curves, steps) of a run of 8 updates."""
  if name == "dpo":
    config = dpo.DPOConfig(**COMMON, lora=LoRAConfig(rank=2))
    found = dpo.train(tiny, PAIRS, config, **how)
    return found.policy.params, (found.losses, found.accuracies, found.margins)
  if name == "reward model":
    config = reward_model.RewardModelConfig(**COMMON)
    found = reward_model.train_pairs(tiny, PAIRS, config, **how)
    curves = found.losses, found.accuracies, (found.model.mean, found.model.std)
    return found.model.params, curves
  config = SFT
  if name == "sft, tokens":  # ends in the second epoch, inside it
    config = dataclasses.replace(SFT, update_tokens=130)
  found = sft.train(tiny, TEXTS, config, **how)
  return found.policy.params, (found.losses, found.steps, found.update_tokens)


@pytest.mark.parametrize(
  "name",
  ["sft", "sft, tokens"]
  + [pytest.param(name, marks=pytest.mark.slow) for name in ("dpo", "reward model")],
)
def test_supervised_runs_go_on_bit_for_bit(name, tiny, tmp_path):
  """Stopped after update 2, killed in update 6 (of which 4 are saved), and again."""
  due, lines = [], []
  straight = supervised(name, tiny, on_step=lambda *line: due.append(line))
  assert len(due) == (7 if name == "sft, tokens" else 8)

  def run(**how):
    with Checkpointer(tmp_path) as checkpoints:
      on_step = how.pop("on_step", lambda *line: lines.append(line))
      return supervised(name, tiny, on_step=on_step, saving=Saving(checkpoints, **how))

  asked = iter([False, True])
  with pytest.raises(StoppedError, match="after update 2 of"):
    run(stop=functools.partial(next, asked))
  assert lines == due[:2]

  def killed(update, of, metrics):
    if update == 5:
      raise RuntimeError("power")
    lines.append((update, of, metrics))

  with pytest.raises(RuntimeError, match="power"):
    run(every=4, on_step=killed)
  resumed = run()
  assert lines == due  # of the killed run, those until its checkpoint
  assert resumed[1] == straight[1]
  assert_equal(straight[0], resumed[0])
  again = run()  # of a finished run: its result, and no update
  assert lines == due and again[1] == straight[1]
  assert_equal(straight[0], again[0])


def test_batches_are_the_same_from_every_position(tiny, tmp_path, monkeypatch):
  """Stopped after each of the 8 updates."""
  seen, make = [], sft.make_train_step

  def recorded(*args):
    def step(state, batch):
      seen.append(batch.tokens.tolist())
      return make(*args)(state, batch)

    return step

  monkeypatch.setattr(sft, "make_train_step", recorded)
  straight = sft.train(tiny, TEXTS, SFT)
  due = seen.copy()
  assert len(due) == 8 and due[:4] != due[4:]
  seen.clear()
  for update in range(1, 9):
    assert len(seen) == update - 1
    with Checkpointer(tmp_path) as checkpoints:
      saving = Saving(checkpoints, stop=lambda: True)
      if update < 8:
        with pytest.raises(StoppedError, match=f"after update {update} of 8"):
          sft.train(tiny, TEXTS, SFT, saving=saving)
      else:  # nothing is left to stop
        resumed = sft.train(tiny, TEXTS, SFT, saving=saving)
  assert seen == due
  assert resumed.losses == straight.losses
  assert_equal(straight.policy.params, resumed.policy.params)


def test_more_epochs_can_be_asked_for(tiny, tmp_path):
  """The schedule is then that of the longer run."""

  def rates(saving=None, epochs=2):
    seen = []
    config = dataclasses.replace(SFT, epochs=epochs)
    sft.train(
      tiny, TEXTS, config, lambda _, of, m: seen.append(m["learning_rate"]), saving
    )
    return seen

  with Checkpointer(tmp_path) as checkpoints:
    assert rates(Saving(checkpoints), epochs=1) != rates()[:4]
  with Checkpointer(tmp_path) as checkpoints:
    assert rates(Saving(checkpoints)) == rates()[4:]


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(tiny, tmp_path):
  """Of 4 devices to 2 x 2 and to one; to 1e-5, for sums are taken in another order."""

  def on(fsdp, tensor):
    mesh = make_mesh(1, fsdp, tensor, devices=jax.devices()[: fsdp * tensor])
    model = tiny.model.clone(mesh=mesh)
    layout = tree_shardings(mesh, param_axes(model), param_shapes(model))
    params = jax.device_put(tiny.params, layout)
    return dataclasses.replace(tiny, model=model, params=params)

  straight = sft.train(on(4, 1), TEXTS, SFT)
  for fsdp, tensor in ((2, 2), (1, 1)):
    where = tmp_path / f"{fsdp}{tensor}"
    asked = iter([False] * 3 + [True])
    with Checkpointer(where) as checkpoints, pytest.raises(StoppedError):
      stopping = Saving(checkpoints, stop=functools.partial(next, asked))
      sft.train(on(4, 1), TEXTS, SFT, saving=stopping)
    with Checkpointer(where) as checkpoints:
      other = on(fsdp, tensor)
      resumed = sft.train(other, TEXTS, SFT, saving=Saving(checkpoints))
    np.testing.assert_allclose(resumed.losses, straight.losses, rtol=1e-5)
    mesh = jax.tree.leaves(resumed.policy.params)[0].sharding.mesh
    assert mesh == other.model.mesh


# ---------------------------------------------------------------- Expert Iteration

EI = ei.EIConfig(
  train=sft.SFTConfig(**COMMON), rounds=3, samples_per_prompt=4, max_new_tokens=4
)
EI_RUNS = {
  "base": EI,  # with a dev score
  "previous": dataclasses.replace(EI, start="previous", max_per_prompt=2),
}


def second_is_best():
  """A dev score of the start and of three rounds, by the order they are first seen in;
  other weights than those have none."""
  seen = []

  def score(policy):
    weights = [float(x.sum()) for x in jax.tree.leaves(policy.params)]
    if weights not in seen:
      seen.append(weights)
    return (0, 1, 3, 2)[seen.index(weights)]

  return score


def judge(text, example):
  return Verdict(text, "a" in text, None, tuple(text) or None)


def expert(name, tiny, **how):
  """Starts from a policy in bfloat16; rounds train its weights or a base in float32."""
  low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny.params)
  policy = dataclasses.replace(tiny, params=low)
  how |= {"base": tiny, "sft_rows": TEXTS[:3]}
  return ei.run(policy, PROMPTS, judge, EI_RUNS[name], **how)


def assert_same_run(due, found):
  assert untimed(found.rounds) == untimed(due.rounds)
  assert found.solutions == due.solutions
  assert found.sampled_solutions == due.sampled_solutions
  assert found.update_tokens == due.update_tokens
  assert_equal(due.policy.params, found.policy.params)


@pytest.mark.parametrize(
  "name", ["base", pytest.param("previous", marks=pytest.mark.slow)]
)
def test_expert_iteration_goes_on_bit_for_bit(name, tiny, tmp_path):
  """Stopped and killed in each phase; what a round has sampled is never lost."""
  score = second_is_best() if name == "base" else None
  straight = expert(name, tiny, dev_score=score)
  assert len(straight.rounds) == 3 and straight.solutions
  events, resumed = [], []

  def heard(kind, values):
    events.append(kind)
    if kind == "resume":
      resumed.append((values["rounds"], values["updates"], values["sampled_solutions"]))

  def run(stop=lambda: False, on_event=heard):
    events.clear()
    with Checkpointer(tmp_path) as checkpoints:
      how = {"on_event": on_event, "saving": Saving(checkpoints, stop=stop)}
      return expert(name, tiny, dev_score=score, **how), checkpoints.steps()

  def killed(kind, values):
    heard(kind, values)
    if events.count("train") == 2 or events.count("sample") > 5:
      raise RuntimeError("power")

  of = [one["updates"] for one in straight.rounds]
  for phase, message in (
    ("sample", "after sampling round 1 of 3"),
    ("train", "after sampling round 1 of 3"),
    ("round", "after round 1 of 3"),
  ):
    with pytest.raises(StoppedError, match=message):
      run(lambda phase=phase: events[-1] == phase)
  with pytest.raises(RuntimeError, match="power"):
    run(on_event=killed)
  assert "sample" in events
  with pytest.raises(StoppedError, match="after round 2 of 3"):
    run(lambda: events[-1] == "round")
  assert "sample" not in events  # round 2 was sampled before the power went
  found, steps = run()
  assert steps == [5, 6]
  assert resumed == [
    *[(0, 0, 0)] * 2, *[(1, of[0], 24)] * 2, (2, sum(of[:2]), 48)
  ]  # fmt: skip
  assert_same_run(straight, found)
  again, _ = run()
  assert events == ["resume"]
  assert_same_run(straight, again)


def test_the_start_can_be_what_is_kept(tiny, tmp_path):
  """Patience has ended the run: it does not go on, and its result is the start."""
  config = dataclasses.replace(EI, patience=1)
  scores = iter([1.0, 0.0])
  for _ in range(2):
    with Checkpointer(tmp_path) as checkpoints:
      found = ei.run(
        tiny,
        PROMPTS,
        judge,
        config,
        dev_score=lambda policy: next(scores),
        saving=Saving(checkpoints),
      )
    assert len(found.rounds) == 1
    assert_equal(found.policy.params, tiny.params)


def ended_early(run, tiny, prompts, path, config, reward=pay):
  """The run until its first checkpoint."""
  with Checkpointer(path) as checkpoints, pytest.raises(StoppedError):
    run(tiny, prompts, reward, config, saving=Saving(checkpoints, stop=lambda: True))


@pytest.mark.parametrize("name", ["ppo", "grpo, an optax transformation"])
def test_other_prompts_are_refused(name, tiny, tmp_path):
  """The order hangs on them: some would come twice, others never."""
  run, config = RUNS[name]
  ended_early(run, tiny, PROMPTS, tmp_path, config)
  new = Example(6, "a", "", "")
  relabelled = [dataclasses.replace(e, id=e.id + 1) for e in PROMPTS]
  allowed = []

  def again(prompts, other_prompts=False, **changes):
    with Checkpointer(tmp_path) as checkpoints:
      saving = Saving(
        checkpoints,
        other_prompts=other_prompts,
        stop=lambda: True,
        on_allowed=lambda: allowed.append(1),
      )
      run(tiny, prompts, pay, dataclasses.replace(config, **changes), saving=saving)

  for prompts in ([*PROMPTS, new], PROMPTS[:5], PROMPTS[::-1], relabelled):
    with pytest.raises(CheckpointError, match=r"6 training prompts.* are others"):
      again(prompts)
  for name, value, was in (("prompts_per_iteration", 3, 2), ("seed", 1, 0)):
    with pytest.raises(CheckpointError, match=f"with {name}={was}, and with {name}="):
      again(PROMPTS, **{name: value})
  assert not allowed  # before anything is written
  with pytest.raises(StoppedError):
    again([*PROMPTS, new], other_prompts=True)  # of whoever knows better


def test_solutions_stay_with_their_prompts(tiny, tmp_path):
  """Of other prompts they would be trained behind the wrong ones, unseen."""
  config = EI_RUNS["base"]
  ended_early(ei.run, tiny, PROMPTS, tmp_path, config, judge)
  new = Example(6, "ab", "", "")

  def again(prompts):
    with Checkpointer(tmp_path) as checkpoints:
      return ei.run(tiny, prompts, judge, config, saving=Saving(checkpoints))

  for prompts in (PROMPTS[:5], PROMPTS[::-1], [new, *PROMPTS]):
    with pytest.raises(CheckpointError, match="with new ones at their end only"):
      again(prompts)
  first, second, _ = again([*PROMPTS, new]).rounds  # of the first, the old ones
  assert second["samples"] > first["samples"]


def test_labelled_solutions_are_of_the_same_prompts(tmp_path):
  made = []

  def labelled():
    made.append(1)
    return [], {"samples": 6}

  def again(prompts):
    with Checkpointer(tmp_path) as checkpoints:
      return rc._once(labelled, Saving(checkpoints), prompts)

  assert again(PROMPTS) == again(PROMPTS) == ([], {"samples": 6}) and len(made) == 1
  with pytest.raises(CheckpointError, match=r"7 that .* are others"):
    again([*PROMPTS, Example(6, "a", "", "")])

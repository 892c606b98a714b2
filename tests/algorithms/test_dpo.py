"""DPO and IPO: the loss by hand, what moves, what does not, and what is refused."""

from __future__ import annotations

import dataclasses
import logging
import math

import jax
import numpy as np
import pytest

from rlft.algorithms import dpo
from rlft.core.errors import ConfigError, DataError, DivergenceError
from rlft.core.mesh import make_mesh, tree_shardings
from rlft.models.decoder import init_params, param_axes, param_shapes
from rlft.models.lora import LoRAConfig
from rlft.sampling.score import score
from rlft.tasks import preferences
from rlft.tasks.preferences import Preference
from rlft.training.optimizer import OptimizerConfig
from rlft.training.pairs import encode_pairs

OPTIMIZER = OptimizerConfig(learning_rate=3e-3, b2=0.98, eps=1e-5)
CONFIG = dpo.DPOConfig(optimizer=OPTIMIZER, batch_size=8, max_length=64, beta=0.5)


def bigger_answers(start, count):
  """Pairs whose chosen side ends in the larger digit; either side may be longer."""
  rng = np.random.default_rng(start)
  out = []
  for i in range(start, start + count):
    low, high = sorted(rng.choice(10, 2, replace=False).tolist())
    prompt = "".join(map(str, rng.integers(0, 10, 2 + i % 2)))
    more, less = "+ " * (i % 3 == 0), "+ " * (i % 3 == 1)
    out.append(Preference(i, prompt, f"{more}+{high}", f"{less}+{low}"))
  return out


@pytest.fixture(scope="module")
def pairs():
  return bigger_answers(0, 128)


@pytest.fixture(scope="module")
def stranger(policy):
  """Another policy of the same tokenizer, far from the start."""
  params = init_params(policy.model, jax.random.key(7))
  return dataclasses.replace(policy, params=jax.tree.map(lambda x: x * 1.5, params))


@pytest.fixture(scope="module")
def trained(policy, pairs):
  before = jax.device_get(policy.params)
  seen = []
  result = dpo.train(
    policy,
    pairs,
    CONFIG,
    dev={"other": bigger_answers(2000, 9), "held": bigger_answers(1000, 60)},
    on_progress=lambda done, of: seen.append((done, of)),
  )
  jax.tree.map(np.testing.assert_array_equal, policy.params, before)
  # Every pair, held out or not, once through the reference.
  assert seen[-1] == (197, 197) and [d for d, _ in seen] == sorted(d for d, _ in seen)
  return result


def by_hand(policy, pair, mean):
  """Log-probabilities of both sides of a text pair, one row at a time."""
  out = []
  for text in (pair.chosen, pair.rejected):
    prompt, completion = policy.tokenizer([pair.prompt, text])["input_ids"]
    row = np.array([[*prompt, *completion, policy.eos_ids[0]]])
    logp_T = score(policy, row, np.ones(row.shape, bool))[0, len(prompt) :]
    assert len(logp_T) == len(completion) + 1  # the EOS counts
    out.append(logp_T.mean() if mean else logp_T.sum())
  return np.array(out, np.float64)


@pytest.mark.parametrize("kind, smoothing", [("dpo", 0.0), ("dpo", 0.2), ("ipo", 0.0)])
def test_first_loss_is_the_formula(policy, stranger, pairs, kind, smoothing):
  """Against another reference, over the real pairs of a batch that is filled up."""
  few = pairs[:5]
  config = dataclasses.replace(CONFIG, kind=kind, label_smoothing=smoothing)
  result = dpo.train(policy, few, config, stranger)
  ratios = [
    by_hand(policy, pair, kind == "ipo") - by_hand(stranger, pair, kind == "ipo")
    for pair in few
  ]
  h = np.array([chosen - rejected for chosen, rejected in ratios])
  assert np.abs(h).max() > 0.1  # or nothing is tested
  expected = (h - 1) ** 2
  if kind == "dpo":
    lost = lambda x: np.log1p(np.exp(-0.5 * x))
    expected = (1 - smoothing) * lost(h) + smoothing * lost(-h)
  assert result.losses == pytest.approx([expected.mean()], rel=1e-4)
  assert result.accuracies == pytest.approx([(h > 0).mean()])
  assert result.margins == pytest.approx([0.5 * h.mean()], rel=1e-3)


def test_learns_an_order_that_holds_for_other_pairs(trained):
  assert (trained.steps, trained.pairs, trained.dropped) == (16, 128, 0)
  assert trained.losses[0] == pytest.approx(math.log(2), abs=1e-5)
  assert trained.accuracies[0] == 0.5 and trained.margins[0] == 0
  assert np.mean(trained.losses[-3:]) < 0.6
  before, after = trained.before["held"], trained.after["held"]
  assert trained.after["other"].pairs == 9
  assert before.accuracy == pytest.approx((0.5, 0.5, 0.5))
  assert before.margin == (0, 0, 0)
  assert after.pairs == 60
  share, low, high = after.accuracy
  assert 0.7 < low <= share <= high <= 1
  assert after.margin[1] > 0
  assert after.likelier[0] > before.likelier[0]
  assert trained.reference_seconds < trained.seconds


def test_held_out_prompts_count_alike_whatever_their_pairs(policy, stranger, pairs):
  """A prompt with many pairs is one prompt."""
  many = [dataclasses.replace(pair, prompt="7") for pair in pairs[:5]]
  alone = dataclasses.replace(pairs[5], prompt="12")
  config = dataclasses.replace(CONFIG, batch_size=4)
  held = {"both": [*many, alone], "many": many, "alone": [alone]}
  found = dpo.train(policy, pairs[:4], config, stranger, dev=held).before
  mean = {name: one.margin[0] for name, one in found.items()}
  assert found["both"].pairs == 6 and abs(mean["many"] - mean["alone"]) > 0.01
  assert mean["both"] == pytest.approx((mean["many"] + mean["alone"]) / 2, rel=1e-4)


@pytest.mark.parametrize("kind", ["dpo", "ipo"])
def test_an_update_moves_the_chosen_side_up_relative_to_the_other(policy, pairs, kind):
  few = pairs[:8]
  config = dataclasses.replace(CONFIG, kind=kind)
  result = dpo.train(policy, few, config, dev={"same": few})
  assert result.steps == 1
  assert result.before["same"].margin[0] == 0 < result.after["same"].margin[1]
  assert result.after["same"].accuracy[0] > 0.8


def test_micro_batches_and_epochs(policy, pairs):
  config = dataclasses.replace(CONFIG, epochs=2)
  one = dpo.train(policy, pairs[:20], config)
  four = dpo.train(policy, pairs[:20], dataclasses.replace(config, micro_batches=4))
  assert len(one.losses) == 6 and len(set(one.losses)) == 6
  assert four.losses == pytest.approx(one.losses, rel=1e-5)
  assert four.margins == pytest.approx(one.margins, rel=1e-3, abs=1e-6)


@pytest.mark.slow
def test_on_a_mesh(policy, pairs):
  one = dpo.train(policy, pairs[:16], CONFIG)
  mesh = make_mesh(2, 2, 2, devices=jax.devices()[:8])
  model = policy.model.clone(mesh=mesh)
  layout = tree_shardings(mesh, param_axes(model), param_shapes(model))
  params = jax.device_put(policy.params, layout)
  spread = dataclasses.replace(policy, model=model, params=params)
  many = dpo.train(spread, pairs[:16], CONFIG)
  assert many.losses == pytest.approx(one.losses, rel=1e-4)
  assert many.margins == pytest.approx(one.margins, rel=1e-3, abs=1e-5)
  kernel = many.policy.params["layers"]["mlp"]["up"]["kernel"]
  assert not kernel.sharding.is_fully_replicated


def test_lora_leaves_the_base_alone(policy, pairs):
  lora = LoRAConfig(rank=2, targets=("attention/q", "mlp/up"))
  result = dpo.train(policy, pairs[:24], dataclasses.replace(CONFIG, lora=lora))
  assert result.losses[0] == pytest.approx(math.log(2), abs=1e-5)
  assert result.margins[-1] > 0
  moved = {
    "/".join(p.key for p in path)
    for (path, x), y in zip(
      jax.tree_util.tree_leaves_with_path(result.policy.params),
      jax.tree.leaves(policy.params),
    )
    if not np.array_equal(x, y)
  }
  assert moved == {"layers/attention/q/kernel", "layers/mlp/up/kernel"}
  assert result.policy.model == policy.model  # the adapters are in the weights


def test_compiles_once(policy, pairs):
  model = policy.model.clone(dtype=jax.numpy.dtype("float32"), remat="none")
  step = dpo.make_train_step(model, OPTIMIZER, 0.5, "dpo", 0.0, 0)
  dpo.train(policy, pairs[:9], CONFIG)
  before = step._cache_size(), dpo._jit_side_logp._cache_size()
  assert min(before) > 0
  dpo.train(policy, pairs[:30], dataclasses.replace(CONFIG, seed=4))
  assert (step._cache_size(), dpo._jit_side_logp._cache_size()) == before


def test_a_first_loss_that_cannot_be_is_an_error(policy, pairs, monkeypatch):
  """A reference pass that reads one token too few."""
  real = dpo.pair_logp
  monkeypatch.setattr(dpo, "pair_logp", lambda *a, **k: real(*a, **k) * [[0.5, 1]])
  with pytest.raises(DivergenceError, match="before the first update the loss is"):
    dpo.train(policy, pairs[:8], CONFIG)
  for kind, right in (("dpo", math.log(2)), ("ipo", 1.0)):
    config = dataclasses.replace(CONFIG, kind=kind)
    dpo.check_first_update(right, config)
    for wrong in (right * 1.001, math.nan):
      with pytest.raises(DivergenceError):
        dpo.check_first_update(wrong, config)


def test_a_loss_that_is_not_finite_is_an_error(policy, stranger, pairs):
  params = {**stranger.params, "embedding": stranger.params["embedding"] * np.nan}
  broken = dataclasses.replace(stranger, params=params)
  optimizer = dataclasses.replace(CONFIG.optimizer, max_nonfinite=1)
  config = dataclasses.replace(CONFIG, optimizer=optimizer)
  with pytest.raises(DivergenceError, match="update 1: loss is nan") as info:
    dpo.train(policy, pairs[:8], config, broken)
  assert info.value.arrays["ref_logp"].shape[1] == 2
  assert "--- row 1" in info.value.text


# ------------------------------------------------------------------------- bad input


def test_pairs_that_teach_nothing(policy, pairs, caplog):
  equal = dataclasses.replace(pairs[3], rejected=pairs[3].chosen)
  with pytest.raises(DataError, match="id 3 has two equal sides"):
    dpo.train(policy, [*pairs[:3], equal], CONFIG)
  blank = dataclasses.replace(pairs[3], chosen=" ")
  with pytest.raises(DataError, match="id 3 has a blank side"):
    dpo.train(policy, pairs[:3], CONFIG, dev={"held": [blank]})
  with pytest.raises(DataError, match="no preferences"):
    dpo.train(policy, [], CONFIG)
  short = dataclasses.replace(CONFIG, max_length=4)
  with pytest.raises(DataError, match="1 are longer than max_length=4"):
    dpo.train(policy, pairs[:1], short)
  long = dataclasses.replace(pairs[0], chosen="+1" * 40)
  with caplog.at_level(logging.WARNING):
    result = dpo.train(policy, [long, *pairs[1:8]], CONFIG)
  assert (result.pairs, result.dropped) == (7, 1)
  assert "1 of 8 pairs were dropped" in caplog.text


def test_tokens_that_the_embedding_has_no_row_for(policy, pairs):
  config = dataclasses.replace(policy.config, vocab_size=20)
  short = dataclasses.replace(policy, config=config)
  for models in ((short, None), (policy, short)):
    with pytest.raises(DataError, match=r"chosen side of pair 0 has the token .*20 ro"):
      dpo.train(models[0], pairs[:8], CONFIG, models[1])


def test_a_reference_that_reads_less_bounds_the_pairs(policy, stranger, pairs):
  config = dataclasses.replace(stranger.config, max_positions=4)
  model = stranger.model.clone(config=config)
  narrow = dataclasses.replace(stranger, config=config, model=model)
  with pytest.raises(DataError, match="longer than max_length=4"):
    dpo.train(policy, pairs[:1], CONFIG, narrow)


def test_models_that_cannot_be_trained(policy, tiny, pairs):
  with pytest.raises(ConfigError, match="different tokenizers"):
    dpo.train(policy, pairs, CONFIG, tiny)
  with pytest.raises(ConfigError, match=r"policy is .*no Policy"):
    dpo.train("mini", pairs, CONFIG)
  with pytest.raises(ConfigError, match=r"config is .*no DPOConfig"):
    dpo.train(policy, pairs, {"beta": 0.1})
  with pytest.raises(ConfigError, match="no tokenizer"):
    dpo.train(dataclasses.replace(policy, tokenizer=None), pairs, CONFIG)
  for change, message in (
    ({"micro_batches": 3}, "must be a multiple"),
    ({"chat": True}, "no chat template"),
    ({"optimizer": dataclasses.replace(OPTIMIZER, freeze=("none",))}, "matches no"),
  ):
    with pytest.raises(ConfigError, match=message):
      dpo.train(policy, pairs, dataclasses.replace(CONFIG, **change))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"batch_size": 0}, "batch_size"),
    ({"micro_batches": -1}, "micro_batches"),
    ({"epochs": 0}, "epochs"),
    ({"max_length": 0}, "max_length"),
    ({"beta": 0.0}, "beta"),
    ({"beta": math.inf}, "beta"),
    ({"kind": "kto"}, "kto"),
    ({"label_smoothing": 0.5}, "label_smoothing"),
    ({"kind": "ipo", "label_smoothing": 0.1}, "label_smoothing"),
    ({"compute_dtype": "float16"}, "compute_dtype"),
    ({"remat": "some"}, "remat"),
    ({"seed": -1}, "seed"),
  ],
)
def test_settings_that_cannot_be(changes, message):
  with pytest.raises(ConfigError, match=message):
    dpo.DPOConfig(**changes)


# -------------------------------------------------------------------------- for real


def test_real_preferences(policy, data_dir):
  """Most of their words are unknown to this tokenizer: pairs that it cannot tell apart,
  or that are too long, are dropped; the others train."""
  found = preferences.load(data_dir / "dpo_en_demo", on_bad="skip")
  size = lambda p: max(len(p.prompt + x) for x in (p.chosen, p.rejected))
  found = sorted(found, key=size)[:30]
  rest, held = preferences.hold_out(found, 0.3)
  config = dataclasses.replace(CONFIG, max_length=128)
  result = dpo.train(policy, rest, config, dev={"held": held})
  assert result.pairs + result.dropped == len(rest) and result.pairs >= 5
  assert result.losses[0] == pytest.approx(math.log(2), abs=1e-4)
  assert np.isfinite(result.losses).all() and 0 < result.after["held"].pairs <= len(
    held
  )
  encoded = encode_pairs(
    policy.tokenizer, policy.eos_ids[0], rest, max_length=config.max_length
  )
  assert len(encoded) == result.pairs
  moved = dpo.pair_logp(result.policy, encoded) - dpo.pair_logp(policy, encoded)
  assert (moved[:, 0] - moved[:, 1]).mean() > 0

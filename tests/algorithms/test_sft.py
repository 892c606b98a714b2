"""Supervised fine-tuning, from texts to a trained policy."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlft.algorithms import sft
from rlft.core.errors import ConfigError, DataError
from rlft.core.mesh import make_mesh, tree_shardings
from rlft.models.decoder import param_axes, param_shapes
from rlft.sampling.generate import generate
from rlft.sampling.score import score
from rlft.tasks import arithmetic
from rlft.training.data import TokenRow, batches, collate, encode_rows
from rlft.training.optimizer import OptimizerConfig
from rlft.training.step import init_state

OPTIMIZER = OptimizerConfig(learning_rate=1e-2, b2=0.98)
CONFIG = sft.SFTConfig(optimizer=OPTIMIZER, batch_size=8, max_length=128)


@pytest.fixture(scope="module")
def examples():
  return arithmetic.generate("train", 8)


@pytest.fixture(scope="module")
def rows(examples):
  return [(e.prompt, e.solution) for e in examples]


@pytest.fixture(scope="module")
def memorised(policy, rows):
  before = jax.device_get(policy.params)
  result = sft.train(policy, rows, dataclasses.replace(CONFIG, epochs=150))
  jax.tree.map(np.testing.assert_array_equal, policy.params, before)
  return result


def encoded(policy, rows, **kwargs):
  return encode_rows(
    policy.tokenizer, policy.eos_ids[0], rows, max_length=128, **kwargs
  )


def tokens_of(policy, rows):
  return int(sum(sum(row.weight) for row in encoded(policy, rows)))


def leaves(policy):
  return jax.tree.leaves(jax.device_get(policy.params))


def same(a, b):
  return all(np.array_equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


# -------------------------------------------------------------------- does it learn


def test_a_handful_of_rows_is_memorised(memorised):
  assert memorised.losses[0] > 3
  assert memorised.losses[-1] < 0.2


def test_what_was_memorised_is_what_is_sampled(memorised, examples):
  greedy = generate(
    memorised.policy,
    [e.prompt for e in examples],
    max_new_tokens=48,
    temperature=0.0,
  )
  right = [a == e.solution for a, e in zip(greedy.completions, examples)]
  assert sum(right) >= 7
  assert greedy.finished.sum() >= 7  # EOS was in the loss


def test_start_is_untouched_and_end_is_not(memorised, policy):
  assert not any(map(np.array_equal, leaves(memorised.policy), leaves(policy)))
  assert memorised.policy.tokenizer is policy.tokenizer
  for leaf in jax.tree.leaves(policy.params):
    assert not leaf.is_deleted()


# ------------------------------------------------------------------- the loss itself


@pytest.mark.parametrize("loss_on", ["completion", "all"])
def test_loss_is_the_mean_of_what_score_says(policy, rows, loss_on):
  config = dataclasses.replace(CONFIG, loss_on=loss_on)
  loss = sft.train(policy, rows, config).losses[0]
  batch = collate(encoded(policy, rows, loss_on=loss_on), 8, 128)
  logp = score(policy, batch.tokens, batch.mask)
  total = sum(
    -float(logp[b, t]) * float(batch.weight[b, t]) for b, t in np.ndindex(8, 128)
  )
  assert loss == pytest.approx(total / batch.weight.sum(), rel=1e-5)
  where = batch.weight > 0
  assert np.all(logp[where] < 0)  # no token counts that nothing predicts


def test_micro_batches_change_nothing(policy, rows):
  one = sft.train(policy, rows, CONFIG)
  four = sft.train(policy, rows, dataclasses.replace(CONFIG, micro_batches=4))
  assert four.losses == pytest.approx(one.losses, rel=1e-6)


@pytest.mark.usefixtures("optimized")
def test_no_array_of_all_logits_in_the_compiled_program(policy):
  """[B, T, V] is never held, forward or backward."""
  rows, length = 24, 192  # more tokens than a chunk of the head
  config = dataclasses.replace(policy.config, vocab_size=1031, max_positions=256)
  model = policy.model.clone(config=config)
  shapes = param_shapes(model)
  params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  state = init_state(params, OPTIMIZER, 1)
  step = sft.make_train_step(model, OPTIMIZER)
  text = step.lower(state, collate([], rows, length)).compile().as_text()
  sizes = [
    np.prod([int(n) for n in dims.split(",")])
    for dims in re.findall(r"f32\[([\d,]*\b1031\b[\d,]*)\]", text)
  ]
  assert sizes, "the vocabulary is not where this test looks for it"
  assert max(sizes) < rows * length * 1031 / 2


# ---------------------------------------------------------------------- the budget


def test_epochs(policy, rows):
  config = dataclasses.replace(CONFIG, batch_size=3, micro_batches=1, epochs=2)
  calls = []
  result = sft.train(policy, rows, config, lambda *args: calls.append(args))
  assert result.steps == 6 == len(result.losses)  # 3 + 3 + 2 rows, twice
  assert result.update_tokens == 2 * tokens_of(policy, rows)
  assert [step for step, _, _ in calls] == [1, 2, 3, 4, 5, 6]
  assert {of for _, of, _ in calls} == {6}
  # The schedule has the length of the run: it ends near 0, not before the end.
  rates = [metrics["learning_rate"] for _, _, metrics in calls]
  assert rates == sorted(rates, reverse=True)
  assert 0 < rates[-1] < 0.2 * rates[0]
  assert [metrics["loss"] for _, _, metrics in calls] == result.losses


def test_every_epoch_is_another_permutation(policy, rows, monkeypatch):
  asked = []

  def recorded(*args, **kwargs):
    asked.append((kwargs["seed"], kwargs["epoch"]))
    return batches(*args, **kwargs)

  monkeypatch.setattr(sft, "batches", recorded)
  sft.train(policy, rows, dataclasses.replace(CONFIG, epochs=3, seed=6))
  assert asked == [(6, 0), (6, 1), (6, 2)]


@pytest.mark.parametrize("share", [0.3, 1.0, 2.5])
def test_update_tokens_stops_with_the_batch_that_reaches_it(policy, rows, share):
  budget = int(share * tokens_of(policy, rows))
  config = dataclasses.replace(CONFIG, batch_size=2, update_tokens=budget, epochs=99)
  counts = []
  result = sft.train(
    policy, rows, config, lambda *args: counts.append(args[2]["loss_denominator"])
  )
  assert result.update_tokens == sum(counts)
  assert sum(counts) >= budget > sum(counts[:-1])


def test_compiles_once_for_rounds_of_different_length(policy, rows):
  model = policy.model.clone(dtype=jnp.dtype("float32"), remat="none")
  step = sft.make_train_step(model, OPTIMIZER, 1)
  sft.train(policy, rows, CONFIG)
  before = step._cache_size()
  assert before > 0
  sft.train(policy, rows, dataclasses.replace(CONFIG, epochs=3, seed=1))
  sft.train(policy, rows * 2, CONFIG)
  assert step._cache_size() == before


# ------------------------------------------------------------------------- seeds


def test_seeds(policy, rows):
  config = dataclasses.replace(CONFIG, batch_size=2)
  a, again, b = (
    sft.train(policy, rows, dataclasses.replace(config, seed=seed))
    for seed in (1, 1, 2)
  )
  assert a.losses == again.losses and same(a.policy, again.policy)
  assert a.losses != b.losses and not same(a.policy, b.policy)


def test_frozen_parameters(policy, rows):
  optimizer = dataclasses.replace(OPTIMIZER, freeze=("^embedding", "attention"))
  config = dataclasses.replace(CONFIG, optimizer=optimizer)
  result = sft.train(policy, rows, config)
  new, old = result.policy.params, policy.params
  assert np.array_equal(new["embedding"], old["embedding"])
  jax.tree.map(
    np.testing.assert_array_equal,
    new["layers"]["attention"],
    old["layers"]["attention"],
  )
  assert not np.array_equal(
    new["layers"]["mlp"]["up"]["kernel"], old["layers"]["mlp"]["up"]["kernel"]
  )


# --------------------------------------------------------------------- bad input


def place_on(policy, shape):
  mesh = make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
  model = policy.model.clone(mesh=mesh)
  layout = tree_shardings(mesh, param_axes(model), param_shapes(model))
  params = jax.device_put(policy.params, layout)
  return dataclasses.replace(policy, model=model, params=params)


def test_indivisible_batch(policy, rows):
  config = dataclasses.replace(CONFIG, micro_batches=3)
  with pytest.raises(ConfigError, match=r"batch_size=8 .* 3 x 1 = 3"):
    sft.train(policy, rows, config)
  config = dataclasses.replace(CONFIG, micro_batches=2)
  with pytest.raises(ConfigError, match=r"batch_size=8 .* 2 x 8 = 16"):
    sft.train(place_on(policy, (8, 1, 1)), rows, config)


def test_data_that_cannot_be_trained_on(policy, rows, caplog):
  with pytest.raises(DataError, match="no training rows"):
    sft.train(policy, [], CONFIG)
  with pytest.raises(DataError, match=r"training row 0 is \(None, 'x'\)"):
    sft.train(policy, [(None, "x")], CONFIG)
  with pytest.raises(DataError, match="empty completion"):
    sft.train(policy, [("a", ""), ("b", " ")], CONFIG)
  # The model's own limit counts too, not only the config's.
  with pytest.raises(DataError, match="longer than max_length=128"):
    sft.train(policy, [("1" * 200, "2")], dataclasses.replace(CONFIG, max_length=999))


def test_rows_that_are_encoded_keep_their_weights(policy, rows, caplog):
  ready = encoded(policy, rows)
  ready[0] = dataclasses.replace(ready[0], weight=(0.0,) * len(ready[0].tokens))
  result = sft.train(policy, ready, dataclasses.replace(CONFIG, loss_on="all"))
  assert result.update_tokens == sum(sum(row.weight) for row in ready)
  long = TokenRow((3,) * 129, (1.0,) * 129)
  again = sft.train(policy, [long, *ready], CONFIG)
  same(again.policy, result.policy)
  assert "1 of 9 training rows are longer than max_length=128" in caplog.text
  with pytest.raises(DataError, match="all 1 rows are longer"):
    sft.train(policy, [long], CONFIG)


def test_tokens_that_the_embedding_has_no_row_for(policy, rows):
  config = dataclasses.replace(policy.config, vocab_size=20)
  short = dataclasses.replace(policy, config=config)
  for given in (rows, [TokenRow((1, 2, 20), (0.0, 1.0, 1.0))]):
    with pytest.raises(DataError, match=r"training row 0 has the token .*20 rows"):
      sft.train(short, given, CONFIG)


def test_policies_that_cannot_be_trained(policy, rows):
  with pytest.raises(ConfigError, match=r"policy is .*no Policy"):
    sft.train("mini", rows, CONFIG)
  with pytest.raises(ConfigError, match=r"config is .*no SFTConfig"):
    sft.train(policy, rows, {"epochs": 2})
  with pytest.raises(ConfigError, match="no tokenizer"):
    sft.train(dataclasses.replace(policy, tokenizer=None), rows, CONFIG)
  endless = dataclasses.replace(policy)
  object.__setattr__(endless, "eos_ids", ())
  with pytest.raises(ConfigError, match="eos_ids"):
    sft.train(endless, rows, CONFIG)
  frozen = dataclasses.replace(OPTIMIZER, freeze=("nothing_like_it",))
  with pytest.raises(ConfigError, match="matches no parameter"):
    sft.train(policy, rows, dataclasses.replace(CONFIG, optimizer=frozen))
  with pytest.raises(ConfigError, match="no chat template"):
    sft.train(policy, rows, dataclasses.replace(CONFIG, chat=True))


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("batch_size", 0),
    ("micro_batches", -1),
    ("epochs", 0),
    ("max_length", 0),
    ("update_tokens", -1),
    ("loss_on", "prompt"),
    ("compute_dtype", "float16"),
    ("remat", "some"),
    ("seed", -1),
  ],
)
def test_config_values_out_of_range(field, value):
  with pytest.raises(ConfigError, match=field):
    sft.SFTConfig(**{field: value})

"""Reward and outcome models, from preferences and labels to what they tell apart."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlft.algorithms import reward_model as rm
from rlft.core.errors import ConfigError, DataError
from rlft.core.mesh import make_mesh
from rlft.core.types import Verdict
from rlft.models.decoder import Decoder, init_params
from rlft.models.hub import Policy, load
from rlft.models.scalar import init_scalar, load_scalar, place, save_scalar
from rlft.probes.reward_models import accuracy, auc, pair_gaps
from rlft.rewards.learned import row_values
from rlft.tasks import arithmetic, preferences
from rlft.tasks.preferences import Preference
from rlft.training import outcomes as outcomes_module
from rlft.training import rollouts
from rlft.training.optimizer import OptimizerConfig
from rlft.training.outcomes import Outcome, encode_outcomes, sample_outcomes
from rlft.training.pairs import encode_pairs

OPTIMIZER = OptimizerConfig(learning_rate=3e-3, b2=0.98, eps=1e-5)
CONFIG = rm.RewardModelConfig(optimizer=OPTIMIZER, batch_size=8, max_length=128)


def bigger_answers(start, count):
  """Pairs whose chosen side ends in the larger digit, and prompts that say nothing."""
  rng = np.random.default_rng(start)
  out = []
  for i in range(start, start + count):
    low, high = sorted(rng.choice(10, 2, replace=False).tolist())
    prompt = "".join(map(str, rng.integers(0, 10, 5)))
    out.append(Preference(i, prompt, f"+{high}", f"+{low}", margin=float(i % 3) / 2))
  return out


@pytest.fixture(scope="module")
def pairs():
  return bigger_answers(0, 192)


@pytest.fixture(scope="module")
def trained(policy, pairs):
  before = jax.device_get(policy.params)
  result = rm.train_pairs(policy, pairs, CONFIG)
  jax.tree.map(np.testing.assert_array_equal, policy.params, before)
  return result


def softplus(x):
  return np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0)


# ------------------------------------------------------------------------------ pairs


def test_learns_an_order_that_holds_for_other_pairs(trained, policy):
  held = bigger_answers(1000, 100)
  found = accuracy(trained.model, held)
  share, low, high = found["accuracy"]
  assert found["pairs"] == 100
  assert 0.7 < low <= share <= high <= 1
  assert np.mean(trained.losses[:3]) > 1.5 * np.mean(trained.losses[-3:])
  assert np.mean(trained.accuracies[-3:]) > 0.8
  assert (trained.steps, trained.rows, trained.dropped) == (24, 192, 0)
  first = rm.init_scalar(policy, 0)
  _, low, high = accuracy(first, held)["accuracy"]
  assert low < 0.6 and high > 0.4  # before training nothing is known
  swapped = [dataclasses.replace(p, chosen=p.rejected, rejected=p.chosen) for p in held]
  assert accuracy(trained.model, swapped)["accuracy"][0] == pytest.approx(1 - share)


def test_first_loss_is_the_formula(policy, pairs):
  """Over the real pairs only: the batch is filled up, and margins count."""
  few = pairs[:5]
  result = rm.train_pairs(policy, few, CONFIG)
  start = init_scalar(policy, CONFIG.seed)
  tokens = encode_pairs(policy.tokenizer, policy.eos_ids[0], few, max_length=128)
  gaps = pair_gaps(start, tokens).astype(np.float64)
  margins = np.array([p.margin for p in few])
  assert result.losses == pytest.approx([softplus(margins - gaps).mean()], rel=1e-5)
  assert result.accuracies == pytest.approx([(gaps > 0).mean()])


def test_micro_batches_and_a_mesh_change_nothing(policy, pairs):
  start = init_scalar(policy)
  config = dataclasses.replace(CONFIG, epochs=2)
  one = rm.train_pairs(start, pairs[:13], config)  # the last batch is not full
  mesh = make_mesh(2, 1, 2, devices=jax.devices()[:4])
  many = rm.train_pairs(
    place(start, mesh), pairs[:13], dataclasses.replace(config, micro_batches=2)
  )
  assert len(one.losses) == 4
  assert many.losses == pytest.approx(one.losses, rel=1e-4)
  assert many.model.mean == pytest.approx(one.model.mean, abs=1e-3)
  kernel = many.model.params["trunk"]["layers"]["mlp"]["up"]["kernel"]
  assert not kernel.sharding.is_fully_replicated


def test_normalised_on_reference_responses(trained, policy, pairs):
  tokens = encode_pairs(policy.tokenizer, policy.eos_ids[0], pairs, max_length=128)
  values = row_values(trained.model, [pair.chosen.tokens for pair in tokens])
  last = np.array([value[-1] for value in values])
  assert last.mean() == pytest.approx(0, abs=1e-4)
  assert last.std() == pytest.approx(1, abs=1e-4)
  config = dataclasses.replace(CONFIG, normalise=False)
  raw = rm.train_pairs(policy, pairs[:8], config).model
  assert (raw.mean, raw.std) == (0.0, 1.0)
  given = rm.train_pairs(
    policy, pairs[:8], CONFIG, references=[("1", "+0"), ("2", "+0 9")]
  ).model
  jax.tree.map(np.testing.assert_array_equal, given.params, raw.params)
  encode = lambda text: [*policy.tokenizer(text)["input_ids"], policy.eos_ids[0]]
  two = [v[-1] for v in row_values(raw, [encode("1+0"), encode("2+0 9")])]
  assert given.mean == pytest.approx(np.mean(two), rel=1e-4)
  assert given.std == pytest.approx(np.std(two), rel=1e-3)
  # Equal values have no scale.
  flat = dataclasses.replace(raw, params={**raw.params, "head": {
    "kernel": jnp.zeros_like(raw.params["head"]["kernel"]), "bias": jnp.float32(2)
  }})  # fmt: skip
  flat = rm.normalise(flat, [encode("1+0")] * 3)
  assert (flat.mean, flat.std) == (2.0, 1.0)


def test_goes_on_from_a_reward_model(trained, pairs):
  more = rm.train_pairs(trained.model, pairs[:32], CONFIG)
  assert np.mean(more.losses) < 0.6 * trained.losses[0]
  with pytest.raises(ConfigError, match="kind 'reward', not 'outcome'"):
    rm.train_outcome(trained.model, outcomes_by_hand(), CONFIG)


def test_compiles_once(policy, pairs):
  model = policy.model.clone(
    config=init_scalar(policy).config, dtype=jnp.dtype("float32"), remat="none"
  )
  step = rm.make_train_step(rm.pair_loss, model, OPTIMIZER, 0)
  rm.train_pairs(policy, pairs[:9], CONFIG)
  before = step._cache_size()
  assert before > 0
  rm.train_pairs(policy, pairs[:30], dataclasses.replace(CONFIG, seed=4))
  assert step._cache_size() == before


def test_pairs_that_cannot_be_trained_on(policy, pairs):
  equal = dataclasses.replace(pairs[3], rejected=pairs[3].chosen)
  with pytest.raises(DataError, match="id 3 has two equal sides"):
    rm.train_pairs(policy, [*pairs[:3], equal], CONFIG)
  short = dataclasses.replace(CONFIG, max_length=4)
  with pytest.raises(DataError, match="1 are longer than max_length=4"):
    rm.train_pairs(policy, pairs[:1], short)


# --------------------------------------------------------------------------- outcomes


def test_tokens_that_the_embedding_has_no_row_for(policy, pairs):
  config = dataclasses.replace(policy.config, vocab_size=20)
  short = dataclasses.replace(policy, config=config)
  with pytest.raises(DataError, match=r"chosen side of pair 0 has the token .*20 rows"):
    rm.train_pairs(short, pairs, CONFIG)
  with pytest.raises(DataError, match=r"outcome 0 has the token .*20 rows"):
    encode_outcomes(short, [outcomes_by_hand()[0]], "all")


def outcomes_by_hand():
  rows = [Outcome(i, "12", (5, 6, 7, 8 + i), (1, 2), float(i % 2)) for i in range(4)]
  return [*rows, Outcome(4, "3", (9,), (), 0.25)]


@pytest.mark.parametrize("loss_on", ["steps", "all", "final"])
def test_first_outcome_loss_is_the_formula(policy, loss_on):
  rows = outcomes_by_hand()
  config = dataclasses.replace(CONFIG, loss_on=loss_on)
  result = rm.train_outcome(policy, rows, config)
  start = init_scalar(policy, CONFIG.seed)
  read = {"steps": (1, 2, 3), "all": (0, 1, 2, 3), "final": (3,)}[loss_on]
  losses = []
  for row in rows:
    prompt = policy.tokenizer(row.prompt)["input_ids"]
    (logit,) = row_values(start, [[*prompt, *row.tokens]])
    for t in read if len(row.tokens) > 1 else (0,):
      z = float(logit[len(prompt) + t])
      losses.append(row.label * softplus(-z) + (1 - row.label) * softplus(z))
  assert result.losses == pytest.approx([np.mean(losses)], rel=1e-4)
  assert (result.model.kind, result.model.mean, result.model.std) == ("outcome", 0, 1)


def test_sampled_outcomes_are_counted_and_labelled(policy):
  examples = arithmetic.generate("train", 3)
  rows = sample_outcomes(
    policy, examples, lambda text, e: dataclasses.replace(
      arithmetic.judge(e.solution, e), correct=e.id == examples[1].id
    ), lambda text: [(1, "x")] if len(text) > 1 else [], 5, max_new_tokens=6,
  )  # fmt: skip
  assert len(rows) == 15
  assert [row.prompt_id for row in rows] == [e.id for e in examples for _ in range(5)]
  assert [row.label for row in rows] == [0.0] * 5 + [1.0] * 5 + [0.0] * 5
  for row in rows:
    assert 1 <= len(row.tokens) <= 6
    assert all(end == 0 for end in row.ends)  # the token that holds the first character
  assert any(row.ends for row in rows)
  assert len({row.tokens for row in rows}) > 10
  # An algorithm of the same seed begins with other samples than these.
  rolled = rollouts.sample(
    policy, examples, samples=5, temperature=1.0, max_new_tokens=6, seed=0, step=0
  )
  theirs = [
    tuple(x[mask].tolist()) for x, mask in zip(rolled.tokens, rolled.completion_mask)
  ]
  assert sum(row.tokens == other for row, other in zip(rows, theirs)) < 5


def test_what_cannot_be_judged_is_no_outcome(policy):
  examples = arithmetic.generate("train", 3)
  gone = lambda text, e: None if e is examples[1] else Verdict("1", True)
  rows = sample_outcomes(policy, examples, gone, lambda text: [], 2, max_new_tokens=3)
  assert [row.prompt_id for row in rows] == [examples[i].id for i in (0, 0, 2, 2)]


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"label": None}, r"outcome 1 \(prompt 1\) has the label None"),
    ({"label": math.nan}, "has the label nan"),
    ({"label": 2}, "has the label 2"),
    ({"tokens": ()}, "has no tokens"),
    ({"ends": (4,)}, "has 4 tokens, and step ends"),
  ],
)
def test_outcomes_that_cannot_be_trained_on(policy, change, message):
  rows = outcomes_by_hand()
  rows[1] = dataclasses.replace(rows[1], **change)
  with pytest.raises(DataError, match=message):
    rm.train_outcome(policy, rows, CONFIG)


def test_outcomes_that_teach_nothing(policy):
  rows = outcomes_by_hand()
  right = [dataclasses.replace(row, label=1.0) for row in rows]
  with pytest.raises(DataError, match="all 5 outcomes have the label 1"):
    rm.train_outcome(policy, right, CONFIG)
  bare = [dataclasses.replace(row, ends=()) for row in rows]
  with pytest.raises(DataError, match="none of 5 outcomes has a step end"):
    rm.train_outcome(policy, bare, CONFIG)
  rm.train_outcome(policy, bare, dataclasses.replace(CONFIG, loss_on="final"))
  with pytest.raises(DataError, match="longer than 2 tokens"):
    rm.train_outcome(policy, rows[:4], dataclasses.replace(CONFIG, max_length=2))


def test_where_values_are_read(policy):
  row = outcomes_by_hand()[0]
  weights = lambda read: encode_outcomes(policy, [row], read)[0].weight
  assert weights("steps") == (0, 0, 0, 1, 1, 1)
  assert weights("ends") == (0, 0, 0, 1, 1, 0)
  assert weights("final") == (0, 0, 0, 0, 0, 1)
  assert weights("all") == (0, 0, 1, 1, 1, 1)
  last = dataclasses.replace(row, ends=(3,))
  assert encode_outcomes(policy, [last], "ends")[0].weight == (0,) * 6


def test_auc_of_scores_that_are_known(policy):
  """A head that reads the prompt's label gives 1, its negative 0."""
  rows = [Outcome(i, "12", (5, 6, 7 + i % 2), (0, 2), float(i % 2)) for i in range(8)]
  orm = rm.train_outcome(
    policy, rows, dataclasses.replace(CONFIG, epochs=20, loss_on="final")
  ).model
  assert auc(orm, rows, "final") == (1.0, 1.0, 1.0)
  # Prefixes before the last token are the same for both labels.
  assert auc(orm, rows)[0] == pytest.approx(0.5)
  with pytest.raises(DataError, match="no step ends in 1 outcomes"):
    auc(orm, [dataclasses.replace(rows[0], ends=(2,))])


# -------------------------------------------------------------------------- bad input


def test_models_that_cannot_be_trained(policy, pairs):
  for change, message in (
    ({"tokenizer": None}, "no tokenizer"),
    ({"batch_size": 8, "micro_batches": 3}, "must be a multiple"),
    ({"chat": True}, "no chat template"),
    ({"optimizer": dataclasses.replace(OPTIMIZER, freeze=("nothing",))}, "matches no"),
  ):
    known = {k: v for k, v in change.items() if k == "tokenizer"}
    rest = {k: v for k, v in change.items() if k != "tokenizer"}
    with pytest.raises(ConfigError, match=message):
      rm.train_pairs(
        dataclasses.replace(policy, **known) if known else policy,
        pairs,
        dataclasses.replace(CONFIG, **rest),
      )
  frozen = dataclasses.replace(OPTIMIZER, freeze=("^trunk/",))
  result = rm.train_pairs(
    policy, pairs[:8], dataclasses.replace(CONFIG, optimizer=frozen)
  )
  assert np.array_equal(
    result.model.params["trunk"]["embedding"], policy.params["embedding"]
  )


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("batch_size", 0),
    ("micro_batches", -1),
    ("epochs", 0),
    ("max_length", 0),
    ("loss_on", "some"),
    ("compute_dtype", "float16"),
    ("remat", "some"),
    ("seed", -1),
  ],
)
def test_config_values_out_of_range(field, value):
  with pytest.raises(ConfigError, match=field):
    rm.RewardModelConfig(**{field: value})


# -------------------------------------------------------------------------- for real


def byte_tokenizer():
  import tokenizers
  from transformers import PreTrainedTokenizerFast

  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  vocab = {piece: i for i, piece in enumerate(["<eos>", *alphabet])}
  core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
  core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  core.decoder = tokenizers.decoders.ByteLevel()
  return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


def test_real_preferences_from_file_to_saved_model(policy, data_dir, tmp_path, caplog):
  found = preferences.load(
    data_dir / "hh_rlhf_harmless_test" / "test.jsonl", on_bad="skip"
  )
  # One or two length buckets: each is compiled.
  sizes = lambda p: [len((p.prompt + x).encode()) for x in (p.chosen, p.rejected)]
  found = [p for p in found if min(sizes(p)) > 132 and max(sizes(p)) < 220]
  rest, held = preferences.hold_out(found, 0.3)
  tokenizer = byte_tokenizer()
  config = dataclasses.replace(
    policy.config, vocab_size=len(tokenizer), layers=1, max_positions=192
  )
  model = Decoder(config)
  params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
  start = Policy(model, params, tokenizer, config)
  result = rm.train_pairs(
    start, rest, dataclasses.replace(CONFIG, batch_size=16, max_length=999)
  )
  assert result.rows + result.dropped == len(rest) and result.dropped > 0
  assert np.isfinite(result.losses).all() and result.steps >= 2
  found = accuracy(result.model, held)
  share, low, high = found["accuracy"]
  assert 0 < found["pairs"] < len(held)  # the longer ones were not read
  assert 0 <= low <= share <= high <= 1
  save_scalar(result.model, tmp_path / "reward")
  assert accuracy(load_scalar(tmp_path / "reward"), held) == found


@pytest.mark.slow
def test_an_orm_tells_right_prefixes_from_wrong_ones():
  """The mini model, its own samples, prompts that it was not trained on."""
  policy = load(arithmetic_mini())
  sampled = lambda split, count, k: sample_outcomes(
    policy,
    arithmetic.generate(split, count),
    arithmetic.judge,
    arithmetic.steps,
    k,
    max_new_tokens=48,
  )
  optimizer = OptimizerConfig(learning_rate=5e-4, eps=1e-5, warmup_steps=5)
  result = rm.train_outcome(
    policy,
    sampled("train", 800, 2),
    rm.RewardModelConfig(optimizer=optimizer, batch_size=32, max_length=256),
  )
  held = sampled("test", 100, 4)
  for at in ("steps", "final"):
    _, low, _ = auc(result.model, held, at)
    assert low > 0.5, at


def arithmetic_mini():
  import rlft.assets

  return f"{rlft.assets.__path__[0]}/mini"


def test_outcomes_after_a_stop_string_end_as_others_do(policy):
  """And a few-shot prompt is shown to the sampler, not to the model."""
  examples = arithmetic.generate("train", 3)
  seen, right = [], outcomes_module.sample

  def recorded(policy, examples, **how):
    seen.append([e.prompt for e in examples])
    return right(policy, examples, **how)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(outcomes_module, "sample", recorded)
    rows = sample_outcomes(
      policy, examples, arithmetic.judge, arithmetic.steps, 8,
      max_new_tokens=12, stop=("1",), few_shot="7 ",
    )  # fmt: skip
  assert seen == [["7 " + e.prompt for e in examples]]
  assert {row.prompt for row in rows} == {e.prompt for e in examples}
  one = policy.tokenizer("1", add_special_tokens=False)["input_ids"][-1]
  stopped = [row for row in rows if one in row.tokens]
  assert stopped
  for row in stopped:
    assert row.tokens[-2:] == (one, policy.eos_ids[0])
    (read,) = encode_outcomes(policy, [row], "final")
    assert np.flatnonzero(read.weight).tolist() == [len(read.tokens) - 1]
  with pytest.raises(ConfigError, match="choose one"):
    sample_outcomes(
      policy, examples, arithmetic.judge, arithmetic.steps, 1,
      max_new_tokens=2, few_shot="7", chat=True,
    )  # fmt: skip

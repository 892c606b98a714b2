"""Control tokens: what text becomes, what the model says of them, saving."""

from __future__ import annotations

import copy
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import transformers

import rlft
from rlft.core.errors import ConfigError, DataError
from rlft.core.mesh import make_mesh, tree_shardings
from rlft.models.decoder import (
  Decoder,
  DecoderConfig,
  param_axes,
  param_shapes,
  positions_from_mask,
)
from rlft.models.heads import lm_logits
from rlft.models.hub import MINI, Policy
from rlft.models.tokens import add_tokens, check_ids
from rlft.sampling.stops import decode_completion, token_bytes

LABELS = ("[GOOD]", "[BAD]")
TEXT = "Tom has 3 red marbles."


@pytest.fixture(scope="module")
def mini():
  return rlft.load(MINI)


@pytest.fixture(scope="module")
def byte_level():
  """A small byte-level BPE, in a model whose embedding has 3 rows more, untied."""
  core = tokenizers.Tokenizer(tokenizers.models.BPE())
  core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  core.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=300,
    special_tokens=["<eos>"],
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  core.train_from_iterator([TEXT, "Then he sells 2 marbles. [GOOD]"], trainer)
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=core, eos_token="<eos>"
  )
  config = DecoderConfig(
    vocab_size=len(tokenizer) + 1,
    width=16,
    layers=1,
    heads=2,
    kv_heads=2,
    head_dim=8,
    mlp_width=16,
    max_positions=64,
    tie_embeddings=False,
  )
  model = Decoder(config)
  source = np.random.default_rng(0)
  draw = lambda x: jnp.asarray(source.normal(x.ndim < 2, 0.2, x.shape), jnp.float32)
  params = jax.tree.map(draw, param_shapes(model))
  return Policy(model=model, params=params, tokenizer=tokenizer, config=config)


@pytest.fixture(params=["mini", "byte_level"])
def policy(request):
  return request.getfixturevalue(request.param)


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, tokens):
  mask = jnp.ones(tokens.shape, bool)
  run = model.apply({"params": params}, tokens, positions_from_mask(mask), mask)
  return lm_logits(params, model.config, run.hidden)


def logits_of(policy, tokens):
  return np.asarray(_logits(policy.model, policy.params, np.asarray(tokens)))


def test_text_never_merges_into_them(policy):
  more = add_tokens(policy, LABELS)
  ids = more.tokenizer.convert_tokens_to_ids(list(LABELS))
  plain = policy.tokenizer(TEXT)["input_ids"]
  read = more.tokenizer(TEXT + "[GOOD]" + TEXT + "[BAD]")["input_ids"]
  assert read == [*plain, ids[0], *plain, ids[1]]
  assert more.tokenizer(TEXT)["input_ids"] == plain
  # They are no text: neither in a completion nor for a stop string.
  assert decode_completion(more.tokenizer, read) == TEXT + TEXT
  assert [token_bytes(more.tokenizer)[i] for i in ids] == [b"", b""]


def test_the_given_policy_stays_as_it_is(policy):
  vocab = policy.tokenizer.get_vocab()
  before = jax.tree.map(np.array, policy.params)
  more = add_tokens(policy, LABELS)
  assert policy.tokenizer.get_vocab() == vocab and "[GOOD]" not in vocab
  jax.tree.map(np.testing.assert_array_equal, policy.params, before)
  assert more.config is more.model.config
  assert more.params["layers"] is policy.params["layers"]
  assert more.params["embedding"].shape[0] == more.config.vocab_size
  assert more.params["embedding"].dtype == policy.params["embedding"].dtype


def test_free_rows_are_used_before_new_ones(byte_level):
  """One row was free; the other two are new."""
  rows, known = byte_level.config.vocab_size, len(byte_level.tokenizer)
  assert rows == known + 1
  one = add_tokens(byte_level, ["[A]"])
  assert one.config.vocab_size == rows and one.config == byte_level.config
  table = np.asarray(byte_level.params["embedding"])
  assert np.abs(one.params["embedding"] - table)[known].max() > 0.1  # made anew
  np.testing.assert_array_equal(one.params["embedding"][:known], table[:known])
  three = add_tokens(byte_level, ["[A]", "[B]", "[C]"])
  assert three.config.vocab_size == known + 3 == len(three.tokenizer)
  # A token's rows do not depend on what is added with it, but on its name.
  new = np.asarray(three.params["embedding"][known:])
  np.testing.assert_allclose(new[0], one.params["embedding"][known], atol=1e-7)
  assert np.abs(new[0] - new[1]).max() > 1e-4 and np.abs(new[1] - new[2]).max() > 1e-4
  other = add_tokens(byte_level, ["[A]"], seed=1).params["embedding"][known]
  assert np.abs(new[0] - other).max() > 1e-4


def test_new_rows_are_the_mean_and_some_noise(byte_level):
  known = len(byte_level.tokenizer)
  more = add_tokens(byte_level, LABELS)
  for name, axis in (("embedding", 0), ("head", 1)):
    old = np.moveaxis(np.asarray(byte_level.params[name]), axis, 0)[:known]
    new = np.moveaxis(np.asarray(more.params[name]), axis, 0)
    np.testing.assert_array_equal(new[:known], old)
    for row in new[known:]:
      far = np.abs(row - old.mean(0)) / old.std(0)
      assert 0.15 < np.sqrt((far**2).mean()) < 0.5


def test_old_tokens_keep_their_odds(policy):
  """What the new tokens take is all that changes, and they take little."""
  known = len(policy.tokenizer)
  more = add_tokens(policy, LABELS)
  tokens = [policy.tokenizer(TEXT)["input_ids"]]
  old = logits_of(policy, tokens)[..., :known]
  new = logits_of(more, tokens)
  np.testing.assert_allclose(new[..., :known], old, atol=1e-5)
  share = np.asarray(jax.nn.softmax(new))[..., known:].sum(-1)
  assert (share > 0).all() and share.max() < 1.5 * 2 / (known + 2)


def test_it_comes_back_as_it_was_saved(policy, tmp_path):
  more = add_tokens(policy, LABELS)
  rlft.save(more, tmp_path / "model")
  back = rlft.load(tmp_path / "model")
  auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
  text = TEXT + "[GOOD]" + TEXT + "[BAD][GOOD] GOOD"
  ids = more.tokenizer(text)["input_ids"]
  assert back.tokenizer(text)["input_ids"] == ids == auto(text)["input_ids"]
  assert back.config == more.config and back.eos_ids == more.eos_ids
  jax.tree.map(np.testing.assert_array_equal, back.params, more.params)
  # Given again, they are what they were.
  assert add_tokens(back, LABELS) is back
  third = add_tokens(back, (*LABELS, "[NEW]"))
  np.testing.assert_array_equal(
    third.params["embedding"][:-1], back.params["embedding"]
  )


@pytest.mark.parametrize(
  "shape", [(1, 4, 2), pytest.param((2, 2, 2), marks=pytest.mark.slow)], ids=str
)
def test_a_mesh_gets_new_arrays_by_its_rules(byte_level, shape):
  mesh = make_mesh(*shape)
  model = byte_level.model.clone(mesh=mesh)
  layout = tree_shardings(mesh, param_axes(model), param_shapes(model))
  params = jax.device_put(byte_level.params, layout)
  spread = dataclasses.replace(byte_level, model=model, params=params)
  for count in (1, 2):  # of the sizes that follow, the tensor axis divides one
    names = [f"[{i}]" for i in range(count)]
    more, plain = add_tokens(spread, names), add_tokens(byte_level, names)
    due = tree_shardings(mesh, param_axes(more.model), param_shapes(more.model))
    for name in ("embedding", "head"):
      assert more.params[name].sharding == due[name]
      np.testing.assert_allclose(more.params[name], plain.params[name], atol=1e-6)


@pytest.mark.parametrize(
  "tokens, match",
  [
    ("[GOOD]", "list of strings"),
    (["[GOOD]", ""], "none of them empty"),
    ([3], "none of them empty"),
    (["[A]", "[B]", "[A]"], "given twice"),
    (["marbles"], "'marbles' is an ordinary token"),
  ],
)
def test_what_cannot_be_added(mini, tokens, match):
  with pytest.raises(ConfigError, match=match):
    add_tokens(mini, tokens)


def test_a_policy_without_a_tokenizer(mini):
  with pytest.raises(ConfigError, match="no tokenizer"):
    add_tokens(dataclasses.replace(mini, tokenizer=None), LABELS)


# ------------------------------------------------------- more tokens than rows


@pytest.fixture(scope="module")
def short(mini):
  """A policy whose tokenizer has one token more than the embedding has rows."""
  last = max(mini.tokenizer.get_vocab().values())
  return dataclasses.replace(
    mini, config=dataclasses.replace(mini.config, vocab_size=last)
  )


def test_a_token_without_a_row_is_named(short):
  vocab = short.tokenizer.get_vocab()
  last = max(vocab.values())
  token = next(token for token, i in vocab.items() if i == last)
  check_ids([[0, last - 1], [], np.array([1])], short, "row")
  message = re.escape(f"prompt 1 has the token {token!r} (id {last}), but the embedd")
  with pytest.raises(DataError, match=message):
    check_ids([[0], (1, last)], short, "prompt")
  for wrong in (-1, 10**6, 10**30):
    with pytest.raises(DataError, match=f"row 0 has the token id {wrong}, but the mod"):
      check_ids([[1, wrong]], short, "row")
  with pytest.raises(DataError, match=re.escape(repr(token))):
    rlft.generate(short, [[1, last]], max_new_tokens=1)
  with pytest.raises(DataError, match=re.escape(repr(token))):
    rlft.score(short, np.array([[1, last]]), np.ones((1, 2), bool))


def test_a_token_without_a_row_can_be_given_one(mini):
  grown = copy.deepcopy(mini.tokenizer)
  grown.add_tokens(["[A]", "[B]"], special_tokens=True)
  more = add_tokens(dataclasses.replace(mini, tokenizer=grown), ["[B]", "[C]"])
  a, b, c = more.tokenizer.convert_tokens_to_ids(["[A]", "[B]", "[C]"])
  assert more.config.vocab_size == c + 1
  rows = np.asarray(more.params["embedding"])
  old = np.asarray(mini.params["embedding"])
  np.testing.assert_array_equal(rows[: len(old)], old)
  scale = np.linalg.norm(old, axis=1).mean()
  for i in (a, b, c):  # "[A]" lies below them: its row is no zero
    assert 0.05 < np.linalg.norm(rows[i]) / scale < 1.5
  assert add_tokens(dataclasses.replace(mini, tokenizer=grown), ["[B]"]).config == (
    dataclasses.replace(mini.config, vocab_size=b + 1)
  )

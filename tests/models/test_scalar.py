"""Scalar models: where values are read, and that they survive the disk."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlft.core.errors import CheckpointError, ConfigError
from rlft.core.mesh import make_mesh
from rlft.models import families, hub, tensorfile
from rlft.models.decoder import Decoder, DecoderConfig, init_params
from rlft.models.scalar import (
  as_value,
  check_same_tokenizer,
  init_scalar,
  last_value,
  load_scalar,
  place,
  save_scalar,
  scalar_head,
  token_values,
)
from rlft.tasks.tokenizer import word_tokenizer

CONFIG = DecoderConfig(
  vocab_size=40,
  width=16,
  layers=2,
  heads=2,
  kv_heads=1,
  head_dim=8,
  mlp_width=32,
  max_positions=64,
  tie_embeddings=False,  # a Llama, whose lm head a value has no use for
)
LENGTHS = (5, 9, 1)
SIDES = ("left", "right", "both", "inside")


@pytest.fixture(scope="module", autouse=True)
def _quick_compilation():
  """Tiny programs that run a few times: compiling them is nearly all of the time."""
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def policy():
  model = Decoder(CONFIG)
  params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
  tokenizer = word_tokenizer(["one", "two"])
  return hub.Policy(model=model, params=params, tokenizer=tokenizer, config=CONFIG)


@pytest.fixture(scope="module")
def scalar(policy):
  scalar = init_scalar(policy, seed=3)
  head = {**scalar.params["head"], "bias": jnp.float32(0.25)}
  return dataclasses.replace(scalar, params={**scalar.params, "head": head})


def padded(side, width=14):
  """The same rows, padded elsewhere, with noise under the pads."""
  rng = np.random.default_rng(1)
  rows = [rng.integers(0, 40, n) for n in LENGTHS]
  tokens = rng.integers(0, 10**6, (len(rows), width)).astype(np.int32)
  mask = np.zeros((len(rows), width), bool)
  for i, row in enumerate(rows):
    free = width - len(row)
    at = {
      "left": np.arange(free, width),
      "right": np.arange(len(row)),
      "both": np.arange(len(row)) + free // 2,
      "inside": np.sort(np.random.default_rng(i).permutation(width)[: len(row)]),
    }[side]
    tokens[i, at], mask[i, at] = row, True
  return tokens, mask


@functools.partial(jax.jit, static_argnums=0)
def everything(model, params, tokens, mask):
  return (
    token_values(model, params, tokens, mask),
    last_value(model, params, tokens, mask),
  )


@pytest.fixture(scope="module")
def alone(scalar):
  """Each row without any padding: its hidden states through numpy's head."""
  tokens, _ = padded("right")
  forward = jax.jit(scalar.model.apply)
  kernel = np.asarray(scalar.params["head"]["kernel"], np.float64)
  out = []
  for row, n in zip(tokens, LENGTHS):
    ids = row[None, :n]
    ones = np.ones_like(ids, bool)
    hidden = forward(
      {"params": scalar.params["trunk"]}, ids, np.arange(n)[None], ones
    ).hidden[0]
    out.append(np.asarray(hidden, np.float64) @ kernel + 0.25)
  return out


@pytest.mark.parametrize("side", SIDES)
def test_values_are_those_of_the_row_alone(scalar, alone, side):
  tokens, mask = padded(side)
  values, last = map(np.asarray, everything(scalar.model, scalar.params, tokens, mask))
  assert values.dtype == last.dtype == np.float32
  for i, expected_T in enumerate(alone):
    np.testing.assert_allclose(values[i, mask[i]], expected_T, atol=1e-5)
    assert not values[i, ~mask[i]].any()
    # The last real token, not the last column, and not the last but one.
    assert last[i] == pytest.approx(expected_T[-1], abs=1e-5)


def test_an_empty_row_and_noise_under_pads(scalar):
  tokens, mask = padded("left")
  mask = np.concatenate([mask, np.zeros_like(mask[:1])])
  tokens = np.concatenate([tokens, np.full_like(tokens[:1], -7)])
  values, last = everything(scalar.model, scalar.params, tokens, mask)
  assert last[-1] == 0 and not values[-1].any()
  other = np.where(mask, tokens, 12345678)
  again = everything(scalar.model, scalar.params, other, mask)
  jax.tree.map(np.testing.assert_array_equal, (values, last), again)


def test_gradient_ignores_pads(scalar):
  """The row of the table that only pads hold gets none; every weight's is finite."""
  tokens, mask = padded("left")
  bare = CONFIG.vocab_size - 1
  tokens = np.where(mask, tokens % bare, bare)

  @jax.jit
  def grad(params):
    loss = lambda p: jnp.sum(last_value(scalar.model, p, tokens, mask) ** 2)
    return jax.grad(loss)(params)

  grads = grad(scalar.params)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
  assert not np.asarray(grads["trunk"]["embedding"])[bare].any()
  assert np.abs(grads["head"]["kernel"]).min() > 0


# --------------------------------------------------------------------------- the head


def test_first_heads(policy):
  wide = dataclasses.replace(CONFIG, width=4096, heads=1, kv_heads=1)
  stub = dataclasses.replace(policy, config=wide)
  kernel = np.asarray(init_scalar(stub).params["head"]["kernel"])
  assert kernel.std() == pytest.approx(1 / np.sqrt(4097), rel=0.05)
  assert abs(kernel.mean()) < 5 / 4096
  again, other = (init_scalar(stub, seed=s).params["head"] for s in (0, 1))
  assert np.array_equal(kernel, again["kernel"])
  assert not np.array_equal(kernel, other["kernel"])
  zero = init_scalar(policy, init="zero")
  assert zero.kind == "value" and not zero.params["head"]["kernel"].any()
  with pytest.raises(ConfigError, match="init='ones'"):
    init_scalar(policy, init="ones")
  with pytest.raises(ConfigError, match="kind='judge'"):
    init_scalar(policy, kind="judge")


def test_the_trunk_is_shared_and_has_no_lm_head(policy, scalar):
  assert "head" in policy.params and "head" not in scalar.params["trunk"]
  assert scalar.params["trunk"]["embedding"] is policy.params["embedding"]
  assert scalar.config == scalar.model.config and scalar.config.tie_embeddings


def test_head_is_float32_whatever_the_trunk_is(scalar):
  hidden = jnp.asarray([[1.0, 2.0**-9], [3.0, 1.0]], jnp.bfloat16)
  head = {"kernel": jnp.asarray([1.0, 1.0]), "bias": jnp.float32(2.0**-12)}
  value = scalar_head(head, hidden)
  assert value.dtype == jnp.float32
  assert value.tolist() == [1 + 2.0**-9 + 2.0**-12, 4 + 2.0**-12]


def test_a_value_model_starts_as_the_normalised_reward(scalar):
  reward = dataclasses.replace(scalar, mean=1.5, std=2.0)
  value = as_value(reward)
  assert (value.kind, value.mean, value.std) == ("value", 0.0, 1.0)
  assert value.params["trunk"] is reward.params["trunk"]
  tokens, mask = padded("left")
  _, raw = everything(reward.model, reward.params, tokens, mask)
  _, first = everything(value.model, value.params, tokens, mask)
  np.testing.assert_allclose(first, (raw - 1.5) / 2, atol=1e-6)


# ------------------------------------------------------------------------ on a mesh


def test_on_a_mesh(scalar):
  devices = jax.devices()
  mesh = make_mesh(2, 2, 2, devices=devices[:8])
  placed = place(scalar, mesh)
  kernel = placed.params["trunk"]["layers"]["mlp"]["up"]["kernel"]
  assert kernel.sharding.shard_shape(kernel.shape)[1:] == (8, 16)
  assert placed.params["head"]["kernel"].sharding.is_fully_replicated
  tokens, mask = (np.repeat(x, 4, axis=0) for x in padded("left"))
  one = everything(scalar.model, scalar.params, tokens, mask)
  many = everything(placed.model, placed.params, tokens, mask)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, many)
  # A policy on a mesh gives a head on the mesh.
  trunk = {**placed.params["trunk"], "head": jnp.zeros((16, 40))}
  policy = hub.Policy(placed.model, trunk, None, CONFIG)
  head = init_scalar(policy).params["head"]
  assert head["bias"].sharding.mesh == mesh


# -------------------------------------------------------------------------- on disk


def same(a, b):
  assert jax.tree.structure(a.params) == jax.tree.structure(b.params)
  jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
  for name in ("kind", "mean", "std", "config", "eos_ids"):
    assert getattr(a, name) == getattr(b, name), name


def test_saved_and_loaded(scalar, tmp_path):
  reward = dataclasses.replace(scalar, mean=-0.7, std=3.25, kind="outcome")
  save_scalar(reward, tmp_path / "reward")
  back = load_scalar(tmp_path / "reward")
  same(reward, back)
  check_same_tokenizer(reward, back)
  tokens, mask = padded("both")
  jax.tree.map(
    np.testing.assert_array_equal,
    everything(reward.model, reward.params, tokens, mask),
    everything(back.model, back.params, tokens, mask),
  )
  # A model that was saved there before is replaced, by a policy too.
  save_scalar(scalar, tmp_path / "reward")
  same(scalar, load_scalar(tmp_path / "reward"))
  trunk = hub.load(tmp_path / "reward")
  hub.save(trunk, tmp_path / "reward")
  with pytest.raises(CheckpointError, match="not a reward or value model"):
    load_scalar(tmp_path / "reward")


def test_damaged_directories(scalar, tmp_path):
  path = tmp_path / "reward"
  save_scalar(scalar, path)
  with pytest.raises(CheckpointError, match=r"there is no model at .*nowhere"):
    load_scalar(tmp_path / "nowhere")
  about = (path / "value_head.json").read_text()
  for change in ({"std": 0.0}, {"kind": "judge"}, {"mean": None}):
    (path / "value_head.json").write_text(json.dumps(json.loads(about) | change))
    with pytest.raises(CheckpointError, match=r"value_head\.json: kind must"):
      load_scalar(path)
  (path / "value_head.json").write_text(about[:-5])
  with pytest.raises(CheckpointError, match="not valid JSON"):
    load_scalar(path)
  (path / "value_head.json").write_text(about)
  raw = (path / "value_head.safetensors").read_bytes()
  (path / "value_head.safetensors").write_bytes(raw[:-4])
  with pytest.raises(CheckpointError, match="truncated"):
    load_scalar(path)


def test_a_head_of_another_width_or_not_finite(scalar, tmp_path):
  head = scalar.params["head"]
  for kernel, message in (
    (jnp.zeros(3), r"\(3,\)"),
    (jnp.full(16, jnp.nan), "not finite"),
  ):
    params = {**scalar.params, "head": {**head, "kernel": kernel}}
    with pytest.raises(CheckpointError, match=message):
      save_scalar(dataclasses.replace(scalar, params=params), tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


# ----------------------------------------------------------------------- tokenizers


def test_other_tokenizers(policy, scalar):
  check_same_tokenizer(policy, scalar)
  twin = dataclasses.replace(scalar, tokenizer=word_tokenizer(["one", "two"]))
  check_same_tokenizer(policy, twin)
  other = dataclasses.replace(scalar, tokenizer=word_tokenizer(["one", "ten"]))
  with pytest.raises(ConfigError, match=r"' ten' is None in the one and \d+ in"):
    check_same_tokenizer(policy, other)
  bare = dataclasses.replace(scalar, tokenizer=None)
  check_same_tokenizer(policy, bare)
  small = dataclasses.replace(bare, config=dataclasses.replace(CONFIG, vocab_size=39))
  with pytest.raises(ConfigError, match="vocabularies of 40 and 39"):
    check_same_tokenizer(policy, small)


# ----------------------------------------------------- reward models of Hugging Face

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
SCORES = json.loads((GOLDEN / "reward_models.json").read_text())


def classifier(name, path, dtype=np.float32, score=None, bias=None, **change):
  """The golden trunk with the head of make_reward_models.py, as it is published."""
  path.mkdir()
  file = tensorfile.TensorFile(GOLDEN / "models" / name / "model.safetensors")
  arrays = {n: next(file.chunks(n, whole=True))[1] for n in file}
  arrays = {n: x for n, x in arrays.items() if n not in ("lm_head.weight",)}
  arrays.pop("embed_out.weight", None)
  config = json.loads((GOLDEN / "models" / name / "config.json").read_text())
  width = config.get("word_embed_proj_dim") or config.get("n_embd")
  width = width or config["hidden_size"]
  head = (np.arange(width, dtype=np.float32)[None] % 7 - 3) / 8
  arrays["score.weight"] = (head if score is None else score).astype(dtype)
  if bias is not None:
    arrays["score.bias"] = np.asarray(bias, dtype)
  tensors = {n: (x.dtype, x.shape) for n, x in arrays.items()}
  tensorfile.write(path / "model.safetensors", tensors, arrays.values())
  config |= {
    "architectures": [SCORES[name]["architecture"]],
    "id2label": {"0": "LABEL_0"},
    "problem_type": "regression",
  }
  (path / "config.json").write_text(json.dumps(config | change))
  return path


def golden_rows(name):
  with np.load(GOLDEN / "models" / name / "golden.npz") as file:
    return file["tokens"], file["mask"]


@pytest.mark.parametrize("name", sorted(SCORES))
def test_scores_are_those_of_transformers(name, tmp_path):
  reward = load_scalar(classifier(name, tmp_path / "rm"))
  assert (reward.kind, reward.mean, reward.std) == ("reward", 0.0, 1.0)
  for tokens, mask in zip(*golden_rows(name)):  # padded on either side
    scores = last_value(reward.model, reward.params, tokens, mask)
    np.testing.assert_allclose(scores, SCORES[name]["scores"], atol=2e-5, rtol=1e-4)


def test_every_family_has_scores():
  covered = {one["architecture"] for one in SCORES.values()}
  assert len(covered) == len({f.model_type for f in families.FAMILIES})


@pytest.mark.parametrize("name", ["llama", "opt_350m"])
def test_a_reward_model_of_hugging_face_survives_the_disk(name, tmp_path):
  reward = load_scalar(classifier(name, tmp_path / "rm", bias=[0.75]))
  save_scalar(reward, tmp_path / "saved")
  again = load_scalar(tmp_path / "saved")
  assert again.config == reward.config
  jax.tree.map(np.testing.assert_array_equal, again.params, reward.params)
  tokens, mask = (x[0] for x in golden_rows(name))
  scores = last_value(again.model, again.params, tokens, mask)
  expected = np.add(SCORES[name]["scores"], 0.75)
  np.testing.assert_allclose(scores, expected, atol=2e-5, rtol=1e-4)


def test_a_head_in_half_precision_and_a_lm_head_that_was_left(tmp_path):
  path = classifier("llama", tmp_path / "rm", dtype=np.float16)
  file = tensorfile.TensorFile(path / "model.safetensors")
  arrays = {n: next(file.chunks(n, whole=True))[1] for n in file}
  arrays["lm_head.weight"] = np.ones((72, 32), np.float32)
  tensors = {n: (x.dtype, x.shape) for n, x in arrays.items()}
  tensorfile.write(path / "model.safetensors", tensors, arrays.values())
  head = load_scalar(path).params["head"]
  assert head["kernel"].dtype == jnp.float32
  np.testing.assert_array_equal(head["kernel"], (np.arange(32) % 7 - 3) / 8)


@pytest.mark.parametrize(
  "change, message",
  [
    ({"score": np.ones((3, 32))}, "a classifier of 3 labels; a reward model has one"),
    ({"score": np.ones((1, 31))}, r"'score.weight' of shape \(1, 32\); this one has"),
    ({"score": np.full((1, 32), np.nan)}, "its weights are not finite"),
    ({"bias": [1.0, 2.0]}, r"'score.bias': \(2,\)"),
    (
      {"architectures": ["LlamaForTokenClassification"]},
      "TokenClassification.*not sup",
    ),
    ({"architectures": ["LlamaForCausalLM"]}, "no value_head.json.*init_scalar"),
  ],
)
def test_classifiers_that_are_no_reward_models(tmp_path, change, message):
  with pytest.raises(CheckpointError, match=message):
    load_scalar(classifier("llama", tmp_path / "rm", **change))


def test_a_reward_model_is_no_policy(tmp_path):
  path = classifier("gpt2", tmp_path / "rm")
  with pytest.raises(CheckpointError, match=r"reward model.*load_scalar.*reward.model"):
    hub.load(path)


def test_an_outcome_model_starts_no_value_model(policy):
  with pytest.raises(ConfigError, match="logits of being right"):
    as_value(init_scalar(policy, kind="outcome"))

"""Rotary positions against transformers, and against themselves where rows are sampled.

rope.json comes from tests/golden/make_rope.py.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from rlft.core.errors import CheckpointError, DataError
from rlft.models import families, hub
from rlft.models.families import table
from rlft.models.rope import RopeScaling, longest_sample, rope_frequencies, rope_table
from rlft.sampling.generate import generate
from rlft.sampling.score import score

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "rope.json").read_text())
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def config_of(more):
  hf = LLAMA | CASES[0]["config"] | {"rope_scaling": None} | more
  return families.resolve(hf).from_hf(hf)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['config']} {c['length']}")
def test_frequencies_are_those_of_transformers(case):
  hf = LLAMA | case["config"]
  config = families.resolve(hf).from_hf(hf)
  position = jnp.ones((1, 1), jnp.int32)  # whose angles are the frequencies
  length = jnp.array([case["length"]])
  cos, sin = rope_table(32, config.rope_theta, config.rope_scaling, position, length)
  angle, factor = np.array(case["frequencies"]), case["attention_factor"]
  np.testing.assert_allclose(cos[0, 0], factor * np.cos(angle), rtol=0, atol=1e-6)
  np.testing.assert_allclose(sin[0, 0], factor * np.sin(angle), rtol=0, atol=1e-6)
  assert families.to_hf(config, like=families.LLAMA)["model_type"] == "llama"


@pytest.mark.parametrize("length", [1, 127, 128])
def test_dynamic_is_the_default_up_to_its_context(length):
  scaling = RopeScaling("dynamic", 2.0, original_positions=128)
  position = jnp.arange(length)[None]
  for a, b in zip(
    rope_table(32, 1e4, scaling, position, jnp.array([length])),
    rope_table(32, 1e4, None, position, jnp.array([length])),
  ):
    np.testing.assert_array_equal(a, b)


def test_an_odd_share_has_a_frequency_more():
  assert rope_frequencies(3, 1e4, None) == [1.0, 1e4 ** (-2 / 3)]


def test_how_long_a_sample_may_be():
  dynamic = RopeScaling("dynamic", 2.0, original_positions=32)
  long = RopeScaling("longrope", 4.0, original_positions=32)
  yarn = RopeScaling("yarn", 4.0, original_positions=32)
  assert [longest_sample(10, 128, s) for s in (None, yarn)] == [128, 128]
  assert [longest_sample(n, 64, dynamic) for n in (10, 40)] == [32, 32]
  assert [longest_sample(n, 128, long) for n in (10, 32, 33)] == [32, 32, 128]


def test_yarn_and_dynamic_lengthen_the_model():
  qwen = {"factor": 4.0, "rope_type": "yarn", "original_max_position_embeddings": 128}
  assert config_of({"rope_scaling": qwen}).max_positions == 512
  dynamic = {"factor": 2.0, "type": "dynamic"}
  assert config_of({"rope_scaling": dynamic}).max_positions == 256
  assert config_of({}).max_positions == 128


def test_both_spellings_may_stand_side_by_side():
  yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
  new = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 500.0}
  config = config_of({"rope_scaling": yarn, "rope_parameters": new})
  assert config.rope_theta == 500.0 and config.rope_scaling.original_positions == 32


def test_a_null_beside_the_rotary_settings_is_no_base():
  rotary = {"rope_type": "default", "rope_theta": 500.0}
  assert config_of({"rope_parameters": rotary, "rope_theta": None}).rope_theta == 500.0
  with pytest.raises(CheckpointError, match="'rope_theta' is None"):
    config_of({"rope_theta": None})


LONG = {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
NAN = float("nan")


@pytest.mark.parametrize(
  ("rotary", "match"),
  [
    ({"rope_type": "linear"}, "'factor' is missing"),
    ({"rope_type": "linear", "factor": None}, "'factor' is missing"),
    ({"rope_type": "linear", "factor": 0}, "'factor' is 0.0; it must be positive"),
    ({"rope_type": "dynamic", "factor": NAN}, "'factor' is nan"),
    ({"rope_type": "yarn", "factor": "4"}, "'factor' is '4'"),
    ({"rope_type": "yarn", "factor": [4]}, r"'factor' is \[4\]"),
    ({"rope_type": "yarn", "factor": -2.0}, "'factor' is -2.0"),
    ({"rope_type": "yarn", "beta_fast": 0}, "'beta_fast' is 0.0"),
    ({"rope_type": "yarn", "truncate": None}, "'truncate' is None"),
    ({"rope_type": "yarn", "truncate": "no"}, "'truncate' is 'no'"),
    (
      {"rope_type": "yarn", "original_max_position_embeddings": 0},
      "'original_max_position_embeddings' is 0",
    ),
    ({"rope_type": "llama3", "low_freq_factor": 0.0}, "'low_freq_factor' is 0.0"),
    (LONG | {"short_factor": None}, "'short_factor' is None"),
    (LONG | {"long_factor": [2.0] * 4}, "'long_factor' is a list of 4.* 16 numbers"),
    (LONG | {"long_factor": [2.0] * 15 + [0]}, r"'long_factor\[15\]' is 0.0"),
    (LONG | {"short_factor": [NAN] * 16}, r"'short_factor\[0\]' is nan"),
    (LONG | {"attention_factor": "1"}, "'attention_factor' is '1'"),
    ({"rope_type": "su"}, "'su' is not supported; supported: default, linear"),
    ({"rope_type": ["yarn"]}, r"\['yarn'\] is not supported"),
    ({"rope_theta": 0}, "'rope_theta' is 0.0"),
    ({"full_attention": {}, "sliding_attention": {}}, "full_attention.*not supported"),
    ([1, 2], r"'rope_parameters' is \[1, 2\]; it must be an object"),
    ("linear", "'rope_parameters' is 'linear'"),
  ],
)
def test_rotary_settings_that_cannot_be_are_named(rotary, match):
  with pytest.raises(CheckpointError, match=match):
    config_of({"rope_parameters": rotary})


def test_settings_that_contradict_each_other_are_named():
  one, other = {"type": "linear", "factor": 2.0}, {"type": "linear", "factor": 4.0}
  with pytest.raises(CheckpointError, match=r"'factor' is 2.0 in 'rope_scaling'.* 4.0"):
    config_of({"rope_scaling": one, "rope_parameters": other})


def test_a_share_that_does_not_fit_the_head_is_named():
  with pytest.raises(CheckpointError, match="rotates 5 of the 5 features"):
    table.rotary_share({"rotary_pct": 1.0}, 5, "rotary_pct", 0.25)
  with pytest.raises(CheckpointError, match=r"rotary_pct=1\.5"):
    table.rotary_share({"rotary_pct": 1.5}, 8, "rotary_pct", 0.25)
  assert table.rotary_share({"rotary_pct": 0.6}, 5, "rotary_pct", 0.25) == 0.6


@pytest.mark.parametrize(
  ("name", "lengths", "new"),
  [
    ("phi3_longrope", (3, 12, 13, 20), {3: 9, 12: 0, 13: 20, 20: 20}),
    ("llama_dynamic", (3, 8), {3: 9, 8: 4}),
    ("qwen2_yarn", (3, 30), {3: 30, 30: 20}),
  ],
)
def test_sampled_and_scored_log_probs_agree_at_the_border(name, lengths, new):
  """Prompts on both sides of the original context, up to the last token allowed."""
  policy = dataclasses.replace(hub.load(GOLDEN / "models" / name), eos_ids=())
  rng = np.random.default_rng(0)
  prompts = [rng.integers(72, size=n).tolist() for n in lengths if new[n]]
  budget = [new[n] for n in lengths if new[n]]
  out = generate(policy, prompts, samples=2, max_new_tokens=budget, seed=1)
  assert out.lengths.tolist() == np.repeat(budget, 2).tolist()
  want = score(policy, out.tokens, out.mask)
  gap = np.abs(np.where(out.completion_mask, want - out.raw_logp, 0)).max()
  assert gap < 1e-4


@pytest.mark.parametrize(
  ("name", "length", "new"),
  [("phi3_longrope", 3, 10), ("phi3_longrope", 12, 1), ("llama_dynamic", 8, 5)],
)
def test_a_row_is_not_sampled_across_the_border(name, length, new):
  policy = hub.load(GOLDEN / "models" / name)
  match = "beyond 12 tokens its '(longrope|dynamic)'.*lower max_new_tokens"
  with pytest.raises(DataError, match=match):
    generate(policy, [[1] * length], max_new_tokens=new)

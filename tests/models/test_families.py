"""Every family against transformers: log-probs, configs, and files out and in again."""

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
from rlft.models import decoder, families, heads, hub, tensorfile
from rlft.models.decoder import DecoderConfig, RopeScaling
from rlft.models.families import table

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "models"
NAMES = sorted(path.name for path in GOLDEN.iterdir())


@functools.cache
def policy_of(name: str) -> hub.Policy:
  return hub.load(GOLDEN / name)


@functools.cache
def golden_of(name: str) -> dict[str, np.ndarray]:
  with np.load(GOLDEN / name / "golden.npz") as file:
    return dict(file)


def log_probs(policy: hub.Policy, tokens_BT, mask_BT, quick: bool = False):
  """Log-prob of each token; `quick` spends less time on compiling."""

  def run(params, tokens_BT, mask_BT):
    positions_BT = decoder.positions_from_mask(mask_BT)
    hidden = policy.model.apply({"params": params}, tokens_BT, positions_BT, mask_BT)
    logp = heads.lm_logp(params, policy.config, hidden.hidden[:, :-1], tokens_BT[:, 1:])
    real = mask_BT[:, 1:] & mask_BT[:, :-1]
    return jnp.pad(jnp.where(real, logp, 0.0), ((0, 0), (1, 0)))

  options = {"xla_backend_optimization_level": 0} if quick else {}
  compiled = jax.jit(run, compiler_options=options)
  return np.asarray(compiled(policy.params, tokens_BT, mask_BT))


@functools.cache
def log_probs_of(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Of the golden rows: padded left, padded right, and left with more and other pads.

  All in one batch, five columns wider on the left and three on the right.
  """
  golden, rng = golden_of(name), np.random.default_rng(0)
  tokens, mask = golden["tokens"], golden["mask"]
  wide = ((0, 0), (0, 0), (5, 3))
  mask = np.pad(mask[[0, 1, 0]], wide)
  tokens = np.pad(tokens[[0, 1, 0]], wide)
  tokens[2] = np.where(mask[2], tokens[2], rng.integers(72, size=tokens[2].shape))
  assert (tokens[2] != tokens[0]).any()
  length = tokens.shape[-1]
  logp = log_probs(
    policy_of(name), tokens.reshape(-1, length), mask.reshape(-1, length)
  ).reshape(tokens.shape)
  return tuple(logp[:, :, 5:-3])


def test_every_family_has_a_golden_checkpoint():
  made = {policy_of(name).hf_config["architectures"][0] for name in NAMES}
  assert made == {family.architecture for family in families.FAMILIES}


@pytest.mark.parametrize("name", NAMES)
def test_log_probs_equal_those_of_transformers(name):
  left, right, _ = log_probs_of(name)
  want = golden_of(name)["logp"]
  np.testing.assert_allclose(left, want[0], rtol=0, atol=1e-4)
  np.testing.assert_allclose(right, want[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_ids_under_pads_change_nothing(name):
  left, _, other = log_probs_of(name)
  np.testing.assert_array_equal(left, other)


def test_the_number_of_pads_changes_nothing():
  golden = golden_of("gemma3_text")
  tokens, mask = golden["tokens"][0], golden["mask"][0]
  none = log_probs(policy_of("gemma3_text"), tokens[:1], mask[:1])
  assert mask[:1].all()
  np.testing.assert_allclose(
    log_probs_of("gemma3_text")[0][:1], none, rtol=0, atol=2e-5
  )


# A setting that the golden log-probs did not notice would be a setting nobody tests.
@pytest.mark.parametrize(
  "name, change",
  [
    ("llama", {"norm_eps": 1e-6}),
    ("llama", {"rope_theta": 9e3}),
    ("llama3_scaled", {"rope_scaling": None}),
    ("llama3_scaled", {"rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.1, 32)}),
    ("mistral", {"windows": ()}),
    ("mistral", {"windows": (7, 6)}),
    ("qwen2_window", {"windows": (0, 0, 5, 0)}),
    ("qwen2_yarn", {"rope_scaling": None}),
    ("llama_dynamic", {"rope_scaling": None}),
    ("phi3_longrope", {"rope_scaling": None}),
    ("phi3_longrope", {"rope_fraction": 1.0, "rope_scaling": None}),
    ("phi3_longrope", {"windows": ()}),
    ("qwen3", {"qk_norm": False}),
    ("gemma", {"embed_scale": 5.6}),
    ("gemma", {"norm_offset": 0.99}),
    ("gemma", {"activation": "gelu"}),
    ("gemma2", {"attention_softcap": 3.1}),
    ("gemma2", {"final_softcap": 0.0}),
    ("gemma2", {"attention_scale": None}),
    ("gemma2", {"windows": (0, 5, 0, 5)}),
    ("gemma3_text", {"local_rope_theta": 110.0}),
    ("gemma3_text", {"local_rope_theta": None}),
    ("gemma3_text", {"rope_scaling": None}),
    ("gemma3_text", {"windows": (5,) * 7}),
    ("gpt2", {"activation": "gelu"}),
    ("gpt_neox", {"activation": "gelu_tanh"}),
    ("gpt_neox", {"parallel_residual": False}),
    ("gpt_neox_serial", {"rope_fraction": 0.25}),
    ("opt", {"activation": "gelu"}),
    ("opt", {"position_offset": 1, "max_positions": 41}),
    ("opt_350m", {"norm_placement": "pre"}),
  ],
)
def test_the_golden_log_probs_notice(name, change):
  policy, golden = policy_of(name), golden_of(name)
  config = dataclasses.replace(policy.config, **change)
  params = policy.params
  if change.get("qk_norm") is False:
    attention = dict(params["layers"]["attention"])
    del attention["q_norm"], attention["k_norm"]
    params = params | {"layers": params["layers"] | {"attention": attention}}
  changed = dataclasses.replace(
    policy, model=decoder.Decoder(config), config=config, params=params
  )
  got = log_probs(changed, golden["tokens"][0], golden["mask"][0], quick=True)
  assert np.abs(got - golden["logp"][0]).max() > 3e-4


@pytest.mark.parametrize("name", NAMES)
def test_saved_tensors_are_those_that_were_read(name, tmp_path):
  hub.save(policy_of(name), tmp_path / "out")
  before = tensorfile.TensorFile(GOLDEN / name / "model.safetensors")
  after = tensorfile.TensorFile(tmp_path / "out" / "model.safetensors")
  assert set(after) == set(before)
  for tensor in before:
    (_, a), (_, b) = (next(f.chunks(tensor, whole=True)) for f in (before, after))
    assert a.dtype == b.dtype and a.shape == b.shape
    assert a.tobytes() == b.tobytes(), tensor
  assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
    (GOLDEN / name / "config.json").read_text()
  )


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_survives_a_round_trip(name, tmp_path):
  first = hub.load(GOLDEN / name, dtype="bfloat16")
  hub.save(first, tmp_path / "out")
  second = hub.load(tmp_path / "out", dtype=jnp.bfloat16)
  assert second.config == first.config
  assert jax.tree.structure(first.params) == jax.tree.structure(second.params)
  for a, b in zip(jax.tree.leaves(first.params), jax.tree.leaves(second.params)):
    assert a.dtype == b.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("name", NAMES)
def test_a_config_survives_without_the_original(name, tmp_path):
  """A model that rlft made has no config.json yet: it is written from its config."""
  policy = dataclasses.replace(policy_of(name), hf_config={})
  hub.save(policy, tmp_path / "out")
  again = hub.load(tmp_path / "out")
  assert again.config == policy.config
  family = families.resolve(policy_of(name).hf_config)
  made = families.to_hf(policy.config, like=family)
  assert made["architectures"] == [family.architecture]
  assert family.from_hf(made) == policy.config


@pytest.mark.parametrize("name", NAMES)
def test_the_table_has_one_row_for_each_parameter(name):
  family = families.resolve(policy_of(name).hf_config)
  paths = [weight.path for weight in family.weights]
  assert len(paths) == len(set(paths))


# As published (what is left out is what we do not read): the older spelling of rotary
# settings and of layer patterns, and the defaults that published files rely on.
_LLAMA32 = {
  "architectures": ["LlamaForCausalLM"],
  "head_dim": 64,
  "hidden_act": "silu",
  "hidden_size": 2048,
  "intermediate_size": 8192,
  "max_position_embeddings": 131072,
  "model_type": "llama",
  "num_attention_heads": 32,
  "num_hidden_layers": 16,
  "num_key_value_heads": 8,
  "rms_norm_eps": 1e-05,
  "rope_scaling": {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
  },
  "rope_theta": 500000.0,
  "tie_word_embeddings": True,
  "vocab_size": 128256,
}
_QWEN25 = {
  "architectures": ["Qwen2ForCausalLM"],
  "hidden_act": "silu",
  "hidden_size": 896,
  "intermediate_size": 4864,
  "max_position_embeddings": 32768,
  "max_window_layers": 21,
  "model_type": "qwen2",
  "num_attention_heads": 14,
  "num_hidden_layers": 24,
  "num_key_value_heads": 2,
  "rms_norm_eps": 1e-06,
  "rope_theta": 1000000.0,
  "sliding_window": 32768,
  "tie_word_embeddings": True,
  "use_sliding_window": False,
  "vocab_size": 151936,
}
_GEMMA3 = {
  "architectures": ["Gemma3ForCausalLM"],
  "attn_logit_softcapping": None,
  "final_logit_softcapping": None,
  "head_dim": 256,
  "hidden_activation": "gelu_pytorch_tanh",
  "hidden_size": 1152,
  "intermediate_size": 6912,
  "max_position_embeddings": 32768,
  "model_type": "gemma3_text",
  "num_attention_heads": 4,
  "num_hidden_layers": 26,
  "num_key_value_heads": 1,
  "query_pre_attn_scalar": 256,
  "rms_norm_eps": 1e-06,
  "rope_local_base_freq": 10000,
  "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
  "rope_theta": 1000000,
  "sliding_window": 512,
  "sliding_window_pattern": 6,
  "vocab_size": 262144,
}
_GEMMA2 = {
  "architectures": ["Gemma2ForCausalLM"],
  "attn_logit_softcapping": 50.0,
  "final_logit_softcapping": 30.0,
  "head_dim": 128,
  "hidden_activation": "gelu_pytorch_tanh",
  "hidden_size": 4608,
  "intermediate_size": 36864,
  "max_position_embeddings": 8192,
  "model_type": "gemma2",
  "num_attention_heads": 32,
  "num_hidden_layers": 46,
  "num_key_value_heads": 16,
  "query_pre_attn_scalar": 144,
  "rms_norm_eps": 1e-06,
  "rope_theta": 10000.0,
  "sliding_window": 4096,
  "vocab_size": 256000,
}
_GPT2 = {
  "activation_function": "gelu_new",
  "architectures": ["GPT2LMHeadModel"],
  "layer_norm_epsilon": 1e-05,
  "model_type": "gpt2",
  "n_ctx": 1024,
  "n_embd": 768,
  "n_head": 12,
  "n_layer": 12,
  "n_positions": 1024,
  "vocab_size": 50257,
}
_PHI3 = {
  "architectures": ["Phi3ForCausalLM"],
  "auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
  "hidden_act": "silu",
  "hidden_size": 3072,
  "intermediate_size": 8192,
  "max_position_embeddings": 131072,
  "model_type": "phi3",
  "num_attention_heads": 32,
  "num_hidden_layers": 32,
  "num_key_value_heads": 32,
  "original_max_position_embeddings": 4096,
  "rms_norm_eps": 1e-05,
  "rope_scaling": {
    "long_factor": [2.0] * 48,
    "short_factor": [1.0] * 48,
    "type": "su",
  },
  "rope_theta": 10000.0,
  "sliding_window": 262144,
  "vocab_size": 32064,
}
_PYTHIA = {
  "architectures": ["GPTNeoXForCausalLM"],
  "hidden_act": "gelu",
  "hidden_size": 512,
  "intermediate_size": 2048,
  "layer_norm_eps": 1e-05,
  "max_position_embeddings": 2048,
  "model_type": "gpt_neox",
  "num_attention_heads": 8,
  "num_hidden_layers": 6,
  "rotary_emb_base": 10000,
  "rotary_pct": 0.25,
  "tie_word_embeddings": False,
  "use_parallel_residual": True,
  "vocab_size": 50304,
}


@pytest.mark.parametrize(
  "hf, expected",
  [
    (
      _LLAMA32,
      {
        "rope_theta": 5e5,
        "rope_scaling": RopeScaling("llama3", 32.0, 1.0, 4.0, 8192),
        "kv_heads": 8,
        "tie_embeddings": True,
        "windows": (),
      },
    ),
    (_QWEN25, {"qkv_bias": True, "out_bias": False, "windows": (), "head_dim": 64}),
    (_QWEN25 | {"use_sliding_window": True}, {"windows": (0,) * 21 + (32768,) * 3}),
    (
      _GEMMA3,
      {
        "windows": (512, 512, 512, 512, 512, 0) * 4 + (512, 512),
        "rope_theta": 1e6,
        "local_rope_theta": 1e4,
        "rope_scaling": RopeScaling("linear", 8.0),
        "final_softcap": 0.0,
        "tie_embeddings": True,
        "attention_scale": 0.0625,
      },
    ),
    (
      _GEMMA2,
      {
        "windows": (4096, 0) * 23,
        "attention_scale": 1 / 12,
        "attention_softcap": 50.0,
        "final_softcap": 30.0,
        "embed_scale": 4608**0.5,
      },
    ),
    (_GPT2, {"mlp_width": 3072, "head_dim": 64, "tie_embeddings": True}),
    (
      _PHI3,
      {
        "max_positions": 131072,
        "rope_scaling": RopeScaling(
          "longrope",
          32.0,
          original_positions=4096,
          attention_factor=1.1902380714238083,  # of the published code
          short_factors=(1.0,) * 48,
          long_factors=(2.0,) * 48,
        ),
        "windows": (262144,) * 32,
      },
    ),
    (_QWEN25 | {"use_sliding_window": True, "sliding_window": None}, {"windows": ()}),
    (_GEMMA2 | {"hidden_activation": "gelu"}, {"activation": "gelu"}),
    (_GEMMA3 | {"hidden_activation": "gelu"}, {"activation": "gelu"}),
    # The base has a name of its own, and that of other families is not read.
    (_PYTHIA | {"rotary_emb_base": 500, "rope_theta": 700.0}, {"rope_theta": 500.0}),
    (_PYTHIA, {"rope_fraction": 0.25, "parallel_residual": True, "qkv_bias": True}),
  ],
)
def test_published_configs(hf, expected):
  family = families.resolve(hf)
  config = family.from_hf(hf)
  assert {key: getattr(config, key) for key in expected} == expected
  assert family.from_hf(families.to_hf(config, like=family)) == config


def test_checkpoints_of_the_bare_trunk_have_no_prefix(tmp_path):
  """The published GPT-2 files call their tensors "h.0..." and keep mask buffers."""
  source = tensorfile.TensorFile(GOLDEN / "gpt2" / "model.safetensors")
  arrays = {
    name.removeprefix("transformer."): next(source.chunks(name, whole=True))[1]
    for name in source
  }
  arrays["h.0.attn.bias"] = np.ones((1, 1, 4, 4), np.float32)
  tensors = {name: (array.dtype, array.shape) for name, array in arrays.items()}
  tensorfile.write(tmp_path / "model.safetensors", tensors, arrays.values())
  (tmp_path / "config.json").write_text((GOLDEN / "gpt2" / "config.json").read_text())
  bare, full = hub.load(tmp_path).params, policy_of("gpt2").params
  for a, b in zip(jax.tree.leaves(bare), jax.tree.leaves(full)):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize(
  "change, message",
  [
    ({"architectures": ["BertModel"]}, "BertModel.*not supported.*LlamaForCausalLM"),
    ({"architectures": ["LlamaForTokenClassification"]}, "not supported"),
    ({"architectures": None, "model_type": "t5"}, "'t5'.*not supported"),
    ({"auto_map": {"AutoModel": "x.py"}}, "auto_map.*rlft never runs it"),
    ({"quantization_config": {"bits": 4}}, "quantised weights cannot be trained"),
    ({"rope_scaling": {"rope_type": "mrope"}}, "'mrope' is not supported"),
    ({"hidden_act": "mish"}, "'mish' is not supported"),
    ({"hidden_act": "quick_gelu"}, "'quick_gelu' is not supported"),
    ({"hidden_act": ["silu"]}, r"\['silu'\] is not supported"),
    ({"hidden_size": None}, "'hidden_size' is None"),
    ({"hidden_size": "2048"}, "'hidden_size' is '2048'"),
    ({"rms_norm_eps": float("nan")}, "'rms_norm_eps' is nan"),
    ({"rms_norm_eps": -1.0}, "'rms_norm_eps' is -1.0; it must be positive"),
    ({"num_key_value_heads": 5}, "'num_attention_heads' is 32, which is not a mult"),
    ({"num_attention_heads": 4096, "head_dim": None}, "'head_dim' is 0"),
    ({"architectures": 7}, "'architectures' is 7; it must be a list"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
  ],
)
def test_configs_that_we_do_not_compute_are_refused(change, message):
  hf = _LLAMA32 | change
  with pytest.raises(CheckpointError, match=message):
    families.resolve(hf).from_hf(hf)


# What a null means in transformers: another value of the config, or none.
_NULLS = {"head_dim", "n_inner", "num_key_value_heads", "word_embed_proj_dim"}
_NULLS |= {"sliding_window", "attn_logit_softcapping", "final_logit_softcapping"}
_FLOATS = {"query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"}


@pytest.mark.parametrize("name", NAMES)
def test_a_number_that_is_none_is_named(name):
  hf = json.loads((GOLDEN / name / "config.json").read_text())
  family, read = families.resolve(hf), 0
  config = family.from_hf(hf)
  for key, value in hf.items():
    if isinstance(value, bool) or not isinstance(value, int | float):
      continue
    bad = [[], [value], {}, "7", str(value), True, float("nan"), 10**400]
    if key not in _NULLS:
      bad.append(None)
    if isinstance(value, int) and key not in _FLOATS:
      bad += [-3, 0.5, 10**12]
    for wrong in bad:
      try:
        found = family.from_hf(hf | {key: wrong})
      except CheckpointError as error:
        assert repr(key) in str(error) and repr(wrong)[:60] in str(error), wrong
        read += 1
      else:
        assert found == config, f"{key}={wrong!r:.60} is taken for a number"
  assert read > 60  # else nothing was read


@pytest.mark.parametrize("name", NAMES)
def test_a_switch_that_is_none_is_named(name):
  """The text "false" is true in Python: a model would have been another one."""
  hf = json.loads((GOLDEN / name / "config.json").read_text())
  family, read = families.resolve(hf), 0
  config = family.from_hf(hf)
  switches = {key for key, value in hf.items() if isinstance(value, bool)}
  for key in switches | {"tie_word_embeddings"}:
    for wrong in ("false", "true", 2, 1.0, [False], {}):
      try:
        found = family.from_hf(hf | {key: wrong})
      except CheckpointError as error:
        assert key in str(error) and repr(wrong) in str(error), wrong
        read += 1
      else:
        assert found == config, f"{key}={wrong!r} is taken for a switch"
  assert read >= 6  # else nothing was read


def test_the_tanh_approximation_has_many_names():
  names = ("new", "fast", "accurate", "python_tanh", "pytorch_tanh")
  assert {table.activation(f"gelu_{name}") for name in names} == {"gelu_tanh"}
  assert table.activation("gelu_python") == table.activation("gelu") == "gelu"


def test_a_stretch_beside_the_rotary_settings_of_each_kind_of_layer():
  far = {"rope_type": "default", "rope_theta": 1e6}
  hf = _GEMMA3 | {"rope_parameters": {"full_attention": far, "sliding_attention": {}}}
  with pytest.raises(
    CheckpointError, match="'rope_type' is 'linear' in 'rope_scaling'"
  ):
    families.resolve(hf).from_hf(hf)
  del far["rope_type"]
  assert families.resolve(hf).from_hf(hf).rope_scaling == RopeScaling("linear", 8.0)


def test_rotary_settings_for_no_kind_of_layer():
  hf = _GEMMA3 | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
  with pytest.raises(CheckpointError, match=r"of Gemma 3 are those of .*full_att"):
    families.resolve(hf).from_hf(hf)


def test_layer_types_must_fit():
  hf = _GEMMA3 | {"layer_types": ["sliding_attention", "chunked_attention"]}
  with pytest.raises(CheckpointError, match=r"2 entries for 26.*chunked_attention"):
    families.resolve(hf).from_hf(hf)
  with pytest.raises(CheckpointError, match="'layer_types' is 7; give a list"):
    families.resolve(hf).from_hf(hf | {"layer_types": 7})


def test_a_config_that_no_family_computes_cannot_be_saved():
  config = DecoderConfig(
    vocab_size=8,
    width=8,
    layers=1,
    heads=1,
    kv_heads=1,
    head_dim=8,
    mlp_width=8,
    max_positions=8,
    final_softcap=1.0,  # of Gemma, whose norms this model lacks
  )
  with pytest.raises(ConfigError, match="no Hugging Face architecture computes"):
    families.to_hf(config)

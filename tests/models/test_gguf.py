"""GGUF: config and weights, on SmolLM2 and on small files written here.

The expected values of SmolLM2 were made once with transformers (its GGUF loader).
"""

from __future__ import annotations

import importlib.util
import math
import sys
import tracemalloc

import gguf as gguf_package
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlft.core.errors import CheckpointError
from rlft.models import families, gguf
from rlft.models.rope import RopeScaling

HEADS, KV_HEADS, HEAD_DIM, WIDTH, FF, VOCAB = 4, 2, 8, 32, 64, 40


@pytest.fixture(scope="module")
def smollm2():
  try:
    return gguf.find_smollm2()
  except CheckpointError as error:
    pytest.skip(f"no real data: {error}")


def permute(weights, heads):
  """What llama.cpp's converter does to the rows of q and k."""
  split = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
  return split.swapaxes(1, 2).reshape(weights.shape)


def write(path, arch="llama", values=(), drop=(), extra=(), kind="F32", bias=False):
  """Writes a one-layer model; returns its weights under Hugging Face names."""
  rng = np.random.default_rng(0)
  writer = gguf_package.GGUFWriter(path, arch)
  settings_ = {
    f"{arch}.block_count": 1,
    f"{arch}.context_length": 128,
    f"{arch}.embedding_length": WIDTH,
    f"{arch}.feed_forward_length": FF,
    f"{arch}.attention.head_count": HEADS,
    f"{arch}.attention.head_count_kv": KV_HEADS,
    f"{arch}.attention.layer_norm_rms_epsilon": 1e-6,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["<s>", "a", "b", "ab", "[PAD]", "x y", "</s>"],
    "tokenizer.ggml.token_type": [3, 1, 1, 1, 5, 4, 3],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": 0,
  }
  for key, value in {**settings_, **dict(values)}.items():
    if key in drop:
      continue
    if isinstance(value, list):
      writer.add_array(key, value)
    elif isinstance(value, bool):
      writer.add_bool(key, value)
    elif isinstance(value, float):
      writer.add_float32(key, value)
    elif isinstance(value, int):
      writer.add_uint32(key, value)
    else:
      writer.add_string(key, value)
  layer = "model.layers.0."
  shapes = {
    "token_embd": ("model.embed_tokens", (VOCAB, WIDTH)),
    "output_norm": ("model.norm", (WIDTH,)),
    "blk.0.attn_norm": (layer + "input_layernorm", (WIDTH,)),
    "blk.0.attn_q": (layer + "self_attn.q_proj", (HEADS * HEAD_DIM, WIDTH)),
    "blk.0.attn_k": (layer + "self_attn.k_proj", (KV_HEADS * HEAD_DIM, WIDTH)),
    "blk.0.attn_v": (layer + "self_attn.v_proj", (KV_HEADS * HEAD_DIM, WIDTH)),
    "blk.0.attn_output": (layer + "self_attn.o_proj", (WIDTH, WIDTH)),
    "blk.0.ffn_norm": (layer + "post_attention_layernorm", (WIDTH,)),
    "blk.0.ffn_gate": (layer + "mlp.gate_proj", (FF, WIDTH)),
    "blk.0.ffn_up": (layer + "mlp.up_proj", (FF, WIDTH)),
    "blk.0.ffn_down": (layer + "mlp.down_proj", (WIDTH, FF)),
  }
  expected = {}
  for name, (hf_name, shape) in shapes.items():
    leaves = {"weight": shape}
    if bias and name[-2:] in ("_q", "_k", "_v"):
      leaves["bias"] = shape[:1]
    for leaf, leaf_shape in leaves.items():
      array = rng.standard_normal(leaf_shape).astype(np.float32)
      stored = array
      if arch == "llama" and name in ("blk.0.attn_q", "blk.0.attn_k"):
        stored = permute(array, HEADS if name[-1] == "q" else KV_HEADS)
      if kind != "F32" and len(leaf_shape) == 2:
        type_ = gguf_package.GGMLQuantizationType[kind]
        stored = gguf_package.quantize(stored, type_)
        writer.add_tensor(f"{name}.{leaf}", stored, raw_dtype=type_)
      else:
        writer.add_tensor(f"{name}.{leaf}", stored)
      expected[f"{hf_name}.{leaf}"] = array
  for name, array in dict(extra).items():
    writer.add_tensor(name, array)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return expected


# ------------------------------------------------------------------ config


def test_config_of_smollm2(smollm2):
  assert gguf.read_config(smollm2) == {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "intermediate_size": 1536,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "max_position_embeddings": 8192,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
  }


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_config_of_each_architecture(tmp_path, arch):
  values = {f"{arch}.attention.key_length": HEAD_DIM, f"{arch}.rope.freq_base": 5e5}
  head = np.zeros((VOCAB, WIDTH), np.float32)
  write(tmp_path / "m.gguf", arch, values, extra={"output.weight": head}, bias=True)
  config = gguf.read_config(tmp_path / "m.gguf")
  assert config["model_type"] == arch
  assert config["rope_theta"] == 5e5
  assert config["head_dim"] == HEAD_DIM
  assert config["rms_norm_eps"] == 1e-6
  assert config["vocab_size"] == VOCAB
  assert config["tie_word_embeddings"] is False
  assert config["attention_bias"] is True
  assert "eos_token_id" not in config


def llama3_divisors(factor, head_dim=64, theta=5e5):
  """The rule of Llama 3's rotary scaling, frequency by frequency."""
  divisors = []
  for i in range(0, head_dim, 2):
    wavelength = 2 * np.pi * theta ** (i / head_dim)
    if wavelength < 8192 / 4:
      divisors.append(1.0)
    elif wavelength > 8192 / 1:
      divisors.append(factor)
    else:
      smooth = (8192 / wavelength - 1) / (4 - 1)
      divisors.append(1 / ((1 - smooth) / factor + smooth))
  return np.array(divisors, np.float32)


def test_llama3_rotary_scaling_is_read_from_the_divisors(tmp_path):
  values = {
    "llama.attention.key_length": 64,
    "llama.rope.freq_base": 5e5,
    "llama.rope.dimension_count": 64,
  }
  divisors = llama3_divisors(32.0)
  write(tmp_path / "m.gguf", values=values, extra={"rope_freqs.weight": divisors})
  config = gguf.read_config(tmp_path / "m.gguf")
  assert config["rope_scaling"] == {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
  }
  divisors[20] *= 1.1
  write(tmp_path / "n.gguf", values=values, extra={"rope_freqs.weight": divisors})
  with pytest.raises(CheckpointError, match="Llama 3's rule"):
    gguf.read_config(tmp_path / "n.gguf")


def test_linear_rotary_scaling(tmp_path):
  values = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
  write(tmp_path / "m.gguf", values=values)
  scaling = gguf.read_config(tmp_path / "m.gguf")["rope_scaling"]
  assert scaling == {"rope_type": "linear", "factor": 4.0}


YARN = {
  "llama.rope.scaling.type": "yarn",
  "llama.rope.scaling.factor": 4.0,
  "llama.rope.scaling.original_context_length": 32,
}


def test_yarn(tmp_path):
  values = YARN | {"llama.rope.scaling.yarn_beta_fast": 16.0}
  values |= {"llama.rope.scaling.finetuned": True}
  write(tmp_path / "m.gguf", values=values)
  hf = gguf.read_config(tmp_path / "m.gguf")
  config = families.resolve(hf).from_hf(hf)
  assert config.rope_scaling == RopeScaling(
    "yarn",
    4.0,
    original_positions=32,
    attention_factor=1 + 0.1 * math.log(4),
    beta_fast=16.0,
  )


def test_longrope(tmp_path):
  values = {
    "llama.rope.scaling.type": "longrope",
    "llama.rope.scaling.attn_factor": 1.25,
    "llama.rope.scaling.original_context_length": 32,
  }
  lists = [1.0, 1.1, 1.2, 1.3], [2.0, 4.0, 6.0, 8.0]
  extra = {
    f"rope_factors_{name}.weight": np.array(numbers, np.float32)
    for name, numbers in zip(("short", "long"), lists)
  }
  write(tmp_path / "m.gguf", values=values, extra=extra)
  hf = gguf.read_config(tmp_path / "m.gguf")
  scaling = families.resolve(hf).from_hf(hf).rope_scaling
  assert (scaling.short_factors, scaling.long_factors) == tuple(map(tuple, lists))
  assert (scaling.attention_factor, scaling.original_positions) == (1.25, 32)
  assert "model.norm.weight" in gguf.tensors(tmp_path / "m.gguf")


@pytest.mark.parametrize(
  "key", ["llama.rope.scaling.factor", "llama.rope.scale_linear"]
)
def test_a_factor_without_a_kind_is_linear(tmp_path, key):
  write(tmp_path / "m.gguf", values={key: 4.0})
  scaling = gguf.read_config(tmp_path / "m.gguf")["rope_scaling"]
  assert scaling == {"rope_type": "linear", "factor": 4.0}
  write(tmp_path / "n.gguf", values={key: 4.0, "llama.rope.scaling.type": "none"})
  assert "rope_scaling" not in gguf.read_config(tmp_path / "n.gguf")


@pytest.mark.parametrize(
  ("changes", "match"),
  [
    ({"arch": "mamba"}, "'mamba' is not supported.*llama, qwen2, qwen3"),
    ({"drop": ["llama.block_count"]}, "'llama.block_count' is missing"),
    ({"values": {"llama.expert_count": 8}}, "mixture of 8 experts"),
    ({"values": {"llama.attention.head_count": [4, 4]}}, "list where a int"),
    ({"values": {"llama.attention.head_count": 0}}, "num_attention_heads is 0"),
    ({"values": {"llama.rope.scaling.type": "mrope"}}, "'mrope' is not supported"),
    (
      {"values": YARN | {"llama.rope.scaling.attn_factor": 0.5}},
      r"rope\.scaling\.attn_factor is 0\.5, which is not supported",
    ),
    (
      {"values": YARN, "extra": {"rope_freqs.weight": np.ones(4, np.float32)}},
      "rope_freqs.weight.*do not go with rotary scaling 'yarn'",
    ),
    (
      {"values": {"llama.rope.scaling.type": "longrope"}},
      "rope_factors_short.weight has shape",
    ),
    ({"values": {"llama.rope.dimension_count": 4}}, "over 4 of 8 dimensions"),
  ],
)
def test_what_a_config_cannot_say_is_an_error(tmp_path, changes, match):
  write(tmp_path / "m.gguf", **changes)
  with pytest.raises(CheckpointError, match=match):
    gguf.read_config(tmp_path / "m.gguf")


# ------------------------------------------------------------------ weights


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_weights_come_back_with_their_rows_in_order(tmp_path, arch):
  expected = write(tmp_path / "m.gguf", arch, bias=True)
  tensors = gguf.tensors(tmp_path / "m.gguf")
  assert set(tensors) == set(expected) and len(tensors) == len(expected)
  for name, array in expected.items():
    assert tensors.shape(name) == array.shape
    np.testing.assert_array_equal(tensors[name], array)


@pytest.mark.parametrize(
  ("kind", "atol"), [("F16", 2e-3), ("BF16", 2e-2), ("Q8_0", 0.02)]
)
def test_quantised_weights(tmp_path, kind, atol):
  expected = write(tmp_path / "m.gguf", kind=kind)
  tensors = gguf.tensors(tmp_path / "m.gguf")
  for name, array in expected.items():
    assert tensors[name].dtype == np.float32
    np.testing.assert_allclose(tensors[name], array, atol=atol)


def test_weights_of_smollm2_are_those_that_transformers_reads(smollm2):
  tensors = gguf.tensors(smollm2)
  assert len(tensors) == 2 + 30 * 9
  q = tensors["model.layers.0.self_attn.q_proj.weight"]
  k = tensors["model.layers.29.self_attn.k_proj.weight"]
  assert q.shape == (576, 576) and k.shape == (192, 576)
  assert q[1, :4] == pytest.approx([-0.15917969, 0.39794922, -0.01989746, -1.2734375])
  assert k[33, :4] == pytest.approx([0.15319824, -0.13668823, -0.05386353, -0.09527588])


def test_dequantisation_equals_the_reference_reader(smollm2):
  reference = {t.name: t for t in gguf_package.GGUFReader(smollm2).tensors}
  tensors = gguf.tensors(smollm2)
  for name, hf_name in {
    "blk.7.ffn_down.weight": "model.layers.7.mlp.down_proj.weight",
    "blk.7.attn_v.weight": "model.layers.7.self_attn.v_proj.weight",
    "blk.7.attn_norm.weight": "model.layers.7.input_layernorm.weight",
  }.items():
    tensor = reference[name]
    expected = gguf_package.dequantize(tensor.data, tensor.tensor_type)
    np.testing.assert_array_equal(tensors[hf_name], expected)


def test_one_tensor_at_a_time(smollm2):
  tensors = gguf.tensors(smollm2)
  name = "model.layers.0.mlp.down_proj.weight"
  size = 4 * np.prod(tensors.shape(name))
  tracemalloc.start()
  try:
    for layer in range(6):
      tensors[name.replace("0", str(layer))]
    kept, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  assert peak < 4 * size  # six tensors were read
  assert kept < size / 10


def test_a_tensor_without_a_place_is_an_error(tmp_path):
  write(tmp_path / "m.gguf", extra={"blk.0.attn_sinks.weight": np.ones(4, np.float32)})
  with pytest.raises(CheckpointError, match=r"blk.0.attn_sinks.weight.*no place"):
    gguf.tensors(tmp_path / "m.gguf")


def test_rows_that_are_not_the_heads_are_an_error(tmp_path):
  write(tmp_path / "m.gguf", values={"llama.attention.head_count_kv": 1})
  with pytest.raises(CheckpointError, match="not 1 heads of 8"):
    gguf.tensors(tmp_path / "m.gguf")


def test_the_missing_package_is_named(tmp_path, monkeypatch):
  write(tmp_path / "m.gguf")
  monkeypatch.setitem(sys.modules, "gguf", None)
  with pytest.raises(CheckpointError, match=r"rlft\[gguf\]"):
    gguf.tensors(tmp_path / "m.gguf")
  assert gguf.read_config(tmp_path / "m.gguf")["hidden_size"] == WIDTH


# ------------------------------------------------------------------ damaged files


def read_all(path):
  gguf.read_config(path)
  gguf.read_tokenizer(path)
  tensors = gguf.tensors(path)
  return [tensors[name] for name in tensors]


@pytest.mark.parametrize(
  ("content", "match"),
  [
    (None, "cannot be read.*No such file"),
    (b"", "cannot be read"),
    (b"PK\x03\x04 a zip file", "not a GGUF file"),
    (b"GGUF\x01\x00\x00\x00" + bytes(16), "version 1 is not 2 or 3"),
    (b"GGUF\x00\x00\x00\x03" + bytes(16), "is not 2 or 3"),
    (b"GGUF\x03\x00\x00\x00", "truncated"),
  ],
)
def test_what_is_not_a_gguf_file(tmp_path, content, match):
  path = tmp_path / "m.gguf"
  if content is not None:
    path.write_bytes(content)
  for read in (gguf.read_config, gguf.tensors, gguf.read_tokenizer):
    with pytest.raises(CheckpointError, match=match):
      read(path)


def test_a_truncated_file_is_an_error_wherever_it_ends(tmp_path):
  whole = tmp_path / "m.gguf"
  write(whole)
  content = whole.read_bytes()
  part = tmp_path / "part.gguf"
  read_all(whole)
  for size in [*range(0, len(content) - 1, 101), len(content) - 200]:
    part.write_bytes(content[:size])
    with pytest.raises(CheckpointError):
      read_all(part)


@settings(
  deadline=None,
  max_examples=300,
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(at=st.floats(0, 1), value=st.integers(0, 255), width=st.sampled_from([1, 8]))
def test_a_damaged_header_is_read_or_refused(tmp_path, at, value, width):
  path = tmp_path / "m.gguf"
  if not path.exists():
    write(path)
  content = bytearray(path.read_bytes())
  start = int(at * (content.index(b"blk.0.ffn_down.weight") + 80))
  content[start : start + width] = bytes([value] * width)
  damaged = tmp_path / "damaged.gguf"
  damaged.write_bytes(content)
  try:
    read_all(damaged)
  except CheckpointError as error:
    assert "damaged.gguf" in str(error)


def test_smollm2_missing_is_named(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(CheckpointError, match=r"rlft\[smollm2\]"):
    gguf.find_smollm2()

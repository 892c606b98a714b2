"""PEFT adapters: what is loaded is the base with the adapter added in."""

from __future__ import annotations

import json
import pathlib
import shutil

import numpy as np
import pytest

from rlft.core.errors import CheckpointError
from rlft.models import hub, tensorfile

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "models"
QUERY = "model.layers.1.self_attn.q_proj"


def adapter(path, module, size_in, size_out, rank=4, more=None, **about):
  """An adapter of one module, as PEFT writes it; returns B A."""
  path.mkdir(exist_ok=True)
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(rank, size_in)), rng.normal(size=(size_out, rank))
  arrays = {
    f"base_model.model.{module}.lora_{n}.weight": x for n, x in zip("AB", (a, b))
  }
  arrays |= more or {}
  arrays = {name: np.asarray(x, np.float32) for name, x in arrays.items()}
  tensors = {name: (x.dtype, x.shape) for name, x in arrays.items()}
  tensorfile.write(path / "adapter_model.safetensors", tensors, arrays.values())
  about = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "bias": "none"} | about
  about = {"base_model_name_or_path": str(GOLDEN / "llama")} | about
  (path / "adapter_config.json").write_text(json.dumps(about))
  return b @ a


def query(policy):
  return np.asarray(policy.params["layers"]["attention"]["q"]["kernel"])


@pytest.mark.parametrize(
  "about, rank, scale",
  [
    ({}, 4, 6 / 4),
    ({"use_rslora": True}, 4, 3.0),
    ({"rank_pattern": {"q_proj": 2}}, 2, 3.0),
    ({"alpha_pattern": {"layers.1.self_attn.q_proj": 2}}, 4, 0.5),
    ({"alpha_pattern": {"layers.0.self_attn.q_proj": 2}}, 4, 1.5),
  ],
)
def test_a_llama_with_its_adapter(tmp_path, about, rank, scale):
  update = adapter(tmp_path / "a", QUERY, 32, 32, rank, **({"r": 4} | about))
  base, found = query(hub.load(GOLDEN / "llama")), query(hub.load(tmp_path / "a"))
  np.testing.assert_array_equal(found[0], base[0])
  np.testing.assert_allclose(found[1], base[1] + scale * update.T, atol=1e-5)


def test_gpt2_is_stored_the_other_way(tmp_path):
  base = hub.load(GOLDEN / "gpt2")
  where = {"base_model_name_or_path": str(GOLDEN / "gpt2"), "fan_in_fan_out": True}
  update = adapter(tmp_path / "a", "transformer.h.0.attn.c_proj", 32, 32, **where)
  o = lambda policy: np.asarray(policy.params["layers"]["attention"]["o"]["kernel"][0])
  found = o(hub.load(tmp_path / "a"))
  np.testing.assert_allclose(found, o(base) + 1.5 * update.T, atol=1e-5)


def test_modules_that_were_saved_whole_replace(tmp_path):
  head = np.ones((72, 32), np.float32)
  more = {"base_model.model.lm_head.weight": head}
  adapter(tmp_path / "a", QUERY, 32, 32, more=more)
  assert (np.asarray(hub.load(tmp_path / "a").params["head"]) == 1).all()


def test_a_base_beside_the_adapter(tmp_path):
  shutil.copytree(GOLDEN / "llama", tmp_path / "base")
  adapter(tmp_path / "a", QUERY, 32, 32, base_model_name_or_path="../base")
  assert hub.load(tmp_path / "a").config == hub.load(GOLDEN / "llama").config


@pytest.mark.parametrize(
  "about, message",
  [
    ({"peft_type": "IA3"}, "has peft_type='IA3', which is not supported.*merge_and_un"),
    ({"use_dora": True}, "use_dora=True"),
    ({"bias": "all"}, "bias='all'"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    ({"r": 3}, "rank 3"),
    ({"lora_alpha": None}, "lora_alpha=None, which is no positive number"),
    ({"base_model_name_or_path": None}, "names no base model"),
    ({"base_model_name_or_path": "./gone"}, "is an adapter, and its base: there is no"),
  ],
)
def test_adapters_that_cannot_be_merged(tmp_path, about, message):
  adapter(tmp_path / "a", QUERY, 32, 32, **about)
  with pytest.raises(CheckpointError, match=message):
    hub.load(tmp_path / "a")


def test_tensors_that_have_no_place(tmp_path):
  adapter(tmp_path / "a", "model.layers.7.self_attn.q_proj", 32, 32)
  with pytest.raises(CheckpointError, match="which its base does not have"):
    hub.load(tmp_path / "a")
  where = {"base_model_name_or_path": str(GOLDEN / "qwen2")}
  adapter(tmp_path / "a", "model.embed_tokens", 32, 72, **where)
  with pytest.raises(
    CheckpointError, match=r"changes .*embed_tokens.* of a tied model"
  ):
    hub.load(tmp_path / "a")

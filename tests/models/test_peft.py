"""PEFT adapters: what is loaded is the base with the adapter added in."""

from __future__ import annotations

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from rlft.core.errors import CheckpointError
from rlft.models import decoder, heads, hub, scalar, tensorfile

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "models"
ADAPTERS = pathlib.Path(__file__).parents[1] / "golden" / "peft"
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


def log_probs(policy, tokens_BT, mask_BT):
  positions_BT = decoder.positions_from_mask(mask_BT)
  of = {"params": policy.params}
  hidden = policy.model.apply(of, tokens_BT, positions_BT, mask_BT).hidden[:, :-1]
  logp = heads.lm_logp(policy.params, policy.config, hidden, tokens_BT[:, 1:])
  real = mask_BT[:, 1:] & mask_BT[:, :-1]
  return np.pad(np.where(real, logp, 0.0), ((0, 0), (1, 0)))


@pytest.mark.parametrize("name", sorted(p.name for p in ADAPTERS.iterdir()))
def test_what_peft_computes(name):
  """Of tests/golden/make_peft.py, whose adapters name their bases beside them."""
  base = json.loads((ADAPTERS / name / "adapter_config.json").read_text())
  base = ADAPTERS / name / base["base_model_name_or_path"]
  with np.load(base / "golden.npz") as file:
    tokens, mask = file["tokens"][0], file["mask"][0]
  with np.load(ADAPTERS / name / "golden.npz") as file:
    golden = dict(file)
  if "scores" in golden:
    with pytest.raises(CheckpointError, match=r"is a reward model .*load_scalar"):
      hub.load(ADAPTERS / name)
    scored = scalar.load_scalar(ADAPTERS / name)
    found = scalar.last_value(scored.model, scored.params, tokens, mask)
    np.testing.assert_allclose(found, golden["scores"], rtol=0, atol=1e-4)
    return
  policy = hub.load(ADAPTERS / name)
  assert hub.architecture(ADAPTERS / name) == policy.config
  np.testing.assert_allclose(
    log_probs(policy, tokens, mask), golden["logp"], rtol=0, atol=1e-4
  )


def test_what_is_saved_of_an_adapted_model_is_whole(tmp_path):
  for name, tied in (("qwen2_added", True), ("qwen2_both", False)):
    policy = hub.load(ADAPTERS / name)
    assert policy.config.tie_embeddings == tied
    hub.save(policy, tmp_path / name)
    again = hub.load(tmp_path / name)
    assert again.config == policy.config
    jax.tree.map(np.testing.assert_array_equal, again.params, policy.params)


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
    ({"peft_type": None}, "peft_type=None"),
    ({"a_new_way": 2}, "a_new_way=2, which is not supported"),
    ({"rank_pattern": ["q_proj"]}, "which is no dict"),
    ({"rank_pattern": {"(": 2}}, r"has the pattern '\(' in rank_pattern"),
    ({"alpha_pattern": {"(a+)+x": 2}}, "has the pattern .* in alpha_pattern"),
    ({"alpha_pattern": {".*.*.*.*x": 2}}, "has the pattern .* in alpha_pattern"),
    ({"r": 3}, "rank 3"),
    ({"lora_alpha": None}, "lora_alpha=None, which is no positive number"),
    ({"lora_alpha": float("nan")}, "lora_alpha=nan, which is no positive number"),
    ({"lora_alpha": 10**400}, "lora_alpha=1000.*, which is no positive number"),
    ({"modules_to_save": "norm"}, "modules_to_save='norm', which is no list"),
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
  for name in ("lm_head.lora_magnitude_vector", "lm_head.lora_B.bias"):
    more = {f"base_model.model.{name}": np.ones(72)}
    adapter(tmp_path / "a", QUERY, 32, 32, more=more)
    with pytest.raises(CheckpointError, match=f"has the tensor '.*{name}'"):
      hub.load(tmp_path / "a")
  adapter(tmp_path / "a", QUERY, 32, 32, more={QUERY + ".weight": np.ones((32, 32))})
  with pytest.raises(CheckpointError, match=f"has the tensor '{QUERY}.weight'"):
    hub.load(tmp_path / "a")


def test_an_adapter_that_lacks_what_it_says_it_saved(tmp_path):
  adapter(tmp_path / "a", QUERY, 32, 32, modules_to_save=["lm_head", "norm"])
  with pytest.raises(CheckpointError, match=r"saved 'lm_head' .*, but not 'lm_head.we"):
    hub.load(tmp_path / "a")
  tensorfile.write(tmp_path / "a" / "adapter_model.safetensors", {}, ())
  with pytest.raises(CheckpointError, match="changes nothing: its file is empty"):
    hub.load(tmp_path / "a")


def test_its_own_tokenizer_comes_first(tmp_path):
  adapter(
    tmp_path / "a",
    "model.layers.0.self_attn.q_proj",
    hub.load(hub.MINI).config.width,
    hub.load(hub.MINI).config.heads * hub.load(hub.MINI).config.head_dim,
    base_model_name_or_path=str(hub.MINI),
  )
  base = hub.load(tmp_path / "a")
  assert base.tokenizer is not None and base.eos_ids == hub.load(hub.MINI).eos_ids
  base.tokenizer.chat_template = "{{ messages }}"
  base.tokenizer.save_pretrained(tmp_path / "a")
  found = hub.load(tmp_path / "a")
  assert found.tokenizer.chat_template == "{{ messages }}"
  assert found.eos_ids == base.eos_ids


def test_the_base_is_of_the_revision_that_is_named(tmp_path, monkeypatch):
  asked = []

  def download(name, allow_patterns, revision=None):
    asked.append((name, revision))
    return str(GOLDEN / "llama")

  monkeypatch.setattr("huggingface_hub.snapshot_download", download)
  about = {"base_model_name_or_path": "owner/base", "revision": "v1"}
  adapter(tmp_path / "a", QUERY, 32, 32, **about)
  hub.load(tmp_path / "a")
  assert asked == [("owner/base", "v1")]

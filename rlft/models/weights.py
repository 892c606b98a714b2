"""Parameters in and out of checkpoint files, one tensor at a time.

Names, layouts and shapes come from the family's table; this module moves the bytes.
Everything that headers can tell is checked before the first array is made.
"""

from __future__ import annotations

import functools
import json
import math
import pathlib
import re
from collections.abc import Collection, Iterator
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from rlft.core import mesh as meshes
from rlft.core.errors import CheckpointError
from rlft.models import decoder, tensorfile
from rlft.models.decoder import Decoder, DecoderConfig
from rlft.models.families import Family, Weight

# Buffers that older versions of transformers saved: masks and rotary tables.
_BUFFER = re.compile(
  r"rotary_emb\.inv_freq$|\.attn\.(bias|masked_bias)$|\.attention\.(bias|masked_bias)$"
)
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Source(Protocol):
  """Named tensors in a file or several."""

  def names(self) -> set[str]:
    """All names."""

  def where(self, name: str) -> str:
    """The file that holds a tensor, for messages."""

  def shape(self, name: str) -> tuple[int, ...]:
    """Shape of a tensor, from a header."""

  def dtype(self, name: str) -> str:
    """Name of its dtype, from a header."""

  def chunks(self, name: str, whole: bool) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, rows) of a tensor; in one piece when `whole`."""


class Directory:
  """The safetensors files of a Hugging Face directory."""

  def __init__(self, path: pathlib.Path):
    self._files: dict[str, tensorfile.TensorFile] = {}
    # A single file is the model, as for transformers: an index beside it is left over
    # from an earlier save in several files, whether or not those are still there.
    if (path / SINGLE).is_file():
      file = tensorfile.TensorFile(path / SINGLE)
      self._files = dict.fromkeys(file, file)
    elif (path / INDEX).is_file():
      self._read_index(path)
    else:
      raise _no_weights(path)

  def _read_index(self, path: pathlib.Path) -> None:
    """Finds what the files of an index hold, which need not be what it promises."""
    promised, files = _index(path)
    missing = [file for file in files if not (path / file).is_file()]
    if missing:
      raise CheckpointError(
        f"{path} lacks {len(missing)} of {len(files)} weight files that its index "
        f"names: {', '.join(missing[:5])}; fetch them again"
      )
    for file in files:
      opened = tensorfile.TensorFile(path / file)
      for name in opened:
        if name in self._files and promised.get(name) not in (
          file,
          self._files[name].path.name,
        ):
          raise CheckpointError(
            f"{self._files[name].path} and {path / file} both hold {name!r}, and the "
            "index does not say which one counts; fetch the files again"
          )
        if name not in self._files or promised.get(name) == file:
          self._files[name] = opened

  def names(self) -> set[str]:
    return set(self._files)

  def where(self, name: str) -> str:
    return str(self._files[name].path)

  def shape(self, name: str) -> tuple[int, ...]:
    return self._files[name].shape(name)

  def dtype(self, name: str) -> str:
    return self._files[name].infos[name].dtype

  def chunks(self, name: str, whole: bool) -> Iterator[tuple[int, np.ndarray]]:
    return self._files[name].chunks(name, whole)


def files_of_index(path: pathlib.Path) -> list[str]:
  """The weight files that a directory's index names."""
  return _index(path)[1]


def _index(path: pathlib.Path) -> tuple[dict[str, str], list[str]]:
  """Tensor -> file, and the files."""
  index = path / INDEX
  try:
    promised = json.loads(index.read_bytes())["weight_map"]
    files = sorted(set(promised.values()))
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    raise CheckpointError(f"{index} is damaged: it has no 'weight_map'") from error
  if not files:
    raise CheckpointError(f"{index} is damaged: its 'weight_map' is empty")
  for file in files:
    # No way out of the directory.
    if not isinstance(file, str) or pathlib.PurePath(file).name != file:
      raise CheckpointError(f"{index} names {file!r}, which is not a plain file name")
  return promised, files


def _no_weights(path: pathlib.Path) -> CheckpointError:
  files = sorted(p.name for p in path.iterdir())
  pickles = [f for f in files if f.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt"))]
  ggufs = [f for f in files if f.endswith(".gguf")]
  if pickles:
    return CheckpointError(
      f"{path} holds its weights only as {pickles[0]}: a pickle, which can run code, "
      "so rlft does not read it. Convert it where torch is installed: python -c "
      '"from transformers import AutoModelForCausalLM as M; '
      f"M.from_pretrained('{path}').save_pretrained('{path}-safetensors')\""
    )
  if ggufs:
    return CheckpointError(f"{path} holds GGUF files: pass {path / ggufs[0]} itself")
  return CheckpointError(
    f"{path} holds neither {SINGLE} nor {INDEX}; it has: {', '.join(files[:8])}"
  )


class GGUFFile:
  """The tensors of a GGUF file, dequantised one at a time."""

  def __init__(self, path: pathlib.Path):
    from rlft.models import gguf

    self._path, self._tensors = path, gguf.tensors(path)

  def names(self) -> set[str]:
    return set(self._tensors)

  def where(self, name: str) -> str:
    return str(self._path)

  def shape(self, name: str) -> tuple[int, ...]:
    return self._tensors.shape(name)

  def dtype(self, name: str) -> str:
    return "F32"

  def chunks(self, name: str, whole: bool) -> Iterator[tuple[int, np.ndarray]]:
    return self._tensors.chunks(name, None if whole else 32 << 20)


# ------------------------------------------------------------------------ import


def read_params(
  source: Source,
  family: Family,
  model: Decoder,
  mesh: Mesh | None,
  dtype: Any,
  beside: Collection[str] = (),
) -> dict:
  """Reads the parameters of a model into (sharded) arrays.

  Host memory beyond the arrays themselves is one tensor or 32 MiB of rows; on an
  accelerator it is one stacked parameter.

  Args:
    source: the tensors.
    family: whose names they have.
    model: the decoder; its config says what there must be.
    mesh: where the arrays live, by the rules of `core.mesh`; None is one device.
    dtype: of the arrays.
    beside: tensors of the source that are not the decoder's.

  Returns:
    The nested dict of parameters.

  Raises:
    CheckpointError: tensors are missing, unexpected, of a wrong shape or dtype, or not
      finite; each named.
  """
  shapes = _flat(decoder.param_shapes(model))
  axes = _flat(decoder.param_axes(model))
  rows = _rows(family, shapes)
  names = _names(source, family, model.config, beside)
  _check(source, family, rows, names, shapes, model.config)
  params = {}
  for path, weight in rows.items():
    shape = shapes[path].shape
    sharding = None if mesh is None else meshes.sharding(mesh, axes[path], shape)
    params[path] = _read(source, weight, names, shape, sharding, model.config, dtype)
  return _nest(params)


def read_array(source: Source, name: str) -> np.ndarray:
  """A small tensor, in float32."""
  check_dtype(source.dtype(name), name, source.where(name))
  ((_, value),) = source.chunks(name, whole=True)
  return _cast(value, np.float32)


def _read(source, weight: Weight, names, shape, sharding, config, dtype) -> jax.Array:
  placed = sharding or SingleDeviceSharding(jax.local_devices()[0])
  places = placed.addressable_devices_indices_map(shape)
  ranges = {
    device: tuple(s.indices(n)[:2] for s, n in zip(index, shape))
    for device, index in places.items()
  }
  buffers = {box: _aligned([b - a for a, b in box], dtype) for box in ranges.values()}
  # A slab is what one tensor holds: a layer of a stacked parameter, or all of it.
  row_axis = len(shape) - 1 if weight.transpose else int(weight.stacked)
  for layer in range(shape[0]) if weight.stacked else (0,):
    name = names[weight.name.format(layer)]
    for first, chunk in source.chunks(name, whole=weight.part is not None):
      chunk = _cast(chunk, dtype)
      if not _finite(chunk):
        raise CheckpointError(
          f"{source.where(name)}: the tensor {name!r} holds NaN or infinite values"
        )
      value = weight.take(chunk, config)
      slab = [(layer, layer + 1)] if weight.stacked else []
      slab += [(0, n) for n in value.shape]
      if weight.part is None and chunk.ndim:
        slab[row_axis] = (first, first + chunk.shape[0])
      value = value[None] if weight.stacked else value
      for box, buffer in buffers.items():
        common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, slab)]
        if all(a < b for a, b in common):
          at = tuple(slice(a - o, b - o) for (a, b), (o, _) in zip(common, box))
          of = tuple(slice(a - o, b - o) for (a, b), (o, _) in zip(common, slab))
          buffer[at] = value[of]
  # Aligned buffers become arrays without a copy on CPU. Elsewhere they are copied:
  # wait, so that they are freed before the next ones are made.
  if sharding is None:
    return jax.block_until_ready(jax.device_put(*buffers.values()))
  arrays = [jax.device_put(buffers[box], device) for device, box in ranges.items()]
  array = jax.make_array_from_single_device_arrays(shape, sharding, arrays)
  return jax.block_until_ready(array)


def _aligned(shape: list[int], dtype: Any) -> np.ndarray:
  """An uninitialised array at a multiple of 64 bytes, as XLA wants it."""
  size = math.prod(shape) * np.dtype(dtype).itemsize
  raw = np.empty(size + 64, np.uint8)
  start = -raw.ctypes.data % 64
  return raw[start : start + size].view(dtype).reshape(shape)


def _cast(x: np.ndarray, dtype: Any) -> np.ndarray:
  with np.errstate(over="ignore", invalid="ignore"):  # `_finite` finds both
    return x.astype(dtype, copy=False)


def _finite(x: np.ndarray) -> bool:
  if x.dtype == tensorfile.DTYPES["BF16"]:  # all bits of the exponent: inf or NaN
    bits = x.view(np.uint16) & 0x7F80
    return not (bits == 0x7F80).any()
  return bool(np.isfinite(x).all())


def _rows(family: Family, paths: Any) -> dict[str, Weight]:
  """The family's row of each parameter."""
  table = {weight.path: weight for weight in family.weights}
  lacking = sorted(set(paths) - set(table))
  if lacking:
    raise CheckpointError(
      f"a {family.architecture} checkpoint has no place for the parameters {lacking}"
    )
  return {path: table[path] for path in paths}


def _names(
  source: Source, family: Family, config: DecoderConfig, beside: Collection[str]
) -> dict[str, str]:
  """The table's name of each tensor -> the source's.

  A source may lack the prefix, and may keep a tied matrix under the head's name alone.
  """
  head, embedding = name_of(family, "head"), name_of(family, "embedding")
  names = {k: v for k, v in names_in(source, family).items() if k not in beside}
  if config.tie_embeddings and head in names and embedding not in names:
    names[embedding] = names.pop(head)
  return names


def names_in(source: Source, family: Family) -> dict[str, str]:
  """A tensor's name with the family's prefix -> the source's, which may lack it."""
  names = source.names()
  outside = {name_of(family, "head"), "score.weight", "score.bias"}
  if any(name.startswith(family.prefix) for name in names):
    return {name: name for name in names}
  return {n if n in outside else family.prefix + n: n for n in names}


def check_dtype(dtype: str, name: str, where: Any) -> None:
  """Raises where a tensor is no float."""
  if dtype not in tensorfile.DTYPES:
    raise CheckpointError(
      f"{where}: {name!r} has the dtype {dtype}; supported: "
      f"{', '.join(tensorfile.DTYPES)}"
    )


def name_of(family: Family, path: str) -> str:
  """The tensor that holds a parameter."""
  return next(weight.name for weight in family.weights if weight.path == path)


def _check(source, family, rows, names, shapes, config: DecoderConfig) -> None:
  expected = {}
  for path, weight in rows.items():
    shape = shapes[path].shape
    for layer in range(shape[0]) if weight.stacked else (0,):
      inner = shape[1:] if weight.stacked else shape
      expected[weight.name.format(layer)] = weight.hf_shape(inner, config)
  missing = sorted(set(expected) - set(names))
  extra = sorted(
    name for name in set(names) - set(expected) if not _BUFFER.search(name)
  )
  if missing:
    found = ", ".join(names[name] for name in extra[:3])
    instead = f" (it holds instead: {found})" if extra else ""
    raise CheckpointError(
      f"{len(missing)} of {len(expected)} tensors are missing: "
      f"{', '.join(missing[:5])}{instead}; the checkpoint is incomplete, or its "
      "config.json describes another model"
    )
  head = name_of(family, "head")
  if config.tie_embeddings and head in extra:
    _check_tied(source, names[head], names[rows["embedding"].name])
    extra.remove(head)
  if extra:
    raise CheckpointError(
      f"{len(extra)} tensors have no place in the model that config.json describes: "
      f"{', '.join(extra[:5])}; nothing is dropped silently"
    )
  for name, shape in expected.items():
    found, dtype = source.shape(names[name]), source.dtype(names[name])
    where = source.where(names[name])
    if tuple(found) != tuple(shape):
      raise CheckpointError(
        f"{where}: the tensor {name!r} has the shape {tuple(found)}, but config.json "
        f"makes it {tuple(shape)}"
      )
    if dtype not in tensorfile.DTYPES:
      raise CheckpointError(
        f"{where}: the tensor {name!r} has the dtype {dtype}; supported: "
        f"{', '.join(tensorfile.DTYPES)}. Quantised weights must be dequantised first"
      )


def _check_tied(source: Source, head: str, embedding: str) -> None:
  """A tied model may repeat its embedding as the head; then they must be equal."""
  if not equal(source, head, embedding):
    raise CheckpointError(
      f"{source.where(head)}: {head!r} differs from {embedding!r}, but config.json "
      "ties them; set 'tie_word_embeddings' to false there to use both"
    )


def equal(source: Source, a: str, b: str) -> bool:
  """Whether two tensors hold the same numbers.

  In another dtype the narrower one decides: it holds the other's rounded values.
  """
  dtypes = {source.dtype(a), source.dtype(b)}
  if source.shape(a) != source.shape(b) or not dtypes <= set(tensorfile.DTYPES):
    return False
  narrow = min((tensorfile.DTYPES[name] for name in dtypes), key=lambda d: d.itemsize)
  pairs = zip(source.chunks(a, False), source.chunks(b, False))
  return all((_cast(x, narrow) == _cast(y, narrow)).all() for (_, x), (_, y) in pairs)


# ------------------------------------------------------------------------ export


def write_params(
  params: dict,
  family: Family,
  model: Decoder,
  path: pathlib.Path,
  max_shard_bytes: int,
  write: bool = True,
) -> None:
  """Writes parameters as safetensors, in several files beyond `max_shard_bytes`.

  With parameters on several hosts, every process calls this and one has `write`.

  Raises:
    CheckpointError: a parameter is missing, unexpected, misshapen or not finite.
  """
  flat, shapes = _flat(params), _flat(decoder.param_shapes(model))
  rows = _rows(family, shapes)
  if set(flat) != set(shapes):
    raise CheckpointError(
      f"params lack {sorted(set(shapes) - set(flat))} and have the unexpected "
      f"{sorted(set(flat) - set(shapes))}"
    )
  tensors: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
  parts: dict[str, list[tuple[Weight, int]]] = {}
  for path_, weight in rows.items():
    leaf, shape = flat[path_], shapes[path_].shape
    if leaf.shape != shape or np.dtype(leaf.dtype) not in tensorfile.DTYPES.values():
      raise CheckpointError(
        f"the parameter {path_!r} is {leaf.dtype} {leaf.shape}; the model makes it a "
        f"float of shape {shape}"
      )
    for layer in range(shape[0]) if weight.stacked else (0,):
      name = weight.name.format(layer)
      inner = shape[1:] if weight.stacked else shape
      tensors[name] = (np.dtype(leaf.dtype), weight.hf_shape(inner, model.config))
      parts.setdefault(name, []).append((weight, layer))

  # The layers of a parameter follow each other, so that it is fetched once; q, k and v
  # may share a tensor.
  @functools.lru_cache(maxsize=3)
  def fetch(path: str) -> np.ndarray:
    return _host(flat[path])

  def value(name: str) -> np.ndarray:
    dtype, shape = tensors[name]
    out = np.empty(shape, dtype)
    for weight, layer in parts[name]:
      array = fetch(weight.path)
      array = array[layer] if weight.stacked else array
      weight.put(out, array, model.config)
    if not _finite(out):
      raise CheckpointError(f"the weights of {name!r} are not finite: not saved")
    return out

  files = _split(tensors, max_shard_bytes)
  for file, names in files.items():
    chosen = {name: tensors[name] for name in names}
    if write:
      tensorfile.write(path / file, chosen, map(value, names))
    else:  # takes part in gathering
      for name in names:
        value(name)
  if len(files) > 1 and write:
    total = sum(_bytes(entry) for entry in tensors.values())
    weight_map = {name: file for file, names in files.items() for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _host(leaf: Any) -> np.ndarray:
  """A parameter on the host; a view where jax keeps it there."""
  if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
    from jax.experimental import multihost_utils

    leaf = multihost_utils.process_allgather(leaf, tiled=True)
  return np.asarray(leaf)


def _bytes(entry: tuple[np.dtype, tuple[int, ...]]) -> int:
  return math.prod(entry[1]) * entry[0].itemsize


def _split(tensors: dict, limit: int) -> dict[str, list[str]]:
  """File name -> tensors, each file within `limit` unless one tensor is beyond it."""
  groups: list[list[str]] = [[]]
  used = 0
  for name, entry in tensors.items():
    if groups[-1] and used + _bytes(entry) > limit:
      groups.append([])
      used = 0
    groups[-1].append(name)
    used += _bytes(entry)
  if len(groups) == 1:
    return {SINGLE: groups[0]}
  return {
    f"model-{i:05d}-of-{len(groups):05d}.safetensors": names
    for i, names in enumerate(groups, 1)
  }


def _flat(tree: dict, prefix: str = "") -> dict[str, Any]:
  out = {}
  for key, value in tree.items():
    if isinstance(value, dict):
      out |= _flat(value, f"{prefix}{key}/")
    else:
      out[prefix + key] = value
  return out


def _nest(flat: dict[str, Any]) -> dict:
  out: dict[str, Any] = {}
  for path, value in flat.items():
    *parents, last = path.split("/")
    node = out
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = value
  return out

"""What a checkpoint must hold: name, shape, dtype and sha256 of every array.

It is hashed before the arrays are written, so that it covers whatever lies between.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlft.core.errors import CheckpointError

FILE = "manifest.json"
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)*", re.ASCII)


def named_arrays(tree: Any, abstract: bool = False) -> dict[str, Any]:
  """Leaves by path: {"policy": {"kernel": x}} gives {"policy/kernel": x}.

  Args:
    tree: of jax or numpy arrays.
    abstract: whether `jax.ShapeDtypeStruct` will do.

  Raises:
    CheckpointError: a leaf is something else, or its name cannot be a name.
  """
  named: dict[str, Any] = {}
  kinds = (jax.Array, np.ndarray) + ((jax.ShapeDtypeStruct,) if abstract else ())
  for path, x in jax.tree_util.tree_leaves_with_path(tree):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if not isinstance(x, kinds) or getattr(x.dtype, "kind", "f") in "OSUMm":
      raise CheckpointError(f"{name!r} is no array of numbers: put it into `meta`")
    if name in named or not _NAME.fullmatch(name) or ".." in name:
      raise CheckpointError(f"array name {name!r}: [A-Za-z0-9_./-], and each once")
    named[name] = x
  return named


def is_key(x: Any) -> bool:
  """Whether an array holds typed random keys."""
  return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def stored(x: Any) -> jax.ShapeDtypeStruct:
  """What is written of an array, and where it lies: of keys, their integers."""
  shape, dtype = x.shape, x.dtype
  if is_key(x):
    data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(shape, dtype))
    shape, dtype = data.shape, data.dtype
  return jax.ShapeDtypeStruct(shape, dtype, sharding=getattr(x, "sharding", None))


def entry(x: Any) -> dict[str, Any]:
  """What must be equal of a saved array and of the one that it is restored as."""
  impl: list[str] = []
  if is_key(x):
    note = lambda keys: impl.append(str(jax.random.key_impl(keys)))
    jax.eval_shape(note, jax.ShapeDtypeStruct(x.shape, x.dtype))
  raw = stored(x)
  key = impl[0] if impl else None
  return {"shape": list(raw.shape), "dtype": str(raw.dtype), "key": key}


def misfits(saved: Mapping[str, dict], want: Mapping[str, dict]) -> dict[str, str]:
  """Where the entries of a checkpoint and of a tree differ, by name."""

  def spell(one: Mapping[str, Any]) -> str:
    dims = ",".join(map(str, one.get("shape", ())))
    return f"{one['key'] or one['dtype']}[{dims}]" if one else "absent"

  differ = {}
  for name in sorted(saved.keys() | want.keys()):
    theirs = {k: v for k, v in saved.get(name, {}).items() if k != "sha256"}
    ours = want.get(name, {})
    if theirs != ours:
      differ[name] = f"{spell(theirs)} there, {spell(ours)} here"
  return differ


# ------------------------------------------------------------------------- digests


def digests(x: Any) -> dict[str, str]:
  """sha256 of each piece of an array that this host has, by where it lies.

  A host that has all of it gives one digest, which no sharding changes.
  """
  return {_spell(ends): sha256(_bytes(piece)) for ends, piece in _pieces(x).items()}


def compare(x: Any, expected: Mapping[str, str]) -> tuple[str, list[str]]:
  """What is wrong with an array, and the pieces that this host cannot judge."""
  pieces, unseen = _pieces(x), []
  for region, digest in expected.items():
    ends = tuple(tuple(map(int, e.split(":"))) for e in region.split(",") if e)
    holds = lambda mine, ends=ends: all(
      a <= c and d <= b for (a, b), (c, d) in zip(mine, ends)
    )
    mine = next(filter(holds, pieces), None)
    if mine is None:
      unseen.append(region)
      continue
    part = tuple(slice(c - a, d - a) for (a, _), (c, d) in zip(mine, ends))
    actual = sha256(_bytes(pieces[mine][part]))
    if actual != digest:
      return f"sha256 is {actual}, not {digest}", []
  return "", unseen


def _pieces(x: Any) -> dict[tuple[tuple[int, int], ...], np.ndarray]:
  if getattr(x, "is_fully_addressable", True):
    return {tuple((0, size) for size in x.shape): np.asarray(x)}
  return {
    tuple(i.indices(size)[:2] for i, size in zip(s.index, x.shape)): np.asarray(s.data)
    for s in x.addressable_shards
  }


def _spell(ends: Iterable[tuple[int, int]]) -> str:
  return ",".join(f"{start}:{stop}" for start, stop in ends)


def _bytes(x: np.ndarray) -> np.ndarray:
  # bfloat16 and its like have no buffer interface; their bytes do.
  return np.ascontiguousarray(x).reshape(-1).view(np.uint8)


def sha256(data: Any) -> str:
  """The digest in hexadecimal."""
  return hashlib.sha256(data).hexdigest()


def parallel(function: Callable, items: Iterable[Any]) -> list[Any]:
  """Maps with threads: hashing, and copies off a device, let go of the interpreter."""
  with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
    return list(pool.map(function, items))


# ---------------------------------------------------------------------------- files


def plain(value: Any, name: str) -> Any:
  """A copy as JSON gives it back: the caller may go on changing what it gave.

  Raises:
    CheckpointError: it holds what JSON cannot.
  """

  def number(x: Any) -> Any:
    if isinstance(x, np.generic):
      return x.item()
    raise TypeError(f"{type(x).__name__} is no number, text, list or dict")

  try:
    return json.loads(json.dumps(value, default=number))
  except (TypeError, ValueError) as error:
    raise CheckpointError(f"{name} cannot be written as JSON: {error}") from error


def digest(value: Any) -> str:
  """sha256 of a JSON value."""
  return sha256(json.dumps(value, sort_keys=True).encode())


def seal(manifest: Mapping[str, Any]) -> dict[str, Any]:
  """A manifest with its own digest: a flipped bit of it is seen too."""
  return {"sha256": digest(manifest), "manifest": manifest}


def unseal(path: Path) -> tuple[dict[str, Any] | None, str]:
  """A sealed manifest, or what is wrong with the file."""
  try:
    sealed = json.loads(path.read_bytes())
    manifest, expected = sealed["manifest"], sealed["sha256"]
  except FileNotFoundError:
    return None, "is missing"
  except (OSError, ValueError, KeyError, TypeError) as error:
    return None, f"cannot be read: {one_line(error)}"
  actual = digest(manifest)
  if actual != expected:
    return None, f"sha256 is {actual}, not {expected}"
  return manifest, ""


def few(problems: Mapping[str, str], most: int = 5) -> str:
  """The first of many problems, in one line."""
  shown = [f"{name}: {what}" for name, what in list(problems.items())[:most]]
  more = len(problems) - len(shown)
  return "; ".join(shown) + (f"; and {more} more" if more else "")


def one_line(error: BaseException) -> str:
  """An error in one line: those of orbax run over pages, with the cause at the end."""
  text = " ".join(str(error).split())
  if len(text) > 400:
    text = f"{text[:200]} ... {text[-190:]}"
  return f"{type(error).__name__}: {text}"

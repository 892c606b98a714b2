"""Safetensors files, read and written a piece at a time.

The format: 8 bytes with the length of a JSON header, the header (for each tensor its
dtype, shape and byte range), the bytes. The safetensors package maps the whole file,
whose pages then count as our memory, and writes only from a dict of every tensor; a
model that just fits needs neither.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

from rlft.core.errors import CheckpointError

DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # bytes; the limit of the reference implementation
_CHUNK = 8 << 20  # bytes read at once, of float32


@dataclasses.dataclass(frozen=True)
class _Info:
  dtype: str
  shape: tuple[int, ...]
  start: int  # in the file
  stop: int


class TensorFile:
  """One safetensors file: its header is checked and kept, its tensors are not."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    self.infos = _read_header(path)

  def __iter__(self) -> Iterator[str]:
    return iter(self.infos)

  def shape(self, name: str) -> tuple[int, ...]:
    return self.infos[name].shape

  def chunks(self, name: str, whole: bool = False) -> Iterator[tuple[int, np.ndarray]]:
    """Reads a tensor.

    Args:
      name: a tensor of this file.
      whole: in one piece, instead of 2 million numbers in rows at a time.

    Yields:
      (index of the first row, rows), in the dtype of the file.
    """
    info = self.infos[name]
    dtype = DTYPES[info.dtype]
    rows = info.shape[0] if info.shape else 1
    per_row = math.prod(info.shape[1:])
    # The same rows whatever the dtype, so that two tensors can be compared.
    step = rows if whole else max(1, _CHUNK // max(1, per_row * 4))
    # Unbuffered: the bytes go from the page cache straight into the array.
    with open(self.path, "rb", buffering=0) as file:
      file.seek(info.start)
      for first in range(0, rows, step):
        count = min(step, rows - first)
        chunk = np.empty((count, *info.shape[1:]) if info.shape else (), dtype)
        _fill(file, chunk, self.path, name)
        yield first, chunk


def _fill(file, array: np.ndarray, path: pathlib.Path, name: str) -> None:
  view = memoryview(array.reshape(-1).view(np.uint8))
  done = 0
  while done < len(view):
    count = file.readinto(view[done:])
    if not count:
      raise CheckpointError(f"{path}: ends within the tensor {name!r}")
    done += count


def _read_header(path: pathlib.Path) -> dict[str, _Info]:
  def damaged(what: str) -> CheckpointError:
    return CheckpointError(f"{path}: {what}; fetch or save the file again")

  total = path.stat().st_size
  with open(path, "rb") as file:
    first = file.read(8)
    if first == b"version ":
      raise CheckpointError(
        f"{path} is a Git LFS pointer, not the weights; run `git lfs pull`"
      )
    length = int.from_bytes(first, "little")
    if total < 8 or length > _MAX_HEADER:
      raise damaged(f"not a safetensors file (claims a header of {length} bytes)")
    if 8 + length > total:
      raise damaged(f"truncated: {total} bytes, but a header of {length}")
    raw = file.read(length)
  try:
    header = json.loads(raw)
  except (ValueError, RecursionError) as error:
    raise damaged(f"its header is not JSON ({type(error).__name__})") from error
  if not isinstance(header, dict):
    raise damaged("its header is not a JSON object")
  header.pop("__metadata__", None)
  infos = {}
  for name, entry in header.items():
    try:
      dtype, shape = entry["dtype"], tuple(entry["shape"])
      start, stop = entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
      raise damaged(f"the header entry of {name!r} is malformed") from error
    if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
      raise damaged(f"the header entry of {name!r} has a bad shape or range")
    # Mask buffers may have any dtype: it matters once the tensor is used.
    if dtype in DTYPES and stop - start != math.prod(shape) * DTYPES[dtype].itemsize:
      raise damaged(
        f"{name!r} of shape {shape} and dtype {dtype} has {stop - start} bytes"
      )
    infos[name] = _Info(dtype, shape, 8 + length + start, 8 + length + stop)
  end = 8 + length
  for name, info in sorted(infos.items(), key=lambda item: item[1].start):
    if info.start != end or info.stop < info.start:
      raise damaged(f"the bytes of {name!r} overlap others or leave a hole")
    end = info.stop
  if end != total:
    kind = "truncated" if total < end else "longer than its header says"
    raise damaged(f"{kind}: {total} bytes, expected {end}")
  return infos


def write(
  path: pathlib.Path,
  tensors: dict[str, tuple[np.dtype, tuple[int, ...]]],
  values: Iterable[np.ndarray],
) -> None:
  """Writes a safetensors file and flushes it to the disk.

  Args:
    path: the file.
    tensors: name -> (dtype, shape), in the order of `values`.
    values: the arrays; each is taken when the one before has been written.
  """
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  start = 0
  for name, (dtype, shape) in tensors.items():
    stop = start + math.prod(shape) * dtype.itemsize
    header[name] = {
      "dtype": _NAMES[dtype],
      "shape": list(shape),
      "data_offsets": [start, stop],
    }
    start = stop
  raw = json.dumps(header, separators=(",", ":")).encode()
  raw += b" " * (-len(raw) % 8)  # the bytes of the tensors begin aligned
  with open(path, "wb") as file:
    file.write(len(raw).to_bytes(8, "little") + raw)
    for (name, (dtype, shape)), value in zip(tensors.items(), values, strict=True):
      if value.dtype != dtype or value.shape != shape:
        raise ValueError(f"{name}: {value.dtype} {value.shape}, not {dtype} {shape}")
      file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    file.flush()
    os.fsync(file.fileno())

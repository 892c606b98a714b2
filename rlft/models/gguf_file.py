"""The layout of a GGUF file: keys and values, then a directory of tensors.

Every length is checked against the file before it is used, so that a damaged file is
a clear error and never an endless loop or a huge allocation.

Source: the GGUF specification (ggml, docs/gguf.md), versions 2 and 3, little-endian.
"""

from __future__ import annotations

import dataclasses
import mmap
import pathlib
import struct
from typing import Any

import numpy as np

from rlft.core.errors import CheckpointError

_STRING, _ARRAY = 8, 9
_SCALARS = {
  0: "<u1",
  1: "<i1",
  2: "<u2",
  3: "<i2",
  4: "<u4",
  5: "<i4",
  6: "<f4",
  7: "?",
  10: "<u8",
  11: "<i8",
  12: "<f8",
}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
  """One row of the tensor directory; `shape` is numpy's order, outermost first."""

  shape: tuple[int, ...]
  kind: int
  offset: int


@dataclasses.dataclass(frozen=True)
class Header:
  """What stands before the weights, and the mapped file that they are read from."""

  path: pathlib.Path
  buffer: mmap.mmap
  values: dict[str, Any]
  infos: dict[str, TensorInfo]

  def get(self, key: str, kind: type, default: Any = None) -> Any:
    """The value of a key, checked to be of `kind`; `default` where there is none."""
    value = self.values.get(key, default)
    if key in self.values and type(value) is not kind:
      raise CheckpointError(
        f"{self.path}: the GGUF key {key!r} holds a {type(value).__name__} where a "
        f"{kind.__name__} was expected, which is not supported."
      )
    return value

  def require(self, key: str, kind: type) -> Any:
    if key not in self.values:
      raise CheckpointError(
        f"{self.path}: the GGUF key {key!r} is missing; convert the model again with "
        "a current llama.cpp, whose converter writes it."
      )
    return self.get(key, kind)


class Cursor:
  """A position in the file that refuses to move past its end."""

  def __init__(self, path: pathlib.Path, buffer: mmap.mmap):
    self.path, self.buffer, self.at = path, buffer, 0

  def take(self, size: int) -> bytes:
    if size > len(self.buffer) - self.at:
      raise CheckpointError(
        f"{self.path} is truncated or damaged: {size} bytes wanted at offset "
        f"{self.at} of {len(self.buffer)}; download it again."
      )
    self.at += size
    return self.buffer[self.at - size : self.at]

  def integer(self, code: str) -> int:
    return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

  def text(self) -> str:
    return self.take(self.integer("Q")).decode("utf-8")

  def value(self, kind: int) -> Any:
    if kind == _STRING:
      return self.text()
    if kind == _ARRAY:
      kind, count = self.integer("I"), self.integer("Q")
      if kind == _STRING:
        # No list is allocated ahead: a damaged count ends at the end of the file.
        return [self.text() for _ in range(count)]
      return self.scalars(kind, count).tolist()
    return self.scalars(kind, 1)[0].item()

  def scalars(self, kind: int, count: int) -> np.ndarray:
    if kind not in _SCALARS:
      raise CheckpointError(
        f"{self.path}: value type {kind} before offset {self.at} is not one of "
        f"GGUF's scalar types {sorted(_SCALARS)}; the file is damaged, download it "
        "again."
      )
    dtype = np.dtype(_SCALARS[kind])
    return np.frombuffer(self.take(count * dtype.itemsize), dtype)


def open_gguf(path: str | pathlib.Path) -> Header:
  """Maps a GGUF file and reads its header; raises CheckpointError when damaged."""
  path = pathlib.Path(path)
  try:
    with path.open("rb") as file:
      buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
  except (OSError, ValueError) as error:  # ValueError: an empty file has no mapping
    raise CheckpointError(
      f"{path} cannot be read as a GGUF file ({error}); give the path of a .gguf file."
    ) from error
  if buffer[:4] != b"GGUF":
    raise CheckpointError(
      f"{path} is not a GGUF file: it starts with {buffer[:4]!r}, not b'GGUF'."
    )
  cursor = Cursor(path, buffer)
  cursor.take(4)
  version = cursor.integer("I")
  if version not in (2, 3):
    raise CheckpointError(
      f"{path}: GGUF version {version} is not 2 or 3 (little-endian); convert the "
      "model again with a current llama.cpp."
    )
  n_tensors, n_values = cursor.integer("Q"), cursor.integer("Q")
  values: dict[str, Any] = {}
  infos: dict[str, TensorInfo] = {}
  try:
    for _ in range(n_values):
      key = cursor.text()
      values[key] = cursor.value(cursor.integer("I"))
    for _ in range(n_tensors):
      name = cursor.text()
      # GGUF writes the fastest dimension first, numpy and Hugging Face last.
      shape = tuple(cursor.integer("Q") for _ in range(cursor.integer("I")))[::-1]
      infos[name] = TensorInfo(shape, cursor.integer("I"), cursor.integer("Q"))
  except UnicodeDecodeError as error:
    raise CheckpointError(
      f"{path} is damaged: the text before offset {cursor.at} is not UTF-8; download "
      "it again."
    ) from error
  align = Header(path, buffer, values, infos).get("general.alignment", int, 32)
  empty = [name for name, info in infos.items() if 0 in info.shape]
  if align < 1 or empty:
    raise CheckpointError(
      f"{path} is damaged: alignment {align}, empty tensors {empty[:3]}; download it "
      "again."
    )
  start = -(-cursor.at // align) * align
  infos = {
    name: dataclasses.replace(info, offset=start + info.offset)
    for name, info in infos.items()
  }
  return Header(path, buffer, values, infos)

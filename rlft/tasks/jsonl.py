"""Rows of files: one JSON value a line, a JSON array of them, or parquet.

What a file is, its first bytes say, not its name: gzip is unpacked, other archives are
named. Blank lines are no rows.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from rlft.core.errors import DataError
from rlft.text.encode import clean

MAX_LINE = 2**24  # bytes: no row of text is 16 MiB
MAX_ARRAY = 2**30
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
_GZIP, _PARQUET, _BOM = b"\x1f\x8b", b"PAR1", b"\xef\xbb\xbf"
_NAMED = {
  b"PK\x03\x04": "a zip archive",
  b"\x28\xb5\x2f\xfd": "compressed by zstd",
  b"\xfd7zXZ": "compressed by xz",
  b"BZh": "compressed by bzip2",
  b"ARROW1": "an Arrow file: give the data set to the library, or write it as jsonl",
  _GZIP: "gzip within gzip",
  b"\xff\xfe": "UTF-16 text: write it as UTF-8",
  b"\xfe\xff": "UTF-16 text: write it as UTF-8",
  b"version https://git-lfs": "a pointer of Git LFS (git lfs pull fetches the file)",
}


def rows(path: Path) -> Iterator[tuple[str, Any]]:
  """(place, value) of each row; of one that cannot be read, a `DataError` says why.

  Args:
    path: the file; may begin with `~`.

  Raises:
    DataError: it cannot be opened, or is none of the kinds of file above.
  """
  path = Path(os.path.expanduser(path))
  try:
    with path.open("rb") as file:
      if _starts(file, _PARQUET):
        yield from _parquet(path)
      elif _starts(file, _GZIP):
        with gzip.open(file) as unpacked:
          yield from _json(path, io.BufferedReader(unpacked))
      else:
        yield from _json(path, file)
  except (OSError, EOFError, zlib.error) as error:
    reason = getattr(error, "strerror", None) or error
    raise DataError(f"{path}: {reason}.") from error


def of_split(folder: Path, split: str) -> Path:
  """The file of a split in a directory, `train.jsonl` say, of any kind that is read."""
  folder = Path(os.path.expanduser(folder))
  files = (folder / f"{split}{suffix}" for suffix in SUFFIXES)
  return next((file for file in files if file.is_file()), folder / f"{split}.jsonl")


def _starts(file: BinaryIO, magic: bytes) -> bool:
  return file.peek(len(magic))[: len(magic)] == magic


def _json(path: Path, file: BinaryIO) -> Iterator[tuple[str, Any]]:
  for magic, kind in _NAMED.items():
    if _starts(file, magic):
      raise DataError(f"{path} is {kind}; give jsonl, a JSON array, gzip or parquet.")
  head = file.peek(64).removeprefix(_BOM).lstrip()
  if head.startswith(b"["):
    body = file.read(MAX_ARRAY + 1)
    if len(body) > MAX_ARRAY:
      raise DataError(f"{path}: a JSON array of more than 1 GiB; write a row a line.")
    array = _parse(body)
    if isinstance(array, list) and _is_rows(array):
      yield from ((f"{path}, row {i}", row) for i, row in enumerate(array))
      return
    file = io.BytesIO(body)
  # Bytes, so that one line that is not UTF-8 spoils only itself.
  number = 0
  while line := file.readline(MAX_LINE + 1):
    number += 1
    size = len(line)
    if size > MAX_LINE:
      while not line.endswith(b"\n") and (line := file.readline(MAX_LINE)):
        size += len(line)
      yield (
        f"{path}, line {number}",
        DataError(
          f"the line has {size:,} bytes, more than {MAX_LINE:,}: is it one row?"
        ),
      )
    elif line.removeprefix(_BOM).strip():
      yield f"{path}, line {number}", _parse(line)


def _is_rows(array: list) -> bool:
  """Whether an array holds rows, and is not the one row of its file: messages, say."""
  return not array or (
    any(isinstance(row, dict | list | str) for row in array)
    and not any(isinstance(row, dict) and "role" in row for row in array)
  )


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
  import pyarrow  # comes with `datasets`; half a second to import
  from pyarrow import parquet

  number = 0
  try:
    for batch in parquet.ParquetFile(path).iter_batches():
      for row in batch.to_pylist():
        yield f"{path}, row {number}", clean(row)
        number += 1
  except pyarrow.ArrowException as error:
    raise DataError(f"{path}: no whole parquet file: {error}.") from error


def _parse(text: bytes) -> Any:
  try:
    value = json.loads(text.decode("utf-8-sig"))
  except UnicodeDecodeError:
    return DataError("the line is not UTF-8.")
  except (ValueError, RecursionError) as error:
    return DataError(f"not JSON: {error}.")
  # JSON can spell half a character, which no tokenizer reads: U+FFFD.
  return clean(value) if b"\\ud" in text.lower() else value

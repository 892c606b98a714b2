"""Files of one JSON value a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlft.core.errors import DataError
from rlft.text.encode import clean


def rows(path: Path) -> Iterator[tuple[str, Any]]:
  """(place, value) of each line; of one that cannot be read, a `DataError` says why.

  Args:
    path: the file.

  Raises:
    DataError: it cannot be opened.
  """
  try:
    # Bytes, so that one line that is not UTF-8 spoils only itself.
    with path.open("rb") as file:
      for number, line in enumerate(file, 1):
        yield f"{path}, line {number}", _parse(line)
  except OSError as error:
    raise DataError(f"{path}: {error.strerror or error}.") from error


def _parse(line: bytes) -> Any:
  if not line.strip():
    return DataError("the line is empty.")
  try:
    value = json.loads(line.decode("utf-8-sig"))
  except UnicodeDecodeError:
    return DataError("the line is not UTF-8.")
  except (ValueError, RecursionError) as error:
    return DataError(f"not JSON: {error}.")
  # JSON can spell half a character, which no tokenizer reads: U+FFFD.
  return clean(value) if b"\\ud" in line.lower() else value

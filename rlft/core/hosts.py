"""What the processes of a run tell each other: small JSON values, no arrays."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from rlft.core.errors import RlftError


def everyone(value: Any) -> list[Any]:
  """A JSON value of every process, on every process, in their order.

  All processes must call it, in the same order.
  """
  if jax.process_count() == 1:
    return [value]
  from jax.experimental import multihost_utils

  data = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(data.size))
  rows = multihost_utils.process_allgather(np.pad(data, (0, sizes.max() - data.size)))
  return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes)]


def by_first(action: Callable[[], Any]) -> Any:
  """What `action` gives on process 0, on every process.

  Raises:
    RlftError: process 0 raised it; without this the others would wait for ever.
  """
  if jax.process_count() == 1:
    return action()
  value = error = None
  if jax.process_index() == 0:
    try:
      value = action()
    except RlftError as raised:
      error = raised
  value, text = everyone([value, None if error is None else str(error)])[0]
  if error is not None:
    raise error
  if text is not None:
    raise RlftError(f"process 0: {text}")
  return value

"""Updates whose numbers are not finite: counted, shown, and the end when they go on.

The train step skips such an update inside the compiled program (see `training.step`),
so that neither weights nor moments ever hold a NaN. Here the host looks at the flag it
left: one such update is a warning, several in a row end the run, with the batch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from rlft.core import hosts
from rlft.core.errors import DivergenceError
from rlft.training.optimizer import Optimizer, settings

log = logging.getLogger(__name__)

_LOOKED_AT = ("loss", "grad_norm", "update_norm", "skipped")


class Guard:
  """Watches the updates of one model.

  Metrics are the same on all processes, and so is what is decided from them.

  Attributes:
    skipped: updates that were not made.
    error: why the run must end; None while it need not.
  """

  def __init__(self, optimizer: Optimizer, tokenizer: Any = None, of: str = ""):
    """Args: `max_nonfinite` is of the optimiser; the tokenizer makes a batch readable;
    `of` names the model in messages."""
    self._limit, self._tokenizer = settings(optimizer).max_nonfinite, tokenizer
    self._of = f" of the {of}" if of else ""
    self._waiting: tuple[str, Mapping[str, Any], Any] | None = None
    self._in_a_row = self.skipped = 0
    self.error: DivergenceError | None = None

  def add(self, update: str, metrics: Mapping[str, Any], batch: Any) -> None:
    """Looks at the update before this one: reading it waits for nothing new.

    Args:
      update: its name, for messages.
      metrics: of the train step.
      batch: what it was made from: a dataclass, or any tree, of arrays.
    """
    self.flush()
    self._waiting = update, {name: metrics[name] for name in _LOOKED_AT}, batch

  def flush(self) -> None:
    """Looks at the last update too."""
    waiting, self._waiting = self._waiting, None
    if waiting is None or self.error is not None:
      return
    update, metrics, batch = waiting
    found = {name: float(x) for name, x in jax.device_get(metrics).items()}
    what = ", ".join(
      f"{name} is {found[name]}"
      for name in ("loss", "grad_norm", "update_norm")
      if not math.isfinite(found[name])
    )
    if not found["skipped"]:
      self._in_a_row = 0
      if what:  # finite gradients, and yet a step without bound: the weights have it
        self.error = self._divergence(f"{update}: {what}", batch)
      return
    self.skipped += 1
    self._in_a_row += 1
    log.warning(
      "%s%s: %s; the update is skipped, %d in a row (max_nonfinite=%d)",
      update,
      self._of,
      what,
      self._in_a_row,
      self._limit,
    )
    if self._in_a_row >= self._limit:
      self.error = self._divergence(
        f"{update}{self._of}: {what}, in {self._in_a_row} updates in a row. None of "
        "them was made, and the weights are sound",
        batch,
      )

  def check(self) -> None:
    """Raises `DivergenceError` where the run must end: once its metrics are written,
    and before anything is saved."""
    self.flush()
    if self.error is not None:
      raise self.error

  def _divergence(self, what: str, batch: Any) -> DivergenceError:
    return DivergenceError(
      f"{what}. Lower the learning rate, or look at the batch and at what the reward "
      "gave",
      arrays=own_arrays(batch),
      text=self._readable(batch),
    )

  def _readable(self, batch: Any) -> str:
    tokens, mask = (_find(batch, name) for name in ("tokens", "mask"))
    if self._tokenizer is None or tokens is None or mask is None:
      return ""
    width = tokens.shape[-1]  # pairs have two sides: [B, 2, T]
    rows = zip(tokens.reshape(-1, width), mask.astype(bool).reshape(-1, width))
    texts = [self._tokenizer.decode(row[kept].tolist()) for row, kept in rows]
    return "\n".join(f"--- row {i}\n{text}" for i, text in enumerate(texts)) + "\n"


def own_arrays(batch: Any) -> dict[str, np.ndarray]:
  """The rows of a batch that this process holds, by their names."""
  named, _ = jax.tree_util.tree_flatten_with_path(batch)
  plain = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
  host = lambda x: hosts.own_rows(x) if isinstance(x, jax.Array) else np.asarray(x)
  return {plain(path) or "batch": host(x) for path, x in named}


def _find(batch: Any, name: str) -> np.ndarray | None:
  found = own_arrays(batch)
  return next((x for key, x in found.items() if key.split("/")[-1] == name), None)

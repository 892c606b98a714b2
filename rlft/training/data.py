"""Rows of text to batches of tokens.

Letters: B rows, T tokens.

Rows are bucketed by length: a batch holds rows of one bucket, so that no batch is
mostly padding and each bucket compiles once.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import struct
from jax.sharding import Mesh

from rlft.core import hosts, rng
from rlft.core.errors import ConfigError, DataError
from rlft.sampling.buckets import bucket
from rlft.text.encode import (
  Completion,
  Message,
  Prompt,
  completion_end,
  encode_completions,
  encode_prompts,
  is_completion,
  is_messages,
  says,
)

__all__ = ["completion_end", "encode_prompts"]  # also asked for here

log = logging.getLogger(__name__)


@struct.dataclass
class TrainBatch:
  """One batch of token rows.

  Attributes:
    tokens: int32 [B, T].
    mask: bool [B, T], True on real tokens.
    weight: float32 [B, T], weight of each token in the loss.
  """

  tokens: Any
  mask: Any
  weight: Any


@dataclasses.dataclass(frozen=True)
class TokenRow:
  """One encoded training row; `weight[i]` belongs to `tokens[i]`."""

  tokens: tuple[int, ...]
  weight: tuple[float, ...]

  @property
  def content(self) -> bytes:
    """What tells it from another row."""
    return np.asarray(self.tokens, np.int32).tobytes()


def encode_rows(
  tokenizer: Any,
  eos_ids: int | Sequence[int],
  rows: Sequence[tuple[Prompt, Completion] | Sequence[Message]],
  *,
  max_length: int,
  chat: bool = False,
  loss_on: str = "completion",
) -> list[TokenRow]:
  """Encodes (prompt, completion) rows; a completion that is text gets its end.

  See `text.encode.encode_completions`. Rows that are longer than `max_length`, or whose
  completion is empty, are dropped and counted in a warning; none is cut.

  Args:
    tokenizer: a `transformers` tokenizer.
    eos_ids: end completions in sampling; the one that ends a text is in the loss.
    rows: prompts with their completions; or lists of messages, whose last one, an
      assistant's, is the completion of the others.
    max_length: tokens, EOS included.
    chat: see `encode_prompts`; special tokens in completions are plain text then too.
    loss_on: "completion", or "all" for the prompt too. A row's first token has nothing
      before it that could predict it, and is never in the loss.

  Raises:
    DataError: there are no rows, one is no prompt with a completion, or none can be
      used.
  """
  if loss_on not in ("completion", "all"):
    raise ConfigError(f"loss_on={loss_on!r}: 'completion' or 'all'")
  rows = list(rows)
  if not rows:
    raise DataError("no training rows")
  pairs = [_pair(row, i) for i, row in enumerate(rows)]
  whole = [
    (p, c)
    for p, c in pairs
    if (any(map(str.strip, texts)) if (texts := says(c)) else len(c) > 0)
  ]
  if not whole:
    raise DataError(f"all {len(rows)} training rows have an empty completion")
  out, shortest = [], None
  for prompt, completion in encode_completions(tokenizer, eos_ids, whole, chat):
    tokens = (*prompt, *completion)
    if len(tokens) > max_length:
      shortest = min(len(tokens), shortest or len(tokens))
      continue
    own = 1.0 if loss_on == "all" else 0.0
    weight = (own,) * len(prompt) + (1.0,) * len(completion)
    out.append(TokenRow(tokens, (0.0, *weight[1:])))
  if not out:
    raise DataError(
      f"all {len(whole)} training rows are longer than max_length={max_length} tokens, "
      f"the shortest has {shortest}: raise max_length, up to the model's positions"
    )
  for dropped, reason in (
    (len(rows) - len(whole), "have an empty completion"),
    (len(whole) - len(out), f"are longer than max_length={max_length} tokens"),
  ):
    if dropped:
      log.warning(
        "%d of %d training rows %s and were dropped", dropped, len(rows), reason
      )
  return out


def _pair(row: Any, index: int) -> tuple[Prompt, Completion]:
  """(prompt, completion) of a row."""
  if is_messages(row) and len(row) > 1 and row[-1]["role"] == "assistant":
    return row[:-1], row[-1]
  if isinstance(row, tuple | list) and len(row) == 2:
    prompt, completion = row
    if (isinstance(prompt, str) or is_messages(prompt)) and is_completion(completion):
      return prompt, completion
  raise DataError(
    f"training row {index} is {row!r:.200}; give (prompt, completion): a text or "
    "messages, and a text or a sequence of token ids"
  )


def collate(rows: Sequence[TokenRow], batch_size: int, length: int) -> TrainBatch:
  """Right-pads rows to [batch_size, length]; missing rows are all padding."""
  tokens = np.zeros((batch_size, length), np.int32)
  mask = np.zeros((batch_size, length), bool)
  weight = np.zeros((batch_size, length), np.float32)
  for i, row in enumerate(rows):
    size = len(row.tokens)
    tokens[i, :size], weight[i, :size], mask[i, :size] = row.tokens, row.weight, True
  return TrainBatch(tokens, mask, weight)


def batches(
  rows: Sequence[TokenRow],
  *,
  batch_size: int,
  seed: int,
  epoch: int,
  seen: Collection[int] = (),
  mesh: Mesh | None = None,
) -> Iterator[TrainBatch]:
  """One epoch: every row exactly once, in an order that (seed, epoch) decides.

  A batch holds rows of one length bucket; what a bucket leaves over is filled up with
  rows of shorter ones, so only the last batch can have rows of padding.

  Yields:
    `TrainBatch` of [batch_size, bucket], on the mesh when there is one. Of several
    processes each makes its own rows alone.
  """
  lengths = [len(row.tokens) for row in rows]
  padded = TokenRow((), ())
  for length, members in grouped(
    lengths, batch_size=batch_size, seed=seed, epoch=epoch, seen=seen
  ):
    whole = [rows[i] for i in members] + [padded] * (batch_size - len(members))
    own = hosts.own_part(whole, mesh)
    yield hosts.place_own(collate(own, len(own), length), mesh)


def grouped(
  lengths: Sequence[int],
  *,
  batch_size: int,
  seed: int,
  epoch: int,
  seen: Collection[int] = (),
) -> Iterator[tuple[int, list[int]]]:
  """(bucket, rows) of every batch of an epoch; see `batches`.

  Rows that were `seen` are left out: an epoch's rest after other batches.
  """
  order = rng.numpy(seed, rng.Stream.ROWS, epoch).permutation(len(lengths))
  by_bucket: dict[int, list[int]] = {}
  for i in order:
    if int(i) in seen:
      continue
    by_bucket.setdefault(bucket(lengths[i]), []).append(int(i))
  groups, carried = [], []
  for length in sorted(by_bucket):
    members = carried + by_bucket[length]
    whole = len(members) // batch_size * batch_size
    for start in range(0, whole, batch_size):
      groups.append((length, members[start : start + batch_size]))
    carried = members[whole:]
  if carried:
    groups.append((max(by_bucket), carried))
  for g in rng.numpy(seed, rng.Stream.BATCHES, epoch).permutation(len(groups)):
    yield groups[g]


def place(batch: Any, mesh: Mesh | None) -> Any:
  """Puts a batch's arrays on the mesh, rows over its batch axes.

  Of several processes each has the whole batch, and puts its own rows there.
  """
  if hosts.several():
    batch = jax.tree.map(lambda x: hosts.own_part(x, mesh), batch)
  return hosts.place_own(batch, mesh)

"""Rows of text to batches of tokens.

Letters: B rows, T tokens.

Rows are bucketed by length: a batch holds rows of one bucket, so that no batch is
mostly padding and each bucket compiles once.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import struct
from jax.sharding import Mesh

from rlft.core.errors import ConfigError, DataError
from rlft.core.mesh import sharding
from rlft.sampling.buckets import bucket

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


def encode_prompts(
  tokenizer: Any, prompts: Sequence[str], chat: bool = False
) -> list[list[int]]:
  """Token ids of prompts, as training and sampling both see them.

  Args:
    tokenizer: a `transformers` tokenizer.
    prompts: texts.
    chat: whether to put each into the tokenizer's chat template as the user's turn,
      followed by the opening of the assistant's. Text that looks like a special token
      is then encoded as plain text: a prompt cannot open or close a turn.

  Returns:
    A list of ids for each prompt.

  Raises:
    ConfigError: `chat` without a chat template.
  """
  if not chat:
    return [list(ids) for ids in tokenizer(list(prompts))["input_ids"]]
  if not getattr(tokenizer, "chat_template", None):
    raise ConfigError("chat=True, but the tokenizer has no chat template; set it False")
  marker = "RLFTUSERTEXT"
  rendered = tokenizer.apply_chat_template(
    [{"role": "user", "content": marker}], tokenize=False, add_generation_prompt=True
  )
  before, found, after = rendered.partition(marker)
  if not found or marker in after:
    raise ConfigError("the chat template does not show the user's text exactly once")
  plain = lambda text, **kw: tokenizer(text, add_special_tokens=False, **kw)[
    "input_ids"
  ]
  head, tail = plain(before), plain(after)
  return [head + plain(p, split_special_tokens=True) + tail for p in prompts]


def encode_rows(
  tokenizer: Any,
  eos_id: int,
  rows: Sequence[tuple[str, str]],
  *,
  max_length: int,
  chat: bool = False,
  loss_on: str = "completion",
) -> list[TokenRow]:
  """Encodes (prompt, completion) texts; the completion gets its EOS.

  Prompt and completion are encoded apart, as they are when sampling. Rows that are
  longer than `max_length` are dropped and counted in a warning, never cut.

  Args:
    tokenizer: a `transformers` tokenizer.
    eos_id: ends the completion; it is in the loss.
    rows: texts.
    max_length: tokens, EOS included.
    chat: see `encode_prompts`.
    loss_on: "completion", or "all" for the prompt too.

  Raises:
    DataError: there are no rows, or all are too long.
  """
  if loss_on not in ("completion", "all"):
    raise ConfigError(f"loss_on={loss_on!r}: 'completion' or 'all'")
  if not rows:
    raise DataError("no training rows")
  prompts = encode_prompts(tokenizer, [p for p, _ in rows], chat)
  completions = tokenizer([c for _, c in rows], add_special_tokens=False)["input_ids"]
  out, dropped = [], 0
  for prompt, completion in zip(prompts, completions):
    tokens = (*prompt, *completion, eos_id)
    if len(tokens) > max_length:
      dropped += 1
      continue
    own = 1.0 if loss_on == "all" else 0.0
    weight = (own,) * len(prompt) + (1.0,) * (len(completion) + 1)
    out.append(TokenRow(tokens, weight))
  if not out:
    raise DataError(
      f"all {len(rows)} training rows are longer than max_length={max_length} tokens"
    )
  if dropped:
    log.warning(
      "%d of %d training rows are longer than max_length=%d tokens and were dropped",
      dropped,
      len(rows),
      max_length,
    )
  return out


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
  mesh: Mesh | None = None,
) -> Iterator[TrainBatch]:
  """One epoch: every row exactly once, in an order that (seed, epoch) decides.

  A batch holds rows of one length bucket; what a bucket leaves over is filled up with
  rows of shorter ones, so only the last batch can have rows of padding.

  Yields:
    `TrainBatch` of [batch_size, bucket], on the mesh when there is one.
  """
  order = np.random.default_rng([seed, epoch]).permutation(len(rows))
  by_bucket: dict[int, list[int]] = {}
  for i in order:
    by_bucket.setdefault(bucket(len(rows[i].tokens)), []).append(int(i))
  groups, carried = [], []
  for length in sorted(by_bucket):
    members = carried + by_bucket[length]
    whole = len(members) // batch_size * batch_size
    for start in range(0, whole, batch_size):
      groups.append((length, members[start : start + batch_size]))
    carried = members[whole:]
  if carried:
    groups.append((max(by_bucket), carried))
  for g in np.random.default_rng([seed, epoch, 1]).permutation(len(groups)):
    length, members = groups[g]
    yield place(collate([rows[i] for i in members], batch_size, length), mesh)


def place(batch: Any, mesh: Mesh | None) -> Any:
  """Puts a batch's arrays on the mesh, rows over its batch axes."""
  if mesh is None:
    return batch
  put = lambda x: jax.device_put(
    x, sharding(mesh, ("batch",) + (None,) * (x.ndim - 1), x.shape)
  )
  return jax.tree.map(put, batch)

"""Preferences to batches of token pairs, for reward models and DPO.

Letters: B pairs, T tokens; the axis of 2 holds (chosen, rejected).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
from flax import struct
from jax.sharding import Mesh

from rlft.core.errors import DataError
from rlft.models.hub import Policy
from rlft.models.scalar import ScalarModel
from rlft.models.tokens import check_ids
from rlft.tasks.preferences import Preference, without_prompts
from rlft.training.data import TokenRow, encode_rows, grouped, place

log = logging.getLogger(__name__)

_ENDLESS = 1 << 30


@struct.dataclass
class PairBatch:
  """One batch of pairs; the sides of a pair are in one row, so no split parts them.

  Attributes:
    tokens: int32 [B, 2, T], right-padded.
    mask: bool [B, 2, T], True on real tokens.
    weight: float32 [B, 2, T], 1 on the tokens of completions, EOS included.
    margin: float32 [B], by how much the chosen side is better; 0 where unknown.
    valid: bool [B], False on pairs that only fill the batch.
  """

  tokens: Any
  mask: Any
  weight: Any
  margin: Any
  valid: Any


@dataclasses.dataclass(frozen=True)
class TokenPair:
  """One encoded preference; `source` is its index in what was encoded."""

  chosen: TokenRow
  rejected: TokenRow
  margin: float
  source: int

  @property
  def length(self) -> int:
    return max(len(self.chosen.tokens), len(self.rejected.tokens))

  @property
  def content(self) -> bytes:
    """What tells it from another pair."""
    return self.chosen.content + b"|" + self.rejected.content


def encode_pairs(
  tokenizer: Any,
  eos_ids: int | Sequence[int],
  preferences: Sequence[Preference],
  *,
  max_length: int,
  chat: bool = False,
) -> list[TokenPair]:
  """Encodes preferences; each completion gets its EOS.

  A pair of which one side is longer than `max_length`, or whose sides are the same
  tokens (to a tokenizer that knows few words), is dropped and counted; none is cut.

  Args:
    tokenizer: a `transformers` tokenizer.
    eos_ids: end completions in sampling.
    preferences: the pairs; a prompt that both sides repeat is taken off them.
    max_length: tokens of a side, prompt and EOS included.
    chat: see `training.data.encode_prompts`.

  Raises:
    DataError: there are no pairs, a pair has equal or blank sides, or none can be used.
  """
  preferences = list(preferences)
  if not preferences:
    raise DataError("no preferences")
  for one in preferences:
    if not isinstance(one.chosen, str) or not isinstance(one.rejected, str):
      raise DataError(
        f"the preference with id {one.id} has sides that are no texts, "
        f"{one.chosen!r:.60}: give rows with messages as dicts"
      )
    if not one.chosen.strip() or not one.rejected.strip():
      raise DataError(f"the preference with id {one.id} has a blank side")
    if one.chosen.strip() == one.rejected.strip():
      raise DataError(
        f"the preference with id {one.id} has two equal sides, {one.chosen!r:.60}: "
        "nothing can be learned from it; remove it"
      )
  preferences = without_prompts(preferences)
  texts = [(one.prompt, one.chosen) for one in preferences]
  texts += [(one.prompt, one.rejected) for one in preferences]
  rows = encode_rows(tokenizer, eos_ids, texts, max_length=_ENDLESS, chat=chat)
  out, same = [], 0
  for i, one in enumerate(preferences):
    chosen, rejected = rows[i], rows[i + len(preferences)]
    if chosen.tokens == rejected.tokens:
      same += 1
      continue
    pair = TokenPair(chosen, rejected, one.margin or 0.0, i)
    if pair.length <= max_length:
      out.append(pair)
  long = len(preferences) - same - len(out)
  why = (
    f"{same} have sides of equal tokens, {long} are longer than {max_length=} tokens"
  )
  if not out:
    raise DataError(f"none of {len(preferences)} pairs can be used: {why}")
  if same or long:
    log.warning("%d of %d pairs were dropped: %s", same + long, len(preferences), why)
  return out


def check_pair_ids(pairs: Sequence[TokenPair], model: Policy | ScalarModel) -> None:
  """Raises `DataError` for a token that the model has no row for."""
  for side in ("chosen", "rejected"):
    rows = (getattr(pair, side).tokens for pair in pairs)
    check_ids(rows, model, f"the {side} side of pair")


def collate_pairs(
  pairs: Sequence[TokenPair], batch_size: int, length: int
) -> PairBatch:
  """Right-pads pairs to [batch_size, 2, length]; missing ones are all padding."""
  shape = (batch_size, 2, length)
  tokens, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
  weight = np.zeros(shape, np.float32)
  margin, valid = np.zeros(batch_size, np.float32), np.zeros(batch_size, bool)
  for i, pair in enumerate(pairs):
    margin[i], valid[i] = pair.margin, True
    for side, row in enumerate((pair.chosen, pair.rejected)):
      size = len(row.tokens)
      tokens[i, side, :size], weight[i, side, :size] = row.tokens, row.weight
      mask[i, side, :size] = True
  return PairBatch(tokens, mask, weight, margin, valid)


def pair_batches(
  pairs: Sequence[TokenPair],
  *,
  batch_size: int,
  seed: int,
  epoch: int,
  seen: Collection[int] = (),
  mesh: Mesh | None = None,
) -> Iterator[PairBatch]:
  """One epoch: every pair once, in the order and buckets of `training.data.batches`."""
  for length, members in grouped(
    [pair.length for pair in pairs],
    batch_size=batch_size,
    seed=seed,
    epoch=epoch,
    seen=seen,
  ):
    yield place(collate_pairs([pairs[i] for i in members], batch_size, length), mesh)

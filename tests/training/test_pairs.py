"""Preferences to batches of token pairs."""

from __future__ import annotations

import numpy as np
import pytest

from rlft.core.errors import DataError
from rlft.tasks.preferences import Preference
from rlft.tasks.tokenizer import word_tokenizer
from rlft.training.pairs import collate_pairs, encode_pairs, pair_batches

TOKENIZER = word_tokenizer(["one", "two", "three"])
EOS = TOKENIZER.eos_token_id


def encode(*rows, max_length=99):
  pairs = [Preference(7 + i, *row) for i, row in enumerate(rows)]
  return encode_pairs(TOKENIZER, EOS, pairs, max_length=max_length)


def ids(text):
  return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def test_a_pair():
  (pair,) = encode(("one two", " three", " one two", 0.5))
  assert list(pair.chosen.tokens) == [*ids("one two"), *ids(" three"), EOS]
  assert list(pair.rejected.tokens) == [*ids("one two"), *ids(" one two"), EOS]
  assert pair.chosen.weight == (0.0, 0.0, 1.0, 1.0)
  assert pair.length == 5
  batch = collate_pairs([pair], 2, 8)
  assert batch.tokens.shape == batch.mask.shape == batch.weight.shape == (2, 2, 8)
  assert batch.mask.sum(-1).tolist() == [[4, 5], [0, 0]]
  assert batch.weight.sum(-1).tolist() == [[2, 3], [0, 0]]
  assert batch.valid.tolist() == [True, False]
  assert batch.margin.tolist() == [0.5, 0.0]
  assert batch.tokens[0, 0, :4].tolist() == list(pair.chosen.tokens)
  assert batch.tokens[0, 1, :5].tolist() == list(pair.rejected.tokens)


def test_what_is_dropped_is_counted(caplog):
  good = ("one", " two", " three")
  long = ("one", " two", " one" * 9)
  unknown = ("one", " Peter", " Paul")  # the tokenizer knows neither
  kept = encode(good, long, unknown, good, max_length=8)
  assert [pair.source for pair in kept] == [0, 3]
  assert "2 of 4 pairs were dropped: 1 have sides of equal tokens" in caplog.text
  assert "1 are longer than max_length=8" in caplog.text
  with pytest.raises(DataError, match="none of 1 pairs can be used"):
    encode(long, max_length=8)


@pytest.mark.parametrize(
  ("row", "message"),
  [
    (("one", " two", " two "), "id 8 has two equal sides, ' two'"),
    (("one", " ", " two"), "id 8 has a blank side"),
    (("one", " two", ""), "id 8 has a blank side"),
    (("one", [{"role": "assistant", "content": "two"}], "x"), "id 8 .*no texts"),
  ],
)
def test_pairs_that_teach_nothing(row, message):
  with pytest.raises(DataError, match=message):
    encode(("one", " two", " three"), row)


def test_no_pairs():
  with pytest.raises(DataError, match="no preferences"):
    encode()


def test_an_epoch_has_every_pair_once():
  rows = [("one" + " two" * (i % 40), " two" * (i + 1), " three") for i in range(40)]
  pairs = encode(*rows)
  seen = []
  for batch in pair_batches(pairs, batch_size=8, seed=0, epoch=0):
    assert batch.valid.all()
    assert batch.mask.any(1).sum(-1).max() <= batch.tokens.shape[-1]
    seen += batch.mask[:, 0].sum(-1).tolist()
  assert sorted(seen) == sorted(len(pair.chosen.tokens) for pair in pairs)
  other = next(pair_batches(pairs, batch_size=8, seed=0, epoch=1))
  first = next(pair_batches(pairs, batch_size=8, seed=0, epoch=0))
  assert first.tokens.shape != other.tokens.shape or not np.array_equal(
    first.tokens, other.tokens
  )

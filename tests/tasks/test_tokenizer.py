"""The closed-vocabulary tokenizer: every text of its task, to the letter."""

from __future__ import annotations

import pytest

from rlft.tasks import arithmetic
from rlft.tasks.tokenizer import word_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
  return word_tokenizer(arithmetic.words())


@pytest.mark.parametrize("split", arithmetic.SPLITS)
def test_texts_come_back_to_the_letter(tokenizer, split):
  for example in arithmetic.generate(split, 30):
    text = example.prompt + example.solution
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids
    # Prompt and completion are encoded apart in training and sampling.
    apart = [*tokenizer(example.prompt)["input_ids"]]
    apart += tokenizer(example.solution)["input_ids"]
    assert apart == ids
    assert len(tokenizer(example.solution)["input_ids"]) < (
      arithmetic.MAX_SOLUTION_TOKENS
    )


def test_digits_are_tokens(tokenizer):
  assert tokenizer.convert_ids_to_tokens(tokenizer("120+7")["input_ids"]) == [
    "1", "2", "0", "+", "7",
  ]  # fmt: skip


def test_nothing_is_added(tokenizer):
  assert tokenizer("3+4")["input_ids"] == tokenizer(
    "3+4", add_special_tokens=False
  )["input_ids"]  # fmt: skip
  assert tokenizer.eos_token_id == 0 and tokenizer.bos_token_id is None


def test_ids_do_not_depend_on_the_order_of_the_words():
  a, b = word_tokenizer(["x", "y", "."]), word_tokenizer([".", "y", "x", "x"])
  assert a.get_vocab() == b.get_vocab()


def test_a_word_outside_the_vocabulary_is_unknown(tokenizer):
  ids = tokenizer("3+4=seven zebras")["input_ids"]
  assert tokenizer.unk_token_id in ids


def test_saved_and_loaded(tokenizer, tmp_path):
  from transformers import AutoTokenizer

  tokenizer.save_pretrained(tmp_path)
  again = AutoTokenizer.from_pretrained(tmp_path)
  text = arithmetic.generate("train", 1)[0].prompt
  assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
  assert again.decode(again(text)["input_ids"]) == text

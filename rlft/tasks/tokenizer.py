"""A tokenizer for a task with a closed vocabulary: one id a word, one a digit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerFast

EOS = "<eos>"
UNKNOWN = "<unk>"
# A space goes with the word, comma or answer mark beside it, so that texts come back
# to the letter and a worked step costs no token for white space.
_PATTERN = r" ?#### ?|, ?|[0-9]| ?[A-Za-z]+|[^\sA-Za-z0-9]|\s"


def word_tokenizer(
  words: Iterable[str], prompt_end: str = ""
) -> PreTrainedTokenizerFast:
  """Builds a tokenizer that reads texts made of these words, and numbers.

  Args:
    words: the words and punctuation marks of the task.
    prompt_end: what its prompts end with; stored with it, see `text.reader`.

  Returns:
    A `transformers` tokenizer. Digits are tokens of their own; decoding gives the text
    back exactly; ids are in the order of the sorted vocabulary.
  """
  import tokenizers
  from transformers import PreTrainedTokenizerFast

  pieces = {" ", "\n", ",", ", ", "####", " ####", "#### ", " #### "}
  pieces.update("0123456789")
  for word in words:
    pieces.update((word, " " + word) if word.isalpha() else (word,))
  vocab = {piece: i for i, piece in enumerate([EOS, UNKNOWN, *sorted(pieces)])}
  core = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(vocab=vocab, unk_token=UNKNOWN)
  )
  core.pre_tokenizer = tokenizers.pre_tokenizers.Split(
    tokenizers.Regex(_PATTERN), behavior="isolated"
  )
  core.decoder = tokenizers.decoders.Fuse()
  return PreTrainedTokenizerFast(
    tokenizer_object=core,
    eos_token=EOS,
    unk_token=UNKNOWN,
    **({"prompt_end": prompt_end} if prompt_end else {}),
    clean_up_tokenization_spaces=False,
  )

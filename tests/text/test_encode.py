"""Texts and chats to token ids, as the model knows them."""

from __future__ import annotations

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from rlft.core.errors import ConfigError, DataError
from rlft.text.encode import encode_prompts

CHATML = (
  "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + "
  "'<|im_end|>\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer(template=CHATML):
  """One token a byte, with real special tokens: built here, no file needed."""
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  core = tokenizers.Tokenizer(
    tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[])
  )
  core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  core.decoder = tokenizers.decoders.ByteLevel()
  out = PreTrainedTokenizerFast(
    tokenizer_object=core,
    bos_token="<s>",
    eos_token="</s>",
    additional_special_tokens=["<|im_start|>", "<|im_end|>"],
  )
  out.chat_template = template
  return out


SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": " What is 3+4?\n"}
TURNS = [SYSTEM, USER, {"role": "assistant", "content": "7"}, USER]


def test_prompts_are_texts_or_messages():
  tokenizer = byte_tokenizer()
  wanted = [
    tokenizer.apply_chat_template(m, add_generation_prompt=True, return_dict=False)
    for m in ([USER], [SYSTEM, USER], TURNS)
  ]
  got = encode_prompts(tokenizer, [[USER], "plain", [SYSTEM, USER], TURNS])
  assert got == [wanted[0], tokenizer("plain")["input_ids"], *wanted[1:]]
  chats = encode_prompts(tokenizer, [USER["content"], TURNS], chat=True)
  assert chats == [wanted[0], wanted[2]]


@pytest.mark.parametrize(
  "bad", [None, 7, [], [1, 2], ["a"], [{}], [{"role": 3}], {"role": "user"}, b"text"]
)
def test_what_is_no_prompt_is_named(bad):
  with pytest.raises(DataError, match="prompt 1 is "):
    encode_prompts(byte_tokenizer(), ["a", bad])


def test_messages_need_a_template():
  with pytest.raises(ConfigError, match="no chat template"):
    encode_prompts(byte_tokenizer(None), [[USER]])

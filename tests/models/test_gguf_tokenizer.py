"""Tokenizers of GGUF files: SmolLM2's, SentencePiece's, and small ones written here.

Expected ids of SmolLM2 were made once with llama.cpp's own tokenizer on the same file;
sentencepiece.json comes from tests/golden/make_sentencepiece.py.
"""

from __future__ import annotations

import importlib.util
import json
import pathlib

import gguf as gguf_package
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from rlft.core.errors import CheckpointError
from rlft.models import gguf
from rlft.models.gguf_tokenizer import (
  PRE_TOKENIZERS,
  _byte_level_bpe,
  read_ends,
  read_tokenizer,
)

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
BPE = {
  "model": "gpt2",
  "pre": "gpt-2",
  "tokens": ["<s>", "a", "b", "ab", "[PAD]", "x y", "</s>"],
  "token_type": [3, 1, 1, 1, 5, 4, 3],
  "merges": ["a b"],
  "bos_token_id": 0,
}


@pytest.fixture(scope="module")
def tokenizer():
  try:
    return read_tokenizer(gguf.find_smollm2())
  except CheckpointError as error:
    pytest.skip(f"no real data: {error}")


def write(path, values=(), drop=(), base=BPE):
  """A file with a tokenizer and nothing else."""
  writer = gguf_package.GGUFWriter(path, "llama")
  all_values = {f"tokenizer.ggml.{key}": value for key, value in base.items()}
  for key, value in {**all_values, **dict(values)}.items():
    if key in drop:
      continue
    if isinstance(value, list):
      writer.add_array(key, value)
    elif isinstance(value, bool):
      writer.add_bool(key, value)
    elif isinstance(value, int):
      writer.add_uint32(key, value)
    else:
      writer.add_string(key, value)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.close()


def test_the_tokenizer_of_smollm2(tokenizer):
  assert len(tokenizer) == 49152
  specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
  assert tokenizer.convert_tokens_to_ids(specials) == [0, 1, 2]
  assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
  assert (tokenizer.pad_token_id, tokenizer.unk_token_id) == (2, 0)
  # Digits stand alone; nothing is added at either end; control tokens are tokens.
  ids = [19556, 216, 33, 34, 35, 36, 267, 29989, 400, 2]
  assert tokenizer.encode("Hello 1234 wörld<|im_end|>") == ids
  assert tokenizer.decode(ids, skip_special_tokens=True) == "Hello 1234 wörld"
  # Made with llama.cpp.
  assert tokenizer.encode("日本語 🙂👍🏽 Ⅷ½\t\t  def f(x):\n    return x**2\n") == [
    *(23274, 115, 40993, 179, 120, 248, 47526, 10813, 235, 231, 10813, 233, 138, 216),
    *(173, 223, 117, 16738, 1656, 216, 753, 275, 24, 104, 727, 472, 1003, 1792, 828),
    *(34, 198),
  ]


# SmolLM2's vocabulary has no token for these bytes (llama.cpp drops them as well): six
# control characters, the first bytes of unassigned planes, and what UTF-8 never holds.
NO_TOKEN = b"\x04\x06\x13\x14\x16\x1d\xc0\xc1\xf1\xf2" + bytes(range(0xF5, 0x100))


def test_smollm2_covers_every_byte_but_these(tokenizer):
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  missing = [char for char in alphabet if tokenizer.convert_tokens_to_ids(char) == 0]
  assert len(alphabet) == 256
  assert tokenizer.convert_tokens_to_ids("Ġ") == 216
  assert len(missing) == len(NO_TOKEN) == 21
  control = set(NO_TOKEN[:6])
  every = "".join(chr(c) for c in range(0x800) if c not in control)
  assert tokenizer.decode(tokenizer.encode(every)) == every


def test_the_chat_template_of_smollm2(tokenizer):
  text = tokenizer.apply_chat_template(
    [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
  )
  assert text == (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by "
    "Hugging Face<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
  )


def test_real_text_round_trips(tokenizer, data_dir):
  lines = (data_dir / "gsm8k" / "test.jsonl").read_text().splitlines()[:300]
  plays = (data_dir / "tinyshakespeare" / "input.txt").read_text()[:100_000]
  code = importlib.util.find_spec("numpy").loader.get_source("numpy")
  for text in [*lines, plays, code]:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    pieces = tokenizer.convert_ids_to_tokens(ids)
    assert not [p for p in pieces if len(p) > 1 and any(c.isdigit() for c in p)]


@settings(deadline=None, max_examples=200)
@given(text=st.text())
def test_any_text_round_trips(tokenizer, text):
  assume(not set(text.encode()) & set(NO_TOKEN))
  assert tokenizer.decode(tokenizer.encode(text)) == text


# By hand from the patterns that llama.cpp gives these names. With SmolLM2's vocabulary
# and `tokenizer.ggml.pre` replaced, ids equalled llama.cpp's on 6,045 texts for each.
CUT = "I'LL say: 12345 'tis\n\n  naïve+=1!!\r\n x²"


@pytest.mark.parametrize(
  ("pre", "pieces"),
  [
    ("default", "I|'|LL| say|:| |123|45| |'|tis|\n\n | naïve|+=|1|!!|\r\n| x|²"),
    ("gpt-2", "I|'|LL| say|:| 12345| '|tis|\n\n | naïve|+=|1|!!|\r\n| x|²"),
    ("llama-bpe", "I|'LL| say|:| |123|45| '|tis|\n\n| | naïve|+=|1|!!\r\n| x|²"),
    ("llama3", "I|'LL| say|:| |123|45| '|tis|\n\n| | naïve|+=|1|!!\r\n| x|²"),
    (
      "deepseek-r1-qwen",
      "I|'LL| say|:| |1|2|3|4|5| '|tis|\n\n| | naïve|+=|1|!!\r\n| x|²",
    ),
    ("dbrx", "I|'LL| say|:| |123|45| '|tis|\n\n| | naïve|+=|1|!!\r\n| x|²"),
    ("falcon", "I|'|LL| say|:| |123|45| |'|tis|\n\n | naïve|+=|1|!!|\r\n| x|²"),
    ("tekken", "I|'LL| say|:| |1|2|3|4|5| '|tis|\n\n| | naïve|+=|1|!!\r\n| x|²"),
    ("gpt-4o", "I'LL| say|:| |123|45| '|tis|\n\n| | naïve|+=|1|!!\r\n| x|²"),
    ("deepseek-v3", "I|'LL| say|:| |123|45| '|tis|\n\n| | naïve|+=|1|!!\r\n| x|²"),
    (
      "deepseek-coder",
      "I|'|LL| say|:| |1|2|3|4|5| '|tis|\n|\n| | naïve|+=|1|!!|\r|\n| x|²",
    ),
    (
      "deepseek-llm",
      "I|'|LL| say|:| |12345| '|tis|\n|\n| | na|ï|ve|+=|1|!!|\r|\n| x|²",
    ),
    ("qwen2", "I|'LL| say|:| |1|2|3|4|5| '|tis|\n\n| | naïve|+=|1|!!\r\n| x|²"),
    ("smollm", "I|'|LL| say|:| |1|2|3|4|5| '|tis|\n\n | naïve|+=|1|!!|\r\n| x|²"),
  ],
)
def test_each_pre_tokenizer_cuts_as_llama_cpp_does(pre, pieces):
  backend = _byte_level_bpe({}, [], PRE_TOKENIZERS[pre])
  cut = backend.pre_tokenizer.pre_tokenize_str(CUT)
  assert [CUT[a:b] for _, (a, b) in cut] == pieces.split("|")


def test_special_user_defined_and_unused_tokens(tmp_path):
  values = {"tokenizer.ggml.eos_token_id": 6, "tokenizer.ggml.add_eos_token": True}
  write(tmp_path / "m.gguf", values=values | {"tokenizer.ggml.add_bos_token": True})
  tokenizer = read_tokenizer(tmp_path / "m.gguf")
  assert tokenizer.encode("abx y<s>b") == [0, 3, 5, 0, 2, 6]
  assert tokenizer.decode([0, 3, 5, 4, 6], skip_special_tokens=True) == "abx y"
  write(tmp_path / "n.gguf")  # gpt-2 adds nothing unless told
  assert read_tokenizer(tmp_path / "n.gguf").encode("ab") == [3]
  write(tmp_path / "o.gguf", values={"tokenizer.ggml.pre": "llama-bpe"})
  assert read_tokenizer(tmp_path / "o.gguf").encode("ab") == [0, 3]


@pytest.mark.parametrize(
  ("changes", "match"),
  [
    ({"values": {"tokenizer.ggml.model": "t5"}}, "'t5' is not supported.*'gpt2'"),
    ({"values": {"tokenizer.ggml.model": "llama"}}, "'tokenizer.ggml.scores' is miss"),
    (
      {"values": {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.5]}},
      "scores holds 1 entries for 7",
    ),
    ({"values": {"tokenizer.ggml.pre": "mine"}}, "'mine' is unknown; known:.*smollm"),
    ({"drop": ["tokenizer.ggml.pre"]}, "'tokenizer.ggml.pre' is missing"),
    ({"drop": ["tokenizer.ggml.merges"]}, "'tokenizer.ggml.merges' is missing"),
    ({"values": {"tokenizer.ggml.token_type": [1, 1]}}, "7 tokens, 2 types"),
    ({"values": {"tokenizer.ggml.merges": ["a c"]}}, r"merges \('a', 'c'\)"),
    ({"values": {"tokenizer.ggml.bos_token_id": 9}}, "bos_token_id is 9"),
    ({"values": {"tokenizer.ggml.bos_token_id": 4}}, "bos_token_id is 4"),
    ({"values": {"tokenizer.ggml.add_eos_token": True}}, "names no eos token"),
  ],
)
def test_a_tokenizer_that_cannot_be_built_is_an_error(tmp_path, changes, match):
  write(tmp_path / "m.gguf", **changes)
  with pytest.raises(CheckpointError, match=match):
    read_tokenizer(tmp_path / "m.gguf")


# ------------------------------------------------------------------ SentencePiece


@pytest.fixture(scope="module")
def llama():
  made = json.loads((GOLDEN / "sentencepiece.json").read_text())
  base = {
    "model": "llama",
    "pre": "default",
    "tokens": made["tokens"],
    "scores": made["scores"],
    "token_type": made["types"],
  }
  return base, made["texts"]


def test_sentencepiece_encodes_and_decodes_the_same_text(tmp_path, llama):
  base, texts = llama
  write(tmp_path / "m.gguf", base=base)
  tokenizer = read_tokenizer(tmp_path / "m.gguf")
  assert len(texts) > 60
  for text, ids in texts:
    assert tokenizer.encode(text) == [1, *ids], text  # bytes for what it lacks
    if "▁" not in text:
      assert tokenizer.decode(ids) == text
  names = tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token
  assert names == ("<s>", "</s>", "<unk>")


def test_flags_of_a_sentencepiece_file(tmp_path, llama):
  base, texts = llama
  text, ids = texts[3]
  flags = {"add_bos_token": False, "add_eos_token": True}
  write(tmp_path / "m.gguf", base=base | flags)
  assert read_tokenizer(tmp_path / "m.gguf").encode(text) == [*ids, 2]
  write(tmp_path / "n.gguf", base=base | {"add_space_prefix": False})
  bare = read_tokenizer(tmp_path / "n.gguf")
  assert bare.encode(" " + text) == [1, *ids]
  assert bare.decode(bare.encode("a b")[1:]) == "a b"


def test_control_tokens_in_text_and_the_space_behind_them(tmp_path, llama):
  base, _ = llama
  more = {"<|im_start|>": 3, "[INST]": 4, "[PAD]": 5}
  base = base | {
    "tokens": [*base["tokens"], *more],
    "scores": [*base["scores"], 0.0, 0.0, 0.0],
    "token_type": [*base["token_type"], *more.values()],
  }
  first = len(base["tokens"]) - 3
  write(tmp_path / "m.gguf", base=base)
  tokenizer = read_tokenizer(tmp_path / "m.gguf")
  hello = tokenizer.encode("hello")[1:]
  # llama.cpp puts a space before each piece of text.
  ids = tokenizer.encode("<|im_start|>hello[INST]hello</s>")
  assert ids == [1, first, *hello, first + 1, *hello, 2]
  assert first + 2 not in tokenizer.get_vocab().values()
  assert set(tokenizer.all_special_tokens) >= {"<s>", "</s>", "<unk>"}


# ------------------------------------------------------------------ ends


@pytest.mark.parametrize(
  ("values", "ends"),
  [
    ({}, [6]),  # </s> by its text
    ({"tokenizer.ggml.eos_token_id": 0}, [0, 6]),
    ({"tokenizer.ggml.eos_token_id": 6, "tokenizer.ggml.eot_token_id": 3}, [6, 3]),
    ({"tokenizer.ggml.eos_token_id": 6, "tokenizer.ggml.eom_token_id": 2}, [6, 2]),
    ({"tokenizer.ggml.eos_token_id": 6, "tokenizer.ggml.eot_token_id": 99}, [6]),
    ({"tokenizer.ggml.token_type": [3, 1, 1, 1, 5, 4, 1]}, None),  # </s> is plain text
    (
      {"tokenizer.ggml.tokens": ["<s>", "<|eom_id|>", "b", "<|im_end|>", "", "x", "y"]}
      | {"tokenizer.ggml.token_type": [3, 3, 1, 4, 5, 4, 3]},
      [1, 3],
    ),
  ],
)
def test_ends_are_those_that_llama_cpp_knows(tmp_path, values, ends):
  write(tmp_path / "m.gguf", values=values)
  assert read_ends(tmp_path / "m.gguf").get("eos_token_id") == ends


def test_an_end_is_a_control_token_whatever_its_type_says(tmp_path):
  tokens = ["<s>", "a", "b", "ab", "[PAD]", "<|im_end|>", "</s>"]
  base = BPE | {"tokens": tokens, "token_type": [3, 1, 1, 1, 5, 1, 1]}
  write(tmp_path / "m.gguf", base=base)
  assert read_ends(tmp_path / "m.gguf") == {"eos_token_id": [5]}
  tokenizer = read_tokenizer(tmp_path / "m.gguf")
  assert tokenizer.encode("a<|im_end|>") == [1, 5]
  assert tokenizer.decode([1, 5], skip_special_tokens=True) == "a"


@pytest.mark.parametrize("index", [4, 99])  # unused, and beyond the vocabulary
def test_an_end_or_pad_that_is_no_token_is_left_out(tmp_path, index):
  ids = {"tokenizer.ggml.padding_token_id": index, "tokenizer.ggml.eos_token_id": index}
  write(tmp_path / "m.gguf", values=ids)
  tokenizer = read_tokenizer(tmp_path / "m.gguf")
  assert (tokenizer.pad_token, tokenizer.eos_token) == (None, None)
  assert tokenizer.bos_token == "<s>"


def test_a_sentencepiece_file_ends_with_its_second_token(tmp_path, llama):
  write(tmp_path / "m.gguf", base=llama[0])
  assert read_ends(tmp_path / "m.gguf") == {"eos_token_id": [2]}

"""Stop strings: the table against brute force over bytes, on real tokenizers."""

from __future__ import annotations

import random

import numpy as np
import pytest
import tokenizers
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from rlft.core.errors import CheckpointError, ConfigError
from rlft.models import gguf
from rlft.sampling import stops as stops_module
from rlft.sampling.stops import (
  START,
  TERMINAL,
  compile_stops,
  cut,
  decode_completion,
  token_bytes,
)

TEXT = (
  "Question: naïve café, 日本語 and 🙂🙂🙃!\n\nAnswer: 12 + 30 = 42\n\n\nThe end of "
  "the end; the then, then the hen.\r\n\tdef f(x):\n    return x ** 2\n```\n"
)
STOPS = ["\n\n", "Question:", "🙂", "the", "then", "hen", "日本", "42\n", " ", "e"]


def fast(backend, **special):
  return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def gpt2_style():
  backend = tokenizers.Tokenizer(models.BPE())
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=400,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    special_tokens=["<|endoftext|>"],
    show_progress=False,
  )
  backend.train_from_iterator([TEXT], trainer)
  return fast(backend, eos_token="<|endoftext|>")


def word_level():
  vocab = {"<unk>": 0, "</s>": 1, "2": 2, "+": 3, "the": 4, "end": 5, "é🙂": 6}
  backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
  backend.pre_tokenizer = pre_tokenizers.Whitespace()
  return fast(backend, eos_token="</s>", unk_token="<unk>")


@pytest.fixture(
  scope="module", params=["gpt2_style", "word_level", "stories", "smollm2"]
)
def tokenizer(request):
  if request.param == "stories":
    folder = request.getfixturevalue("data_dir") / "models" / "stories260K"
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)
  if request.param == "smollm2":
    try:
      return gguf.read_tokenizer(gguf.find_smollm2())
    except CheckpointError as error:
      pytest.skip(f"no real data: {error}")
  return {"gpt2_style": gpt2_style, "word_level": word_level}[request.param]()


@pytest.fixture(scope="module")
def gpt2():
  return gpt2_style()


def brute_force(text: bytes, stops: list[str]) -> tuple[int, bytes]:
  """(bytes read until a stop is complete or -1, text before it), byte by byte."""
  for end in range(1, len(text) + 1):
    sizes = [len(s.encode()) for s in stops if text[:end].endswith(s.encode())]
    if sizes:
      return end, text[: end - max(sizes)]
  return -1, text


def walk(table, ids) -> int:
  """How many tokens a row has when its stop is complete; -1 when it never is."""
  state = START
  for count, index in enumerate(ids, 1):
    state = int(table.next_state[state, index])
    if state == table.terminal:
      return count
  return -1


def check(tokenizer, ids, stops):
  vocab_size = len(token_bytes(tokenizer)) + 3
  table = compile_stops(stops, tokenizer, vocab_size)
  pieces = [*token_bytes(tokenizer), b"", b"", b""]
  text = b"".join(pieces[i] for i in ids)
  end, before = brute_force(text, stops)
  lengths = np.cumsum([len(pieces[i]) for i in ids])
  expected = int(np.searchsorted(lengths, end)) + 1 if end > 0 else -1
  assert walk(table, ids) == expected
  stopped = ids if expected < 0 else ids[:expected]
  # What a row says does not depend on what it would have said after its stop.
  for some in (ids, stopped):
    decoded = decode_completion(tokenizer, some, stops)
    assert decoded == before.decode("utf-8", "replace")


# ------------------------------------------------------------------ bytes of tokens


@pytest.mark.parametrize("name", ["gsm8k/test.jsonl", "tinyshakespeare/input.txt"])
def test_the_bytes_are_the_text(tokenizer, data_dir, name):
  text = (data_dir / name).read_text()[:20_000] + TEXT
  ids = tokenizer.encode(text)
  joined = b"".join(token_bytes(tokenizer)[i] for i in ids).decode()
  plain = tokenizer.decode(ids, skip_special_tokens=True)
  # A text of its own begins with a word, a completion may begin with a space.
  assert joined.removeprefix(" ") == plain.removeprefix(" ")
  if tokenizer.backend_tokenizer.model.__class__.__name__ != "WordLevel":
    assert joined.removeprefix(" ") == text
  assert decode_completion(tokenizer, ids) == joined


def test_special_tokens_have_no_bytes(tokenizer):
  pieces = token_bytes(tokenizer)
  assert len(pieces) == len(tokenizer)
  assert all(pieces[i] == b"" for i in tokenizer.all_special_ids)
  assert sum(piece == b"" for piece in pieces) < 20
  assert token_bytes(tokenizer) is pieces


def test_byte_level_tokens_cover_every_byte(gpt2):
  assert {bytes([b]) for b in range(256)} <= set(token_bytes(gpt2))


def test_byte_fallback_and_metaspace(data_dir):
  folder = data_dir / "models" / "stories260K"
  tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
  pieces = token_bytes(tokenizer)
  assert {bytes([b]) for b in range(256)} <= set(pieces)
  ids = tokenizer.encode("🙂 Once upon", add_special_tokens=False)
  assert decode_completion(tokenizer, ids) == " 🙂 Once upon"
  assert decode_completion(tokenizer, ids[:3]) == " \ufffd"  # half a character
  metaspace = tokenizers.Tokenizer(models.BPE({"▁a": 0, "b▁": 1, "<0xC3>": 2}, []))
  metaspace.decoder = decoders.Metaspace()
  assert token_bytes(fast(metaspace)) == (b" a", b"b ", b"<0xC3>")
  suffix = tokenizers.Tokenizer(models.BPE({"a</w>": 0, "b": 1}, []))
  suffix.decoder = decoders.BPEDecoder()
  assert token_bytes(fast(suffix)) == (b"a ", b"b")
  pieces = tokenizers.Tokenizer(models.WordLevel({"a": 0, "##b": 1}, unk_token="a"))
  pieces.decoder = decoders.WordPiece(cleanup=False)
  assert token_bytes(fast(pieces)) == (b" a", b"b")


def test_a_token_added_later_is_seen():
  tokenizer = gpt2_style()
  before = token_bytes(tokenizer)
  compile_stops(["<good>"], tokenizer, 500)
  tokenizer.add_tokens(["<good>"])
  assert token_bytes(tokenizer) == (*before, b"<good>")
  table = compile_stops(["<good>"], tokenizer, 500)
  assert table.next_state[START, len(before)] == TERMINAL
  tokenizer.add_special_tokens({"pad_token": "<good>"})
  assert token_bytes(tokenizer) == (*before, b"")


@pytest.mark.parametrize(
  "decoder",
  [
    decoders.CTC(),
    decoders.WordPiece(cleanup=True),
    decoders.Strip(" ", 1, 0),
    decoders.Sequence([decoders.Replace(tokenizers.Regex("a+"), "b"), decoders.Fuse()]),
  ],
)
def test_a_decoder_that_hides_bytes_is_an_error(decoder):
  backend = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
  backend.decoder = decoder
  with pytest.raises(ConfigError, match="a step that hides them"):
    token_bytes(fast(backend))


def test_a_slow_tokenizer_is_an_error():
  with pytest.raises(ConfigError, match="object is not a fast tokenizer"):
    token_bytes(object())


# ------------------------------------------------------------------ tables


def test_a_table_by_hand():
  backend = tokenizers.Tokenizer(
    models.BPE({"a": 0, "b": 1, "ab": 2, "ba": 3, "xabx": 4, "<e>": 5}, [])
  )
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  table = compile_stops(["ab"], fast(backend, eos_token="<e>"), 8)
  assert (table.terminal, table.stops) == (TERMINAL, ("ab",))
  assert table.next_state.shape == (16, 8) and table.next_state.dtype == np.int32
  # State 2 is "a". A stop inside a token counts; <e> and ids 6, 7 keep the state.
  assert table.next_state[START].tolist() == [2, 0, 1, 2, 1, 0, 0, 0]
  assert table.next_state[2].tolist() == [2, 1, 1, 1, 1, 2, 2, 2]
  assert (table.next_state[TERMINAL] == TERMINAL).all()
  padding = np.broadcast_to(np.arange(3, 16)[:, None], (13, 8))
  np.testing.assert_array_equal(table.next_state[3:], padding)


@settings(
  deadline=None,
  max_examples=60,
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_random_tokens_against_brute_force(tokenizer, data):
  count = len(token_bytes(tokenizer)) + 3
  seed = data.draw(st.integers(0, 2**32), label="seed")
  rng = random.Random(seed)
  ids = tokenizer.encode(TEXT) + [rng.randrange(count) for _ in range(20)]
  ids = [rng.choice(ids) for _ in range(rng.randrange(40))]
  said = decode_completion(tokenizer, ids)
  pieces = [said[i : i + n] for i in range(len(said)) for n in range(1, 9)]
  choice = st.sampled_from(STOPS + [p for p in pieces if "\ufffd" not in p])
  stops = data.draw(st.lists(choice | st.text(min_size=1), min_size=1, max_size=5))
  stops = [s for s in stops if "\ufffd" not in s] or ["the"]
  check(tokenizer, ids, stops)


# Few letters: stops overlap, repeat and contain one another.
WORD = st.text("ab", min_size=1, max_size=6)


@settings(deadline=None, max_examples=300)
@given(text=st.text("ab", max_size=30), stops=st.lists(WORD, min_size=1, max_size=6))
def test_overlapping_stops(text, stops):
  delta = stops_module._automaton(stop.encode() for stop in stops)
  state, end = START, -1
  for count, byte in enumerate(text.encode(), 1):
    state = int(delta[state, byte])
    if state == TERMINAL and end < 0:
      end = count
  expected, before = brute_force(text.encode(), stops)
  assert end == expected
  assert cut(text, stops) == before.decode()
  assert cut(text.encode(), stops) == before


@settings(
  deadline=None,
  max_examples=60,
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
  seed=st.integers(0, 2**32),
  stops=st.lists(st.sampled_from(STOPS), min_size=1, max_size=4, unique=True),
)
def test_every_tokenisation_gives_the_same_text(gpt2, seed, stops):
  rng = random.Random(seed)
  ids_of = {piece: i for i, piece in enumerate(token_bytes(gpt2)) if piece}
  longest = max(map(len, ids_of))
  text, at, ids = TEXT.encode(), 0, []
  while at < len(text):
    ends = [e for e in range(at + 1, at + longest + 1) if text[at:e] in ids_of]
    end = rng.choice(ends)
    ids.append(ids_of[text[at:end]])
    if rng.random() < 0.1:
      ids.append(gpt2.eos_token_id)  # a special token is no text
    at = end
  check(gpt2, ids, stops)
  assert decode_completion(gpt2, ids, stops) == cut(TEXT, stops)


@pytest.mark.parametrize(
  ("stop", "text", "rest", "kept"),
  [
    ("<|endoftext|>", "the@ end", "", "the"),
    ("<|endoftext|>\n", "the@\nend", "", "the"),
    ("the<|endoftext|>", "in the@ end", "", "in "),
    ("a<|endoftext|>b", "xa@b", "y", "x"),
    ("a<|endoftext|>b", "xa@c", None, "xac"),
    ("<|endoftext|>\n", "the@ end@\n", "@", "the end"),
    ("ab", "xa@b", "", "x"),  # no stop names it: it is no text
  ],
)
def test_a_stop_string_may_hold_a_special_token(gpt2, stop, text, rest, kept):
  """`text` completes the stop, whatever the `rest`; None: nothing does."""
  ids = []
  for char in text + (rest or ""):
    own = gpt2.encode(char, add_special_tokens=False)
    ids += [gpt2.eos_token_id] if char == "@" else own
  table = compile_stops([stop, "zzz"], gpt2, 500)
  states = [0]
  for token in ids:
    states.append(int(table.next_state[states[-1], token]))
  assert (states[-1] == table.terminal) == (rest is not None)
  assert decode_completion(gpt2, ids, [stop, "zzz"]) == kept


def test_stops_in_one_bucket_have_one_shape(gpt2):
  shapes = {
    compile_stops(stops, gpt2, 500).next_state.shape
    for stops in (["\n"], ["\n\n", "Question:"], ["日本語🙂"], ["ab", "abc", "bc"])
  }
  assert shapes == {(16, 500)}
  assert compile_stops(["x" * 15], gpt2, 500).next_state.shape == (16, 500)
  assert compile_stops(["x" * 16], gpt2, 500).next_state.shape == (32, 500)


def test_no_stops(gpt2):
  table = compile_stops([], gpt2, 500)
  assert table.next_state.shape == (1, 500) and not table.next_state.any()
  assert table.terminal == -1
  assert cut("as it is", []) == "as it is"


def test_a_vocabulary_smaller_than_the_tokenizer(gpt2):
  whole = compile_stops(["then"], gpt2, 500).next_state
  part = compile_stops(["then"], gpt2, 300).next_state
  np.testing.assert_array_equal(part, whole[:, :300])


def test_tables_are_kept_and_cannot_be_changed(gpt2):
  table = compile_stops(["a"], gpt2, 500)
  assert compile_stops(["a"], gpt2, 500) is table
  assert compile_stops(["a"], gpt2, 501) is not table
  with pytest.raises(ValueError, match="read-only"):
    table.next_state[0, 0] = 1
  for i in range(20):
    compile_stops([str(i)], gpt2, 500)
  assert compile_stops(["a"], gpt2, 500) is not table  # only so many


@pytest.mark.parametrize(
  ("stops", "match"),
  [
    ("end", "give a list of strings"),
    ({"end"}, "give a list of strings"),
    ([""], "non-empty"),
    (["end", None], "stop string None"),
    ([b"end"], "non-empty str"),
    (["\ud800"], "lone surrogate"),
  ],
)
def test_what_is_no_stop_string(gpt2, stops, match):
  with pytest.raises(ConfigError, match=match):
    compile_stops(stops, gpt2, 500)
  with pytest.raises(ConfigError, match=match):
    cut("text", stops)


def test_a_table_too_large_is_an_error(gpt2):
  with pytest.raises(ConfigError, match="70000 bytes need a table of 500000 MiB"):
    compile_stops(["x" * 70_000], gpt2, 1_000_000)
  with pytest.raises(ConfigError, match="vocab_size=0"):
    compile_stops(["x"], gpt2, 0)


# ------------------------------------------------------------------ text


@pytest.mark.parametrize(
  ("text", "stops", "expected"),
  [
    ("12\n\nQuestion:", ["Question:", "\n\n"], "12"),
    ("no stop here", ["\n"], "no stop here"),
    ("xabcd", ["abcd", "bc"], "xa"),  # bc is complete first
    ("xabc", ["bc", "abc"], "x"),  # both are: the longest
    ("abab", ["ab", "aba"], ""),
    ("aab", ["ab"], "a"),
    ("🙂b", ["b"], "🙂"),
  ],
)
def test_cut(text, stops, expected):
  assert cut(text, stops) == expected
  assert cut(text.encode(), stops) == expected.encode()


def test_ids_without_a_token(gpt2):
  ids = [len(token_bytes(gpt2)) + 5, *gpt2.encode("hi"), gpt2.eos_token_id]
  assert decode_completion(gpt2, np.array(ids)) == "hi"
  with pytest.raises(ConfigError, match="token id -1"):
    decode_completion(gpt2, [-1])

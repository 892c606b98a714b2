"""Stop strings as a table that the sampler steps through, one look-up a token.

A stop string may begin inside one token and end inside another, and its characters may
be spread over tokens that are no text by themselves. So stops are matched on bytes: the
Aho-Corasick automaton of the stops, run over the bytes of every token from every
state, gives `next_state_SV`, and the sampler's loop holds one integer a row.

Of several stops the one that is *complete* first counts, and of those that end at the
same byte the longest. This does not depend on where the tokens' boundaries lie, as the
stop that begins first would: with "abcd" and "bc", a row that has "abc" cannot wait.

Shape letters: S states, V vocabulary, N tokenizer's tokens.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import re
import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from rlft.core.errors import ConfigError

if TYPE_CHECKING:
  import transformers

  from rlft.core.types import Rollout

START, TERMINAL = 0, 1
# Tables smaller than this share one shape, so that usual stops never recompile.
MIN_STATES = 16
MAX_TABLE_BYTES = 1 << 28
_KEPT_TABLES = 8

Text = TypeVar("Text", str, bytes)


@dataclasses.dataclass(frozen=True, eq=False)
class StopTable:
  """The automaton of some stop strings over one tokenizer.

  Attributes:
    next_state: int32 [S, V], read-only: the state after a token. Rows start in state
      0; `terminal` absorbs. S is a power of two, 1 without stops.
    terminal: the state that says that a stop is complete; -1 without stops.
    stops: the strings.
  """

  next_state: np.ndarray
  terminal: int
  stops: tuple[str, ...]


# ------------------------------------------------------------------ bytes of tokens


def _byte_of_char() -> dict[str, int]:
  """Byte-level BPE's alphabet: printable bytes are themselves, others from U+0100."""
  kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  moved = [byte for byte in range(256) if byte not in set(kept)]
  return {chr(b): b for b in kept} | {chr(256 + i): b for i, b in enumerate(moved)}


_BYTES = _byte_of_char()
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
  """The decoder's steps, refused unless each acts on one token at a time."""
  if decoder is None:  # tokens are words, joined by spaces
    return [{"type": "WordPiece", "prefix": None}]
  steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
  fused = False
  for step in steps:
    kind = step["type"]
    fused |= kind == "Fuse"
    if (
      kind in ("ByteLevel", "Metaspace", "ByteFallback", "Fuse", "BPEDecoder")
      or (kind == "Replace" and "String" in step["pattern"])
      or (kind == "WordPiece" and not step["cleanup"])
      # It takes the space off the first word of a text; a completion is no such text.
      or (kind == "Strip" and fused and step["stop"] == 0)
    ):
      continue
    raise ConfigError(
      f"stop strings need to know the bytes of each token, and the tokenizer's decoder "
      f"has a step that hides them: {step}; use a byte-level, metaspace or word-level "
      "tokenizer."
    )
  return steps


def _spell(token: str, steps: list[dict[str, Any]]) -> bytes:
  for step in steps:
    kind = step["type"]
    if kind == "ByteLevel" and all(char in _BYTES for char in token):
      return bytes(_BYTES[char] for char in token)
    if kind == "ByteFallback" and (match := _BYTE_TOKEN.fullmatch(token)):
      return bytes.fromhex(match[1])
    if kind == "Replace":
      token = token.replace(step["pattern"]["String"], step["content"])
    elif kind == "Metaspace":
      token = token.replace(step["replacement"], " ")
    elif kind == "BPEDecoder" and token.endswith(step["suffix"]):
      token = token.removesuffix(step["suffix"]) + " "
    elif kind == "WordPiece":
      prefix = step["prefix"]
      inner = prefix and token.startswith(prefix)
      token = token.removeprefix(prefix) if inner else f" {token}"
  return token.encode("utf-8", "surrogatepass")


class _Pieces:
  """The bytes of a tokenizer's tokens, longest token first as well; and its tables."""

  def __init__(self, tokenizer: transformers.PreTrainedTokenizerFast):
    added = tokenizer.added_tokens_decoder.items()
    special = {index for index, token in added if token.special}
    special |= set(tokenizer.all_special_ids)
    # Their texts, which only a stop string that names one can see.
    self.special = {i: tokenizer.convert_ids_to_tokens(i) for i in special}
    steps = _steps(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"])
    vocab = tokenizer.get_vocab()
    spelt = [b""] * (1 + max(vocab.values(), default=-1))
    for token, index in vocab.items():
      if index not in special:
        spelt[index] = _spell(token, steps)
    self.bytes = tuple(spelt)
    length_N = np.array([len(piece) for piece in spelt], np.int64)
    self.order_N = np.argsort(-length_N, kind="stable")
    self.length_N = length_N[self.order_N]
    self.start_N = (np.cumsum(length_N) - length_N)[self.order_N]
    self.text = np.frombuffer(b"".join(spelt), np.uint8)
    self.tables: dict[Any, StopTable] = {}

  def named(self, stops: Sequence[str]) -> dict[int, bytes]:
    """The special tokens that a stop string holds: those are text to it."""
    return {
      index: text.encode()
      for index, text in self.special.items()
      if text and any(text in stop for stop in stops)
    }


_CACHE: weakref.WeakKeyDictionary[Any, tuple[Any, _Pieces]] = (
  weakref.WeakKeyDictionary()
)


def _pieces(tokenizer: transformers.PreTrainedTokenizerFast) -> _Pieces:
  if getattr(tokenizer, "backend_tokenizer", None) is None:
    raise ConfigError(
      f"{type(tokenizer).__name__} is not a fast tokenizer; load it with a "
      "tokenizer.json (transformers.PreTrainedTokenizerFast)."
    )
  # Tokens can be added to a tokenizer in use, as control tokens are.
  state = (len(tokenizer), tuple(tokenizer.all_special_ids))
  known, pieces = _CACHE.get(tokenizer, (None, None))
  if pieces is None or known != state:
    pieces = _Pieces(tokenizer)
    _CACHE[tokenizer] = (state, pieces)
  return pieces


def token_bytes(
  tokenizer: transformers.PreTrainedTokenizerFast,
) -> tuple[bytes, ...]:
  """The exact bytes that each token adds to a text; computed once per tokenizer.

  Args:
    tokenizer: a fast tokenizer: byte-level BPE, metaspace with byte fallback, or
      word-level. Words carry the space before them, as within a text.

  Returns:
    By id; b"" for special tokens and for ids without a token. Joined, they are the
    text of any sequence of ids, with no space taken off its front.

  Raises:
    ConfigError: the tokenizer is not a fast one, or its decoder rewrites the text in a
      way that no single token's bytes can say.
  """
  return _pieces(tokenizer).bytes


# ------------------------------------------------------------------ automaton


def _check(stops: Sequence[str]) -> tuple[str, ...]:
  if isinstance(stops, (str, bytes)) or not isinstance(stops, Sequence):
    raise ConfigError(f"stops={stops!r}: give a list of strings, such as ['\\n\\n'].")
  for stop in stops:
    if not isinstance(stop, str) or not stop:
      raise ConfigError(
        f"stop string {stop!r}: every stop must be a non-empty str; an empty one would "
        "end each completion before its first token."
      )
    try:
      stop.encode()
    except UnicodeEncodeError as error:
      raise ConfigError(
        f"stop string {stop!r} holds a lone surrogate, which no text can contain."
      ) from error
  return tuple(dict.fromkeys(stops))


def _automaton(stops: Iterable[bytes]) -> np.ndarray:
  """Aho-Corasick over bytes: the state after a byte, int32 [states, 256]."""
  children: list[dict[int, int]] = [{}, {}]  # of START and TERMINAL
  # Shortest first: what follows a stop hangs on TERMINAL, which nothing ever leaves.
  for stop in sorted(stops, key=len):
    node = START
    for byte in stop[:-1]:
      node = children[node].setdefault(byte, len(children))
      if node == len(children):
        children.append({})
    children[node].setdefault(stop[-1], TERMINAL)
  # States that are never reached keep their state, as TERMINAL does.
  delta = np.repeat(np.arange(len(children), dtype=np.int32)[:, None], 256, axis=1)
  delta[START] = START
  queue = collections.deque([(START, None)])
  while queue:
    node, suffix = queue.popleft()  # the state of the longest proper suffix
    if suffix is not None:
      delta[node] = delta[suffix]
    for byte, child in children[node].items():
      after_suffix = int(delta[node, byte])
      if after_suffix == TERMINAL:  # a stop inside this one is complete here
        continue
      delta[node, byte] = child
      if child != TERMINAL:
        queue.append((child, after_suffix))
  return delta


def compile_stops(
  stops: Sequence[str],
  tokenizer: transformers.PreTrainedTokenizerFast,
  vocab_size: int,
) -> StopTable:
  """Compiles stop strings (or tool triggers) to a table of state after token.

  next_state[s, v] = delta(... delta(delta(s, b_1), b_2) ..., b_n), b = bytes of v

  Args:
    stops: the strings; the text is over as soon as one of them is complete.
    tokenizer: see `token_bytes`. Special tokens keep the state, but for those that a
      stop holds ("<|im_end|>\\n"): these are text.
    vocab_size: V, the model's; ids beyond the tokenizer's keep the state, and tokens
      beyond V, which the model cannot choose, are left out.

  Returns:
    A table of S states, where S is at least 16 and a power of two, so that other stops
    in the same bucket have the same shape; S = 1 without stops.

  Raises:
    ConfigError: a stop is empty or not a string, or the table would be too large.

  Source: Aho and Corasick, Efficient string matching, 1975, with every state in which
    a stop is complete merged into one that absorbs.
  """
  stops = _check(stops)
  if vocab_size < 1:
    raise ConfigError(f"vocab_size={vocab_size}: give the model's vocabulary size.")
  pieces = _pieces(tokenizer)
  key = (stops, vocab_size)
  if key not in pieces.tables:
    if len(pieces.tables) >= _KEPT_TABLES:
      del pieces.tables[next(iter(pieces.tables))]
    pieces.tables[key] = _compile(stops, pieces, vocab_size)
  return pieces.tables[key]


def _compile(stops: tuple[str, ...], pieces: _Pieces, vocab_size: int) -> StopTable:
  if not stops:
    next_state_SV = np.zeros((1, vocab_size), np.int32)
    next_state_SV.setflags(write=False)
    return StopTable(next_state_SV, -1, stops)
  delta = _automaton(stop.encode() for stop in stops)
  used = len(delta)
  states = max(MIN_STATES, 1 << (used - 1).bit_length())
  if 4 * states * vocab_size > MAX_TABLE_BYTES:
    raise ConfigError(
      f"{len(stops)} stop strings with {sum(len(s.encode()) for s in stops)} bytes "
      f"need a table of {4 * states * vocab_size >> 20} MiB, more than "
      f"{MAX_TABLE_BYTES >> 20}; give shorter or fewer stop strings."
    )
  state_SN = np.repeat(
    np.arange(used, dtype=np.int32)[:, None], len(pieces.order_N), axis=1
  )
  for place in range(int(pieces.length_N.max(initial=0))):
    count = int(np.searchsorted(-pieces.length_N, -place))  # tokens longer than place
    byte_N = pieces.text[pieces.start_N[:count] + place]
    state_SN[:, :count] = delta[state_SN[:, :count], byte_N]
  next_state_SV = np.repeat(
    np.arange(states, dtype=np.int32)[:, None], vocab_size, axis=1
  )
  reachable = pieces.order_N < vocab_size
  next_state_SV[:used, pieces.order_N[reachable]] = state_SN[:, reachable]
  for index, text in pieces.named(stops).items():
    if index < vocab_size:
      state_S = np.arange(used, dtype=np.int32)
      for byte in text:
        state_S = delta[state_S, byte]
      next_state_SV[:used, index] = state_S
  next_state_SV.setflags(write=False)
  return StopTable(next_state_SV, TERMINAL, stops)


# ------------------------------------------------------------------ text


def cut(text: Text, stops: Sequence[str]) -> Text:
  """The text before the stop that is complete first (of those, the longest).

  Args:
    text: a completion, as str or as UTF-8 bytes.
    stops: the strings given to `compile_stops`.

  Returns:
    What precedes the stop; the whole text where no stop is complete.
  """
  found = []
  for stop in _check(stops):
    pattern = stop if isinstance(text, str) else stop.encode()
    start = text.find(pattern)
    if start >= 0:
      found.append((start + len(pattern), start))
  return text[: min(found)[1]] if found else text


def decode_completion(
  tokenizer: transformers.PreTrainedTokenizerFast,
  ids: Sequence[int] | np.ndarray,
  stops: Sequence[str] = (),
) -> str:
  """The text of a completion, cut before a stop string, without special tokens.

  Unlike `tokenizer.decode` it takes no space off the front: the text continues a
  prompt. Bytes that are not UTF-8, such as a character cut in half by the length
  limit, become U+FFFD.

  Args:
    tokenizer: see `token_bytes`.
    ids: the completion's token ids; ids without a token add nothing.
    stops: the strings given to `compile_stops`.

  Returns:
    The text.

  Raises:
    ConfigError: an id is negative, or a stop string is not valid.
  """
  pieces = _pieces(tokenizer)
  ids = [int(index) for index in ids]
  if min(ids, default=0) < 0:
    raise ConfigError(f"token id {min(ids)} is negative; cut the padding off first.")
  known = len(pieces.bytes)
  parts = [pieces.bytes[index] if index < known else b"" for index in ids]
  if named := pieces.named(_check(stops)):
    # Cut where the special tokens are text, then keep what is text for a reader too.
    seen = [named.get(index, part) for index, part in zip(ids, parts)]
    left = len(cut(b"".join(seen), stops))
    kept = []
    for index, part, length in zip(ids, parts, map(len, seen)):
      kept.append(b"" if index in named else part[: max(0, left)])
      left -= length
    text = b"".join(kept)
  else:
    text = cut(b"".join(parts), stops)
  return text.decode("utf-8", "replace")


def by_stop(rollout: Rollout, eos_ids: Sequence[int]) -> np.ndarray:
  """bool [B]: rows that a stop string ended, and no token that ends completions."""
  chosen = rollout.completion_mask
  last_B = chosen.shape[1] - 1 - np.argmax(chosen[:, ::-1], axis=1)
  last_B = rollout.tokens[np.arange(len(last_B)), last_B]
  return np.asarray(rollout.finished, bool) & ~np.isin(last_B, list(eos_ids))

"""What a tokenizer makes of texts: ids, begun, continued, and with plain parts."""

from __future__ import annotations

import functools
import json
import logging
import re
import weakref
from collections.abc import Sequence
from typing import Any

from rlft.core.errors import ConfigError, DataError

log = logging.getLogger(__name__)

# Characters that stand for special tokens; of a plane that no writing uses.
_STAND_IN = 0x100000
_NAMED = 5  # unknown words in a warning


def reader(tokenizer: Any) -> Reader:
  """The tokenizer's `Reader`, made once; tokens can be added to one that is in use."""
  state = (len(tokenizer), tuple(tokenizer.all_special_ids))
  known, found = _CACHE.get(tokenizer, (None, None))
  if found is None or known != state:
    found = Reader(tokenizer)
    _CACHE[tokenizer] = (state, found)
  return found


_CACHE: weakref.WeakKeyDictionary[Any, tuple[Any, Reader]] = weakref.WeakKeyDictionary()


class Reader:
  """A tokenizer with what must be known of it.

  Attributes:
    special: id of each special token's text.
    begin: the ids that it puts before a text, such as BOS. What it puts behind one is
      not for prompts, which are to be continued.
    prompt_end: what every plain prompt of its model ends with, a line end say; stored
      as "prompt_end" in tokenizer_config.json.
  """

  def __init__(self, tokenizer: Any):
    # Not the tokenizer itself: a value of the cache would keep its key alive.
    self._weak = weakref.ref(tokenizer)
    added = tokenizer.added_tokens_decoder.items()
    self.special = {token.content: index for index, token in added if token.special}
    texts = sorted(self.special, key=len, reverse=True)  # the longest one matches
    self.pattern = re.compile("|".join(map(re.escape, texts)) or "(?!)")
    whole = list(tokenizer("a")["input_ids"])
    (body,) = self.ids(["a"], told=False)
    at = next(
      (i for i in range(len(whole)) if body and whole[i : i + len(body)] == body),
      int(whole[:1] == [tokenizer.bos_token_id]),
    )
    self.begin = whole[:at]
    self.prompt_end = str(tokenizer.init_kwargs.get("prompt_end", ""))
    self._named: set[str] = set()

  @property
  def tokenizer(self) -> Any:
    return self._weak()

  def ids(self, texts: Sequence[str], told: bool = True) -> list[list[int]]:
    """Ids of texts as they stand, special tokens read, nothing put around them.

    Words that the tokenizer does not know are named in a warning, once each.
    """
    if not texts:
      return []
    encoded = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    encoded = [list(ids) for ids in encoded]
    unknown = self.tokenizer.unk_token_id
    if told and unknown is not None:
      for text, ids in zip(texts, encoded):
        if unknown in ids:
          self._name(text, unknown)
    return encoded

  def _name(self, text: str, unknown: int) -> None:
    if len(self._named) >= _NAMED:
      return
    found = self._backend().encode(text, add_special_tokens=False)
    words = [text[a:b] for i, (a, b) in zip(found.ids, found.offsets) if i == unknown]
    words = {w.strip() for w in words} - {self.tokenizer.unk_token, ""} - self._named
    if words:
      self._named |= words
      log.warning(
        "the tokenizer does not know %s: it reads %s instead",
        ", ".join(map(repr, sorted(words)[:_NAMED])),
        self.tokenizer.unk_token,
      )

  def ended(self, text: str) -> str:
    """A prompt with `prompt_end`."""
    return text if text.endswith(self.prompt_end) else text + self.prompt_end

  def begun(self, ids: Sequence[int]) -> list[int]:
    """The ids of a text with `begin` before them, unless the text brought it."""
    size = len(self.begin)
    return list(ids) if list(ids[:size]) == self.begin else [*self.begin, *ids]

  def has_special(self, text: str, spans: Sequence[tuple[int, int]]) -> bool:
    """Whether what looks like a special token touches one of the spans."""
    if not spans:
      return False
    return any(
      start < match.end() and match.start() < end
      for match in self.pattern.finditer(text)
      for start, end in spans
    )

  def guarded(
    self, text: str, spans: Sequence[tuple[int, int]], inside: bool = False
  ) -> list[int]:
    """Ids of a text whose spans are plain: no special token is read in or into them.

    Args:
      text: the whole.
      spans: (start, end), in order.
      inside: whether it stands in the middle of a text: no space is put before it.
    """
    backend, ids_of = self._guard(inside)
    stands = {content: chr(_STAND_IN + i) for i, content in enumerate(self.special)}
    if any(char in text for char in stands.values()):
      raise DataError(
        f"a text beside special tokens holds a character of the private plane 16: "
        f"{text!r:.200}; remove it"
      )
    parts, count, at = [], 0, 0
    for start, end in [*spans, (len(text), len(text))]:
      part, n = self.pattern.subn(lambda m: stands[m[0]], text[at:start])
      parts += [part, text[start:end]]
      count, at = count + n, end
    found = backend.encode("".join(parts), add_special_tokens=False).ids
    if sum(i in ids_of for i in found) != count:
      raise ConfigError(
        "a text holds what looks like a special token, and the tokenizer cannot read "
        f"it as plain text: {text!r:.200}"
      )
    return [ids_of.get(i, i) for i in found]

  def inside(self, text: str) -> list[int]:
    """Ids of a text that goes on with another, without a space put before it."""
    if not self._prefixes:
      return self.ids([text])[0]
    return list(self._inner.encode(text, add_special_tokens=False).ids)

  def _backend(self) -> Any:
    backend = getattr(self.tokenizer, "backend_tokenizer", None)
    if backend is None:
      raise ConfigError(
        f"{type(self.tokenizer).__name__} is not a fast tokenizer; load it with a "
        "tokenizer.json (transformers.PreTrainedTokenizerFast)."
      )
    return backend

  @functools.cached_property
  def _prefixes(self) -> bool:
    """Whether the tokenizer puts a space before a text."""
    made = json.loads(self._backend().to_str())
    return _without_prefix(made) != made

  @functools.cached_property
  def _inner(self) -> Any:
    return self._copy(inside=True)

  def _copy(self, inside: bool) -> Any:
    import tokenizers

    made = json.loads(self._backend().to_str())
    made = _without_prefix(made) if inside else made
    copy = tokenizers.Tokenizer.from_str(json.dumps(made))
    copy.no_truncation()
    copy.no_padding()
    return copy

  @functools.cached_property
  def _guards(self) -> dict[bool, tuple[Any, dict[int, int]]]:
    return {}

  def _guard(self, inside: bool) -> tuple[Any, dict[int, int]]:
    """A copy that reads special tokens as text, and stand-ins in their place.

    A stand-in strips and splits as its token does. Returns the copy, and the special
    id of each stand-in's.
    """
    if inside not in self._guards:
      from tokenizers import AddedToken

      copy = self._copy(inside)
      flags = {t.content: t for t in self.tokenizer.added_tokens_decoder.values()}
      ids_of = {}
      for i, (content, index) in enumerate(self.special.items()):
        like = flags[content]
        stand = AddedToken(
          chr(_STAND_IN + i),
          single_word=like.single_word,
          lstrip=like.lstrip,
          rstrip=like.rstrip,
          normalized=like.normalized,
          special=False,
        )
        copy.add_tokens([stand])
        ids_of[copy.token_to_id(stand.content)] = index
      copy.encode_special_tokens = True
      self._guards[inside] = (copy, ids_of)
    return self._guards[inside]


def _without_prefix(made: Any) -> Any:
  """A tokenizer's settings without the steps that put a space before a text."""
  if isinstance(made, list):
    return [_without_prefix(x) for x in made if not _is_prepend(x)]
  if not isinstance(made, dict):
    return made
  out = {}
  for key, value in made.items():
    if key in ("model", "added_tokens", "decoder", "post_processor"):
      out[key] = value
    elif key == "prepend_scheme":
      out[key] = "never"
    elif key == "add_prefix_space":
      out[key] = False
    else:
      out[key] = None if _is_prepend(value) else _without_prefix(value)
  return out


def _is_prepend(value: Any) -> bool:
  return isinstance(value, dict) and value.get("type") == "Prepend"

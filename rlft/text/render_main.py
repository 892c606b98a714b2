"""The program that renders chat templates: a child that may be killed at any time.

A template is a program of strangers. It may loop for ever or ask for all memory, inside
one call too, where no thread could stop it; so it runs here, under limits of the
operating system. The environment is that of `transformers`, so that texts are equal.

Requests and answers are one line of JSON each; see `render`. Imports stay few: the
child must start in a tenth of a second.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import os
import resource
import signal
import sys
from typing import Any

import jinja2.ext
import jinja2.sandbox

SECONDS = 2  # of processor time, for one conversation
MEMORY = 1 << 30  # bytes, of the whole program
# Characters of a rendering: so many, and so many times those of its messages.
LENGTH, GROWTH = 1 << 20, 64
# Around what a message said, in the rendering that is traced.
OTHER, LAST, CLOSE = "\U000ffff0", "\U000ffff1", "\U000ffff2"


# ------------------------------------------------------------------ tracing


class Traced(str):
  """A text that knows of each character who wrote it: 0 template, 1 message, 2 last.

  To code that copies characters it is the text with marks around what messages said; to
  whoever asks what it says it is the text. What is made of it by `strip`, `+`, `split`,
  a slice ... is traced too. Whatever else a template does spoils the marks, which is
  seen when the text is held against the one that was not traced.
  """

  __slots__ = ("inner", "who")

  def __new__(cls, inner: str = "", who: bytes | None = None):
    who = bytes(len(inner)) if who is None else who
    parts = []
    for start, end, one in _runs(who):
      text = inner[start:end]
      parts.append((OTHER, LAST)[one - 1] + text + CLOSE if one else text)
    self = super().__new__(cls, "".join(parts))
    self.inner, self.who = inner, who
    return self

  def part(self, start: int, end: int) -> Traced:
    return Traced(self.inner[start:end], self.who[start:end])

  def __str__(self):
    return self

  def __len__(self):
    return len(self.inner)

  def __hash__(self):
    return hash(self.inner)

  def __iter__(self):
    return (self.part(i, i + 1) for i in range(len(self.inner)))

  def __getitem__(self, key):
    if isinstance(key, slice):
      return Traced(self.inner[key], self.who[key])
    key = range(len(self.inner))[key]
    return self.part(key, key + 1)

  def __add__(self, other):
    if not isinstance(other, str):
      return NotImplemented
    return Traced(self.inner + _plain(other), self.who + _who(other))

  def __radd__(self, other):
    if not isinstance(other, str):
      return NotImplemented
    return Traced(_plain(other) + self.inner, _who(other) + self.who)

  def strip(self, chars=None):
    return self.lstrip(chars).rstrip(chars)

  def lstrip(self, chars=None):
    return self.part(len(self.inner) - len(self.inner.lstrip(chars)), len(self.inner))

  def rstrip(self, chars=None):
    return self.part(0, len(self.inner.rstrip(chars)))

  def removeprefix(self, prefix):
    return self.part(
      len(self.inner) - len(self.inner.removeprefix(_plain(prefix))), len(self.inner)
    )

  def removesuffix(self, suffix):
    return self.part(0, len(self.inner.removesuffix(_plain(suffix))))

  def _pieces(self, pieces, gap=0):
    """Parts of the text in their order, so many characters apart at least."""
    at, out = 0, []
    for piece in pieces:
      at = self.inner.index(piece, at)
      out.append(self.part(at, at + len(piece)))
      at += len(piece) + gap
    return out

  def split(self, sep=None, maxsplit=-1):
    sep = None if sep is None else _plain(sep)
    return self._pieces(self.inner.split(sep, maxsplit), len(sep or ""))

  def rsplit(self, sep=None, maxsplit=-1):
    sep = None if sep is None else _plain(sep)
    return self._pieces(self.inner.rsplit(sep, maxsplit), len(sep or ""))

  def splitlines(self, keepends=False):
    return self._pieces(self.inner.splitlines(keepends))

  def partition(self, sep):
    return tuple(self._pieces(self.inner.partition(_plain(sep))))

  def rpartition(self, sep):
    return tuple(self._pieces(self.inner.rpartition(_plain(sep))))

  def _map(self, change):
    """The text with each author's runs changed."""
    texts, who = [], []
    for start, end, one in _runs(self.who):
      texts.append(change(self.inner[start:end]))
      who.append(bytes([one]) * len(texts[-1]))
    return Traced("".join(texts), b"".join(who))

  def replace(self, old, new, count=-1):
    return self._map(lambda text: text.replace(_plain(old), _plain(new), count))

  def upper(self):
    return self._map(str.upper)

  def lower(self):
    return self._map(str.lower)

  def title(self):
    return self._map(str.title)

  def capitalize(self):
    return self._map(str.capitalize)


def _asks(name: str):
  """A method that reads the text itself, and gives something other than a text."""
  method = getattr(str, name)
  return lambda self, *args: method(self.inner, *(_bare(x) for x in args))


_ASK = """
  __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __contains__ startswith endswith find rfind
  index rindex count encode isspace isdigit isalpha isalnum isnumeric isdecimal islower
  isupper istitle isidentifier isprintable isascii
"""
for _name in _ASK.split():
  setattr(Traced, _name, _asks(_name))


def _runs(who: bytes):
  """(start, end, author) of each run of characters of one author."""
  start = 0
  for i in range(1, len(who) + 1):
    if i == len(who) or who[i] != who[start]:
      yield start, i, who[start]
      start = i


def _plain(text: str) -> str:
  return text.inner if isinstance(text, Traced) else text


def _who(text: str) -> bytes:
  return text.who if isinstance(text, Traced) else bytes(len(text))


def _bare(value: Any) -> Any:
  if isinstance(value, tuple):
    return tuple(_bare(x) for x in value)
  return value.inner if isinstance(value, Traced) else value


def _trace(value: Any, who: int) -> Any:
  """A message whose texts are traced; its role and the types of its parts are not."""
  if isinstance(value, str):
    return Traced(value, bytes([who]) * len(value))
  if isinstance(value, list):
    return [_trace(x, who) for x in value]
  if isinstance(value, dict):
    return {
      key: x if key in ("role", "type") else _trace(x, who) for key, x in value.items()
    }
  return value


def _traced(value: Any) -> Any:
  """A text that was joined, with marks in it, is traced again; all else as it is."""
  if type(value) is not str or CLOSE not in value:
    return value
  text, spans = _spans(value)
  who = bytearray(len(text))
  for start, end, last in spans:
    who[start:end] = bytes([1 + last]) * (end - start)
  return Traced(text, bytes(who))


def _spans(marked: str) -> tuple[str, list[tuple[int, int, bool]]]:
  """The text without its marks, and (start, end, of the last message) of each span."""
  parts, spans, size, opened = [], [], 0, None
  at = 0
  for i, char in enumerate(marked):
    if char in (OTHER, LAST, CLOSE):
      parts.append(marked[at:i])
      size += i - at
      at = i + 1
      if char != CLOSE:
        opened = (size, char == LAST)
      elif opened is not None:
        spans.append((opened[0], size, opened[1]))
        opened = None
  return "".join([*parts, marked[at:]]), spans


# ------------------------------------------------------------------ rendering


class Generation(jinja2.ext.Extension):
  """{% generation %} ... {% endgeneration %}: marks what an assistant says."""

  tags = {"generation"}  # noqa: RUF012

  def parse(self, parser):
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    call = self.call_method("_said")
    return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

  def _said(self, caller):
    return caller()


def _raise_exception(message):
  raise jinja2.TemplateError(message)


def _tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
  return json.dumps(
    x,
    ensure_ascii=ensure_ascii,
    indent=indent,
    separators=separators,
    sort_keys=sort_keys,
  )


class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
  """The sandbox; what it joins (macros, blocks, ~) stays traced."""

  def getattr(self, obj, attribute):
    return super().getattr(_traced(obj), attribute)

  def getitem(self, obj, argument):
    return super().getitem(_traced(obj), argument)


def _tracing(function):
  return functools.wraps(function)(lambda *args: function(*map(_traced, args)))


@functools.lru_cache(maxsize=8)
def _template(source: str) -> jinja2.Template:
  environment = Environment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[Generation, jinja2.ext.loopcontrols],
  )
  environment.filters["tojson"] = _tojson
  for name in ("trim", "upper", "lower", "title", "capitalize", "replace", "length"):
    environment.filters[name] = _tracing(environment.filters[name])
  environment.globals["raise_exception"] = _raise_exception
  return environment.from_string(source)


def render(template: str, conversation: list, variables: dict) -> dict[str, Any]:
  """{"text", "spans"} of a conversation, or {"error"}.

  `spans` are (start, end, of the last message): where the text is what a message said;
  None where the template does with texts what cannot be followed.
  """
  now = datetime.datetime.now()
  most = LENGTH + GROWTH * len(json.dumps([conversation, variables]))
  try:
    variables["strftime_now"] = now.strftime
    text = _template(template).render(messages=conversation, **variables)
    if len(text) > most:
      return {"error": f"the text has {len(text)} characters, more than {most}"}
  except Exception as error:
    reason = (str(error).strip() or "no reason given").split("\n")[0]
    return {"error": f"{type(error).__name__}: {reason:.300}"}
  traced = [_trace(m, 1) for m in conversation[:-1]]
  traced.append(_trace(conversation[-1], 2))
  try:
    marked = _template(template).render(messages=traced, **variables)
    found, spans = _spans(marked)
  except Exception:
    return {"text": text, "spans": None}
  return {"text": text, "spans": spans if found == text else None}


def main() -> None:
  """Answers requests until the parent hangs up.

  A request has a template, variables and conversations; an answer has what `render`
  gives for each.
  """
  for limit, value in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CORE, 0)):
    with contextlib.suppress(ValueError, OSError):  # not every system has it
      resource.setrlimit(limit, (value, value))
  outgoing = os.dup(1)
  os.dup2(2, 1)
  for line in sys.stdin.buffer:
    request = json.loads(line)
    answers = []
    for conversation in request["conversations"]:
      # Nobody handles the signal: it ends the program, whatever it is in.
      signal.setitimer(signal.ITIMER_PROF, SECONDS)
      variables = dict(request["variables"])
      answers.append(render(request["template"], conversation, variables))
    signal.setitimer(signal.ITIMER_PROF, 0)
    with os.fdopen(os.dup(outgoing), "wb") as file:
      file.write(json.dumps(answers).encode() + b"\n")


if __name__ == "__main__":
  main()

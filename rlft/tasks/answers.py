"""The one number that an answer states, read exactly, or none where there is doubt.

A completion is hostile input that is paid for being read as the right number, so a
number in parts (`18 20`, `3 1/2`, `2 + 3 = 5`, `18 or 20`, `10:30`, `7 million`) is no
number: a reader that takes one of its parts pays for a guess. What is one number beyond
doubt is read however it is set: `+7`, `−5`, `\\$18`, `9{,}500`, `42 000`, `USD 18`,
`\\boxed{18}`, `**18**`, `x = 18`.
"""

from __future__ import annotations

import re
import unicodedata

from rlft.tasks import chains

MARK = "####"
MAX_LINE = 1024  # characters; an answer's line is not longer
MAX_TAIL = 65_536  # of a text, in which its last number is looked for

_SIGN = "[-+−–‑]"
# No white space inside: two ways to read it would take exponential time.
_CURRENCY = r"(?:\\?\$|[€£₹¥]|\b(?:USD|US|EUR|GBP|INR|Rs\.?)(?![A-Za-z]))"
# Thousands, with one kind of separator, or none; a first group of 0 is a decimal comma.
_NUMBER = (
  "(?:[1-9][0-9]{0,2}(?P<sep>[, \u00a0\u2009\u202f])[0-9]{3}(?:(?P=sep)[0-9]{3})*"
  "(?![0-9])|[0-9]+)"
  r"(?:\.[0-9]+)?|\.[0-9]+"
)
# What may stand before the number: marks, brackets, LaTeX, a variable, "the answer is".
_BEFORE = (
  rf"(?:[\s*_`'\"“”‘’(\[{{#=:~≈]|\\[(\[]|\\(?:boxed|text|textbf|mathbf|mathrm)(?=\{{)"
  rf"|{_CURRENCY}|[A-Za-z]\s?=|(?i:the\s)?(?i:final\s)?(?i:answer)(?i:\sis)?(?![a-z]))*"
)
_STATED = re.compile(
  rf"{_BEFORE}(?P<sign>{_SIGN})?\s?(?:{_CURRENCY}\s?)?"
  rf"(?P<number>{_NUMBER})"
)
_FOUND = re.compile(
  rf"(?P<sign>{_SIGN})?(?:{_CURRENCY}\s?(?P<after>{_SIGN})?)?(?P<number>{_NUMBER})"
)
# A power of a unit of length is no second number.
_UNIT_POWER = re.compile(
  r"\b([kcdm]?m|ft|in|yd|mi|feet|inch(?:es)?|units?)(?:\^?[23]|[²³])"
)
# What makes a number another one, right behind it.
_SCALED = re.compile(
  r"\s*(?:[+^=>×÷±√π]|<(?!/[A-Za-z])|\\(?:d?frac|times|cdot|pi|sqrt|pm|div)"
  r"|[-−–*]\s*[A-Za-z](?![A-Za-z])|[kKMBxyi](?![A-Za-z])|(?i:and\s+(?:a|one)\s)"
  r"|(?i:pi|bn|mn|hundred|thousand|million|billion|trillion|tenth|half|halves|dozen"
  r"|squared|cubed)(?:th)?s?(?![A-Za-z]))"
)
# Words that begin another number, or a choice of it, on an answer's line.
_AND_MORE = re.compile(
  r"(?i)(?<![a-z])(?:or|plus|minus|negative|a\s(?:quarter|third|fifth)|hal(?:f|ves)"
  r"|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w+teen|twenty|thirty"
  r"|forty|fifty|sixty|seventy|eighty|ninety|hundreds?|thousands?|[mbtr]+illions?"
  r"|dozens?)(?![a-z])"
)
# Of chat models `####` also opens headings: `#### Step 1`, `#### 1. Add`.
_HEADING = re.compile(r"#*\s*\**(?:(?P<numbered>[0-9]{1,2}[.):]\s+)\**)?[A-Za-z]")
# Before a number of a sentence: another one that it goes on from, or a power's or
# root's mark.
_CONTINUED = re.compile(
  r"[0-9]%?(?:\}\{|\s*[*+×÷^/]\s*|\s+|[:'_]|,\s*|\s*[-–−]\s*|\s+(?:or|to|and)\s+)?$"
  r"|(?:[A-Za-z√^_]|[\^_]\{|\\sqrt\{|\\frac\{)$"
)


def stated(text: str) -> str | None:
  """The number right after the first `####`, in its shortest exact form.

  Its line holds that number and no other; words may follow.

  Returns:
    The normalised number; None when there is none, or doubt.
  """
  _, _, rest = text.partition(MARK)
  return _only(rest)


def last(text: str) -> str | None:
  """The number that a text of a chat model ends in.

  What the last `\\boxed{}` states; else what `####` does; without either, the last
  number of the text. Where both are there and differ, or the number is one in parts,
  there is none.
  """
  tail = text[-MAX_TAIL:]
  boxed = _boxed(tail)
  if MARK in text:
    own = stated(text)
    heading = _HEADING.match(text.partition(MARK)[2][:MAX_LINE])
    if not heading or (own is not None and not heading["numbered"]):
      return own if boxed is None or own == _only(boxed) else None
  if boxed is not None:
    return _only(boxed)
  for line in reversed(tail.splitlines()):
    if any(map(str.isnumeric, line)):
      return _last_of(line)
  return None


def _only(text: str) -> str | None:
  """The number of the first line that is not blank, if it is the only one."""
  line = next(iter(text[: 2 * MAX_LINE].lstrip().splitlines()), "")
  if len(line) > MAX_LINE:
    return None
  line = _plain(line)
  match = _STATED.match(line)
  if match is None:
    return None
  rest = _UNIT_POWER.sub(r"\1", line[match.end() :])
  if any(map(str.isnumeric, rest)) or _SCALED.match(rest) or _AND_MORE.search(rest):
    return None
  return _value(match["sign"], match["number"])


def _last_of(line: str) -> str | None:
  """The last number of a line, if it is not one in parts."""
  line = _plain(line[-MAX_LINE:])
  line = _UNIT_POWER.sub(r"\1", line)
  *_, match = [None, *_FOUND.finditer(line)]
  if match is None or (match.start() == 0 and len(line) >= MAX_LINE):
    return None
  before, rest = line[: match.start()], line[match.end() :]
  if any(map(str.isnumeric, rest)) or _SCALED.match(rest) or _CONTINUED.search(before):
    return None
  return _value(match["sign"] or match["after"], match["number"])


def _plain(line: str) -> str:
  """Digits of any script as ASCII, LaTeX's separators as what they show."""
  if not line.isascii():
    line = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in line)
  return line.replace("{,}", ",").replace("\\,", "\u2009").replace("\\%", "%")


def _value(sign: str | None, digits: str) -> str | None:
  value = chains.parse_number(re.sub("[, \u00a0\u2009\u202f]", "", digits))
  if value is None:
    return None
  return chains.normalise(value if sign in (None, "+") else -value)


def _boxed(text: str) -> str | None:
  r"""What the last `\boxed{...}` holds; None without one."""
  start = text.rfind("\\boxed{")
  if start < 0:
    return None
  start, depth = start + len("\\boxed{"), 1
  for at in range(start, min(len(text), start + MAX_LINE)):
    depth += {"{": 1, "}": -1}.get(text[at], 0)
    if not depth:
      return text[start:at]
  return ""

"""Settings from a command line: `--config.FIELD=VALUE`, read by the field's type."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import math
import re
import typing
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlft.cli import fields
from rlft.cli.typed import coerce
from rlft.core.errors import ConfigError

if TYPE_CHECKING:
  from ml_collections import ConfigDict

Overrides = Sequence[tuple[str, str]]  # (dotted field, text of the value)
PREFIX = "--config."


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
  """Takes `--config.FIELD=VALUE` (or `--config.FIELD VALUE`) out of a command line.

  They are taken out before argparse runs: it does not know their names, and they may
  stand anywhere.

  Args:
    argv: the command line.

  Returns:
    What is left, and the overrides in order, as (field, text).

  Raises:
    ConfigError: an override without a value.
  """
  rest, overrides = [], []
  words = iter(argv)
  for word in words:
    if word == "--":  # what follows is data, such as a prompt
      rest += [word, *words]
    elif word.startswith(PREFIX):
      field, equals, text = word.removeprefix(PREFIX).partition("=")
      if not equals:
        text = next(words, "--")
        if text.startswith("--"):
          raise ConfigError(f"{PREFIX}{field} needs a value: {PREFIX}{field}=VALUE")
      overrides.append((field, text))
    else:
      rest.append(word)
  return rest, overrides


def apply_overrides(config: ConfigDict, overrides: Overrides, cls: type) -> ConfigDict:
  """Sets fields of `config`, in place, from text.

  Args:
    config: the settings.
    overrides: (dotted field, text) in order; the last one of a field wins.
    cls: the dataclass that `config` will become. Its types decide how text is read, and
      its fields may be set although the file left them at their default.

  Returns:
    `config`.

  Raises:
    ConfigError: unknown field (with those that may be meant) or text that is not of its
      type.
  """
  for field, text in overrides:
    _override(config, cls, field, text)
  return config


def _override(config: ConfigDict, cls: type, path: str, text: str) -> None:
  node, inner = config, cls
  *groups, name = path.split(".")
  for i, group in enumerate(groups):
    kind = _type(inner, group, path, cls)
    inner = fields.group_class(kind)
    if inner is None:
      above = ".".join(groups[: i + 1])
      raise ConfigError(
        f"{above!r} is a setting, not a group: it has no {path[len(above) + 1 :]!r}"
      )
    if not isinstance(node.get(group), Mapping) and not hasattr(
      node.get(group), "to_dict"
    ):  # the file left the group at its default
      _set(node, group, {})
    node = node[group]
  kind = _type(inner, name, path, cls)
  group = fields.group_class(kind)
  none = text.lower() in ("none", "null") and type(None) in fields.arms(kind)
  if group and not none:
    first = next(fields.walk(group)).path
    raise ConfigError(
      f"{path!r} is a group of settings: set one of them, such as "
      f"{PREFIX}{path}.{first}=VALUE"
    )
  _set(node, name, read(text, kind, path))


def _type(cls: type, name: str, path: str, root: type) -> Any:
  if name not in [field.name for field in dataclasses.fields(cls) if field.init]:
    raise fields.unknown(path, root, PREFIX)
  return typing.get_type_hints(cls)[name]


def _set(node: ConfigDict, name: str, value: Any) -> None:
  """Replaces a field; ml_collections' own type check knows less than ours."""
  with node.unlocked(), node.ignore_type():
    node[name] = value


_WORDS = {
  "true": True,
  "false": False,
  "none": None,
  "null": None,
  "inf": math.inf,
  "-inf": -math.inf,
}


def read(text: str, kind: Any, path: str) -> Any:
  """The text as a value of a type: a word, a Python literal, a tuple, or plain text.

  Args:
    text: of the command line.
    kind: of the field.
    path: of the field, for the error.

  Raises:
    ConfigError: it is none of them; names the type, and how a tuple is written.
  """
  candidates: list[Any] = []
  if text.lower() in _WORDS:
    candidates.append(_WORDS[text.lower()])
  else:
    # A warning of invalid escapes is of Python source; this is a person's text.
    with (
      warnings.catch_warnings(action="ignore"),
      contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError),
    ):
      candidates.append(ast.literal_eval(text))
  for candidate in [*candidates, unescape(text)]:
    if isinstance(candidate, list | tuple):
      continue  # their items are read below, each by its own type
    with contextlib.suppress(ConfigError):
      return coerce(candidate, kind, path)
  for arm in fields.arms(kind):
    if typing.get_origin(arm) is tuple:
      with contextlib.suppress(ConfigError):
        return _tuple(text, typing.get_args(arm), path)
  raise ConfigError(
    f"{path!r} takes {fields.describe(kind)}{fields.form(kind)}, "
    f"not {fields.short(text)}"
  )


def unescape(text: str) -> str:
  r"""`\n`, `\t` and `\r` as the characters: a shell hands them over as two."""
  names = {"n": "\n", "t": "\t", "r": "\r"}
  return re.sub(r"\\([ntr])", lambda found: names[found[1]], text)


def _tuple(text: str, kinds: tuple[Any, ...], path: str) -> tuple[Any, ...]:
  """`a,b`, `(a, b)` or `[a, b]`, with or without quotes; one item may stand alone."""
  inner = text.strip()
  closed = next((i for i, _, depth in _unquoted(inner) if not depth), -1)
  if inner[:1] + inner[-1:] in ("()", "[]") and closed == len(inner) - 1:
    inner = inner[1:-1]
  commas = [i for i, char, depth in _unquoted(inner) if char == "," and depth == 0]
  ends = zip([-1, *commas], [*commas, len(inner)])
  items = [inner[start + 1 : end].strip() for start, end in ends]
  if not items[-1]:  # `1,` and nothing at all
    items.pop()
  if kinds[-1] is Ellipsis:
    kinds = kinds[:1] * len(items)
  if "" in items or len(items) != len(kinds):
    raise ConfigError(f"{path!r}: {fields.short(text)} has not {len(kinds)} items")
  return tuple(read(item, kind, path) for item, kind in zip(items, kinds))


def _unquoted(text: str) -> Iterator[tuple[int, str, int]]:
  """Index, character and how many brackets are open, of what is not in quotes."""
  depth, quote, fresh = 0, "", True  # fresh: an item begins, and may be quoted
  for i, char in enumerate(text):
    if quote:
      quote = "" if char == quote else quote
    elif fresh and char in "'\"":
      quote = char  # an apostrophe inside of a word is none
    else:
      depth += (char in "([") - (char in ")]")
      yield i, char, depth
    fresh = char in " ,([" and (fresh or char != " ")

"""The fields of a command's settings: their paths, types, defaults and sentences."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Any

from rlft.core.errors import ConfigError

_MOST = 12  # that a hint names


@dataclasses.dataclass(frozen=True)
class Field:
  """A setting, or a group of them.

  Attributes:
    path: dotted, from the command's settings.
    kind: its type.
    default: its value when nobody sets it; `dataclasses.MISSING` where it must be set.
    names, text: the fields that share its sentence, and the sentence.
    group: whether it has fields of its own.
  """

  path: str
  kind: Any
  default: Any
  names: tuple[str, ...]
  text: str
  group: bool


def walk(cls: type, base: Any = None, path: str = "") -> Iterator[Field]:
  """Every field of a tree of dataclasses: the plain ones, then each group and its own.

  Args:
    cls: the dataclass.
    base: an instance whose values are the defaults; None takes those of `cls`.
    path: of the group, with a dot at its end.
  """
  hints, texts = typing.get_type_hints(cls), sentences(cls)
  own = [field for field in dataclasses.fields(cls) if field.init]
  for field in sorted(own, key=lambda one: group_class(hints[one.name]) is not None):
    kind, inner = hints[field.name], group_class(hints[field.name])
    default = default_of(field, base)
    names, text = texts.get(field.name, ((field.name,), ""))
    yield Field(path + field.name, kind, default, names, text, inner is not None)
    if inner is not None:
      given = default if type(default) is inner else None
      yield from walk(inner, given, f"{path}{field.name}.")


def default_of(field: dataclasses.Field, base: Any = None) -> Any:
  """A field's value in `base`, else its own default, else `dataclasses.MISSING`."""
  default = getattr(base, field.name, field.default)
  if default is dataclasses.MISSING and callable(field.default_factory):
    return field.default_factory()
  return default


@functools.cache
def sentences(cls: type) -> dict[str, tuple[tuple[str, ...], str]]:
  """What a docstring's "Attributes:" says: name -> (names that share it, sentence)."""
  _, _, section = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")
  found: dict[str, tuple[tuple[str, ...], str]] = {}
  for names, text in re.findall(
    r"^  (\w[\w, ]*):((?:.*\n?)(?:^ {4,}.*\n?)*)", section, re.MULTILINE
  ):
    each = tuple(name.strip() for name in names.split(","))
    found |= dict.fromkeys(each, (each, " ".join(text.split())))
  return found


def group_class(kind: Any) -> type | None:
  """The dataclass in `kind` (itself, or one arm of an Optional), else None."""
  return next((arm for arm in arms(kind) if dataclasses.is_dataclass(arm)), None)


def arms(kind: Any) -> tuple[Any, ...]:
  """The types of a union; of any other type itself."""
  if typing.get_origin(kind) in (typing.Union, types.UnionType):
    return typing.get_args(kind)
  return (kind,)


def describe(kind: Any) -> str:
  """A type in words that a person can act on."""
  origin, args = typing.get_origin(kind), typing.get_args(kind)
  if kind is Any:
    return "any value"
  if kind is type(None) or kind is None:
    return "none"
  if kind is bool:
    return "true or false"
  if origin is typing.Literal:
    return "one of " + ", ".join(map(str, args))
  if origin in (typing.Union, types.UnionType):
    return " or ".join(map(describe, args))
  if origin is tuple:
    inner = ", ".join("..." if a is Ellipsis else describe(a) for a in args)
    return f"a tuple ({inner})"
  return getattr(kind, "__name__", str(kind))


def form(kind: Any) -> str:
  """How a tuple is written on a command line; "" for what is none."""
  for arm in arms(kind):
    if typing.get_origin(arm) is tuple:
      inner = typing.get_args(arm)
      many = inner[-1] is Ellipsis
      shown = [
        _example(one, i) for i, one in enumerate(inner[:1] * 2 if many else inner)
      ]
      text = ",".join(shown)
      alone = f", one as {shown[0]}, none as ()" if many else ""
      return f", written {text} or ({', '.join(shown)}){alone}"
  return ""


def _example(kind: Any, i: int) -> str:
  if typing.get_origin(kind) is typing.Literal:
    choices = typing.get_args(kind)
    return str(choices[i % len(choices)])
  examples = {int: ("1", "4"), float: ("0.1", "0.9"), bool: ("true", "false")}
  return examples.get(kind, ("a", "b"))[i % 2]


def spell(value: Any) -> str:
  """A value as a command line takes it."""
  if value is None or isinstance(value, bool):
    return str(value).lower()
  if isinstance(value, tuple):
    inner = [_quoted(v) if isinstance(v, str) else spell(v) for v in value]
    return ",".join(inner) if inner else "()"
  if isinstance(value, float) and math.isinf(value):
    return str(value)
  return _quoted(value) if isinstance(value, str) else repr(value)


def _quoted(text: str) -> str:
  if re.fullmatch(r"[\w./@+*-]*[A-Za-z/*+-][\w./@+*-]*", text):
    return text
  return repr(text)


def listing(cls: type, width: int = 80) -> str:
  """Every field with its default, type and sentence, for `--help`."""
  lines, shared = [], ""
  wrap = functools.partial(textwrap.fill, width=width, break_on_hyphens=False)
  every = list(walk(cls))
  for i, one in enumerate(every):
    if one.group:
      none = " (none unless one of these is set)" if one.default is None else ""
      head = f"{one.path}{none}: {one.text}" if one.text else f"{one.path}{none}:"
      lines += ["", wrap(head, initial_indent="  ", subsequent_indent="    ")]
      continue
    value = "must be set"
    if one.default is not dataclasses.MISSING:
      value = spell(one.default)
    line = f"{one.path} = {value} ({describe(one.kind)})"
    lines.append(wrap(line, initial_indent="    ", subsequent_indent="      "))
    after = every[i + 1] if i + 1 < len(every) else None
    shared = after is not None and after.names == one.names and not after.group
    if one.text and not shared:
      indent = " " * 8
      lines.append(wrap(one.text, initial_indent=indent, subsequent_indent=indent))
  return "\n".join(lines).lstrip("\n")


def example(cls: type) -> str:
  """The override that helps show: of a learning rate, if there is one."""
  every = [one for one in walk(cls) if not one.group]
  rates = [one.path for one in every if one.path.endswith("learning_rate")]
  if rates:
    return f"--config.{rates[0]}=1e-6"
  one = every[0]
  known = one.default is not dataclasses.MISSING
  return f"--config.{one.path}={spell(one.default) if known else 'VALUE'}"


# ---- names that are none


def unknown(path: str, cls: type, prefix: str = "") -> ConfigError:
  """The error of a field that is not there: it names the one that was meant.

  Args:
    path: as it was given, dotted.
    cls: the command's settings.
    prefix: what stands before a field where it was given: "--config.", or nothing.
  """
  named = [f"{prefix}{one}" if prefix else repr(one) for one in meant(path, cls)]
  hint = f"; did you mean {either(named)}?" if named else ""
  group, names = "", [field.name for field in dataclasses.fields(cls) if field.init]
  for one in walk(cls):  # of the deepest group that is there
    if one.group and f"{path}.".startswith(f"{one.path}."):
      group = f" of {one.path}"
      fields = dataclasses.fields(group_class(one.kind))
      names = [field.name for field in fields if field.init]
  return ConfigError(
    f"unknown field {path!r}{hint} (fields{group}: {', '.join(names)})"
  )


def either(names: list[str]) -> str:
  """`a`, `a or b`; of very many the first, and how many there are."""
  more = f" (and {len(names) - _MOST} more)" if len(names) > _MOST else ""
  return " or ".join(names[:_MOST]) + more


def ending(path: str, cls: type) -> list[str]:
  """The fields that end in as many of the last names of `path` as any does; the most
  alike first."""
  paths, names = [one.path for one in walk(cls)], path.split(".")
  for start in range(len(names)):
    end = "." + ".".join(names[start:])
    if found := [one for one in paths if f".{one}".endswith(end)]:
      return _alike(path, found)
  return []


def meant(path: str, cls: type) -> list[str]:
  """The fields that a wrong path may mean, the likeliest first: those that end as it
  does; else a neighbour in the group that it names; else those of the nearest name."""
  if found := ending(path, cls):
    return found
  paths = [one.path for one in walk(cls)]
  group, _, last = path.rpartition(".")
  for some in ([one for one in paths if one.rpartition(".")[0] == group], paths):
    ends = {one.rpartition(".")[2] for one in some}
    if near := difflib.get_close_matches(last, ends, n=1, cutoff=0.5):
      return _alike(path, [one for one in some if f".{one}".endswith(f".{near[0]}")])
  return []


def _alike(path: str, paths: list[str]) -> list[str]:
  likeness = lambda one: difflib.SequenceMatcher(None, path, one).ratio()
  return sorted(paths, key=likeness, reverse=True)


def short(value: Any) -> str:
  """A value for an error message: of a long one its beginning."""
  text = repr(value)
  return text if len(text) <= 200 else f"{text[:200]}... ({len(text):,} characters)"

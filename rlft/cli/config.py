"""Configs: an ml_collections file, typed overrides, then frozen dataclasses.

A sub-command calls two functions: `add_arguments` declares `--config` and `--workdir`,
`from_args` returns the dataclass. `ConfigDict` stops here: nothing below cli sees it.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import difflib
import importlib.util
import inspect
import json
import math
import numbers
import os
import re
import sys
import traceback
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rlft.core.errors import ConfigError

if TYPE_CHECKING:
  from ml_collections import ConfigDict

T = TypeVar("T")
Overrides = Sequence[tuple[str, str]]  # (dotted field, text of the value)

RESOLVED = "resolved_config.json"
ABSENT = "(absent)"
_REDACTED = "***"


def add_arguments(parser: argparse.ArgumentParser, *, workdir: str) -> None:
  """Adds `--config` and `--workdir`, which every command that trains or reads takes."""
  parser.add_argument(
    "--config",
    metavar="FILE[:ARG]",
    help="config file, with the argument of its get_config; any field can be set by "
    "--config.FIELD=VALUE, such as --config.optimizer.learning_rate=1e-6",
  )
  parser.add_argument(
    "--workdir", default=workdir, help="where results go (default: %(default)s)"
  )


def from_args(args: argparse.Namespace, cls: type[T]) -> T:
  """The settings of this command line: file (else the defaults of `cls`), overrides."""
  import ml_collections

  config = load(args.config) if args.config else ml_collections.ConfigDict()
  apply_overrides(config, args.overrides, cls)
  return to_dataclass(cls, config)


def load(spec: str) -> ConfigDict:
  """Runs `get_config` of a config file.

  Args:
    spec: path of a Python file, then optionally ":" and the argument of `get_config`.

  Returns:
    The file's `ConfigDict`.

  Raises:
    ConfigError: no such file, no `get_config`, an argument that is missing or too many,
      or an exception in the file, with its line.
  """
  name, colon, arg = spec.partition(":")
  path = Path(name)
  if not path.is_file():
    siblings = sorted(map(str, path.parent.glob("*.py")))
    raise ConfigError(f"no config file {name!r}{_nearest(name, siblings, 'files')}")
  if path.suffix != ".py":
    raise ConfigError(f"config file {name!r} is not Python: give a .py file")
  module_spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
  module = importlib.util.module_from_spec(module_spec)
  # Dataclasses defined in the file look their module up here.
  sys.modules[module_spec.name] = module
  try:
    module_spec.loader.exec_module(module)
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
      raise ConfigError(f"config file {name!r} defines no function get_config(arg)")
    _check_arity(get_config, spec, colon)
    config = get_config(arg) if colon else get_config()
  except ConfigError:
    raise
  except Exception as error:
    where = _line_of(error, path)
    kind = type(error).__name__
    raise ConfigError(f"config file {where} raised {kind}: {error}") from error
  finally:
    del sys.modules[module_spec.name]
  import ml_collections

  if not isinstance(config, ml_collections.ConfigDict):
    raise ConfigError(
      f"get_config of {name!r} returned {type(config).__name__}, not a ConfigDict"
    )
  return config


def _check_arity(get_config: Any, spec: str, colon: str) -> None:
  try:
    inspect.signature(get_config).bind(*([""] if colon else []))
  except TypeError:
    cure = (
      "takes no argument: drop what follows ':'"
      if colon
      else f"needs an argument: --config={spec}:ARG (see the file's docstring)"
    )
    raise ConfigError(f"get_config of {spec!r} {cure}") from None


def _line_of(error: Exception, path: Path) -> str:
  lines = [f.lineno for f in traceback.extract_tb(error.__traceback__)
           if Path(f.filename) == path]  # fmt: skip
  if isinstance(error, SyntaxError):
    lines = [error.lineno]
  return f"{path}:{lines[-1]}" if lines else str(path)


# ---- overrides


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
    elif word.startswith("--config."):
      field, equals, text = word.removeprefix("--config.").partition("=")
      if not equals:
        text = next(words, "--")
        if text.startswith("--"):
          raise ConfigError(f"--config.{field} needs a value: --config.{field}=VALUE")
      overrides.append((field, text))
    else:
      rest.append(word)
  return rest, overrides


def apply_overrides(
  config: ConfigDict, overrides: Overrides, cls: type | None = None
) -> ConfigDict:
  """Sets fields of `config`, in place, from text.

  Args:
    config: the settings.
    overrides: (dotted field, text) in order; the last one of a field wins.
    cls: the dataclass that `config` will become. Its types decide how text is read, and
      its fields may be set although the file left them at their default. Without it,
      the type of the present value decides.

  Returns:
    `config`.

  Raises:
    ConfigError: unknown field (with the nearest one) or text that is not of its type.
  """
  for field, text in overrides:
    _override(config, cls, "", field.split("."), text)
  return config


def _override(
  node: ConfigDict, cls: type | None, path: str, names: list[str], text: str
) -> None:
  name, *rest = names
  kind = _field_type(node, cls, name, path)
  group, child = _group_class(kind), node.get(name)
  path += name
  if rest:
    if group is None and not _is_group(child):
      raise ConfigError(f"{path!r} is a setting, not a group: it has no {rest[0]!r}")
    if not _is_group(child):  # the file left the group at its default
      _set(node, name, {})
    return _override(node[name], group, f"{path}.", rest, text)
  none = text.lower() in ("none", "null") and type(None) in _arms(kind)
  if (group or _is_group(child)) and not none:
    inner = (_names(child, group) or ["FIELD"])[0]
    raise ConfigError(
      f"{path!r} is a group of settings: set one of them, such as "
      f"--config.{path}.{inner}=VALUE"
    )
  _set(node, name, _read(text, kind, path))


def _set(node: ConfigDict, name: str, value: Any) -> None:
  """Replaces a field; ml_collections' own type check knows less than ours."""
  with node.unlocked(), node.ignore_type():
    node[name] = value


def _is_group(value: Any) -> bool:
  return hasattr(value, "to_dict") or isinstance(value, Mapping)


def _names(node: ConfigDict | None, cls: type | None) -> list[str]:
  """Fields that may be set: the dataclass's, else those of the file."""
  if cls is not None:
    return [f.name for f in dataclasses.fields(cls) if f.init]
  return [] if node is None else list(node.keys())


def _field_type(node: ConfigDict, cls: type | None, name: str, path: str) -> Any:
  names = _names(node, cls)
  if name not in names:
    raise ConfigError(f"unknown field {path + name!r}{_nearest(name, names)}")
  if cls is not None:
    return typing.get_type_hints(cls)[name]
  kind = node.get_type(name)
  if _is_group(node[name]) or kind is type(None):
    return Any
  return tuple[Any, ...] if kind in (list, tuple) else kind


def _group_class(kind: Any) -> type | None:
  """The dataclass in `kind` (itself, or one arm of an Optional), else None."""
  for arm in _arms(kind):
    if dataclasses.is_dataclass(arm):
      return arm
  return None


def _arms(kind: Any) -> tuple[Any, ...]:
  if typing.get_origin(kind) in (typing.Union, types.UnionType):
    return typing.get_args(kind)
  return (kind,)


_WORDS = {
  "true": True,
  "false": False,
  "none": None,
  "null": None,
  "inf": math.inf,
  "-inf": -math.inf,
}


def _read(text: str, kind: Any, path: str) -> Any:
  """The text as a Python literal if `kind` takes that, else as a plain string."""
  candidates: list[Any] = []
  if text.lower() in _WORDS:
    candidates.append(_WORDS[text.lower()])
  else:
    with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
      candidates.append(ast.literal_eval(text))
  for candidate in [*candidates, text]:
    try:
      return _coerce(candidate, kind, path)
    except ConfigError:
      continue
  raise ConfigError(f"{path!r} takes {_describe(kind)}, not {text!r}")


# ---- ConfigDict -> dataclass


def to_dataclass(cls: type[T], config: ConfigDict | Mapping[str, Any]) -> T:
  """Converts settings into a tree of frozen, hashable dataclasses.

  Lists become tuples and ints become floats where the field says so; nothing else is
  converted. Fields that `config` leaves out keep the dataclass's default.

  Args:
    cls: a frozen dataclass. Fields are bool, int, float, str, None, Literal, tuple,
      Optional or other unions of these, and frozen dataclasses.
    config: the settings.

  Returns:
    An instance of `cls`.

  Raises:
    ConfigError: a field is unknown, missing or mistyped, named by its dotted path.
  """
  # to_dict resolves ml_collections' references between fields.
  values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
  result = _build(cls, values, "")
  hash(result)  # a field type that is not hashable is our bug: fail at the first use
  return result


def _build(
  cls: type, values: Mapping[str, Any], path: str, base: Any = dataclasses.MISSING
) -> Any:
  """`base`, or a default `cls`, with `values` set."""
  if not cls.__dataclass_params__.frozen:
    raise TypeError(
      f"{cls.__name__} must be a frozen dataclass: jit caches by its hash"
    )
  fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
  hints = typing.get_type_hints(cls)
  for name in values:
    if name not in fields:
      raise ConfigError(f"unknown field {path + str(name)!r}{_nearest(name, fields)}")
  given = {}
  for name, field in fields.items():
    default = getattr(base, name, field.default)
    if default is dataclasses.MISSING and callable(field.default_factory):
      default = field.default_factory()
    if name in values:
      given[name] = _coerce(values[name], hints[name], path + name, default)
    elif default is dataclasses.MISSING:
      raise ConfigError(f"field {path + name!r} ({_describe(hints[name])}) is missing")
  if base is dataclasses.MISSING:
    return cls(**given)
  return dataclasses.replace(base, **given)


def _coerce(
  value: Any, kind: Any, path: str, default: Any = dataclasses.MISSING
) -> Any:
  """`value` as a hashable `kind`; ConfigError when it is not one.

  Where a group is given in part, the rest of it comes from `default`, which need not be
  the group's own default: `optimizer: Adam = Adam(eps=1e-5)`.
  """
  origin, args = typing.get_origin(kind), typing.get_args(kind)
  if kind is Any:
    return _freeze(value, path)
  if dataclasses.is_dataclass(kind):
    if type(value) is kind:
      return value
    if isinstance(value, Mapping):
      base = default if type(default) is kind else dataclasses.MISSING
      return _build(kind, value, f"{path}.", base)
  elif origin in (typing.Union, types.UnionType):
    group = _group_class(kind)
    if group and isinstance(value, Mapping):  # its error, not "takes Adam or none"
      return _coerce(value, group, path, default)
    if type(value) in args:  # before 3 becomes 3.0 in `float | int`
      return value
    for arm in args:
      try:
        return _coerce(value, arm, path)
      except ConfigError:
        continue
  elif origin is typing.Literal:
    for choice in args:
      if type(choice) is type(value) and choice == value:  # True == 1
        return choice
  elif origin is tuple or kind is tuple:
    if isinstance(value, list | tuple):
      args = args or (Any, ...)
      arms = args[:1] * len(value) if args[-1] is Ellipsis else args
      if len(arms) == len(value):
        return tuple(
          _coerce(v, arm, f"{path}[{i}]") for i, (v, arm) in enumerate(zip(value, arms))
        )
  elif kind is type(None) or kind is None:
    if value is None:
      return None
  elif kind is float:
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
      if math.isnan(value):
        raise ConfigError(f"{path!r} is NaN")
      return float(value)
  elif kind is int:
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
      return int(value)
  elif kind in (bool, str):
    if type(value) is kind:
      return value
  else:
    raise TypeError(f"{path}: a config cannot hold {kind}")
  raise ConfigError(
    f"{path!r} takes {_describe(kind)}, not {value!r} ({type(value).__name__})"
  )


def _freeze(value: Any, path: str) -> Any:
  if isinstance(value, list | tuple):
    return tuple(_freeze(v, path) for v in value)
  if value is None or isinstance(value, bool | int | float | str):
    return value
  raise ConfigError(f"{path!r} takes a number, text or a tuple of them, not {value!r}")


def _describe(kind: Any) -> str:
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
    return " or ".join(map(_describe, args))
  if origin is tuple:
    inner = ", ".join("..." if a is Ellipsis else _describe(a) for a in args)
    return f"a tuple ({inner})"
  return getattr(kind, "__name__", str(kind))


def _nearest(name: object, names: Sequence[str] | Mapping[str, Any], what="fields"):
  """The end of an error message: the nearest name, then all of them."""
  names = list(names)
  near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
  hint = f"; did you mean {near[0]!r}?" if near else ""
  return f"{hint} ({what}: {', '.join(names)})" if names else hint


# ---- the record of a run


def dump(config: Any) -> dict[str, Any]:
  """A dataclass as JSON-ready settings: tuples are lists, infinities are strings."""

  def plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
      # Not asdict: init=False fields are derived, and to_dataclass refuses them.
      fields = [f.name for f in dataclasses.fields(value) if f.init]
      return {name: plain(getattr(value, name)) for name in fields}
    if isinstance(value, tuple):
      return [plain(v) for v in value]
    if isinstance(value, float) and math.isinf(value):
      return str(value)
    return value

  return plain(config)


# A whole word of the name, so that tokens, max_new_tokens and keyword stay readable.
_SECRET = re.compile(
  r"(^|_)(api)?(key|token|secret|secrets|password|passwd|credentials?)(_|$)"
)


def redact(settings: Mapping[str, Any]) -> dict[str, Any]:
  """Hides the text of fields whose name says that it is a secret."""

  def secret(name: str, value: Any) -> bool:
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().replace("-", "_")
    # Numbers and switches are not secrets: token_budget stays readable.
    return isinstance(value, str | list) and bool(value and _SECRET.search(words))

  return {
    name: redact(value)
    if isinstance(value, Mapping)
    else _REDACTED
    if secret(name, value)
    else value
    for name, value in settings.items()
  }


def write_resolved(workdir: str | os.PathLike[str], config: Any) -> Path:
  """Writes the settings of a run, secrets hidden, to `resolved_config.json`."""
  from rlft.core import hosts  # which imports jax

  path = Path(workdir) / RESOLVED
  if not hosts.first():
    return path
  path.parent.mkdir(parents=True, exist_ok=True)
  text = json.dumps(redact(dump(config)), indent=2, allow_nan=False)
  partial = path.with_suffix(".tmp")
  partial.write_text(text + "\n", encoding="utf-8")
  partial.replace(path)  # a killed run leaves the old record or the new one
  return path


def read_resolved(workdir: str | os.PathLike[str]) -> dict[str, Any] | None:
  """What `write_resolved` wrote there; None when it wrote nothing."""
  path = Path(workdir) / RESOLVED
  if not path.exists():
    return None
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ConfigError(f"{path} is damaged ({error}): delete it to go on") from error


def diff(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
  """Settings that differ: dotted path -> (old, new), `ABSENT` where there was none.

  Args:
    old: a dataclass, or what `read_resolved` returned.
    new: the same.
  """

  def flat(settings: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in settings.items():
      if isinstance(value, Mapping):
        leaves |= flat(value, f"{path}{name}.")
      else:
        leaves[path + name] = value
    return leaves

  # Hidden on both sides: a secret is not a difference that one can show.
  before, after = (flat(redact(dump(c) if not isinstance(c, Mapping) else c))
                   for c in (old, new))  # fmt: skip
  return {
    path: (before.get(path, ABSENT), after.get(path, ABSENT))
    for path in sorted(before.keys() | after.keys())
    if before.get(path, ABSENT) != after.get(path, ABSENT)
  }

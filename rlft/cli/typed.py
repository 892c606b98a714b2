"""Settings as a tree of frozen dataclasses: values of the right type, or an error."""

from __future__ import annotations

import dataclasses
import math
import numbers
import types
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from rlft.cli import fields
from rlft.core.errors import ConfigError

if TYPE_CHECKING:
  from ml_collections import ConfigDict

T = TypeVar("T")


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
  try:
    result = _build(cls, values, "")
  except _UnknownFieldError as error:
    raise fields.unknown(error.path, cls) from None
  hash(result)  # a field type that is not hashable is our bug: fail at the first use
  return result


class _UnknownFieldError(ConfigError):
  """A field that is not there; what was meant is sought from the root of the tree."""

  def __init__(self, path: str):
    super().__init__(f"unknown field {path!r}")
    self.path = path


def _build(
  cls: type, values: Mapping[str, Any], path: str, base: Any = dataclasses.MISSING
) -> Any:
  """`base`, or a default `cls`, with `values` set."""
  if not cls.__dataclass_params__.frozen:
    raise TypeError(
      f"{cls.__name__} must be a frozen dataclass: jit caches by its hash"
    )
  known = {f.name: f for f in dataclasses.fields(cls) if f.init}
  hints = typing.get_type_hints(cls)
  for name in values:
    if name not in known:
      raise _UnknownFieldError(f"{path}{name}")
  given = {}
  for name, field in known.items():
    default = fields.default_of(field, base)
    if name in values:
      given[name] = coerce(values[name], hints[name], path + name, default)
    elif default is dataclasses.MISSING:
      kind = fields.describe(hints[name])
      raise ConfigError(f"field {path + name!r} ({kind}) is missing")
  try:
    if base is dataclasses.MISSING:
      return cls(**given)
    return dataclasses.replace(base, **given)
  except ConfigError as error:  # of settings that do not go together
    group = path.rstrip(".")
    if group and group not in str(error):
      raise ConfigError(f"{group}: {error}") from error
    raise


def coerce(value: Any, kind: Any, path: str, default: Any = dataclasses.MISSING) -> Any:
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
    group = fields.group_class(kind)
    if group and isinstance(value, Mapping):  # its error, not "takes Adam or none"
      return coerce(value, group, path, default)
    if type(value) in args:  # before 3 becomes 3.0 in `float | int`
      return value
    for arm in args:
      try:
        return coerce(value, arm, path)
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
          coerce(v, arm, f"{path}[{i}]") for i, (v, arm) in enumerate(zip(value, arms))
        )
  elif kind is type(None) or kind is None:
    if value is None:
      return None
  elif kind is float:
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
      try:
        number = float(value)
      except OverflowError:
        raise ConfigError(f"{path!r} is too large a number") from None
      if math.isnan(number):
        raise ConfigError(f"{path!r} is NaN")
      return number
  elif kind is int:
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
      return int(value)
  elif kind in (bool, str):
    if type(value) is kind:
      return value
  else:
    raise TypeError(f"{path}: a config cannot hold {kind}")
  raise ConfigError(
    f"{path!r} takes {fields.describe(kind)}, "
    f"not {fields.short(value)} ({type(value).__name__})"
  )


def _freeze(value: Any, path: str) -> Any:
  if isinstance(value, list | tuple):
    return tuple(_freeze(v, path) for v in value)
  if value is None or isinstance(value, bool | int | float | str):
    return value
  raise ConfigError(
    f"{path!r} takes a number, text or a tuple of them, not {fields.short(value)}"
  )

"""Configs: an ml_collections file, typed overrides, then frozen dataclasses.

A sub-command calls two functions: `add_arguments` declares `--config` and `--workdir`,
`from_args` returns the dataclass. `ConfigDict` stops here: nothing below cli sees it.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import importlib.util
import inspect
import json
import math
import os
import re
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rlft.cli import fields, unused
from rlft.cli.overrides import Overrides, apply_overrides
from rlft.cli.typed import to_dataclass
from rlft.core.errors import ConfigError, nearest

if TYPE_CHECKING:
  from ml_collections import ConfigDict

T = TypeVar("T")

RESOLVED = "resolved_config.json"
ABSENT = "(absent)"
_REDACTED = "***"


def add_arguments(
  parser: argparse.ArgumentParser, settings: type, *, workdir: str
) -> None:
  """Adds `--config` and `--workdir`, which every command that trains or reads takes.

  Args:
    parser: of the command.
    settings: the dataclass of its settings, whose fields `--help` lists.
    workdir: the default.
  """
  add_config(parser, settings, "config file, with the argument of its get_config")
  parser.add_argument(
    "--workdir",
    type=os.path.expanduser,
    default=workdir,
    help="where results go (default: %(default)s)",
  )
  if "checkpoint" in settings.__dataclass_fields__:
    parser.add_argument(
      "--allow_changed",
      metavar="FIELD,...",
      help="settings that may be others in a run that goes on (docs/resume.md)",
    )


def add_config(
  parser: argparse.ArgumentParser, settings: type, text: str, **more: Any
) -> None:
  """Adds `--config`, and the list of what it sets to the help."""
  parser.add_argument(
    "--config",
    metavar="FILE[:ARG]",
    help=f"{text}; any field can be set by --config.FIELD=VALUE, such as "
    f"{fields.example(settings)}",
    **more,
  )
  parser.set_defaults(settings=settings)
  listed = fields.listing(settings)
  parser.epilog = f"""settings, FIELD = DEFAULT (TYPE), set by --config.FIELD=VALUE;
a tuple is written a,b or (a, b), and \\n in a text is a new line:

{listed}"""


def from_args(args: argparse.Namespace, cls: type[T]) -> T:
  """The settings of this command line: file (else the defaults of `cls`), overrides."""
  import ml_collections

  config = ml_collections.ConfigDict()
  if args.config is not None:  # an empty name, of a shell's empty variable, is none
    config = load(args.config)
  _check_command(args.config, config, cls)
  settings = resolve(config, args.overrides, cls)
  if not getattr(args, "allow_changed", None):
    return settings
  names = tuple(name.strip() for name in args.allow_changed.split(",") if name.strip())
  keep = dataclasses.replace(settings.checkpoint, allow_changed=names)
  return dataclasses.replace(settings, checkpoint=keep)


def resolve(config: ConfigDict, overrides: Overrides, cls: type[T]) -> T:
  """The settings that a file and overrides of it give; none of them is in vain."""
  apply_overrides(config, overrides, cls)
  settings = to_dataclass(cls, config)
  unused.check(settings)
  return settings


def _check_command(spec: str | None, config: ConfigDict, cls: type) -> None:
  """Raises where a file has groups that this command lacks, and another one has all."""
  names = {field.name for field in dataclasses.fields(cls)}
  if set(config.keys()) <= names:
    return
  of = [name for name, has in _settings_of_commands().items() if set(config) <= has]
  if of:
    path = spec.partition(":")[0]
    commands = " or ".join(f"`rlft {name}`" for name in of)
    strange = ", ".join(sorted(set(config) - names))
    raise ConfigError(
      f"{path} is a config of {commands}; this command has no settings {strange}"
    )


def _settings_of_commands() -> dict[str, set[str]]:
  """Command -> its groups of settings; read from the source, for imports are slow."""
  found = {}
  for path in sorted(Path(__file__).parent.glob("*.py")):
    for node in ast.parse(path.read_bytes()).body:
      text = ast.get_docstring(node) if isinstance(node, ast.ClassDef) else None
      if named := re.match(r"Settings of `rlft ([\w-]+)`", text or ""):
        names = [one.target for one in node.body if isinstance(one, ast.AnnAssign)]
        found[named[1]] = {one.id for one in names}
  return found


def load(spec: str) -> ConfigDict:
  """Runs `get_config` of a config file.

  Args:
    spec: path of a Python file, then optionally ":" and the argument of `get_config`.

  Returns:
    The file's `ConfigDict`.

  Raises:
    ConfigError: no such file, no `get_config`, an argument that is missing or too many,
      or anything that the file raises, `SystemExit` too, with its line.
  """
  name, colon, arg = spec.partition(":")
  path = Path(os.path.expanduser(name))
  if not path.is_file():
    siblings = sorted(map(str, path.parent.glob("*.py")))
    raise ConfigError(f"no config file {name!r}{nearest(str(path), siblings, 'files')}")
  if path.suffix != ".py":
    raise ConfigError(f"config file {name!r} is not Python: give a .py file")
  # Absolute: the lines of a traceback are found by the file's name.
  module_spec = importlib.util.spec_from_file_location(
    f"_config_{path.stem}", path.resolve()
  )
  module = importlib.util.module_from_spec(module_spec)
  # Dataclasses defined in the file look their module up here.
  sys.modules[module_spec.name] = module
  import ml_collections

  try:
    with contextlib.chdir("."):  # --workdir is meant from where the command was given
      module_spec.loader.exec_module(module)
      get_config = getattr(module, "get_config", None)
      if not callable(get_config):
        raise ConfigError(f"config file {name!r} defines no function get_config(arg)")
      _check_arity(get_config, spec, colon)
      config = get_config(arg) if colon else get_config()
      if not isinstance(config, ml_collections.ConfigDict):
        raise ConfigError(
          f"get_config of {name!r} returned {type(config).__name__}, not a ConfigDict"
        )
      config.to_dict()  # raises where a value is required and not given
      frozen = isinstance(config, ml_collections.FrozenConfigDict)
      return config.as_configdict() if frozen else config
  except ConfigError:
    raise
  except BaseException as error:  # sys.exit() would end the command without a word
    line = _line_of(error, path)
    where = f"{name}:{line}" if line else name
    raise ConfigError(f"config file {where} raised {_what(error)}") from error
  finally:
    sys.modules.pop(module_spec.name, None)


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


def _line_of(error: BaseException, path: Path) -> int | None:
  """The last line of the file that the error came through."""
  own = str(path.resolve())
  if isinstance(error, SyntaxError) and error.filename == own:
    return error.lineno
  lines = [
    frame.lineno
    for frame in traceback.extract_tb(error.__traceback__)
    if frame.filename == own
  ]
  return lines[-1] if lines else None


def _what(error: BaseException) -> str:
  """The error in a line, whatever its text is."""
  try:
    text = str(error)
  except Exception:
    text = "(an error without a text)"
  text = text if len(text) <= 500 else f"{text[:500]}... ({len(text):,} characters)"
  return f"{type(error).__name__}: {text}" if text else type(error).__name__


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


def write_resolved(workdir: str | os.PathLike[str], config: Any, command: str) -> Path:
  """Writes the settings of a command's run to `resolved_config.json`."""
  return write_settings(Path(workdir) / RESOLVED, config, command=command)


def write_settings(path: Path, config: Any, **about: str) -> Path:
  """Writes settings, secrets hidden, behind what else is said about their run."""
  path.parent.mkdir(parents=True, exist_ok=True)
  text = json.dumps(about | redact(dump(config)), indent=2, allow_nan=False)
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

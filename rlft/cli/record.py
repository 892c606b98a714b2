"""A work directory holds one run: its record is written when that run is allowed.

  resolved_config.json     the command and its settings, as they are in force
  resolved_config.1.json   those before a resumed run changed some, and so on
  finished.json            the settings that the run has ended with

A command first asks `finished`, which refuses a directory that is another run's; then
it loads models, and `begin`s, or `saving` does so for it once a checkpoint is known to
be its own. Until then nothing is written.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlft.cli import config as configs
from rlft.core import hosts
from rlft.core.errors import ConfigError

FINISHED = "finished.json"
# What a run leaves; a directory that has them and no record is a part of another run.
RESULTS = ("metrics.jsonl", "evaluation.json", "checkpoints", "result.json")


def finished(workdir: Path, command: str, config: Any, resumes: bool = True) -> bool:
  """Whether this very run has ended; then a line says so.

  Args:
    workdir: of the run.
    command: its name.
    config: its settings, a dataclass or a mapping.
    resumes: whether a finished run may go on with other settings, from checkpoints,
      which then have the last word.

  Raises:
    ConfigError: the directory holds another command's run, or a finished one with other
      settings.
  """

  def ended() -> bool:
    check(workdir, command)
    path = workdir / FINISHED
    if not path.is_file():
      return False
    differ = configs.diff(_settings(_read(path)), config)
    if differ and not resumes:
      raise ConfigError(
        f"{workdir} holds a finished run of rlft {command} with other settings "
        f"({told(differ)}); give another --workdir"
      )
    return not differ

  if not hosts.by_first(ended):
    return False
  print(
    f"{workdir}: this run of rlft {command} is finished, its results are there. To do "
    f"it again give another --workdir, or remove {workdir}"
  )
  return True


def check(workdir: Path, command: str) -> None:
  """Raises `ConfigError` where the directory is not this command's."""
  if workdir.exists() and not workdir.is_dir():
    raise ConfigError(f"--workdir={workdir} is a file: give a directory")
  record = configs.read_resolved(workdir)
  if record is None:
    found = [name for name in RESULTS if (workdir / name).exists()]
    if found:
      raise ConfigError(
        f"{workdir} holds {found[0]} of another run, and no {configs.RESOLVED}: it is "
        "a part of that one; give another --workdir"
      )
    return
  owner = record.get("command", command)  # before 0.2 it was not written
  if owner != command:
    raise ConfigError(
      f"{workdir} holds a run of rlft {owner}, and this is rlft {command}; give "
      "another --workdir"
    )


def begin(workdir: Path, command: str, config: Any, keep: bool = False) -> None:
  """Writes the settings of a run that is allowed; the same ones are not written again.

  Args:
    workdir: of the run.
    command: its name.
    config: its settings, a dataclass or a mapping.
    keep: whether settings that were in force until now stay beside them: what they made
      stays as well.
  """
  if not hosts.first():
    return
  old = configs.read_resolved(workdir)
  if old is not None and not changed(workdir, config):
    return
  (workdir / FINISHED).unlink(missing_ok=True)
  if old is not None and keep:
    path = workdir / configs.RESOLVED
    numbers = range(1, 1 + len(list(workdir.iterdir())))
    free = (path.with_suffix(f".{i}.json") for i in numbers)
    path.rename(next(one for one in free if not one.exists()))
  configs.write_resolved(workdir, config, command)


def finish(workdir: Path, command: str, config: Any) -> None:
  """Writes that the run has ended, with which settings."""
  if hosts.first():
    ended = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    configs.write_settings(workdir / FINISHED, config, command=command, ended=ended)


def changed(workdir: Path, config: Any) -> dict[str, tuple[Any, Any]]:
  """Settings that differ from those on record there: path -> (old, new)."""
  old = configs.read_resolved(workdir)
  return {} if old is None else configs.diff(_settings(old), config)


def told(differ: Mapping[str, tuple[Any, Any]]) -> str:
  """Settings that differ, in words."""
  return ", ".join(f"{name}: {old} -> {new}" for name, (old, new) in differ.items())


def _read(path: Path) -> dict[str, Any]:
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ConfigError(f"{path} is damaged ({error}): delete it to go on") from error


def _settings(record: Mapping[str, Any]) -> dict[str, Any]:
  """A record without what is no setting."""
  return {k: v for k, v in record.items() if k not in ("command", "ended")}

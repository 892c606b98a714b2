"""Every command line and setting that a person is shown is one that rlft takes.

They are parsed, with their config files, by the command itself; nothing is run.
"""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest

import rlft
from rlft.cli import config, fields, main, overrides
from rlft.core.errors import ConfigError

ROOT = Path(__file__).parents[2]
PACKAGE = Path(rlft.__file__).parent
DOCUMENTS = [
  *(path for path in ROOT.glob("*.md") if path.name != "CHANGELOG.md"),
  *(
    path
    for end in ("md", "sh", "py", "sbatch")
    for path in ROOT.glob(f"launch/*.{end}")
  ),
  *ROOT.glob("docs/**/*.md"),
  *ROOT.glob("configs/*.py"),
  *PACKAGE.rglob("*.py"),
]
# Flags, quoted text, and what bench and inspect take; what follows is prose.
WORD = (
  r"""--[\w.-]+(?:=(?:"[^"]*"|'[^']*'|[^\s`"',;]+(?:,[\w./]+)*)?)?|"[^"]*"|"""
  r"""(?:sample|train|grpo|ppo|reward|runs/[\w/]+)\b"""
)
LINE = re.compile(rf"\brlft ([a-z][a-z-]+)((?: +(?:{WORD}))*)")
SETTING = re.compile(r"--config\.([a-z][\w.]*\w)(?:=([^\s`\"',;)]*))?")


def text_of(path: Path) -> str:
  """Lines joined that a backslash or Python breaks, and what is filled in as X."""
  text = path.read_text(encoding="utf-8")
  if path.suffix == ".py":
    text = re.sub(r"\{[^{}\n]*\}", "X", text)
    text = re.sub(r"\"\n\s*f?\"", "", text)
  return re.sub(r"[ \t]*\\+\n\s*", " ", text)


def lines() -> list[tuple[str, str, list[str]]]:
  """(file, command, words) of all that is shown."""
  known, found = set(main._summaries()), []
  for path in DOCUMENTS:
    for name, rest in LINE.findall(text_of(path)):
      if name in known and rest:
        words = [word.rstrip(")") for word in shlex.split(rest)]
        found.append((path.name, name, words))
  return found


def test_every_command_line_is_one_that_parses():
  shown = lines()
  assert len(shown) > 50
  assert {"README.md", "sft.py", "eval.py", "arithmetic_ppo.py", "PLANS.md"} <= {
    file for file, _, _ in shown
  }
  for file, name, words in shown:
    try:
      parsed(name, words)
    except (ConfigError, SystemExit) as error:
      pytest.fail(f"{file}: rlft {name} {shlex.join(words)}: {error}")


def parsed(name: str, words: list[str]) -> None:
  rest, over = overrides.split_overrides(words)
  command = importlib.import_module(f"rlft.cli.{name.replace('-', '_')}")
  if "--help" in rest:
    return
  if name == "plan" and not any(word.startswith("--topology") for word in rest):
    rest += ["--config=...", "--topology=v5e:4x4"]  # "`rlft plan --search` ranks"
  args = main.parse(name, command, rest, over)
  settings = getattr(args, "settings", None)
  if settings is None:
    return
  if args.config in ("...", "X"):
    args.config = None
  config.apply_overrides(
    config.load(args.config) if args.config else new(), over, settings
  )
  if not any(word in ("...", "FILE") for _, word in over):
    config.from_args(args, settings)


def new():
  import ml_collections

  return ml_collections.ConfigDict()


def test_every_setting_is_one_of_some_command(commands):
  every = {one.path: one.kind for cls in commands.values() for one in fields.walk(cls)}
  found = [
    (path.name, *found)
    for path in DOCUMENTS
    for found in SETTING.findall(text_of(path))
    if "X" not in found[0]
  ]
  assert len(found) > 40
  for file, setting, text in found:
    assert setting in every, f"{file}: --config.{setting}"
    if text and not re.match(r"[A-Z.{$]|X", text):
      overrides.read(text.rstrip("."), every[setting], setting)


def test_help_shows_a_setting_of_the_command(commands):
  for name, cls in commands.items():
    parser = argparse.ArgumentParser()
    config.add_arguments(parser, cls, workdir="x")
    [text] = [one.help for one in parser._actions if one.dest == "config"]
    [(path, value)] = SETTING.findall(text)
    every = {one.path: one.kind for one in fields.walk(cls)}
    assert path in every, name
    overrides.read(value, every[path], path)

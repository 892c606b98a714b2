"""The commands that have settings."""

from __future__ import annotations

import argparse
import importlib

import pytest

from rlft.cli import main


def settings_of_commands() -> dict[str, type]:
  """Command -> the dataclass of its settings."""
  found = {}
  for name in main._summaries():
    command = importlib.import_module(f"rlft.cli.{name.replace('-', '_')}")
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    if settings := parser.get_default("settings"):
      found[name] = settings
  return found


@pytest.fixture(scope="session")
def commands() -> dict[str, type]:
  return settings_of_commands()

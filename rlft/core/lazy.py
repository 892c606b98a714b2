"""Modules of a package by attribute, imported when they are asked for (PEP 562)."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable
from types import ModuleType


def modules(
  package: str,
) -> tuple[Callable[[str], ModuleType], Callable[[], list[str]]]:
  """`__getattr__` and `__dir__` of a package whose public names are its modules."""

  def names() -> list[str]:
    path = sys.modules[package].__path__
    return sorted(m.name for m in pkgutil.iter_modules(path) if m.name[0] != "_")

  def find(name: str) -> ModuleType:
    if name.startswith("_") or name not in names():
      raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return importlib.import_module(f"{package}.{name}")

  return find, names

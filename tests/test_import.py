"""`import rlft` is quick, quiet and complete."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import rlft

PACKAGE = Path(rlft.__file__).parent


def test_import_is_quick_and_pulls_nothing_heavy():
  code = (
    "import json, sys, time; start = time.perf_counter(); import rlft;"
    "seconds = time.perf_counter() - start; dir(rlft), rlft.__version__;"
    "print(json.dumps([seconds, sorted(m for m in sys.modules if '.' not in m)]))"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
  )
  seconds, modules = json.loads(done.stdout)
  heavy = {"jax", "transformers", "datasets", "flax", "numpy", "matplotlib", "rich"}
  assert not heavy & set(modules)
  assert seconds < 1.5


def test_public_names_are_what_they_say():
  assert set(rlft.__all__) <= set(dir(rlft)) and "__version__" in dir(rlft)
  assert set(rlft.__all__) == set(rlft._HOME)
  for name, home in rlft._HOME.items():
    assert getattr(rlft, name) is getattr(importlib.import_module(home), name)
    assert name in vars(rlft), "cached: the second access costs nothing"
  with pytest.raises(AttributeError, match="no attribute 'laod'"):
    _ = rlft.laod


def test_subpackages_and_their_modules_load_when_asked_for():
  code = (
    "import sys, rlft; names = dir(rlft); assert 'jax' not in sys.modules;"
    "[dir(getattr(rlft, n)) for n in names]; print(names, dir(rlft.algorithms));"
    "assert rlft.algorithms.grpo.run and rlft.core.errors.DataError"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
  )
  assert (done.returncode, done.stderr) == (0, "")
  packages = {p.parent.name for p in PACKAGE.glob("*/__init__.py")} - {"assets", "cli"}
  assert {*packages, *rlft.__all__, "__version__"} == set(dir(rlft))
  assert "'grpo'" in done.stdout and "'annotations'" not in done.stdout
  with pytest.raises(
    AttributeError, match=r"'rlft\.algorithms' has no attribute 'grop'"
  ):
    _ = rlft.algorithms.grop


def test_type_checkers_see_the_names_that_load_lazily():
  import ast

  tree = ast.parse((PACKAGE / "__init__.py").read_bytes())
  (block,) = [n for n in tree.body if isinstance(n, ast.If)]
  seen = {
    alias.name: node.module
    for node in block.body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
  }
  assert seen == rlft._HOME


def test_every_folder_of_code_is_a_package():
  # Without it, setuptools leaves a folder out and the import contracts skip it.
  for path in PACKAGE.rglob("*.py"):
    assert (path.parent / "__init__.py").exists(), path.parent

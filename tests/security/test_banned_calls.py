"""No file of rlft can run code that arrives as data.

A data set row, a checkpoint and a config of the hub come from strangers. What would
execute them is banned from the source; the planted snippets prove that the scan sees
each one, under an alias too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import rlft

MODULES = {
  "pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve",
  "jsonpickle", "torch",
}  # fmt: skip
CALLS = {
  "eval", "exec", "builtins.eval", "builtins.exec", "yaml.load", "yaml.load_all",
  "yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load", "yaml.full_load_all",
  "pandas.read_pickle", "os.system", "os.popen",
}  # fmt: skip
# Arguments that may only be written as False.
SWITCHES = {"allow_pickle", "trust_remote_code", "shell"}


def banned(source: str) -> Iterator[tuple[int, str]]:
  """(line, what) of every banned use in the source."""
  tree = ast.parse(source)
  names: dict[str, str] = {}  # local name -> what it stands for
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for alias in node.names:
        local = alias.asname or alias.name.split(".")[0]
        names[local] = alias.name if alias.asname else local
    elif isinstance(node, ast.ImportFrom) and node.module:
      for alias in node.names:
        names[alias.asname or alias.name] = f"{node.module}.{alias.name}"

  def full(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
      return f"{full(node.value)}.{node.attr}"
    return names.get(node.id, node.id) if isinstance(node, ast.Name) else "?"

  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      imported = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      imported = [node.module or ""]
    elif isinstance(node, ast.Call) and full(node.func).endswith("import_module"):
      imported = [a.value for a in node.args if isinstance(a, ast.Constant)]
    else:
      imported = []
    for module in imported:
      if str(module).split(".")[0] in MODULES:
        yield node.lineno, f"import {module}"
    # Any mention, not only a call: `f = eval` is the same thing. A field that is named
    # `eval` (a Store) mentions nothing.
    mention = isinstance(node, ast.Name | ast.Attribute) and full(node) in CALLS
    if mention and not isinstance(node.ctx, ast.Store):
      yield node.lineno, full(node)
    if isinstance(node, ast.keyword) and node.arg in SWITCHES:
      switch, value = node.arg, node.value
    elif isinstance(node, ast.Dict):
      for key, value in zip(node.keys, node.values):
        if isinstance(key, ast.Constant) and key.value in SWITCHES and not _off(value):
          yield key.lineno, f"{key.value!r}: not False"
      continue
    else:
      continue
    if not _off(value):
      yield value.lineno, f"{switch}= not False"


def _off(value: ast.AST) -> bool:
  return isinstance(value, ast.Constant) and value.value is False


SOURCES = sorted(Path(rlft.__file__).parent.rglob("*.py"))


def test_the_scan_reads_the_package():
  assert {"main.py", "types.py"} <= {path.name for path in SOURCES}


@pytest.mark.parametrize(
  "path", SOURCES, ids=lambda path: f"{path.parent.name}.{path.stem}"
)
def test_no_banned_call(path):
  found = list(banned(path.read_text(encoding="utf-8")))
  assert not found, f"{path}: {found}"


@pytest.mark.parametrize(
  "snippet",
  [
    "import pickle",
    "import pickle as p",
    "from pickle import loads",
    "import dill",
    "import cloudpickle",
    "import marshal",
    "import torch",
    "from torch import load",
    "import torch.serialization",
    "import importlib\nimportlib.import_module('pickle')",
    "import numpy as np\nnp.load('x', allow_pickle=True)",
    "import numpy as np\nnp.load('x', allow_pickle=flag)",
    "import yaml\nyaml.load(text)",
    "import yaml\nyaml.load(text, Loader=yaml.SafeLoader)",
    "import yaml as y\ny.unsafe_load(text)",
    "from yaml import load\nload(text)",
    "from yaml import load as read\nread(text)",
    "eval('1 + 1')",
    "f = eval",
    "exec('x = 1')",
    "import builtins\nbuiltins.exec('x = 1')",
    "def f():\n  return eval(text)",
    "AutoModel.from_pretrained('x', trust_remote_code=True)",
    "AutoModel.from_pretrained('x', trust_remote_code=settings.trust)",
    "AutoModel.from_pretrained('x', **{'trust_remote_code': True})",
    "kwargs = dict(trust_remote_code=True)",
    "import os\nos.system('ls')",
    "import subprocess\nsubprocess.run(line, shell=True)",
  ],
)
def test_the_scan_sees(snippet):
  assert list(banned(snippet)), snippet


@pytest.mark.parametrize(
  "snippet",
  [
    "import ast\nast.literal_eval('1')",
    "import yaml\nyaml.safe_load(text)",
    "import jax\njax.eval_shape(f)",
    "model.eval()",
    "spec.loader.exec_module(module)",
    "import numpy as np\nnp.load('x', allow_pickle=False)",
    "AutoModel.from_pretrained('x', trust_remote_code=False)",
    "'''eval(text) in words'''",
  ],
)
def test_the_scan_lets_pass(snippet):
  assert not list(banned(snippet)), snippet

"""The dispatcher, with sub-commands planted in a copy of its folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import rlft
from rlft.cli import main

COMMAND = '''"""Prints its settings.

It has a docstring of 100% text.
"""
import dataclasses, sys
from rlft.cli import config
from rlft.core.errors import DataError

SUMMARY = "say what was read"
GROUP = "train"

@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings.

  Attributes:
    steps: how many.
  """
  steps: int = 1

def add_arguments(parser):
  config.add_arguments(parser, Settings, workdir="runs/planted")
  parser.add_argument("--fail", choices=["data", "bug", "ctrl-c"])

def run(args):
  if args.fail == "data":
    raise DataError("row 3 of\\n  x.jsonl is empty")
  if args.fail == "bug":
    raise ZeroDivisionError
  if args.fail == "ctrl-c":
    raise KeyboardInterrupt
  print(config.from_args(args, Settings), args.workdir, "jax" in sys.modules)
  return 7
'''
# Imports something heavy, and must not be touched by help or by another command.
OTHER = "import jax\nSUMMARY: str = 'never imported'\nraise RuntimeError('imported')\n"
BARE = (
  "SUMMARY = 'no config'\ndef add_arguments(parser): pass\ndef run(args): return 0\n"
)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
  root = tmp_path_factory.mktemp("checkout")
  source = Path(rlft.__file__).parent
  (root / "rlft" / "cli").mkdir(parents=True)
  shutil.copy(source / "__init__.py", root / "rlft")
  shutil.copytree(source / "core", root / "rlft" / "core")
  for module in (
    "__init__",
    "main",
    "config",
    "fields",
    "overrides",
    "typed",
    "unused",
    "interrupts",
  ):
    name = f"{module}.py"
    shutil.copy(source / "cli" / name, root / "rlft" / "cli")
  for name, text in {"two_words": COMMAND, "other": OTHER, "bare": BARE}.items():
    (root / "rlft" / "cli" / f"{name}.py").write_text(text)
  return root


def run(checkout: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
  code = "import sys; from rlft.cli.main import main; sys.exit(main())"
  # -P and PYTHONPATH: the copy is imported whatever the working directory holds.
  return subprocess.run(
    [sys.executable, "-P", "-c", code, *args],
    env={**os.environ, "PYTHONPATH": str(checkout), **env},
    cwd=checkout,
    capture_output=True,
    text=True,
    stdin=subprocess.DEVNULL,
    timeout=60,
  )


def test_settings_reach_the_command_and_its_code_comes_back(checkout):
  config = checkout / "c.py"
  config.write_text(
    "import ml_collections\n"
    "def get_config(arg='2'): return ml_collections.ConfigDict({'steps': int(arg)})\n"
  )
  done = run(checkout, "two-words", "--config.steps=5", "--workdir=w")
  assert (done.returncode, done.stdout) == (7, "Settings(steps=5) w False\n")
  done = run(checkout, "two-words", f"--config={config}:9")
  assert done.stdout == "Settings(steps=9) runs/planted False\n"
  done = run(checkout, "--config.steps", "4", "two-words", f"--config={config}")
  assert done.stdout == "Settings(steps=4) runs/planted False\n"


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (["two-words", "--fail=data"], "rlft: error: row 3 of x.jsonl is empty\n"),
    (
      ["two-words", "--config.step=1"],
      "rlft: error: unknown field 'step'; did you mean --config.steps? "
      "(fields: steps)\n",
    ),
    (
      ["two-words", "--steps=3"],
      "rlft: error: rlft two-words does not take '--steps=3'; did you mean "
      "--config.steps=3? (see rlft two-words --help)\n",
    ),
    (
      ["two-words", "--work=w"],  # no abbreviations
      "rlft: error: rlft two-words does not take '--work=w'; did you mean --workdir? "
      "(see rlft two-words --help)\n",
    ),
    (
      ["tow-words"],
      "rlft: error: unknown command 'tow-words'; did you mean 'two-words'? "
      "(commands: bare, other, two-words)\n",
    ),
    (
      ["bare", "--config.a=1"],
      "rlft: error: rlft bare has no --config to override: 'a'\n",
    ),
  ],
)
def test_a_mistake_is_one_line_and_exit_2(checkout, args, message):
  done = run(checkout, *args)
  assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


def test_tracebacks_on_request_and_for_bugs(checkout):
  done = run(checkout, "two-words", "--fail=data", RLFT_TRACEBACK="1")
  assert done.returncode == 1 and "Traceback" in done.stderr
  done = run(checkout, "two-words", "--fail=bug")
  assert done.returncode == 1 and "ZeroDivisionError" in done.stderr


def test_ctrl_c_is_130(checkout):
  done = run(checkout, "two-words", "--fail=ctrl-c")
  said = "rlft: interrupted; there is no checkpoint in runs/planted to go on from\n"
  assert (done.returncode, done.stderr) == (130, said)


def test_help_imports_no_command(checkout):
  done = run(checkout, "--help")
  assert done.returncode == 0, done.stderr
  for lines in (
    "\n\ntrain:\n  two-words  say what was read\n",
    "\n\nmore:\n  bare       no config\n  other      never imported\n",
  ):
    assert lines in done.stdout
  assert run(checkout).returncode == 2
  help_ = run(checkout, "two-words", "--help").stdout
  assert "It has a docstring of 100% text." in help_ and "--config FILE[:ARG]" in help_
  assert "steps = 1 (int)\n        how many." in help_
  done = run(checkout, "--version")
  assert done.stdout == f"rlft {rlft.__version__}\n"


def test_a_reader_that_ends_is_no_error(checkout):
  """As of `rlft ... | head`: by a pipe whose other end is closed."""
  code = "import sys; from rlft.cli.main import main; sys.exit(main())"
  for words in (["--help"], ["two-words", "--help"], ["two-words"]):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
      [sys.executable, "-P", "-c", code, *words],
      env={**os.environ, "PYTHONPATH": str(checkout)},
      cwd=checkout,
      stdout=write,
      stderr=subprocess.PIPE,
      text=True,
      timeout=60,
    )
    os.close(write)
    # argparse passes over it.
    assert done.returncode in ((0, 141) if words[1:] else (141,)), words
    assert done.stderr == "", words


def test_every_command_has_a_group():
  groups = main._literals("GROUP")
  assert groups.keys() == main._literals("SUMMARY").keys()
  assert set(groups.values()) == set(main.GROUPS)

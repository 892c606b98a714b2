"""What the README shows is what works."""

from __future__ import annotations

import json
import re
import shutil
import string
import subprocess
import sys
from pathlib import Path

import pytest

from rlft.tasks import arithmetic

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def model_dir(tmp_path) -> Path:
  """A tiny checkpoint with a tokenizer of characters."""
  import tokenizers
  import transformers

  path = tmp_path / "model"
  shutil.copytree(ROOT / "tests" / "golden" / "models" / "llama", path)
  characters = string.ascii_letters + string.digits + " .,?"
  vocab = {c: i for i, c in enumerate(["<unk>", "<s>", "</s>", *characters])}
  model = tokenizers.models.BPE(vocab=vocab, merges=[], unk_token="<unk>")
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizers.Tokenizer(model), eos_token="</s>"
  ).save_pretrained(path)
  return path


def test_the_library_example_runs(tmp_path, model_dir):
  code = EXAMPLES[0]
  assert len(code.splitlines()) < 25
  for shown, real in {
    "path/to/model": str(model_dir),
    "path/to/copy": str(tmp_path / "copy"),
  }.items():
    assert shown in code
    code = code.replace(shown, real)
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, timeout=300
  )
  assert (done.returncode, done.stderr) == (0, "")
  assert done.stdout.startswith("['")
  assert (tmp_path / "copy" / "model.safetensors").exists()


def run(code: str, cwd: Path) -> str:
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, timeout=900, cwd=cwd
  )
  assert (done.returncode, done.stderr) == (0, "")
  return done.stdout


def test_the_example_of_an_algorithm_runs(tmp_path):
  """One iteration of a few prompts."""
  code = EXAMPLES[1]
  for shown, quick in {"iterations=60": "iterations=1", "1000,": "16,"}.items():
    assert shown in code
    code = code.replace(shown, quick)
  first, last = map(float, run(code, tmp_path).split())
  assert 0 < first == last < 1


@pytest.mark.slow
def test_the_example_of_an_algorithm_learns(tmp_path):
  first, last = map(float, run(EXAMPLES[1], tmp_path).split())
  assert last > first + 0.08


def test_the_example_of_ones_own_data_runs(tmp_path):
  """As short as elsewhere."""
  code = EXAMPLES[2]
  assert sum(bool(line) for line in code.splitlines()) <= 7
  rows = [{"prompt": e.prompt} for e in arithmetic.generate("train", 16)]
  (tmp_path / "prompts.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in rows))
  assert "iterations=5" in code
  run(code.replace("iterations=5", "iterations=1"), tmp_path)
  assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_every_file_that_is_named_exists(name):
  text = (ROOT / name).read_text(encoding="utf-8")
  links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
  paths = re.findall(r"`((?:rlft|configs|tests|\.ci)/[\w./]+)`", text)
  for path in [*links, *paths]:
    assert (ROOT / path).exists(), f"{name} names {path}"

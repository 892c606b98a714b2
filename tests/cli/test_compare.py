"""`rlft compare`: the whole study at its smallest, resumed, and refused."""

from __future__ import annotations

import json
import math
import types
from pathlib import Path

import pytest

from rlft.algorithms import expert_iteration as ei
from rlft.algorithms import grpo, ppo
from rlft.cli import compare as command
from rlft.cli import runs, study
from rlft.cli.main import main

CONFIG = Path(__file__).parents[2] / "configs" / "study_arithmetic.py"


def compare(workdir: Path, *words: str) -> int:
  return main(["compare", f"--config={CONFIG}:smoke", f"--workdir={workdir}", *words])


def test_the_defaults_can_be_run():
  assert command.Study().task.train * 8 == command.Study().budget


@pytest.mark.slow
def test_a_study_and_its_resumption(tmp_path, capsys):
  """All arms from both starts; what is done stays done."""
  starts = "--config.starts=('sft','base')"
  assert compare(tmp_path, starts) == 0
  out = capsys.readouterr().out
  report = (tmp_path / "report.md").read_text()
  for start in ("sft", "base"):
    assert (tmp_path / f"samples_{start}.png").stat().st_size > 10_000
    assert (tmp_path / f"metrics_{start}.png").stat().st_size > 10_000
    for arm in study.NAMES:
      result = json.loads(
        (tmp_path / start / "seed_0" / arm / "result.json").read_text()
      )
      sampled = {"start": 0, "sft": 0}.get(arm, 128)  # the outcome model's included
      assert result["sampled_solutions"] == sampled, arm
      assert set(result["splits"]) == {"test", "ood_templates"}
      assert "rerank@4" in result["splits"]["test"]["metrics"]
  for name in study.NAMES.values():
    assert f"| {name} |" in report
  assert "SFT trades pass@k for maj@1" in report and "start base" in out

  kept = tmp_path / "sft" / "seed_0"
  (kept / "grpo" / "result.json").unlink()
  before = (kept / "ei" / "result.json").stat().st_mtime_ns
  assert compare(tmp_path, starts) == 0
  again = capsys.readouterr().out
  assert "start sft, seed 0: grpo" in again and "seed 0: ei" not in again
  assert (kept / "ei" / "result.json").stat().st_mtime_ns == before
  assert (tmp_path / "report.md").read_text().splitlines()[:6] == (
    report.splitlines()[:6]
  )


def test_dev_prompts_are_no_seeds_training_prompts(tmp_path):
  """Of one file the prompts of all seeds come first, then the dev prompts."""
  path = tmp_path / "train.jsonl"
  row = lambda i: json.dumps({"question": f"{i}?", "answer": f"#### {i}"})
  path.write_text("\n".join(row(i) for i in range(20)) + "\n")
  config = command.Study(
    task=runs.TaskConfig(name="gsm8k", path=str(path), train=4, train_start=2),
    seeds=3,
    dev_prompts=5,
    budget=256,
    ei=ei.EIConfig(rounds=1),
    ppo=ppo.PPOConfig(prompts_per_iteration=2),
    grpo=grpo.GRPOConfig(prompts_per_iteration=1),
  )
  bench = types.SimpleNamespace(config=config)
  found = [e.prompt for e in command._Bench._dev_rows(bench)]
  due = runs.examples(config.task, "train", 5, start=2 + 3 * 4)
  assert found == [e.prompt for e in due] and len(set(found)) == 5


def test_a_result_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
  """A study that is killed while it writes runs that arm again."""
  whole = Path.write_text

  def half(self, text, *args):
    whole(self, text[: len(text) // 2], *args)
    raise KeyboardInterrupt

  monkeypatch.setattr(Path, "write_text", half)
  with pytest.raises(KeyboardInterrupt):
    runs.write_json(tmp_path / "result.json", {"seconds": 1.0})
  assert not (tmp_path / "result.json").exists()
  monkeypatch.undo()
  runs.write_json(tmp_path / "result.json", {"seconds": math.nan})
  assert json.loads((tmp_path / "result.json").read_text()) == {"seconds": None}


def test_another_study_in_the_same_directory(tmp_path, capsys, monkeypatch):
  """Its arms would be compared with those of other settings."""
  monkeypatch.setattr(command._Bench, "do", lambda self, arm: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    compare(tmp_path)
  assert compare(tmp_path, "--config.budget=256") == 2
  assert "budget" in capsys.readouterr().err
  with pytest.raises(ZeroDivisionError):
    compare(tmp_path)  # the first settings still stand


@pytest.mark.parametrize(
  "words, message",
  [
    (["--config.budget=100"], "multiple of task.train"),
    (["--config.arms=('sft',)"], "takes its update tokens from 'ei'"),
    (["--config.arms=('dpo',)"], "choose some of"),
    (["--config.orm_samples=4"], "leave nothing"),
    (["--config.ppo.samples_per_prompt=3"], "multiples of the"),
  ],
)
def test_settings_that_cannot_be(tmp_path, capsys, words, message):
  assert compare(tmp_path, *words) == 2
  assert message in capsys.readouterr().err

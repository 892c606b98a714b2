"""A work directory is one run's: a refused or finished command leaves it as it is."""

from __future__ import annotations

import pytest

from rlft.cli import config, record
from rlft.cli.main import main
from rlft.core.errors import ConfigError

GRPO = (
  "--config.grpo.iterations=1",
  "--config.grpo.prompts_per_iteration=2",
  "--config.grpo.samples_per_prompt=4",
  "--config.grpo.max_new_tokens=4",
  "--config.task.train=8",
  "--config.eval_prompts=0",
  "--config.eval.max_new_tokens=4",
)


def files(workdir):
  """Every file there with its bytes."""
  return {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("runs") / "grpo"
  assert main(["grpo", f"--workdir={workdir}", *GRPO]) == 0
  return workdir


OTHERS = [
  ["ppo"],
  ["sft"],
  ["expert-iteration"],
  ["return-conditioned"],
  ["dpo"],
  ["reward-model"],
  ["best-of-n"],
  ["eval"],
  ["quickstart"],
  ["compare", "--config=configs/study_arithmetic.py"],
]


def test_another_command_is_refused_and_writes_nothing(tmp_path, capsys):
  record.begin(tmp_path, "grpo", {"seed": 0})
  (tmp_path / "evaluation.json").write_text("{}")
  before = files(tmp_path)
  for words in OTHERS:
    assert main([*words, f"--workdir={tmp_path}"]) == 2, words
    said = capsys.readouterr().err
    assert f"{tmp_path} holds a run of rlft grpo, and this is rlft {words[0]}" in said
    assert files(tmp_path) == before, words


def test_a_part_of_a_run_is_no_directory_for_another(tmp_path, capsys):
  part = tmp_path / "after"
  part.mkdir()
  (part / "evaluation.json").write_text("{}")
  assert main(["eval", f"--workdir={part}"]) == 2
  assert "holds evaluation.json of another run" in capsys.readouterr().err
  assert main(["eval", f"--workdir={part / 'evaluation.json'}"]) == 2
  assert "is a file: give a directory" in capsys.readouterr().err
  assert [path.name for path in part.iterdir()] == ["evaluation.json"]


def test_a_finished_run_says_so_and_does_nothing(run, capsys):
  before = files(run)
  assert main(["grpo", f"--workdir={run}", *GRPO]) == 0
  said = capsys.readouterr().out
  assert "this run of rlft grpo is finished" in said and len(said.splitlines()) == 1
  assert files(run) == before


@pytest.mark.parametrize("setting", ["grpo.temperature=0.7", "task.seed=3"])
def test_a_finished_run_with_other_settings_writes_nothing(run, setting, capsys):
  before = files(run)
  assert main(["grpo", f"--workdir={run}", *GRPO, f"--config.{setting}"]) == 2
  assert setting.partition("=")[0] in capsys.readouterr().err
  assert files(run) == before


def test_settings_that_changed_keep_the_ones_before_them(tmp_path):
  settings = lambda rate: {"rate": rate}
  record.begin(tmp_path, "ppo", settings(1), keep=True)
  record.finish(tmp_path, "ppo", settings(1))
  path = tmp_path / config.RESOLVED
  first = path.read_bytes()
  record.begin(tmp_path, "ppo", settings(1), keep=True)
  assert path.read_bytes() == first
  assert record.finished(tmp_path, "ppo", settings(1))
  for rate in (2, 3):
    assert not record.finished(tmp_path, "ppo", settings(rate))
    record.begin(tmp_path, "ppo", settings(rate), keep=True)
  kept = [tmp_path / f"resolved_config.{i}.json" for i in (1, 2)]
  assert kept[0].read_bytes() == first and '"rate": 2' in kept[1].read_text()
  assert config.read_resolved(tmp_path) == {"command": "ppo", "rate": 3}
  assert not record.finished(tmp_path, "ppo", settings(1))


def test_what_has_no_checkpoints_is_not_done_again_with_other_settings(tmp_path):
  record.begin(tmp_path, "best-of-n", {"n": 4})
  assert not record.finished(tmp_path, "best-of-n", {"n": 8}, resumes=False)
  record.finish(tmp_path, "best-of-n", {"n": 4})
  assert record.finished(tmp_path, "best-of-n", {"n": 4}, resumes=False)
  before = files(tmp_path)
  with pytest.raises(ConfigError, match=r"finished run .*\(n: 4 -> 8\); give another"):
    record.finished(tmp_path, "best-of-n", {"n": 8}, resumes=False)
  assert files(tmp_path) == before


def test_an_evaluation_replaces_another_one_whole(tmp_path, capsys):
  small = ["--config.prompts=2", "--config.eval.samples=1", "--config.eval.ks=1"]
  small += ["--config.eval.max_new_tokens=4", f"--workdir={tmp_path}"]
  assert main(["eval", *small, "--config.splits=test,ood_steps"]) == 0
  before = files(tmp_path)
  assert main(["eval", *small, "--config.model.path=/no/such/model"]) == 2
  assert files(tmp_path) == before
  assert main(["eval", *small]) == 0
  assert config.read_resolved(tmp_path)["splits"] == ["test"]
  found = {path.name for path in tmp_path.iterdir()}
  assert found == {config.RESOLVED, "evaluation.json", "transcripts_test.txt"}

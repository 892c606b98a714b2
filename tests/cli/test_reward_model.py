"""`rlft reward-model`, run as a user runs it."""

from __future__ import annotations

import json

import pytest

from rlft.cli.main import main
from rlft.models.scalar import load_scalar
from rlft.training import metrics

SMALL = ("--config.train.batch_size=8", "--config.train.max_length=64")


def write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def pairs(count):
  row = lambda i: {"prompt": f"{i}", "chosen": f"+{i}=9", "rejected": "1"}
  return [row(i) for i in range(count)]


def test_pairs(tmp_path, capsys):
  path = write(tmp_path / "train.jsonl", [*pairs(24), {"prompt": "no sides"}])
  other = write(tmp_path / "other.jsonl", pairs(4))
  code = main(
    [
      "reward-model",
      f"--workdir={tmp_path / 'run'}",
      f"--config.preferences.path={tmp_path}",
      f"--config.preferences.other=('{other}',)",
      "--config.preferences.on_bad=skip",
      "--config.preferences.held_out=0.3",
      *SMALL,
    ]
  )
  assert code == 0
  out = capsys.readouterr().out
  assert "held out" in out and str(other) in out and "accuracy" in out
  found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
  assert set(found) == {"held out", str(other)}
  for split in found.values():
    share, low, high = split["accuracy"]
    assert 0 <= low <= share <= high <= 1
  model = load_scalar(tmp_path / "run" / "model")
  assert model.kind == "reward" and (model.mean, model.std) != (0.0, 1.0)
  recorded = {name for line in metrics.read(tmp_path / "run") for name in line}
  assert {"loss", "accuracy", "reward_gap", "grad_norm"} <= recorded
  assert path.exists()


@pytest.mark.slow
def test_outcomes(tmp_path, capsys):
  code = main(
    [
      "reward-model",
      f"--workdir={tmp_path}",
      "--config.kind=outcome",
      "--config.task.train=12",
      "--config.outcomes.samples=4",
      "--config.outcomes.max_new_tokens=48",
      "--config.outcomes.eval_prompts=6",
      "--config.train.batch_size=16",
      "--config.train.max_length=192",
    ]
  )
  assert code == 0
  assert "AUC of prefixes" in capsys.readouterr().out
  found = json.loads((tmp_path / "evaluation.json").read_text())
  assert set(found["test"]) == {"right", "auc_steps", "auc_final"}
  assert load_scalar(tmp_path / "model").kind == "outcome"


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ((), "preferences.path is empty"),
    (("--config.preferences.path=nowhere.jsonl",), "nowhere.jsonl: No such file"),
    (("--config.kind=elo",), "kind"),
    (("--config.preferences.path=p", "--config.preferences.limit=-1"), "limit=-1"),
  ],
)
def test_mistakes(tmp_path, capsys, flags, message):
  assert main(["reward-model", f"--workdir={tmp_path}", *flags]) == 2
  assert message in capsys.readouterr().err

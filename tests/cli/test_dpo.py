"""`rlft dpo`, run as a user runs it."""

from __future__ import annotations

import json
import math

import pytest

import rlft
from rlft.cli.main import main
from rlft.training import metrics

SMALL = (
  "--config.dpo.batch_size=8",
  "--config.dpo.max_length=64",
  "--config.dpo.optimizer.learning_rate=0.001",
)


def write(path, count):
  row = lambda i: {"prompt": f"{i}", "chosen": f"+{i}=9", "rejected": "1"}
  path.write_text("".join(json.dumps(row(i)) + "\n" for i in range(count)))
  return path


def test_pairs_to_a_model(tmp_path, capsys):
  write(tmp_path / "train.jsonl", 24)
  other = write(tmp_path / "other.jsonl", 4)
  code = main(
    [
      "dpo",
      f"--workdir={tmp_path / 'run'}",
      f"--config.preferences.path={tmp_path}",
      f"--config.preferences.other=('{other}',)",
      "--config.preferences.held_out=0.3",
      *SMALL,
    ]
  )
  assert code == 0
  out = capsys.readouterr().out
  assert "held out" in out and str(other) in out and "chosen likelier" in out
  found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
  for split in ("held out", str(other)):
    assert found["before"][split]["accuracy"][0] == pytest.approx(0.5)
    assert found["after"][split]["accuracy"][0] > 0.9
    assert found["after"][split]["margin"][0] > 0
  lines = [line for line in metrics.read(tmp_path / "run") if "loss" in line]
  assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
  assert {"accuracy", "margin", "chosen_reward", "grad_norm"} <= set(lines[0])
  assert rlft.load(tmp_path / "run" / "model").config.width


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ((), "preferences.path is empty"),
    (("--config.preferences.path=nowhere.jsonl",), "nowhere.jsonl: No such file"),
    (("--config.dpo.kind=kto",), "kind"),
    (("--config.dpo.beta=0",), "beta is 0.0"),
  ],
)
def test_mistakes(tmp_path, capsys, flags, message):
  assert main(["dpo", f"--workdir={tmp_path}", *flags]) == 2
  assert message in capsys.readouterr().err

"""`rlft best-of-n`, run as a user runs it."""

from __future__ import annotations

import json

import pytest

import rlft
from rlft.cli.main import main

SMALL = (
  "--config.prompts=16",
  "--config.best.n=8",
  "--config.best.max_new_tokens=48",
  "--config.best.max_rows=128",
)


def test_inference(tmp_path, capsys):
  assert main(["best-of-n", f"--workdir={tmp_path}", *SMALL]) == 0
  out = capsys.readouterr().out
  assert "128 sampled solutions" in out and "KL at most" in out
  lines = [json.loads(x) for x in (tmp_path / "samples.jsonl").read_text().splitlines()]
  assert len(lines) == 16
  for line in lines:
    rewards = [sample["reward"] for sample in line["samples"]]
    assert len(rewards) == 8 and line["kept"] == rewards.index(max(rewards))
    assert line["text"] == line["samples"][line["kept"]]["text"]
  curves = json.loads((tmp_path / "best_of_n.json").read_text())
  assert list(curves["reward"]) == ["1", "2", "4", "8"]
  assert curves["correct"]["8"][0] >= curves["correct"]["1"][0] > 0
  assert (tmp_path / "best_of_n.png").read_bytes().startswith(b"\x89PNG")
  assert not (tmp_path / "model").exists()


def test_distillation(tmp_path, capsys):
  code = main(
    [
      "best-of-n",
      f"--workdir={tmp_path}",
      "--config.split=train",
      "--config.best.threshold=1",
      "--config.distill.batch_size=8",
      "--config.eval_prompts=0",
      *SMALL,
    ]
  )
  assert code == 0
  assert "kept completions" in capsys.readouterr().out
  policy, start = rlft.load(tmp_path / "model"), rlft.load("mini")
  assert abs(policy.params["embedding"] - start.params["embedding"]).max() > 0


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (("--config.distill.epochs=1",), "split='test' would be trained on and evaluated"),
    (("--config.prompts=0",), "prompts=0"),
    (("--config.best.n=0",), "n=0"),
    (("--config.reward.kind=orm",), "needs reward.model"),
  ],
)
def test_mistakes(tmp_path, capsys, flags, message):
  assert main(["best-of-n", f"--workdir={tmp_path}", *flags]) == 2
  assert message in capsys.readouterr().err

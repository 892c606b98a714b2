"""Settings of checkpoints that cannot be."""

from __future__ import annotations

import pytest

from rlft.cli.main import main


@pytest.mark.parametrize("setting", ["every=0", "keep_last=0", "keep_every=-1"])
def test_a_setting_that_cannot_be_is_refused_at_once(setting, tmp_path, capsys):
  workdir = tmp_path / "run"
  line = ["grpo", f"--workdir={workdir}", f"--config.checkpoint.{setting}"]
  assert main(line) == 2
  assert setting in capsys.readouterr().err
  assert not workdir.exists()

"""What `rlft inspect` says of a run, sound and damaged."""

from __future__ import annotations

import numpy as np
import pytest

from rlft.cli.main import main
from rlft.training.checkpoint import DIRECTORY, Checkpointer
from rlft.training.metrics import MetricWriter


@pytest.fixture
def workdir(tmp_path):
  with MetricWriter(tmp_path, tensorboard=False) as writer:
    for step in (1, 2, 3):
      found = {"reward/mean": step / 4, "learning_rate": 1e-5 * step}
      times = {"time/rollout": 6.0, "time/update": 3.0, "time/checkpoint": 1.0}
      writer.write(step, found | times, step)
  with Checkpointer(tmp_path) as checkpoints:
    for step in (2, 3):
      checkpoints.save(step, {"w": np.arange(4096.0) * step})
  line = '{"program": "jit(step)", "seconds": %s, "last": ["int32[8,%s]"]}\n'
  loaded = '{"program": "jit(init)", "seconds": 0, "cache": "hit", "last": []}\n'
  lines = [line % (2.5, 16), line % (4.0, 32), loaded, '{"torn']
  (tmp_path / "compiles.jsonl").write_text("".join(lines))
  (tmp_path / "after").mkdir()
  (tmp_path / "after" / "transcripts_test.txt").write_text("How many?\n#### 4\n")
  return tmp_path


def test_a_sound_run(workdir, capsys):
  before = sorted((p, p.stat().st_mtime_ns) for p in workdir.rglob("*"))
  assert main(["inspect", str(workdir), "--verify"]) == 0
  said = capsys.readouterr().out
  assert said.count("whole") == 2
  assert "3 lines" in said and "0.750" in said and "3.0e-05" in said
  assert "goodput 90.0% of 30 s: rollout 60.0%, update 30.0%" in said
  assert "3 times, 6.5 s in all; 1 of them loaded from the cache" in said
  assert "jit(init)" in said and "jit(step)" in said and "int32[8,32]" in said
  assert "#### 4" in said and "last writer: pid" in said
  assert sorted((p, p.stat().st_mtime_ns) for p in workdir.rglob("*")) == before


def test_a_flipped_bit_is_named(workdir, capsys):
  files = (workdir / DIRECTORY / "00000003" / "arrays").rglob("*")
  largest = max((f for f in files if f.is_file()), key=lambda f: f.stat().st_size)
  data = bytearray(largest.read_bytes())
  data[len(data) // 2] ^= 1
  largest.write_bytes(data)
  assert main(["inspect", str(workdir)]) == 0  # says that it has not looked
  assert "not read" in capsys.readouterr().out
  assert main(["inspect", str(workdir), "--verify"]) == 1
  said = capsys.readouterr().out
  assert said.count("DAMAGED") == 1 and said.count("whole") == 1
  shown = said[said.index("checkpoints") : said.index("last writer")].splitlines()
  assert max(map(len, shown)) <= 80
  assert shown[shown.index("damaged: step 3:") + 1].startswith("  w: ")
  assert (workdir / DIRECTORY / "00000003").is_dir()  # only looked at


@pytest.mark.parametrize("made", [True, False])
def test_what_is_no_run(made, tmp_path, capsys):
  path = tmp_path if made else tmp_path / "none"
  assert main(["inspect", str(path)]) == 2
  assert str(path) in capsys.readouterr().err

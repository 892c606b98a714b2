"""`rlft bench` at a tiny shape, end to end."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import jax
import pytest

from rlft.cli import bench, bench_rl
from rlft.cli.main import main
from rlft.models.decoder import Decoder, DecoderConfig, init_params
from rlft.models.hub import Policy

TINY = DecoderConfig(
  vocab_size=40,
  width=16,
  layers=2,
  heads=2,
  kv_heads=1,
  head_dim=8,
  mlp_width=32,
  max_positions=64,
  tie_embeddings=False,
)


CEILINGS = bench._ceilings


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
  monkeypatch.setattr(bench, "MODEL_S", TINY)
  monkeypatch.setattr(bench, "_ceilings", lambda dtype: (1e9, 1e9))


def _run(capsys, tmp_path: Path, *words: str) -> tuple[dict, str]:
  path = tmp_path / "out" / "bench.json"
  assert main(["bench", *words, "--repeats=2", f"--json={path}"]) == 0
  return json.loads(path.read_text()), capsys.readouterr().out


def test_sample(capsys, tmp_path):
  result, out = _run(
    capsys, tmp_path, "sample", "--rows=4", "--samples=2", "--prompt=5", "--new=6"
  )
  assert (result["rows"], result["samples"], result["tokens"]) == (4, 2, 24)
  rate = result["tokens_per_second"]
  assert 0 < rate["min"] <= rate["median"] <= rate["max"]
  assert len(result["seconds"]) == 2
  # The first call compiles; a warm one that did would be as slow as it.
  assert result["compile_seconds"] > max(result["seconds"])
  assert result["peak_memory_bytes"] > 2**20
  # By hand: a layer has q, o 16 x 16, k, v 16 x 8, three 16 x 32 and two norms; then
  # the last norm and the head. 2 prompts of 5 tokens and 4 rows of 6 go through them.
  layer = 2 * 256 + 2 * 128 + 3 * 512 + 2 * 16
  weights = 2 * layer + 16 + 16 * 40
  assert result["parameters"] == weights + 40 * 16
  attended = 2 * 5 * 5 / 2 + 24 * (5 + 3)
  flops = 2 * weights * (2 * 5 + 24) + 4 * 2 * 16 * attended
  seconds = sorted(result["seconds"])
  median = sum(seconds) / 2
  assert result["gflops_per_second"] == pytest.approx(flops / median / 1e9)
  traffic = 6 * 4 * (weights + 2 * 2 * 8 * (2 * 5 + 4 * 3))
  assert result["gigabytes_per_second"] == pytest.approx(traffic / median / 1e9)
  assert "tokens/s" in out and "bound" in out


def test_presets_are_the_quoted_shapes():
  parser = argparse.ArgumentParser()
  bench.add_arguments(parser)
  sizes = bench._sizes(parser.parse_args(["sample"]))
  assert sizes == {"rows": 32, "samples": 1, "prompt": 64, "new": 128}
  sizes = bench._sizes(parser.parse_args(["sample", "--shape=shared", "--new=7"]))
  assert sizes == {"rows": 64, "samples": 8, "prompt": 512, "new": 7}


def test_train(capsys, tmp_path):
  result, out = _run(
    capsys, tmp_path, "train", "--rows=4", "--length=8", "--micro_batches=2"
  )
  assert result["tokens"] == 32
  assert result["compile_seconds"] > max(result["seconds"])
  median = sum(result["seconds"]) / 2
  weights = bench._matrix_weights(Decoder(TINY))
  flops = 3 * 32 * (2 * weights + 4 * 2 * 16 * 4)
  assert result["gflops_per_second"] == pytest.approx(flops / median / 1e9)
  assert "compilation" in out


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_an_iteration_trains_though_no_row_ends(kind):
  model = Decoder(TINY)
  policy = Policy(model, init_params(model, jax.random.key(0)), None, TINY)
  sizes = {"rows": 4, "samples": 2, "prompt": 4, "new": 4, "micro_batches": 1}
  args = argparse.Namespace(repeats=1, dtype="float32", remat="none")
  found = bench_rl.iterations(policy, kind, sizes, args)
  assert len(found) == 2
  for one in found:
    assert one["update/skipped"] == 0 and any("grad_norm" in name for name in one)


@pytest.mark.parametrize(
  "words, said",
  [
    (["sample", "--rows=0"], "--rows=0"),
    (["sample", "--rows=3", "--samples=2"], "multiple of --samples"),
    (["train", "--rows=3", "--micro_batches=2"], "multiple of --micro_batches"),
    (["train", "--repeats=0"], "--repeats=0"),
  ],
)
def test_bad_sizes_are_named(capsys, words, said):
  assert main(["bench", *words]) == 2
  assert said in capsys.readouterr().err


def test_ceilings_are_speeds_of_a_computer():
  flops, traffic = CEILINGS("float32")
  assert 1e8 < flops < 1e16 and 1e8 < traffic < 1e14

"""The commands, run as a user runs them, on the embedded model."""

import json
import re
import shlex

import jax
import pytest

import rlft
from rlft.cli.main import main
from rlft.cli.quickstart import sign_test
from rlft.core.errors import ConfigError
from rlft.models import hub
from rlft.training import metrics

SMALL_EVAL = (
  "--config.eval.samples=2",
  "--config.eval.ks=1,2",
  "--config.eval.max_new_tokens=24",
  "--config.eval.max_rows=16",
)
SMALL_EI = (
  "--config.ei.samples_per_prompt=2",
  "--config.ei.max_new_tokens=24",
  "--config.ei.max_rows=16",
  "--config.ei.train.batch_size=8",
)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("quickstart")
  code = main(
    [
      "quickstart",
      f"--workdir={workdir}",
      "--seeds=2",
      "--config.prompts=8",
      "--config.eval_prompts=4",
      "--config.ei.rounds=1",
      "--config.ei.train.update_tokens=300",
      *SMALL_EVAL,
      *SMALL_EI,
    ]
  )
  assert code == 0
  return workdir


def test_quickstart_leaves_what_it_promises(quickstart):
  for seed in (0, 1):
    where = quickstart / f"seed_{seed}"
    for name in ("quickstart.png", "transcripts_test.txt", "model/config.json"):
      assert (where / name).stat().st_size > 100, name
    assert (where / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    assert any((where / "tensorboard").iterdir())
    recorded = {name for line in metrics.read(where) for name in line}
    assert {"EI/loss", "SFT/loss", "EI/test/greedy@1", "EI/round/accepted"} <= recorded


def test_quickstart_compares_at_an_equal_budget(quickstart):
  results = json.loads((quickstart / "results.json").read_text())
  assert len(results["seeds"]) == 2 and results["sign_tests"]
  for seed in results["seeds"]:
    assert seed["sampled_solutions"] == 8 * 2  # prompts x samples x 1 round
    tokens = seed["update_tokens"]
    # A budget ends with the batch that reaches it: 8 rows of at most 48 tokens.
    assert tokens["EI"] <= tokens["SFT"] < tokens["EI"] + 8 * 48
  prompts = [seed["rounds"][0]["sample_seconds"] for seed in results["seeds"]]
  assert prompts[0] != prompts[1]


def test_quickstart_model_is_one_that_loads_and_differs(quickstart):
  policy = rlft.load(quickstart / "seed_0" / "model")
  start = rlft.load("mini")
  assert policy.config == start.config
  moved = abs(policy.params["embedding"] - start.params["embedding"]).max()
  assert 0 < moved < 1


def test_the_embedded_model_is_small_and_knows_its_task(tmp_path, capsys):
  policy = rlft.load("mini")
  size = sum(x.size for x in jax.tree.leaves(policy.params))
  assert size < 1_000_000
  assert sum(f.stat().st_size for f in hub.MINI.rglob("*")) < 4_000_000
  code = main(
    [
      "eval",
      f"--workdir={tmp_path}",
      "--config.prompts=60",
      "--config.eval.samples=1",
      "--config.eval.ks=(1,)",
      "--config.eval.max_new_tokens=48",
    ]
  )
  assert code == 0
  report = json.loads((tmp_path / "evaluation.json").read_text())["test"]["metrics"]
  # Room above and below: the start of the quickstart is neither hopeless nor done.
  assert 0.2 <= report["greedy@1"]["mean"] <= 0.7
  assert "greedy@1" in capsys.readouterr().out
  assert "[right]" in (tmp_path / "transcripts_test.txt").read_text()


def test_sample_shows_completions(capsys):
  question = "Tom has 3 red pens and 4 blue pens. How many pens does Tom have now?"
  assert main(["sample", question, "--samples=2", "--max_new_tokens=24"]) == 0
  out = capsys.readouterr().out
  assert out.count("nats/token") == 2 and "=" in out


def test_a_stop_from_a_shell_is_a_new_line(monkeypatch):
  seen = {}

  def generate(*args, **settings):
    seen.update(settings)
    raise ConfigError("seen")

  monkeypatch.setattr(rlft, "generate", generate)
  assert main(["sample", "x", r"--stop=\n\n", r"--stop=a\tb"]) == 2
  assert seen["stop"] == ["\n\n", "a\tb"]


def test_sft_from_random_weights(tmp_path, capsys):
  code = main(
    [
      "sft",
      f"--workdir={tmp_path}",
      "--config.model.decoder.vocab_size=0",
      "--config.model.decoder.width=16",
      "--config.model.decoder.layers=1",
      "--config.model.decoder.heads=2",
      "--config.model.decoder.kv_heads=2",
      "--config.model.decoder.head_dim=8",
      "--config.model.decoder.mlp_width=16",
      "--config.model.decoder.max_positions=128",
      "--config.task.train=16",
      "--config.sft.batch_size=8",
      "--config.eval_prompts=2",
      *SMALL_EVAL,
    ]
  )
  assert code == 0
  assert rlft.load(tmp_path / "model").config.width == 16
  # The command that is printed at the end runs.
  [hint] = re.findall(r"\(rlft (sample .*) PROMPT\)", capsys.readouterr().out)
  assert (
    main([*shlex.split(hint), "Tom has 3", "--samples=1", "--max_new_tokens=2"]) == 0
  )
  resolved = json.loads((tmp_path / "resolved_config.json").read_text())
  assert resolved["sft"]["batch_size"] == 8


def test_expert_iteration_writes_its_solutions(tmp_path):
  code = main(
    [
      "expert-iteration",
      f"--workdir={tmp_path}",
      "--config.task.train=8",
      "--config.dev_prompts=4",
      "--config.eval_prompts=2",
      "--config.ei.rounds=1",
      *SMALL_EVAL,
      *SMALL_EI,
    ]
  )
  assert code == 0
  lines = (tmp_path / "solutions.jsonl").read_text().splitlines()
  assert lines and {"prompt_id", "text", "chain", "lucky", "round"} <= set(
    json.loads(lines[0])
  )
  assert (tmp_path / "before" / "evaluation.json").exists()
  assert (tmp_path / "after" / "evaluation.json").exists()


@pytest.mark.slow
def test_return_conditioned_asks_for_good_and_for_bad(tmp_path):
  code = main(
    [
      "return-conditioned",
      "--config=configs/arithmetic_rcrl.py",
      f"--workdir={tmp_path}",
      "--config.task.train=8",
      "--config.eval_prompts=2",
      "--config.rcrl.samples_per_prompt=4",
      "--config.rcrl.value=rollouts",
      "--config.rcrl.continuations=2",
      "--config.rcrl.threshold=0.1",
      "--config.rcrl.max_rows=16",
      "--config.rcrl.train.batch_size=8",
      *SMALL_EVAL,
    ]
  )
  assert code == 0
  assert "[GOOD]" in rlft.load(tmp_path / "model").tokenizer.get_vocab()
  lines = (tmp_path / "solutions.jsonl").read_text().splitlines()
  assert {"values", "labels", "ends", "text"} <= set(json.loads(lines[0]))
  for title in ("before", "under_GOOD", "under_BAD"):
    assert (tmp_path / title / "evaluation.json").exists()


@pytest.mark.parametrize(
  ("words", "named"),
  [
    (["eval", "--config.modle.path=x"], "model"),
    (["eval", "--config.task.name=gsm8k"], "task.path"),
    (["eval", "--config.eval.ks=1,32"], "samples=16"),
    (["sft", "--config.sft.batch_size=many"], "batch_size"),
    (["quickstart", "--seeds=0"], "seeds"),
    (["sample"], "no prompt"),
    (["return-conditioned", "--config.rcrl.value=orm"], "outcome model"),
    (["sample", "--model=/no/such/place", "x"], "/no/such/place"),
  ],
)
def test_mistakes_are_one_line(words, named, tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert main(words) == 2
  error = capsys.readouterr().err
  assert named in error and len(error.splitlines()) == 1


def test_sign_test_is_exact():
  assert sign_test(5, 0) == pytest.approx(1 / 32)
  assert sign_test(4, 1) == pytest.approx(6 / 32)
  assert sign_test(0, 0) == 1

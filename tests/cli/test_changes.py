"""Which settings may change in a run that goes on: by the table, and by commands."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest

from rlft.cli import changes
from rlft.cli import config as configs
from rlft.cli.expert_iteration import EIRun
from rlft.cli.grpo import GRPORun
from rlft.cli.main import main
from rlft.cli.ppo import PPORun
from rlft.cli.return_conditioned import RCRLRun
from rlft.cli.rl import RewardChoice
from rlft.core.errors import CheckpointError, ConfigError
from rlft.models.hub import MINI
from rlft.rewards.contract import RewardConfig


def settings(run, **changed):
  found = configs.dump(run()) | {"weights": {"model": "abc"}}
  for path, value in changed.items():
    *groups, name = path.split("__")
    at = found
    for group in groups:
      at = at[group]
    at[name] = value
  return found


@pytest.mark.parametrize(
  "run, path, value",
  [
    (PPORun, "ppo__iterations", 7),
    (PPORun, "ppo__optimizer__learning_rate", 1.0),
    (PPORun, "ppo__value_optimizer__schedule", "constant"),
    (PPORun, "ppo__kl_coef", 1.0),
    (PPORun, "ppo__old_logp", "sampler"),
    (PPORun, "ppo__micro_batches", 2),
    (PPORun, "eval_prompts", 2),
    (PPORun, "eval__samples", 2),
    (PPORun, "checkpoint__every", 2),
    (PPORun, "model__path", "elsewhere"),
    (EIRun, "ei__rounds", 9),
    (EIRun, "ei__train__optimizer__learning_rate", 1.0),
    (RCRLRun, "rcrl__train__epochs", 9),
    (RCRLRun, "rcrl__train__batch_size", 8),
  ],
)
def test_what_may_change(run, path, value):
  found = changes.check("w", settings(run), settings(run, **{path: value}), ())
  assert list(found) == [path.replace("__", ".")]


@pytest.mark.parametrize(
  "run, path, value",
  [
    (PPORun, "ppo__seed", 7),
    (PPORun, "ppo__temperature", 0.5),
    (PPORun, "ppo__loss__clip_range", 0.5),
    (PPORun, "ppo__optimizer__b1", 0.5),
    (PPORun, "task__train", 7),
    (PPORun, "reward__accept", "final"),
    (PPORun, "weights__model", "def"),
    (PPORun, "weights__value", "def"),  # there was none
    (PPORun, "dev_prompts", 5),
    (GRPORun, "grpo__loss__kl_coef", 5),
    (EIRun, "ei__accept", "final"),
    (EIRun, "ei__train__epochs", 9),  # of rounds that are done as well
    (RCRLRun, "rcrl__temperature", 0.3),
    (RCRLRun, "rcrl__labels", "step"),
    (RCRLRun, "rcrl__threshold", 0.9),
  ],
)
def test_what_is_refused(run, path, value):
  name = path.replace("__", ".")
  before, now = settings(run), settings(run, **{path: value})
  with pytest.raises(CheckpointError, match=rf"{name}: .* there, .* here"):
    changes.check("w", before, now, ())
  for allowed in (name, name.split(".")[0]):
    assert list(changes.check("w", before, now, [allowed])) == [name]
  with pytest.raises(ConfigError, match="no such setting"):
    changes.check("w", before, now, [name[:-1]])


def test_evaluation_does_not_change_under_a_dev_score():
  before = settings(PPORun, dev_prompts=5)
  now = settings(PPORun, dev_prompts=5, eval__max_new_tokens=3)
  with pytest.raises(CheckpointError, match=r"eval\.max_new_tokens"):
    changes.check("w", before, now, ())


def test_a_setting_that_a_later_release_has_is_no_change():
  before, now = settings(PPORun), settings(PPORun)
  del before["ppo"]["gamma"]
  assert list(changes.check("w", before, now, ())) == ["ppo.gamma"]


GRPO = {
  "task.train": 4, "grpo.iterations": 1, "grpo.prompts_per_iteration": 2,
  "grpo.samples_per_prompt": 4, "grpo.max_new_tokens": 4, "eval_prompts": 0,
}  # fmt: skip


@pytest.mark.slow
def test_a_command_goes_on_by_its_weights_not_by_their_path(tmp_path, capsys):
  def go(*more):
    words = [f"--config.{name}={value}" for name, value in GRPO.items()]
    code = main(["grpo", f"--workdir={tmp_path / 'run'}", *words, *more])
    return code, capsys.readouterr()

  record = tmp_path / "run" / "resolved_config.json"
  assert go()[0] == 0
  first = record.read_bytes()
  code, said = go("--config.grpo.temperature=0.5")
  assert code == 2 and "grpo.temperature: 1.0 there, 0.5 here" in said.err
  assert record.read_bytes() == first
  same, other = tmp_path / "same", tmp_path / "other"
  shutil.copytree(MINI, same)
  code, said = go(f"--config.model.path={same}")
  assert code == 0 and "changed setting model.path" in said.out
  from safetensors.numpy import load_file, save_file

  shutil.copytree(MINI, other)
  weights = load_file(other / "model.safetensors")
  weights[sorted(weights)[0]] = weights[sorted(weights)[0]] * 1.01
  save_file(weights, other / "model.safetensors", {"format": "pt"})
  code, said = go(f"--config.model.path={other}")
  assert code == 2 and "weights.model" in said.err
  code, said = go("--config.grpo.iterations=2", "--allow_changed=grpo.temperature")
  assert code == 0 and "changed setting grpo.iterations: 1 -> 2" in said.out
  assert json.loads(record.read_text())["grpo"]["iterations"] == 2


@pytest.mark.parametrize(
  "run, name, taught",
  [(PPORun, "ppo.truncated", "score"), (GRPORun, "grpo.mask_truncated", "False")],
)
def test_a_rule_for_what_was_cut_needs_rows_that_train(run, name, taught):
  rule = RewardConfig(missing_eos="penalty", missing_eos_value=1.0)
  reward = RewardChoice(config=rule)
  with pytest.raises(ConfigError, match=f"set {name}={taught}"):
    run(reward=reward)
  method = name.split(".")[0]
  made = getattr(run(), method)
  value = {"score": "score", "False": False}[taught]
  made = dataclasses.replace(made, **{name.split(".")[1]: value})
  run(reward=reward, **{method: made})


@pytest.mark.parametrize(
  ("path", "decides"),
  [
    ("task", True),
    ("task.path", True),
    ("grpo", True),
    ("ppo.seed", True),
    ("grpo.prompts_per_iteration", True),
    ("grpo.temperature", False),
    ("reward", False),
  ],
)
def test_what_is_allowed_and_decides_prompts(path, decides):
  assert changes.decides_prompts(path) == decides

"""What commands share: the mesh that a run gets when its settings leave it open."""

from __future__ import annotations

import dataclasses
import operator
from pathlib import Path
from unittest import mock

import jax
import pytest

from rlft.cli import fields, main, runs
from rlft.cli.runs import MeshConfig
from rlft.core.errors import ConfigError
from rlft.models import hub
from rlft.models.decoder import DecoderConfig
from rlft.probes.evaluate import EvalConfig
from rlft.tasks import arithmetic
from rlft.training import metrics
from rlft.training.checkpoint import Checkpointer

GIB = 2**30
LARGE = DecoderConfig(
  vocab_size=9, width=8, layers=1, heads=1, kv_heads=1, head_dim=8, mlp_width=8,
  max_positions=4096,
)  # fmt: skip
WEIGHTS = 7_000_000_000  # of a 7B model


def chips(count, slices=1):
  return [mock.Mock(slice_index=i * slices // count) for i in range(count)]


@pytest.mark.parametrize(
  ("sizes", "trained", "devices", "memory", "fsdp"),
  [
    (MeshConfig(), 2, chips(256), None, 1),  # a CPU does not say what it has
    (MeshConfig(fsdp=4), 2, chips(256), 16 * GIB, 4),  # what is said counts
    (MeshConfig(), 1, chips(8), 192 * GIB, 2),  # 24 x 7e9 bytes into .6 of 192 GiB
    (MeshConfig(tensor=4), 2, chips(256), 16 * GIB, 16),
    # Policy and value with their state, a reference and the best one: 40 bytes a
    # weight; of .6 x 16 GiB the rollout's copy takes 1.75e9 bytes.
    (MeshConfig(tensor=8), 2, chips(256), 16 * GIB, 8),
    (MeshConfig(tensor=8), 2, chips(32), 16 * GIB, 4),  # all, and too few
    (MeshConfig(tensor=8), 2, chips(256, slices=8), 16 * GIB, 4),  # not across slices
  ],
)
def test_fsdp_is_as_small_as_memory_allows(sizes, trained, devices, memory, fsdp):
  found = runs.shards_needed(sizes, WEIGHTS, trained, devices, memory)
  assert found == fsdp


def test_an_architecture_and_its_weights_are_known_without_them():
  config = hub.architecture(hub.MINI)
  policy = hub.load(hub.MINI)
  assert config == policy.config
  assert runs.weight_count(config) == sum(
    x.size for x in jax.tree.leaves(policy.params)
  )


def test_defaults_leave_the_embedded_model_room_for_its_problems(commands):
  """`rlft eval` and its like run as they are shown, without any setting."""
  policy = hub.load("mini")
  splits = ("train", "test", "dev", "ood_steps", "ood_numbers", "ood_templates")
  texts = [one.prompt for split in splits for one in arithmetic.generate(split, 50)]
  longest = max(len(policy.tokenizer(text)["input_ids"]) for text in texts)
  for name, cls in commands.items():
    if name in ("quickstart", "compare", "dpo"):  # which set their own, or sample none
      continue
    config = runs.fitted(cls())
    found = [f for f in fields.walk(cls) if f.path.endswith("max_new_tokens")]
    assert found, name
    for one in found:
      tokens = operator.attrgetter(one.path)(config)
      assert longest + tokens <= policy.config.max_positions, (name, one.path)


def test_what_was_set_is_not_shortened(commands):
  cls = commands["eval"]
  config = dataclasses.replace(cls(), eval=EvalConfig(max_new_tokens=200))
  assert runs.fitted(config) == config
  large = dataclasses.replace(cls(), model=runs.ModelConfig(decoder=LARGE))
  assert runs.fitted(large) == large


def test_a_run_that_finds_other_devices_than_expected_ends():
  with pytest.raises(ConfigError, match=r"64 devices are expected.*there are 8"):
    runs.make_policy(runs.ModelConfig(), MeshConfig(devices=64))


def test_random_weights_have_the_dtype_that_was_set():
  small = dataclasses.replace(LARGE, vocab_size=0)
  model = runs.ModelConfig(decoder=small, dtype="bfloat16")
  params = runs.make_policy(model, MeshConfig(data=8, fsdp=1, tensor=1)).params
  assert {str(x.dtype) for x in jax.tree.leaves(params)} == {"bfloat16"}


def test_what_is_written_may_be_in_the_home_directory(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.chdir(tmp_path)
  assert runs.write_json(Path("~/x.json"), {}) == tmp_path / "x.json"
  with metrics.MetricWriter("~/run", tensorboard=False) as writer:
    writer.write(1, {"loss": 2.0})
  Checkpointer("~/run")
  assert metrics.read("~/run")[0]["loss"] == 2
  assert main.main(["inspect", "~/run"]) == 0
  assert {path.name for path in tmp_path.iterdir()} == {"x.json", "run"}

"""Settings without an effect are errors; those of the shipped configs have one."""

from __future__ import annotations

from pathlib import Path

import ml_collections
import pytest

from rlft.cli import config, fields, unused
from rlft.core.errors import ConfigError

# Command and arguments of each shipped config.
CONFIGS = {
  "arithmetic_grpo": ("grpo", "", ":dapo", ":dr_grpo", ":rloo", ":reinforce"),
  "arithmetic_mini": ("sft", ""),
  "arithmetic_ppo": ("ppo", "", ":dense"),
  "arithmetic_rcrl": ("return-conditioned", ""),
  "gsm8k_ei_smollm2": ("expert-iteration", ":full", ":cpu"),
  "plan_70b_grpo": ("grpo", ""),
  "plan_7b_ppo": ("ppo", ":v5e", ":v5p"),
  "reward_model_hh": ("reward-model", ":full", ":cpu"),
  "study_arithmetic": ("compare", ":short", ":full", ":smoke"),
}


@pytest.mark.parametrize(
  ("command", "words", "error"),
  [
    ("ppo", "task.path=x.jsonl", "task.path=x.jsonl has no effect with task.name=arit"),
    ("grpo", "task.on_bad=skip", "set --config.task.name=gsm8k, or leave it out"),
    ("eval", "task.check=strict", "task.check=strict has no effect"),
    ("eval", "task.annotations=strip", "task.annotations=strip has no effect"),
    ("sft", "task.name=gsm8k task.knobs.steps=2,3", "task.knobs.steps=2,3 has no effe"),
    ("sft", "task.name=gsm8k task.seed=1", "task.seed=1 has no effect"),
    ("sft", "model.seed=1", "model.seed=1 has no effect with model.decoder=none: set "),
    (
      "sft",
      "DECODER model.path=x",
      "effect with model.decoder=.set.: set --config.mod",
    ),
    ("ppo", "reward.model=x", "set --config.reward.kind=orm or reward.kind=orm_dense"),
    (
      "ppo",
      "reward.kind=orm reward.model=x reward.accept=final",
      "reward.accept=final",
    ),
    (
      "ppo",
      "ppo.value=shared ppo.value_optimizer.eps=1e-8",
      "value_optimizer.eps=1e-08",
    ),
    ("ppo", "ppo.loss.value_coef=1", "with ppo.value=separate"),
    ("ppo", "ppo.kl_horizon=5", "with ppo.kl_target=0.0: set ppo.kl_target, or leave"),
    ("ppo", "ppo.eval_every=5", "with dev_prompts=0"),
    (
      "ppo",
      "ppo.optimizer.schedule=constant ppo.optimizer.end_factor=.1",
      "end_factor",
    ),
    ("grpo", "grpo.loss.constant_length=9", "with grpo.loss.aggregate=sequence"),
    (
      "grpo",
      "grpo.loss.clip=false grpo.loss.clip_high=.3",
      "clip_high=0.3 has no effect",
    ),
    ("expert-iteration", "ei.start=sft base.path=x", "base.path=x has no effect"),
    ("sft", "sft.update_tokens=9 sft.epochs=2", "sft.epochs=2 has no effect"),
    ("return-conditioned", "rcrl.continuations=9", "with rcrl.value=outcome"),
    ("reward-model", "kind=outcome preferences.path=x", "preferences.path=x has no ef"),
    ("reward-model", "outcomes.samples=3", "with kind=pairs"),
    ("compare", "ppo.iterations=5", "ppo.iterations=5 has no effect with budget=8000"),
    ("eval", "task.train=5", "it follows from prompts; leave it out"),
  ],
)
def test_a_setting_without_effect_is_an_error(commands, command, words, error):
  sizes = "vocab_size=0 width=8 layers=1 heads=1 kv_heads=1 head_dim=8 mlp_width=8"
  sizes = " ".join(f"model.decoder.{x}" for x in f"{sizes} max_positions=9".split())
  pairs = [one.split("=", 1) for one in words.replace("DECODER", sizes).split()]
  start = ml_collections.ConfigDict()
  if command == "compare":
    start = config.load("configs/study_arithmetic.py")
    error = error.replace("8000", str(start.budget))
  with pytest.raises(ConfigError, match=error):
    config.resolve(start, pairs, commands[command])


def test_what_has_an_effect_or_its_default_is_taken(commands):
  for command, words in [
    ("sft", "task.name=gsm8k task.path=x task.check=strict task.on_bad=skip"),
    ("sft", "task.knobs.steps=2,3 task.seed=1 task.path="),
    ("ppo", "ppo.kl_target=1 ppo.kl_horizon=5 dev_prompts=4 ppo.eval_every=5"),
    ("grpo", "reward.kind=reward_model reward.model=x"),
    ("reward-model", "kind=outcome task.train=5 outcomes.samples=3"),
    ("expert-iteration", "base.path=x checkpoint.every=1"),
  ]:
    pairs = [one.split("=", 1) for one in words.split()]
    config.resolve(ml_collections.ConfigDict(), pairs, commands[command])


def test_every_shipped_config_is_taken(commands):
  assert {path.stem for path in Path("configs").glob("*.py")} == CONFIGS.keys()
  for name, (command, *args) in CONFIGS.items():
    for arg in args:
      loaded = config.load(f"configs/{name}.py{arg}")
      config.resolve(loaded, [], commands[command])
    with pytest.raises(ConfigError):  # an argument that is none is not the default
      config.resolve(config.load(f"configs/{name}.py:x"), [], commands[command])


def test_every_rule_is_of_fields_that_are_there(commands):
  trees = [(cls, list(fields.walk(cls))) for cls in commands.values()]
  for kind, names, decider, _ in unused.RULES:
    prefixes = [
      (every, path)
      for cls, every in trees
      for path in [""] * (cls.__name__ == kind)
      + [
        f"{one.path}."
        for one in every
        if one.group and fields.group_class(one.kind).__name__ == kind
      ]
    ]
    assert prefixes, kind
    for every, prefix in prefixes:
      paths = {one.path for one in every}
      for name in [*names.split(), decider]:
        assert prefix + name in paths, (kind, name)

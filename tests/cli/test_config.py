"""Config files, overrides and the dataclasses they become."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any, Literal

import ml_collections
import pytest

from rlft.cli import config as config_lib
from rlft.cli import overrides as overrides_lib
from rlft.core.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Adam:
  learning_rate: float = 1e-3
  betas: tuple[float, float] = (0.9, 0.999)
  nesterov: bool = False


@dataclasses.dataclass(frozen=True)
class Settings:
  steps: int
  name: str = "run"
  clip: float | None = 1.0
  start: Literal["base", "sft"] = "base"
  ks: tuple[int, ...] = (1, 16)
  splits: tuple[str, ...] = ()
  pairs: tuple[tuple[int, int], ...] = ()
  parts: tuple[int, ...] | None = None
  seed: int | None = None
  limit: float = math.inf
  # Not Adam's own defaults: a group given in part must keep these.
  optimizer: Adam = Adam(learning_rate=1e-5)
  warmup: Adam | None = None


def build(overrides: dict[str, str] | None = None, **values: Any) -> Settings:
  config = ml_collections.ConfigDict({"steps": 1, **values})
  config_lib.apply_overrides(config, list((overrides or {}).items()), Settings)
  return config_lib.to_dataclass(Settings, config)


def write(tmp_path: Path, text: str) -> str:
  path = tmp_path / "setup.py"
  path.write_text(text)
  return str(path)


GOOD = """
import ml_collections
def get_config(arg="small"):
  config = ml_collections.ConfigDict(dict(steps=3, name=arg))
  config.optimizer = dict(nesterov=True)
  return config
"""


def test_a_file_and_its_argument(tmp_path):
  path = write(tmp_path, GOOD)
  assert config_lib.load(path).name == "small"
  assert config_lib.load(f"{path}:large").name == "large"
  settings = config_lib.to_dataclass(Settings, config_lib.load(path))
  assert settings.optimizer == Adam(learning_rate=1e-5, nesterov=True)


@pytest.mark.parametrize(
  ("text", "arg", "message"),
  [
    (
      GOOD.replace('arg="small"', "").replace("=arg", "='a'"),
      ":x",
      "takes no argument",
    ),
    (GOOD.replace('="small"', ""), "", "needs an argument"),
    ("x = 1", "", "defines no function get_config"),
    ("def get_config():\n  return 3", "", "returned int, not a ConfigDict"),
    ("def get_config():\n  return 1 / 0", "", r"setup.py:2 raised ZeroDivisionError"),
    ("x = (\n", "", r"setup.py:1 raised SyntaxError"),
    ("\nimport json; json.loads('{')", "", r"setup.py:2 raised JSONDecodeError"),
    ("import sys\nsys.exit()", "", r"setup.py:2 raised SystemExit$"),
    (
      "def get_config():\n  raise SystemExit(0)",
      "",
      r"setup.py:2 raised SystemExit: 0$",
    ),
    ("raise KeyboardInterrupt", "", r"setup.py:1 raised KeyboardInterrupt$"),
    (
      "class E(BaseException): pass\nraise E('x' * 10**6)",
      "",
      r"setup.py:2 raised E: x+",
    ),
    (
      "class E(Exception):\n  def __str__(self): raise E\nraise E",
      "",
      "py:3 raised E: ",
    ),
    (
      "def get_config():\n  return get_config()",
      "",
      "setup.py:2 raised RecursionError",
    ),
    (
      "import ml_collections as m\ndef get_config():\n"
      "  return m.ConfigDict({'a': m.config_dict.required_placeholder(int)})",
      "",
      "setup.py raised RequiredValueError",
    ),
  ],
)
def test_a_broken_file_is_an_error_with_its_line(
  tmp_path, text, arg, message, monkeypatch
):
  path = write(tmp_path, text)
  monkeypatch.chdir(tmp_path)
  for name in (path, "setup.py"):  # as it was given, and as Python names it
    with pytest.raises(ConfigError, match=message) as error:
      config_lib.load(name + arg)
    assert len(str(error.value)) < 1000


def test_a_frozen_config_takes_overrides(tmp_path):
  text = "import ml_collections as m\ndef get_config():\n"
  path = write(tmp_path, text + "  return m.FrozenConfigDict({'steps': 3})\n")
  line = argparse.Namespace(config=path, overrides=[("steps", "4")])
  assert config_lib.from_args(line, Settings).steps == 4


def test_an_empty_name_of_a_file_is_an_error():
  line = argparse.Namespace(config="", overrides=[("steps", "4")])
  with pytest.raises(ConfigError, match="no config file ''"):
    config_lib.from_args(line, Settings)


def test_a_file_does_not_move_the_command(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  config_lib.load(write(tmp_path, "import os\nos.chdir('/')\n" + GOOD))
  assert Path.cwd() == tmp_path


def test_home_is_found(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  write(tmp_path, GOOD)
  assert config_lib.load("~/setup.py:large").name == "large"


def test_the_file_of_another_command_is_named_as_that():
  from rlft.cli.grpo import GRPORun

  line = argparse.Namespace(config="configs/arithmetic_ppo.py:dense", overrides=[])
  with pytest.raises(ConfigError, match=r"ppo\.py is a config of `rlft ppo`"):
    config_lib.from_args(line, GRPORun)


def test_settings_that_do_not_go_together_say_where():
  from rlft.cli.ppo import PPORun

  with pytest.raises(ConfigError, match=r"ppo\.value_optimizer: learning_rate=-1"):
    config_lib.to_dataclass(
      PPORun, {"ppo": {"value_optimizer": {"learning_rate": -1.0}}}
    )


def test_a_missing_file_names_its_neighbour(tmp_path):
  write(tmp_path, GOOD)
  with pytest.raises(ConfigError, match=r"did you mean '.*setup\.py'"):
    config_lib.load(str(tmp_path / "setpu.py"))


def test_overrides_are_taken_out_of_any_place():
  line = "--config.a=1 run.py --config=f.py --config.b.c -2 --x -- --config.d=3"
  rest, overrides = overrides_lib.split_overrides(line.split())
  assert " ".join(rest) == "run.py --config=f.py --x -- --config.d=3"
  assert overrides == [("a", "1"), ("b.c", "-2")]
  for words in (["--config.a"], ["--config.a", "--workdir=x"]):
    with pytest.raises(ConfigError, match=r"--config\.a needs a value"):
      overrides_lib.split_overrides(words)


@pytest.mark.parametrize(
  ("field", "text", "value"),
  [
    ("steps", "20", 20),
    ("steps", "1_000", 1000),
    ("clip", "2", 2.0),
    ("clip", "none", None),
    ("clip", "1e-6", 1e-6),
    ("limit", "5", 5.0),
    ("limit", "inf", math.inf),
    ("name", "12", "12"),
    ("name", "none", "none"),
    ("name", "'a b'", "a b"),
    ("name", "", ""),
    ("start", "sft", "sft"),
    ("ks", "1,4", (1, 4)),
    ("ks", "[8]", (8,)),
    ("ks", "()", ()),
    ("ks", "", ()),
    ("ks", "8", (8,)),
    ("ks", "8,", (8,)),
    ("ks", "(8)", (8,)),
    ("ks", "(1, 4)", (1, 4)),
    ("splits", "test,ood_steps", ("test", "ood_steps")),
    ("splits", "(test, ood_steps)", ("test", "ood_steps")),
    ("splits", "('test', \"ood\")", ("test", "ood")),
    ("splits", "'test','ood'", ("test", "ood")),
    ("splits", "[test]", ("test",)),
    ("splits", "sft", ("sft",)),
    ("splits", "1,4", ("1", "4")),
    ("splits", "none", ("none",)),
    ("splits", "(',',)", (",",)),
    ("splits", "(')', x)", (")", "x")),
    ("splits", "'a, b',c", ("a, b", "c")),
    ("splits", "don't", ("don't",)),
    ("splits", r"\n", ("\n",)),
    ("splits", r"'\n\n', Q:", ("\n\n", "Q:")),
    ("pairs", "(1,2),(3,4)", ((1, 2), (3, 4))),
    ("parts", "none", None),
    ("parts", "1,2", (1, 2)),
    ("name", r"a\tb\.", "a\tb\\."),
    ("seed", "7", 7),
    ("optimizer.learning_rate", "1e-6", 1e-6),
    ("optimizer.nesterov", "True", True),
    ("optimizer.betas", "0,1", (0.0, 1.0)),
    ("warmup.nesterov", "true", True),
    ("warmup", "none", None),
  ],
)
def test_override_by_the_declared_type(field, text, value):
  got = build({field: text})
  for name in field.split("."):
    got = getattr(got, name)
  assert got == value
  assert type(got) is type(value)


@pytest.mark.parametrize(
  ("field", "text", "message"),
  [
    ("steps", "1.0", "'steps' takes int, not '1.0'"),
    ("steps", "true", "takes int"),
    ("steps", "none", "takes int"),
    ("clip", "nan", "takes float or none"),
    ("clip", "fast", "takes float or none, not 'fast'"),
    ("optimizer.nesterov", "1", "takes true or false, not '1'"),
    ("start", "stf", "takes one of base, sft"),
    (
      "ks",
      "a",
      r"takes a tuple \(int, ...\), written 1,4 or \(1, 4\), one as 1, none ",
    ),
    ("ks", "1,a", "takes a tuple"),
    ("ks", "1,,4", "takes a tuple"),
    ("ks", "(1, 4", "takes a tuple"),
    (
      "optimizer.betas",
      "0.1",
      r"a tuple \(float, float\), written 0.1,0.9 or \(0.1, 0.",
    ),
    ("optimizer.betas", "0.1,0.2,0.3", r"a tuple \(float, float\)"),
    ("ks", "__import__('os')", "takes a tuple"),
    (
      "stpes",
      "1",
      "unknown field 'stpes'; did you mean --config.steps.*fields: steps, name",
    ),
    (
      "optimizer.lerning_rate",
      "1",
      r"mean --config.optimizer.learning_rate\? \(fields of optimizer: learning",
    ),
    # The end of a path that is elsewhere: with all of it, the likeliest first.
    (
      "learning_rate",
      "1",
      "mean --config.warmup.learning_rate or --config.optimizer.l",
    ),
    ("sft.warmup.nesterov", "1", r"did you mean --config.warmup.nesterov\?"),
    (
      "optimiser.nesterov",
      "1",
      "mean --config.optimizer.nesterov or --config.warmup.n",
    ),
    (
      "warmup.steps",
      "1",
      r"did you mean --config.steps\? \(fields of warmup: learning_r",
    ),
    (
      "optimizer",
      "3",
      "'optimizer' is a group.*--config.optimizer.learning_rate=VALUE",
    ),
    ("optimizer", "none", "'optimizer' is a group"),
    ("steps.x", "3", "'steps' is a setting, not a group"),
    ("", "3", "unknown field ''"),
  ],
)
def test_a_wrong_override_is_an_error_that_helps(field, text, message):
  with pytest.raises(ConfigError, match=message):
    build({field: text})


def test_to_dataclass_is_frozen_hashable_and_typed():
  settings = build(optimizer={"betas": [0, 1]}, ks=[2], clip=1)
  assert settings == build(optimizer={"betas": (0.0, 1.0)}, ks=(2,), clip=1.0)
  assert hash(settings) == hash(build(optimizer={"betas": (0, 1)}, ks=(2,)))
  assert type(settings.clip) is float
  with pytest.raises(ConfigError, match=r"field 'steps' \(int\) is missing"):
    config_lib.to_dataclass(Settings, {})
  for values, message in [
    ({"steps": 1.0}, r"'steps' takes int, not 1.0 \(float\)"),
    ({"steps": True}, "'steps' takes int"),
    ({"optimizer": {"betas": (1.0, "a")}}, r"'optimizer\.betas\[1\]' takes float"),
    ({"optimizer": {"eps": 1.0}}, r"unknown field 'optimizer\.eps'"),
    ({"optimizer": 3}, "'optimizer' takes Adam"),
    ({"warmup": {"nestrov": True}}, r"unknown field 'warmup\.nestrov'; did you mean"),
    ({"name": {"a": 1}}, "'name' takes str"),
    ({"limit": math.nan}, "'limit' is NaN"),
    ({"limit": 10**400}, "'limit' is too large"),
    ({"nesterov": True}, "mean 'warmup.nesterov' or 'optimizer.nesterov'"),
  ]:
    with pytest.raises(ConfigError, match=message):
      build(**values)


def test_to_dataclass_resolves_references_between_fields():
  config = ml_collections.ConfigDict({"steps": 3})
  config.seed = config.get_ref("steps") * 2
  config_lib.apply_overrides(config, [("steps", "5")], Settings)
  assert config_lib.to_dataclass(Settings, config).seed == 10


def test_only_frozen_dataclasses_come_out():
  @dataclasses.dataclass
  class Loose:
    a: int = 1

  with pytest.raises(TypeError, match="Loose must be a frozen dataclass"):
    config_lib.to_dataclass(Loose, {})


def test_dump_comes_back_as_the_same_dataclass(tmp_path):
  settings = build(warmup={"nesterov": True}, ks=(3,))
  assert config_lib.dump(settings)["limit"] == "inf"
  path = config_lib.write_resolved(tmp_path / "new" / "run", settings, "ppo")
  record = json.loads(path.read_text())
  assert record == config_lib.read_resolved(path.parent)
  assert record.pop("command") == "ppo"
  assert not config_lib.diff(record, settings)
  record["limit"] = math.inf
  assert config_lib.to_dataclass(Settings, record) == settings
  assert config_lib.read_resolved(tmp_path) is None
  path.write_text("{")
  with pytest.raises(ConfigError, match="is damaged"):
    config_lib.read_resolved(path.parent)


def test_diff_names_each_setting():
  old, new = build(), build(steps=2, optimizer={"nesterov": True}, warmup={})
  differences = config_lib.diff(old, new)
  assert differences["steps"] == (1, 2)
  assert differences["optimizer.nesterov"] == (False, True)
  assert differences["warmup"] == (None, config_lib.ABSENT)
  assert differences["warmup.learning_rate"] == (config_lib.ABSENT, 1e-3)
  assert not config_lib.diff(old, build())


def test_secrets_are_hidden_and_tokens_are_not():
  settings = {
    "api_key": "a",
    "hub": {"hf_token": "b", "password": "c", "clientSecret": "d", "apiKey": "e"},
    "max_new_tokens": 5,
    "tokens": "f",
    "keyword": "g",
    "token_budget": 9,
    "token": None,
    "key": "",
    "secrets": ["h"],
  }
  assert config_lib.redact(settings) == {
    "api_key": "***",
    "hub": dict.fromkeys(("hf_token", "password", "clientSecret", "apiKey"), "***"),
    "max_new_tokens": 5,
    "tokens": "f",
    "keyword": "g",
    "token_budget": 9,
    "token": None,
    "key": "",
    "secrets": "***",
  }

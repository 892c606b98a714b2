"""Config files, overrides and the dataclasses they become."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, Literal

import ml_collections
import pytest

from rlft.cli import config as config_lib
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
  ],
)
def test_a_broken_file_is_an_error_with_its_line(tmp_path, text, arg, message):
  with pytest.raises(ConfigError, match=message):
    config_lib.load(write(tmp_path, text) + arg)


def test_a_missing_file_names_its_neighbour(tmp_path):
  write(tmp_path, GOOD)
  with pytest.raises(ConfigError, match=r"did you mean '.*setup\.py'"):
    config_lib.load(str(tmp_path / "setpu.py"))


def test_overrides_are_taken_out_of_any_place():
  line = "--config.a=1 run.py --config=f.py --config.b.c -2 --x -- --config.d=3"
  rest, overrides = config_lib.split_overrides(line.split())
  assert " ".join(rest) == "run.py --config=f.py --x -- --config.d=3"
  assert overrides == [("a", "1"), ("b.c", "-2")]
  for words in (["--config.a"], ["--config.a", "--workdir=x"]):
    with pytest.raises(ConfigError, match=r"--config\.a needs a value"):
      config_lib.split_overrides(words)


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
  # From the value's own type, where the file is all that is known.
  plain = ml_collections.ConfigDict(
    {
      "name": "a",
      "steps": 3,
      "clip": 1.0,
      "ks": (1, 2),
      "optimizer": {"nesterov": False},
    }
  )
  if field in ("name", "steps", "ks", "optimizer.nesterov"):
    config_lib.apply_overrides(plain, [(field, text)])
    for name in field.split("."):
      plain = plain[name]
    assert plain == value


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
    ("ks", "8", r"takes a tuple \(int, ...\)"),
    ("ks", "1,a", "takes a tuple"),
    ("optimizer.betas", "0.1", r"a tuple \(float, float\)"),
    ("optimizer.betas", "0.1,0.2,0.3", r"a tuple \(float, float\)"),
    ("ks", "__import__('os')", "takes a tuple"),
    ("stpes", "1", "unknown field 'stpes'; did you mean 'steps'.*fields: steps, name"),
    ("optimizer.lerning_rate", "1", "did you mean 'learning_rate'"),
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


def test_overrides_of_a_file_without_its_dataclass():
  config = ml_collections.ConfigDict({"a": {"b": 1.5}, "n": None})
  config.lock()
  config_lib.apply_overrides(config, [("a.b", "2"), ("n", "x")])
  assert config.a.b == 2.0 and config.n == "x" and config.is_locked
  with pytest.raises(ConfigError, match=r"unknown field 'a\.c'"):
    config_lib.apply_overrides(config, [("a.c", "2")])
  with pytest.raises(ConfigError, match="'a' is a group"):
    config_lib.apply_overrides(config, [("a", "2")])


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
  path = config_lib.write_resolved(tmp_path / "new" / "run", settings)
  record = json.loads(path.read_text())
  assert record == config_lib.read_resolved(path.parent)
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

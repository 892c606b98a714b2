"""Which devices jax is told to look for, on made-up machines."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import types

import pytest

from rlft.core import platform
from rlft.core.errors import ConfigError


@pytest.mark.parametrize(
  ("plugins", "devices", "expected"),
  [
    ((), (), None),  # plain jax: nothing to keep quiet
    (("libtpu",), (), "cpu"),
    (("libtpu",), ("accel0",), None),
    (("libtpu",), ("vfio/3",), None),
    (("libtpu",), ("vfio/vfio",), "cpu"),  # the driver's control file, no chip
    (("libtpu", "jax_cuda13_plugin"), ("nvidia0",), "cuda,cpu"),
    (("libtpu", "jax_cuda12_plugin"), ("nvidiactl",), "cpu"),
    (("libtpu",), ("nvidia0",), "cpu"),  # a GPU that this jax cannot drive
    (("jax_cuda13_plugin",), ("dxg",), None),
    (("jax_cuda13_plugin",), (), "cpu"),
  ],
)
def test_plugins_without_a_device_are_not_tried(
  tmp_path, monkeypatch, plugins, devices, expected
):
  for name in devices:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
  monkeypatch.delitem(sys.modules, "jax", raising=False)
  environ: dict[str, str] = {}
  chosen = platform.choose(environ, dev=tmp_path, installed=lambda n: n in plugins)
  assert chosen == expected
  assert environ == ({} if expected is None else {"JAX_PLATFORMS": expected})


def test_the_user_decides(tmp_path, monkeypatch):
  monkeypatch.delitem(sys.modules, "jax", raising=False)
  environ = {"JAX_PLATFORMS": ""}  # jax's own choice, asked for
  assert platform.choose(environ, dev=tmp_path, installed=lambda name: True) is None
  assert environ == {"JAX_PLATFORMS": ""}


def test_jax_that_is_imported_is_told_too_unless_the_user_has(tmp_path, monkeypatch):
  told = types.SimpleNamespace(jax_platforms=None)
  told.update = lambda name, value: setattr(told, name, value)
  monkeypatch.setitem(sys.modules, "jax", types.SimpleNamespace(config=told))
  environ: dict[str, str] = {}
  choose = lambda: platform.choose(environ, tmp_path, lambda name: name == "libtpu")
  assert choose() == told.jax_platforms == environ.pop("JAX_PLATFORMS") == "cpu"
  told.jax_platforms = "cuda"
  assert choose() is None
  assert (told.jax_platforms, environ) == ("cuda", {})
  monkeypatch.setitem(sys.modules, "jax", types.SimpleNamespace())  # being imported
  assert choose() == environ["JAX_PLATFORMS"] == "cpu"


@pytest.mark.parametrize("first", ["rlft", "jax"])
def test_scripts_start_on_this_machine_without_a_word(first):
  then = {"rlft": "jax", "jax": "rlft"}[first]
  code = f"import {first}\nimport {then}\nimport jax; jax.devices()"
  env = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
  done = subprocess.run(
    [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120
  )
  assert (done.returncode, done.stderr) == (0, "")


def joined(environ):
  """What `join` asks jax for; None when it leaves jax alone."""
  asked = []
  platform.join(environ, lambda **words: asked.append(words))
  return asked[0] if asked else None


def test_alone_without_a_coordinator():
  assert joined({}) is None
  assert joined({"RLFT_COORDINATOR": "h:1", "RLFT_NUM_PROCESSES": "1"}) is None


def test_launchers_words_reach_jax(capsys):
  default = {"initialization_timeout": 300, "heartbeat_timeout_seconds": 60}
  assert joined({"RLFT_COORDINATOR": "auto"}) == default
  environ = {
    "RLFT_COORDINATOR": "host-0:8476",
    "RLFT_NUM_PROCESSES": "4",
    "RLFT_PROCESS_ID": "3",
    "RLFT_JOIN_TIMEOUT": "20",
    "RLFT_HEARTBEAT": "10",
  }
  assert joined(environ) == {
    "coordinator_address": "host-0:8476",
    "num_processes": 4,
    "process_id": 3,
    "cluster_detection_method": "deactivate",
    "initialization_timeout": 20,
    "heartbeat_timeout_seconds": 10,
  }
  waits = "process 3: waiting up to 20 s for 4 processes at host-0:8476"
  assert waits in capsys.readouterr().err


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    ({"RLFT_PROCESS_ID": "2"}, "RLFT_PROCESS_ID=2"),
    ({"RLFT_PROCESS_ID": "-1"}, "RLFT_PROCESS_ID='-1'"),
    ({"RLFT_NUM_PROCESSES": "two"}, "RLFT_NUM_PROCESSES='two'"),
    ({"RLFT_NUM_PROCESSES": "0"}, "RLFT_NUM_PROCESSES='0'"),
    ({"RLFT_COORDINATOR": "host"}, "HOST:PORT"),
    ({"RLFT_HEARTBEAT": "0"}, "RLFT_HEARTBEAT='0'"),
  ],
)
def test_what_cannot_be_joined_is_named(changes, named):
  environ = {"RLFT_COORDINATOR": "h:1", "RLFT_NUM_PROCESSES": "2"} | changes
  with pytest.raises(ConfigError, match=named):
    joined(environ)


def test_sigterm_ends_a_process_that_has_joined():
  """jax takes the signal for itself, and a process that loads a model ignores it."""
  before = signal.signal(signal.SIGTERM, lambda *_: None)
  try:
    joined({"RLFT_COORDINATOR": "auto"})
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
  finally:
    signal.signal(signal.SIGTERM, before)

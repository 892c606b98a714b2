"""Which devices jax is told to look for, on made-up machines."""

from __future__ import annotations

import os
import subprocess
import sys

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


def test_too_late_after_jax(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "jax", sys)
  environ: dict[str, str] = {}
  assert platform.choose(environ, dev=tmp_path, installed=lambda name: True) is None
  assert environ == {}


def test_jax_starts_on_this_machine_without_a_word():
  code = "from rlft.core import platform; platform.choose()\nimport jax; jax.devices()"
  env = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
  done = subprocess.run(
    [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120
  )
  assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
  ("environ", "found", "refused"),
  [
    ({}, 8, False),  # nobody is asked
    ({"RLFT_COORDINATOR": "auto"}, 1, False),
    ({"RLFT_COORDINATOR": "auto"}, 8, True),
    ({"RLFT_COORDINATOR": "h:1"}, 8, False),
    ({"RLFT_COORDINATOR": "h:1", "RLFT_NUM_PROCESSES": "1"}, 8, False),
    ({"RLFT_COORDINATOR": "h:1", "RLFT_NUM_PROCESSES": "2"}, 1, True),
  ],
)
def test_several_processes_are_refused(environ, found, refused):
  if not refused:
    return platform.check_hosts(environ, lambda: found)
  with pytest.raises(ConfigError, match="one host"):
    platform.check_hosts(environ, lambda: found)

"""Which accelerators jax should look for, and with which other processes."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Any

from rlft.core.errors import ConfigError

# Package of the jax plugin -> what `JAX_PLATFORMS` calls it.
_PLUGINS = {
  "libtpu": "tpu",
  "jax_cuda12_plugin": "cuda",
  "jax_cuda13_plugin": "cuda",
}
_DEVICES = {
  "tpu": ("accel*", "vfio/[0-9]*"),  # older drivers; newer: one group per chip
  "cuda": ("nvidia[0-9]*", "dxg"),  # dxg: Windows' GPU inside WSL
}


def choose(
  environ: MutableMapping[str, str] = os.environ,
  dev: Path = Path("/dev"),
  installed: Callable[[str], bool] = lambda name: (
    importlib.util.find_spec(name) is not None
  ),
) -> str | None:
  """Sets `JAX_PLATFORMS` where an installed plugin has no device on this machine.

  An installed libtpu makes jax look for a TPU at start, which takes time and logs
  errors where there is none; a CUDA plugin without a GPU likewise. libtpu without a TPU
  is ordinary here: it is the compiler that plans a pod on a laptop.

  Args:
    environ: the environment to read and to change.
    dev: the directory of device files.
    installed: whether a package can be imported.

  Returns:
    What `JAX_PLATFORMS` was set to, and jax's own setting where jax is imported (it has
    read the variable then); None when both were left alone: the user has set one, or no
    plugin lacks a device.
  """
  jax = sys.modules.get("jax")
  settings = getattr(jax, "config", None)  # not yet there while jax itself is imported
  if "JAX_PLATFORMS" in environ or (jax and getattr(settings, "jax_platforms", "")):
    return None
  plugins = {kind for name, kind in _PLUGINS.items() if installed(name)}
  present = {kind for kind in plugins if any(any(dev.glob(p)) for p in _DEVICES[kind])}
  if plugins == present:
    return None
  # Named platforms must start or jax raises, so only what is there is named; cpu stays
  # reachable for host-side work.
  platforms = ",".join([*sorted(present), "cpu"])
  environ["JAX_PLATFORMS"] = platforms
  if jax is not None and settings is not None:
    settings.update("jax_platforms", platforms)  # no effect once devices have started
  return platforms


def join(
  environ: MutableMapping[str, str] = os.environ,
  initialize: Callable[..., None] | None = None,
) -> None:
  """Becomes one of the processes of a run, as its launcher says; alone without one.

  Call it before jax is used. It returns when all processes are there.

  Args:
    environ: RLFT_COORDINATOR, "auto" (on TPUs jax knows its hosts) or HOST:PORT of
      process 0, and then RLFT_NUM_PROCESSES and RLFT_PROCESS_ID. RLFT_JOIN_TIMEOUT:
      seconds to wait for the others (300). RLFT_HEARTBEAT: seconds after which a
      process that is not heard of is dead, and the others end (60).
    initialize: `jax.distributed.initialize`.

  Raises:
    ConfigError: one of them is not what it must be.
  """
  coordinator = environ.get("RLFT_COORDINATOR")
  if not coordinator:
    return
  timeouts = {
    "initialization_timeout": _count(environ, "RLFT_JOIN_TIMEOUT", 300),
    "heartbeat_timeout_seconds": heartbeat_seconds(environ),
  }
  where: dict[str, Any] = {}
  if coordinator != "auto":
    processes = _count(environ, "RLFT_NUM_PROCESSES", 1)
    index = _count(environ, "RLFT_PROCESS_ID", 0, least=0)
    if index >= processes or ":" not in coordinator:
      raise ConfigError(
        f"RLFT_COORDINATOR={coordinator} must be HOST:PORT or 'auto', and "
        f"RLFT_PROCESS_ID={index} below RLFT_NUM_PROCESSES={processes}"
      )
    if processes == 1:
      return
    where = {
      "coordinator_address": coordinator,
      "num_processes": processes,
      "process_id": index,
      "cluster_detection_method": "deactivate",
    }
    # When one is missing jax ends the process before it could raise anything.
    print(
      f"rlft: process {index}: waiting up to {timeouts['initialization_timeout']} s "
      f"for {processes} processes at {coordinator}",
      file=sys.stderr,
      flush=True,
    )
  if initialize is None:
    import jax

    initialize = jax.distributed.initialize
  initialize(**where, **timeouts)
  # jax takes SIGTERM for itself and does nothing with it unless it is asked to.
  signal.signal(signal.SIGTERM, signal.SIG_DFL)


def heartbeat_seconds(environ: MutableMapping[str, str] = os.environ) -> int:
  """After so many seconds without a sign a process is dead; see `join`."""
  return _count(environ, "RLFT_HEARTBEAT", 60)


def _count(
  environ: MutableMapping[str, str], name: str, default: int, least: int = 1
) -> int:
  text = environ.get(name, str(default))
  if not text.isdigit() or int(text) < least:
    raise ConfigError(f"{name}={text!r}: an integer of at least {least}")
  return int(text)

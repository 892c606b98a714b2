"""Which accelerators jax should look for, and on how many hosts; decided once."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, MutableMapping
from pathlib import Path

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
    What `JAX_PLATFORMS` was set to; None when it was left alone: the user has set it,
    jax is already imported (it reads the variable then), or no plugin lacks a device.
  """
  if "JAX_PLATFORMS" in environ or "jax" in sys.modules:
    return None
  plugins = {kind for name, kind in _PLUGINS.items() if installed(name)}
  present = {kind for kind in plugins if any(any(dev.glob(p)) for p in _DEVICES[kind])}
  if plugins == present:
    return None
  # Named platforms must start or jax raises, so only what is there is named; cpu stays
  # reachable for host-side work.
  platforms = ",".join([*sorted(present), "cpu"])
  environ["JAX_PLATFORMS"] = platforms
  return platforms


def check_hosts(
  environ: MutableMapping[str, str] = os.environ,
  count: Callable[[], int] | None = None,
) -> None:
  """Refuses to be one of several processes: each would train by itself, and write over
  the others.

  Args:
    environ: has what launchers say: RLFT_COORDINATOR ("auto", or HOST:PORT with
      RLFT_NUM_PROCESSES); without it, this is the only process.
    count: of the processes that "auto" finds; by default as jax does on a TPU.

  Raises:
    ConfigError: there are several.
  """
  coordinator = environ.get("RLFT_COORDINATOR")
  if not coordinator:
    return
  if coordinator == "auto":
    processes = (count or _join)()
  else:
    processes = int(environ.get("RLFT_NUM_PROCESSES", "1"))
  if processes > 1:
    raise ConfigError(
      f"{processes} processes were started (RLFT_COORDINATOR={coordinator}): this "
      "release runs on one host, with all of its devices; start one process"
    )


def _join() -> int:
  import jax

  jax.distributed.initialize()
  return jax.process_count()

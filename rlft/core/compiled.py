"""Keeps compiled programs on disk, so that the next start need not compile them.

jax has the keys (all that a program depends on) and the bytes; this is where they lie.
Its own directory is not used, since it is torn by a process that dies while it writes,
and bounded only under a lock. Here a program appears whole, by one rename, with its
hash before it, so that any number of processes read and write without waiting; and
whatever fails, a disk that is full among it, means that a program is compiled.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import secrets
import subprocess
import sys
from collections.abc import MutableMapping
from pathlib import Path

VARIABLE = "RLFT_COMPILATION_CACHE"
OFF, ON = ("off", "0", "no", "false"), ("on", "1", "yes", "true", "")
LIMIT = 2**30  # bytes; some thousand programs of a CPU, some hundred of a TPU
_HASH = hashlib.sha256


def keep_compiled(
  directory: str | os.PathLike[str] | None = None,
  environ: MutableMapping[str, str] = os.environ,
) -> Path | None:
  """Keeps what this process compiles, and takes what was kept; `rlft` commands do.

  Programs lie in a folder for each kind of processor, accelerator and jax version, and
  at most `LIMIT` bytes in all (or JAX_COMPILATION_CACHE_MAX_SIZE): those that were not
  used for longest go first. Code is loaded from there, so keep it where only you write.

  Args:
    directory: where; None is $RLFT_COMPILATION_CACHE, else `rlft/compiled` in the
      user's cache directory.
    environ: RLFT_COMPILATION_CACHE=off keeps nothing.

  Returns:
    The directory; None where nothing is kept: it is off, jax has a cache already
    (JAX_COMPILATION_CACHE_DIR), or the default place is not this user's own.
  """
  asked = environ.get(VARIABLE, "").strip()
  if asked.lower() in OFF:
    return None
  given = directory or ("" if asked.lower() in ON else asked)
  import jax

  if (
    not jax.config.jax_enable_compilation_cache or jax.config.jax_compilation_cache_dir
  ):
    return None
  root = Path(given).expanduser() if given else _of_user(environ)
  if root is None or not (given or _own(root)):
    return None
  try:
    from jax._src import compilation_cache

    # No public name takes a store; a jax without this one compiles at every start.
    if not callable(compilation_cache.get_file_cache):
      return None
  except (ImportError, AttributeError):
    return None
  most = jax.config.jax_compilation_cache_max_size
  # Called at the first compilation, when the devices are known.
  compilation_cache.get_file_cache = lambda path: (
    _Store(Path(path), Path(path) / _kind(), LIMIT if most < 0 else most),
    path,
  )
  root = root.absolute()
  jax.config.update("jax_compilation_cache_dir", str(root))
  # Reading the smallest takes a millisecond or two, compiling it ten and more.
  if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in environ:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  return root


class _Store:
  """What jax asks of a cache: `get(key)` and `put(key, bytes)`; neither raises."""

  def __init__(self, root: Path, folder: Path, most: int):
    self._path = root  # jax shows it
    self._root, self._folder, self._most = root, folder, most

  def get(self, key: str) -> bytes | None:
    path = self._file(key)
    try:
      data = path.read_bytes()
    except OSError:
      return None
    value = data[32:]
    whole = _HASH(value).digest() == data[:32]
    with contextlib.suppress(OSError):
      if whole:
        os.utime(path)  # the least recently used is the oldest
      else:
        path.unlink()  # a damaged disk, a lost write: compiled again, written whole
    return value if whole else None

  def put(self, key: str, value: bytes) -> None:
    if len(value) > self._most:
      return
    part = self._folder / f"{secrets.token_hex(8)}.part"
    try:
      self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
      part.write_bytes(_HASH(value).digest() + value)
      part.replace(self._file(key))
      self._shrink()
    except OSError:
      with contextlib.suppress(OSError):
        part.unlink()

  def _file(self, key: str) -> Path:
    return self._folder / f"{key[-120:]}.program"  # its last 64 letters are the hash

  def _shrink(self) -> None:
    """Deletes the oldest, of other jax versions and of killed writers too."""
    found = []
    for path in self._root.glob("*/*"):
      if path.suffix in (".program", ".part"):
        with contextlib.suppress(OSError):  # another process was faster
          stat = path.stat()
          found.append((stat.st_mtime_ns, stat.st_size, path))
    left = self._most
    for _, size, path in sorted(found, reverse=True):
      left -= size
      if left < 0:
        with contextlib.suppress(OSError):
          path.unlink()


def _of_user(environ: MutableMapping[str, str]) -> Path | None:
  """`rlft/compiled` in the user's cache directory; None without a home."""
  base = environ.get("XDG_CACHE_HOME", "")
  if not os.path.isabs(base):  # as the XDG specification says
    base = os.path.join(os.path.expanduser("~"), ".cache")
  return Path(base) / "rlft" / "compiled" if os.path.isabs(base) else None


def _own(root: Path) -> bool:
  """Whether only this user writes there; it is made if missing."""
  try:
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    stat = root.stat()
  except OSError:
    return False
  if not hasattr(os, "getuid"):  # Windows: the home directory is the user's own
    return True
  return stat.st_uid == os.getuid() and not stat.st_mode & 0o022


def _kind() -> str:
  """A name of what programs are compiled for and by; needs started devices."""
  import jax
  import jaxlib

  devices = sorted({device.device_kind for device in jax.local_devices()})
  words = [jax.__version__, jaxlib.__version__, *devices, _processor()]
  return re.sub(r"[^A-Za-z0-9.]+", "_", "-".join(words))


# Of /proc/cpuinfo on x86, Arm and RISC-V: what code may use, and is scheduled for.
_FACTS = (
  "vendor_id", "cpu family", "model", "model name", "flags", "Features",
  "CPU implementer", "CPU architecture", "CPU variant", "CPU part", "isa", "uarch",
)  # fmt: skip


def _threads() -> int:
  """Cores of this process: XLA splits its loops into as many parts."""
  affinity = getattr(os, "sched_getaffinity", None)
  return len(affinity(0)) if affinity else os.cpu_count() or 1


def _processor() -> str:
  """A hash of the host's processor and its features: XLA compiles for exactly those."""
  facts = [sys.platform, platform.machine(), platform.processor(), f"{_threads()}"]
  with contextlib.suppress(OSError):
    lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    facts += sorted({line for line in lines if line.split("\t")[0].strip() in _FACTS})
  if sys.platform == "darwin":
    with contextlib.suppress(OSError, subprocess.SubprocessError):
      command = ["sysctl", "-n", "machdep.cpu.brand_string"]
      facts.append(subprocess.check_output(command, text=True, timeout=10))
  return _HASH("\n".join(facts).encode()).hexdigest()[:12]

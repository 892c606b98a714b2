"""One writer in a directory."""

from __future__ import annotations

import datetime
import fcntl
import logging
import os
import socket
from pathlib import Path

from rlft.core.errors import CheckpointError

log = logging.getLogger(__name__)


def take_lock(path: Path) -> int | None:
  """A file that is locked until it is closed or its process ends, however it ends.

  Args:
    path: of the file. Its text says who holds it, for people only: a pid in a file may
      be another program's by now.

  Returns:
    The open file's descriptor; None on a file system that has no locks.

  Raises:
    CheckpointError: another one holds it.
    OSError: it cannot be written.
  """
  file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    owner = os.read(file, 500).decode(errors="replace").strip()
    os.close(file)
    raise CheckpointError(
      f"{path}: another run writes here ({owner}); end it, or choose another workdir"
    ) from None
  except OSError as error:  # some network file systems
    os.close(file)
    log.warning("%s cannot be locked (%s): start one run here only", path, error)
    return None
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
  os.ftruncate(file, 0)
  os.write(file, f"pid {os.getpid()} on {socket.gethostname()} since {now}\n".encode())
  return file

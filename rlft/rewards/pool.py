"""Reward functions in processes that can be killed, with a deadline for each call.

A rollout's rows are cut into chunks; each worker thread owns one child process and
hands it a chunk at a time. A child that raises, hangs (in C code too, with the
interpreter's lock held), dies or outgrows its memory costs its own chunk only, whose
rows are then judged one by one: a bad row masks itself.

Children are fresh interpreters that import the functions by name. The script that is
running is not imported again, so it needs no `if __name__ == "__main__"`; nothing is
forked, and nothing is pickled. Each works in an empty directory of its own, which is
gone with it, and what it prints is shown up to a bound: a function that reads a file
names it by its whole path.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import math
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlft.core.errors import ConfigError, RewardError
from rlft.rewards import worker

MOST_SHOWN = 2**16  # bytes that the processes of a pool may print
_TAIL = 2000  # bytes of it that a crash is reported with
_SLICE = 0.1  # seconds between two looks at a busy child
_START_TRIES = 3
_BOOT = (
  "import json, sys; sys.path[:] = json.loads(sys.argv.pop());"
  "from rlft.rewards.worker import main; main()"
)
# Of environment variables: HF_TOKEN, WANDB_API_KEY, GOOGLE_APPLICATION_CREDENTIALS.
_SECRET = re.compile(
  r"(?:^|_)(?:API)?(?:KEYS?|TOKENS?|SECRETS?|PASS|PASSWORD|PASSWD|CREDENTIALS?)(?:_|$)",
  re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class PoolConfig:
  """A pool of reward workers.

  Attributes:
    workers: processes.
    deadline: seconds from the submission of a rollout until it counts as judged,
      whatever is still running: the most that rewards can hold up a step.
    call_deadline: seconds of one call, of up to `chunk_rows` rows; then its process is
      killed.
    start_deadline: seconds for a process to start and import the functions.
    chunk_rows: most rows of a call. Fewer lose less time when one row fails.
    max_calls: calls after which a process is replaced by a fresh one.
    max_rss_mb: resident MiB above which a process is replaced after its call, and at
      twice that during it. Linux only.
    keep_environment: names of environment variables that the functions need although
      their names say that they are secret, such as an API key. Others are removed.
  """

  workers: int = 2
  deadline: float = 60.0
  call_deadline: float = 20.0
  start_deadline: float = 60.0
  chunk_rows: int = 16
  max_calls: int = 1000
  max_rss_mb: int = 2048
  keep_environment: tuple[str, ...] = ()

  def __post_init__(self):
    for name in ("workers", "chunk_rows", "max_calls", "max_rss_mb"):
      if getattr(self, name) < 1:
        raise ConfigError(f"pool {name}={getattr(self, name)}: at least 1")
    for name in ("deadline", "call_deadline", "start_deadline"):
      if not 0 < getattr(self, name) < math.inf:
        raise ConfigError(
          f"pool {name}={getattr(self, name)}: a positive number of seconds"
        )
    if self.call_deadline > self.deadline:
      raise ConfigError(
        f"pool call_deadline={self.call_deadline} is longer than the deadline="
        f"{self.deadline} of a whole rollout"
      )


@dataclasses.dataclass(frozen=True)
class Failure:
  """Why a row has no value.

  Attributes:
    kind: "raised", "value" (no finite number), "count" (of the values), "timeout",
      "crash", or "dropped" (others had failed before it was judged).
    message: what happened, after the function's name.
    traceback: of the exception, if there was one.
    error: the exception, where it was raised in this process.
  """

  kind: str
  message: str
  traceback: str = ""
  error: BaseException | None = None


Outcome = float | None | Failure


# ------------------------------------------------------------------ one child


class _Lost(Exception):
  """A child that did not answer, and is of no more use."""

  def __init__(self, kind: str, message: str, printed: str = ""):
    super().__init__(message)
    self.kind, self.printed = kind, printed


class _Output:
  """What the functions of a pool print: shown up to a bound, then thrown away."""

  def __init__(self):
    self._lock, self._left = threading.Lock(), MOST_SHOWN

  def show(self, part: bytes) -> None:
    with self._lock:
      if not self._left:
        return
      shown = part[: self._left]
      self._left -= len(shown)
      end = (
        "" if self._left else "\n[reward functions print more, which is not shown]\n"
      )
      with contextlib.suppress(OSError, ValueError):  # nobody reads them
        sys.stderr.write(shown.decode("utf-8", "replace") + end)
        sys.stderr.flush()


class _Child:
  """One process, from its start to its end; used by one thread."""

  def __init__(
    self,
    setup: bytes,
    config: PoolConfig,
    over: Callable[[], bool],
    output: _Output,
  ):
    env = {
      key: value
      for key, value in os.environ.items()
      if key in config.keep_environment or not _SECRET.search(key)
    }
    env["JAX_PLATFORMS"] = "cpu"  # should a function import jax: the chips are taken
    path = json.dumps([os.path.abspath(entry) for entry in sys.path])
    self.folder = tempfile.mkdtemp(prefix="rlft-reward-")
    env["TMPDIR"] = self.folder
    # A session of its own: Ctrl-C is the parent's to handle, and what the function
    # starts can be killed with it.
    self.process = subprocess.Popen(
      [sys.executable, "-c", _BOOT, path],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      env=env,
      cwd=self.folder,
      bufsize=0,
      start_new_session=True,
    )
    self._printed = b""
    self._listener = threading.Thread(target=self._listen, args=(output,), daemon=True)
    self._listener.start()
    self.calls = 0
    self.config = config
    for pipe in (self.process.stdin, self.process.stdout):
      os.set_blocking(pipe.fileno(), False)
    try:
      end = time.monotonic() + config.start_deadline
      answer = self.ask(setup, end, over)
      if "ready" not in answer:
        raise _Lost("start", f"{answer['message']}\n{answer['traceback']}")
    except BaseException:
      self.kill()
      raise

  def _listen(self, output: _Output) -> None:
    """Reads what the process prints until the last of it has hung up."""
    with self.process.stderr as pipe:
      while part := os.read(pipe.fileno(), 1 << 16):
        self._printed = (self._printed + part)[-_TAIL:]
        output.show(part)

  def ask(self, request: bytes, end: float, over: Callable[[], bool]) -> dict[str, Any]:
    """The child's answer.

    Args:
      request: a frame.
      end: `time.monotonic()` at which to give up.
      over: whether nobody waits for the answer any more.

    Raises:
      _Lost: kind "timeout", "crash", or "dropped" when it is over.
    """
    began = time.monotonic()
    unsent, got = memoryview(request), bytearray()
    reader, writer = self.process.stdout.fileno(), self.process.stdin.fileno()
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    poll.register(writer, select.POLLOUT)
    self.calls += 1
    while True:
      now = time.monotonic()
      if over():
        raise _Lost("dropped", "was dropped")
      if now >= end:
        raise _Lost("timeout", f"gave no answer within {end - began:.3g} s")
      events = poll.poll(1000 * min(_SLICE, end - now))
      try:
        for file, _ in events:
          if file == writer:
            unsent = unsent[os.write(writer, unsent[:65536]) :]
            if not unsent:
              poll.unregister(writer)
          else:
            part = os.read(reader, 1 << 20)
            if not part:
              raise self._died()
            got += part
      except BlockingIOError:
        continue
      except BrokenPipeError:
        raise self._died() from None
      if len(got) >= worker.HEADER:
        size = worker.HEADER + int.from_bytes(got[: worker.HEADER], "big")
        if len(got) >= size:
          return json.loads(got[worker.HEADER : size])
      if not events:
        # What the function started may hold the pipe open after its death.
        if self.process.poll() is not None:
          raise self._died()
        if self.rss_mb() > 2 * self.config.max_rss_mb:
          raise _Lost(
            "crash", f"took more than 2 x max_rss_mb={self.config.max_rss_mb} of memory"
          )

  def _died(self) -> _Lost:
    self.kill(wait=1.0)
    code = self.process.returncode
    cause = f"exit code {code}"
    if code < 0:
      cause = signal.Signals(-code).name if -code in set(signal.Signals) else cause
    self._listener.join(1.0)
    printed = self._printed.decode("utf-8", "replace")
    return _Lost("crash", f"ended its process ({cause})", printed)

  def rss_mb(self) -> float:
    """Resident MiB; 0 where the system does not say. Its children are not counted."""
    try:
      with open(f"/proc/{self.process.pid}/statm") as file:
        pages = int(file.read().split()[1])
    except (OSError, IndexError):
      return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

  @property
  def worn(self) -> bool:
    """Whether a fresh process should take its place."""
    return (
      self.calls > self.config.max_calls  # the first was the setup
      or self.rss_mb() > self.config.max_rss_mb
    )

  def kill(self, wait: float = 0.0) -> None:
    """Ends the process and what it started, and forgets it.

    Args:
      wait: seconds in which it may end by itself, so that its exit code is its own.
    """
    if self.process.stdout.closed:
      return  # its id may be another process's by now
    if wait:
      with contextlib.suppress(subprocess.TimeoutExpired):
        self.process.wait(wait)
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody is left
      os.killpg(self.process.pid, signal.SIGKILL)
    self.process.wait()
    for pipe in (self.process.stdin, self.process.stdout):
      pipe.close()
    self._listener.join(1.0)  # of what escaped the group nobody waits for the end
    shutil.rmtree(self.folder, ignore_errors=True)


# ------------------------------------------------------------------ judging


class Judging:
  """A rollout that is being judged; `RewardPool.submit` makes it."""

  def __init__(self, board: _Board, count: int, rows: int, columns, most: int | None):
    self.columns = columns
    self.seconds = 0.0
    self._board = board
    self._outcomes: list[list[Any]] = [[_OPEN] * rows for _ in range(count)]
    self._left = count * rows
    self._most = rows if most is None else most
    self._failed: set[int] = set()
    self._began = time.monotonic()
    self.end = self._began + board.config.deadline

  @property
  def over(self) -> bool:
    """Whether nothing more needs to be judged."""
    return not self._left or len(self._failed) > self._most or self._board.closed

  def settle(self, function: int, first: int, outcomes: Sequence[Outcome]) -> None:
    """Writes down what became of some rows."""
    with self._board.changed:
      for row, outcome in enumerate(outcomes, first):
        if self._outcomes[function][row] is _OPEN:  # else it came too late
          self._outcomes[function][row] = outcome
          self._left -= 1
          if isinstance(outcome, Failure):
            self._failed.add(row)
      self.seconds = time.monotonic() - self._began
      self._board.changed.notify_all()

  def result(self) -> list[list[Outcome]]:
    """Waits until all is judged, too much has failed, or the deadline is over.

    Returns:
      For each function, a float, None or a `Failure` for each row.

    Raises:
      RewardError: the pool was closed, or its processes cannot be started any more.
    """
    with self._board.changed:
      self._board.changed.wait_for(
        lambda: self.over, max(0.0, self.end - time.monotonic())
      )
      if self._board.trouble:
        raise RewardError(
          f"the reward workers cannot be started: {self._board.trouble}"
        )
      if self._left and self._board.closed:
        raise RewardError("the reward pool was closed before a rollout was judged")
      kind, message = (
        "timeout",
        (
          f"was not done {self._board.config.deadline:g} s after its rollout was "
          "submitted (deadline)"
        ),
      )
      if len(self._failed) > self._most:
        kind, message = "dropped", "was dropped, for too many rows had failed"
      late = Failure(kind, message)
      for outcomes in self._outcomes:
        outcomes[:] = [late if x is _OPEN else x for x in outcomes]
      self._left = 0
    return [list(outcomes) for outcomes in self._outcomes]


_OPEN = object()


@dataclasses.dataclass(frozen=True)
class _Job:
  judging: Judging
  function: int
  first: int
  end: int  # after the last row


class _Board:
  """What the threads share; it does not know the pool, so a pool can be dropped."""

  def __init__(self, setup: bytes, config: PoolConfig):
    self.setup = setup
    self.config = config
    self.jobs: collections.deque[_Job] = collections.deque()
    self.changed = threading.Condition()
    self.closed = False
    self.trouble = ""
    self.started = 0  # processes, replaced ones as well
    self.output = _Output()
    self.threads: list[threading.Thread] = []

  def close(self, trouble: str = "") -> None:
    with self.changed:
      self.closed = True
      self.trouble = self.trouble or trouble
      self.changed.notify_all()

  def shut_down(self) -> None:
    self.close()
    for thread in self.threads:
      if thread is not threading.current_thread():
        thread.join(timeout=10)

  def start(self) -> _Child | None:
    """A process that is ready; None when the pool is closed."""
    for left in reversed(range(_START_TRIES)):
      try:
        child = _Child(self.setup, self.config, lambda: self.closed, self.output)
      except (_Lost, OSError) as error:
        if self.closed:
          return None
        # What a module raises on import it will raise again.
        if not left or getattr(error, "kind", "") == "start":
          self.close(trouble=f"{error}")
          return None
      else:
        with self.changed:
          self.started += 1
          self.changed.notify_all()
        return child
    return None

  def take(self) -> _Job | None:
    with self.changed:
      self.changed.wait_for(lambda: self.closed or self.jobs)
      return None if self.closed else self.jobs.popleft()


def _serve(board: _Board) -> None:
  """What a thread does: keeps one child alive and hands it jobs."""
  child = None
  try:
    while (child := child or board.start()) and (job := board.take()):
      child = _do(board, job, child)
      del job  # else an idle thread would hold on to a rollout's texts
  finally:
    if child:
      child.kill()


def _do(board: _Board, job: _Job, child: _Child) -> _Child | None:
  """Judges a job's rows; the child, unless it has to be replaced."""
  judging, rows = job.judging, job.end - job.first
  if judging.over or time.monotonic() >= judging.end:
    return child
  end = min(judging.end, time.monotonic() + board.config.call_deadline)
  columns = {k: v[job.first : job.end] for k, v in judging.columns.items()}
  request = worker.frame({"function": job.function, "columns": columns})
  try:
    answer = child.ask(request, end, lambda: judging.over)
  except _Lost as lost:
    child.kill()
    child = None
    answer = {"kind": lost.kind, "message": str(lost), "traceback": lost.printed}
  outcomes = read_answer(answer, rows)
  again = rows > 1 and isinstance(outcomes[0], Failure) and retry(outcomes[0])
  if again and time.monotonic() < judging.end:
    with board.changed:
      board.jobs.extendleft(
        dataclasses.replace(job, first=row, end=row + 1)
        for row in reversed(range(job.first, job.end))
      )
      board.changed.notify_all()
  else:
    judging.settle(job.function, job.first, outcomes)
  if child and child.worn:
    child.kill()
    child = None
  return child


def read_answer(answer: dict[str, Any], rows: int) -> list[Outcome]:
  """The outcomes of a call's rows, from what `worker.call` gave."""
  if "values" not in answer:
    failure = Failure(
      answer["kind"], answer["message"], answer["traceback"], answer.get("error")
    )
    return [failure] * rows
  return [
    Failure("value", f"gave {v[0]}, and not a finite float32 number or None")
    if isinstance(v, list)
    else v
    for v in answer["values"]
  ]


def retry(failure: Failure) -> bool:
  """Whether a failure of several rows at once may be the fault of one of them."""
  return failure.kind in ("raised", "timeout", "crash")


class RewardPool:
  """Worker processes for some reward functions.

      with RewardPool([my_rewards.politeness]) as pool:
        judging = pool.submit(columns)  # the device may work meanwhile
        outcomes = judging.result()

  Args:
    functions: see `worker.describe`.
    config: see `PoolConfig`.

  Raises:
    ConfigError: a function cannot be imported by a child, or its module raises.
  """

  def __init__(self, functions: Sequence[Callable], config: PoolConfig | None = None):
    config = config or PoolConfig()
    setup = worker.frame({"functions": [worker.describe(f) for f in functions]})
    self.count = len(functions)
    self._board = board = _Board(setup, config)
    board.threads += [
      threading.Thread(
        target=_serve, args=(board,), name=f"rlft-reward-{i}", daemon=True
      )
      for i in range(config.workers)
    ]
    # Runs when the pool is closed, dropped, or the interpreter ends.
    self._finish = weakref.finalize(self, _Board.shut_down, board)
    for thread in board.threads:
      thread.start()
    with board.changed:
      board.changed.wait_for(lambda: board.closed or board.started >= config.workers)
    if board.trouble:
      self.close()
      raise ConfigError(f"the reward workers cannot be started: {board.trouble}")

  @property
  def restarts(self) -> int:
    """Processes that took the place of another one."""
    return max(0, self._board.started - len(self._board.threads))

  def submit(
    self, columns: Mapping[str, list], most_failures: int | None = None
  ) -> Judging:
    """Starts to judge rows with every function; does not wait.

    Args:
      columns: what the functions get, by keyword: JSON values, one list per column,
        all of the same length.
      most_failures: rows that may fail; above it nothing more is judged.
    """
    if self._board.closed:
      raise RewardError(
        "the reward pool is closed"
        + (f": {self._board.trouble}" * bool(self._board.trouble))
      )
    config = self._board.config
    rows = len(columns["completions"])
    judging = Judging(self._board, self.count, rows, dict(columns), most_failures)
    size = max(1, min(config.chunk_rows, -(-rows // config.workers)))
    with self._board.changed:
      self._board.jobs.extend(
        _Job(judging, function, first, min(first + size, rows))
        for function in range(self.count)
        for first in range(0, rows, size)
      )
      self._board.changed.notify_all()
    return judging

  def close(self) -> None:
    """Ends the processes, whatever they do, and waits for their end."""
    self._finish()

  def __enter__(self) -> RewardPool:
    return self

  def __exit__(self, *error: object) -> None:
    self.close()

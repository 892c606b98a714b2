"""Calls a reward function: in this process, or as the program of a pool's child.

Next to nothing is imported: a child is there in a tenth of a second, and starts no
device. It speaks frames of JSON, eight bytes of length first, over what were its
standard input and output; those two then read nothing and write to standard error, so
that a function which prints cannot garble an answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import inspect
import itertools
import json
import math
import operator
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from typing import Any

from rlft.core.errors import ConfigError

HEADER = 8  # bytes of a frame's length
STOPS = (signal.SIGINT, signal.SIGTERM)  # that are the run's, and no reward's
MAX_FLOAT32 = 3.4028234663852886e38
PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h


def call(function: Callable, columns: dict[str, list]) -> dict[str, Any]:
  """Calls a reward function, sync or async, and holds it to its contract.

  Args:
    function: `f(*, prompts, completions, completion_ids, **columns)`; one without `**`
      is given what it names. A column does not change what a partial has settled.
    columns: lists of the same length n.

  Returns:
    {"values": n of float | None | [what is wrong]}; or {"kind": "raised" | "count",
    "message", "traceback", "error": the exception or None}. Whatever it raises, be it
    SystemExit.

  Raises:
    What the process's own handler of a signal raises, such as KeyboardInterrupt of a
    Ctrl-C.
  """
  count = len(columns["completions"])
  _, named = parameters(function)
  settled = function.keywords if isinstance(function, functools.partial) else ()
  columns = {
    name: x
    for name, x in columns.items()
    if name not in settled and (named is None or name in named)
  }
  with own_stops() as stopping:
    try:
      values = function(**columns)
      if inspect.isawaitable(values):
        values = _wait(values)
      if _is_list(values):
        # One more than there are rows is enough: a generator may have no end.
        known = hasattr(values, "__len__")
        values = list(values if known else itertools.islice(values, count + 1))
        values = [_number(value) for value in values]
    except BaseException as error:
      if not stopping:
        return raised(error)
  if stopping:  # the function may have swallowed it
    raise stopping[0]
  message = ""
  if not isinstance(values, list):
    message = f"returned {_show(values)}, and not a list of numbers"
  elif len(values) != count:
    message = (
      f"returned {len(values)} values for {count} completions; it returns one for "
      "each, None for what it cannot judge"
    )
  if message:
    return {"kind": "count", "message": message, "traceback": "", "error": None}
  return {"values": values}


def _is_list(values: Any) -> bool:
  """Whether it has values in an order."""
  return isinstance(values, Iterable) and not isinstance(
    values, str | bytes | Mapping | Set
  )


def parameters(function: Callable) -> tuple[list[str], set[str] | None]:
  """(what a function cannot be called without, all that it takes by keyword, or None
  where it takes any name)."""
  try:
    signature = inspect.signature(function)
  except (TypeError, ValueError):  # some that are written in C have none
    return [], None
  named = [
    x
    for x in signature.parameters.values()
    if x.kind in (x.POSITIONAL_OR_KEYWORD, x.KEYWORD_ONLY)
  ]
  needed = [x.name for x in named if x.default is x.empty]
  any_name = any(x.kind == x.VAR_KEYWORD for x in signature.parameters.values())
  return needed, None if any_name else {x.name for x in named}


@contextlib.contextmanager
def own_stops() -> Iterator[list[BaseException]]:
  """What handlers of signals raise while a function has the thread: a Ctrl-C is for the
  run, where a KeyboardInterrupt of the function's own costs it a row."""
  stopping: list[BaseException] = []
  before = {}
  if threading.current_thread() is threading.main_thread():
    before = {number: signal.getsignal(number) for number in STOPS}
  before = {number: own for number, own in before.items() if callable(own)}

  def handler(own, number, frame):
    try:
      own(number, frame)
    except BaseException as error:
      stopping.append(error)
      raise

  try:
    for number, own in before.items():
      signal.signal(number, functools.partial(handler, own))
    yield stopping
  finally:
    for number, own in before.items():
      signal.signal(number, own)


def raised(error: BaseException) -> dict[str, Any]:
  text = "".join(traceback.format_exception(error))
  message = f"raised {_show(error)}"
  return {"kind": "raised", "message": message, "traceback": text, "error": error}


def _wait(awaitable):
  async def run():
    return await awaitable

  try:
    asyncio.get_running_loop()
  except RuntimeError:
    return asyncio.run(run())
  # A notebook's loop is running in this thread, and cannot run another one inside.
  box: list = []

  def target():
    try:
      box.append((asyncio.run(run()), None))
    except BaseException as error:
      box.append((None, error))

  thread = threading.Thread(target=target)
  thread.start()
  thread.join()
  value, error = box[0]
  if error is not None:
    raise error
  return value


def _number(value: Any) -> float | list[str] | None:
  if value is None:
    return None
  try:
    strange = isinstance(value, str | bytes) or getattr(value, "ndim", 0)
    number = math.nan if strange else float(value)
  except BaseException:  # of any kind: the value is a stranger
    number = math.nan
  # Rewards are float32: a larger number would become infinite later, unseen.
  return number if abs(number) <= MAX_FLOAT32 else [_show(value)]


def _show(value: Any) -> str:
  try:
    return f"{value!r:.200}"
  except BaseException:  # an int of 5,000 digits has no text
    return f"a {type(value).__name__} that cannot be printed"


# ------------------------------------------------------------------ names


def name_of(function: Callable) -> str:
  """What a message calls a function."""
  while isinstance(function, functools.partial):
    function = function.func
  return getattr(function, "__qualname__", None) or repr(function)


def describe(function: Any) -> Any:
  """How a child process gets a function: by its import path, as JSON.

  Args:
    function: a function (or class) of a module, or a `functools.partial` of one whose
      arguments are such functions or plain data.

  Raises:
    ConfigError: a child could not import it; says how it could.
  """
  if isinstance(function, functools.partial):
    keywords = {key: _describe_argument(v) for key, v in function.keywords.items()}
    args = [_describe_argument(value) for value in function.args]
    return {"path": describe(function.func)["path"], "args": args, "keywords": keywords}
  module = getattr(function, "__module__", None)
  name = getattr(function, "__qualname__", None)
  cure = (
    "define it at the top level of a module (settings go in with functools.partial), "
    "or run without the pool"
  )
  if module == "__main__":
    raise ConfigError(
      f"{name} is defined in the script that runs, which a worker process cannot "
      "import: move it to a file of its own, or run without the pool"
    )
  try:
    found = operator.attrgetter(name)(sys.modules[module])
  except (AttributeError, KeyError, TypeError):
    found = None
  if found is not function:
    raise ConfigError(
      f"a worker process cannot import {name_of(function)}, for it is no name of a "
      f"module: {cure}"
    )
  return {"path": f"{module}:{name}"}


def _describe_argument(value: Any) -> Any:
  if isinstance(value, functools.partial) or callable(value):
    return describe(value)
  if isinstance(value, list | tuple):
    return [_describe_argument(item) for item in value]
  if value is None or isinstance(value, str | bool | int | float):
    return value
  raise ConfigError(
    f"a worker process cannot be given {value!r:.100}: arguments of a reward function "
    "are functions, text, numbers, None, or lists of them"
  )


def resolve(spec: Any) -> Any:
  """What `describe` described: a function by its import path, or plain data."""
  if isinstance(spec, list):
    return [resolve(item) for item in spec]
  if not isinstance(spec, dict):
    return spec
  module, _, name = spec["path"].partition(":")
  function = operator.attrgetter(name)(importlib.import_module(module))
  if "args" not in spec:
    return function
  keywords = {key: resolve(value) for key, value in spec["keywords"].items()}
  return functools.partial(function, *resolve(spec["args"]), **keywords)


# ------------------------------------------------------------------ the child


def main() -> None:
  """Serves calls until the parent hangs up."""
  if sys.platform == "linux":
    import ctypes

    # A parent that is killed cannot end a child that hangs in C; the kernel can.
    ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
  incoming, outgoing = os.dup(0), os.dup(1)
  nothing = os.open(os.devnull, os.O_RDONLY)
  os.dup2(nothing, 0)
  os.close(nothing)
  os.dup2(2, 1)
  own, home = os.getpid(), os.getcwd()
  setup = _read(incoming)
  if setup is None:
    return
  try:
    functions = [resolve(spec) for spec in setup["functions"]]
  except BaseException as error:
    return _write(outgoing, raised(error))
  _write(outgoing, {"ready": own})
  while (request := _read(incoming)) is not None:
    os.makedirs(home, exist_ok=True)  # the call before may have removed it
    os.chdir(home)
    try:
      answer = call(functions[request["function"]], request["columns"])
    except BaseException as error:  # sys.exit() in a reward is a failure as well
      answer = raised(error)
    if os.getpid() != own:  # a fork that the function left behind came back here
      os._exit(1)
    with contextlib.suppress(Exception):  # the function may have closed it
      sys.stdout.flush()
    _write(outgoing, answer)


def frame(value: Any) -> bytes:
  """A value as it travels."""
  data = json.dumps(value).encode()
  return len(data).to_bytes(HEADER, "big") + data


def _write(file: int, answer: dict[str, Any]) -> None:
  answer.pop("error", None)
  left = memoryview(frame(answer))
  while left:
    left = left[os.write(file, left) :]


def _read(file: int) -> Any:
  header = _read_exactly(file, HEADER)
  if header is None:
    return None
  data = _read_exactly(file, int.from_bytes(header, "big"))
  return None if data is None else json.loads(data)


def _read_exactly(file: int, count: int) -> bytes | None:
  parts = []
  while count:
    part = os.read(file, min(count, 1 << 20))
    if not part:
      return None  # the parent hung up
    parts.append(part)
    count -= len(part)
  return b"".join(parts)

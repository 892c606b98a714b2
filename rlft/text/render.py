"""Chat templates rendered by a child that may be killed; see `render_main`."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlft.core.errors import ConfigError, DataError

_PROGRAM = Path(__file__).with_name("render_main.py")
_AT_ONCE = 256  # conversations of a request


@dataclasses.dataclass(frozen=True)
class Rendering:
  """A conversation as the chat template writes it.

  Attributes:
    text: what `apply_chat_template(tokenize=False)` gives.
    spans: (start, end, of the last message) of every piece of it that a message said,
      in order; None where the template alters texts beyond following.
    said: what the messages said.
  """

  text: str
  spans: tuple[tuple[int, int, bool], ...] | None
  said: tuple[str, ...]


def render(
  tokenizer: Any,
  conversations: Sequence[Sequence[Mapping[str, Any]]],
  add_generation_prompt: bool,
) -> list[Rendering]:
  """Renders conversations with the tokenizer's chat template.

  Time, memory and the length of the text are bounded, on any thread.

  Args:
    tokenizer: a `transformers` tokenizer.
    conversations: lists of messages, none empty.
    add_generation_prompt: whether to open the assistant's turn at the end.

  Raises:
    ConfigError: there is no template, or it cannot be rendered, in one line.
    DataError: a message holds something other than JSON.
  """
  if not getattr(tokenizer, "chat_template", None):
    raise ConfigError(
      "the tokenizer has no chat template: give texts, and leave chat=False"
    )
  try:
    template = tokenizer.get_chat_template()
  except ValueError as error:
    raise ConfigError(str(error).split("\n")[0]) from None
  variables = {
    **tokenizer.special_tokens_map,
    "tools": None,
    "documents": None,
    "add_generation_prompt": add_generation_prompt,
  }
  out = []
  for start in range(0, len(conversations), _AT_ONCE):
    some = [
      # As transformers: a null is a key that is not there.
      [{k: v for k, v in m.items() if v is not None} for m in conversation]
      for conversation in conversations[start : start + _AT_ONCE]
    ]
    request = {"template": template, "variables": variables, "conversations": some}
    try:
      line = json.dumps(request).encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
      raise DataError(f"a message holds something other than JSON: {error}") from None
    for i, answer in enumerate(_CHILD.ask(line)):
      if "error" in answer:
        raise ConfigError(
          f"the chat template cannot be rendered: {answer['error']} "
          f"(for {some[i]!r:.200})"
        )
      spans = answer["spans"]
      spans = spans if spans is None else tuple((a, b, last) for a, b, last in spans)
      out.append(Rendering(answer["text"], spans, tuple(_texts(some[i]))))
  return out


def _texts(value: Any) -> Iterator[str]:
  """The texts in a message, but for its role."""
  if isinstance(value, str):
    yield value
  elif isinstance(value, Mapping):
    yield from (t for key, x in value.items() if key != "role" for t in _texts(x))
  elif isinstance(value, list | tuple):
    yield from (t for x in value for t in _texts(x))


class _Child:
  """The program, started when it is first asked, and again after it has died."""

  def __init__(self):
    self._lock = threading.Lock()
    self._process: subprocess.Popen | None = None
    self._owner = 0

  def ask(self, line: bytes) -> list[dict[str, Any]]:
    with self._lock:
      if self._process is None or self._owner != os.getpid():  # not one of a fork
        self._start()
      try:
        self._process.stdin.write(line)
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
      except BrokenPipeError:
        answer = b""
      except BaseException:  # half a conversation with it is none
        self.end()
        raise
      if answer:
        return json.loads(answer)
      code = self.end()
    raise ConfigError(
      "the chat template cannot be rendered: it needs more time or memory than any "
      f"template should (its process ended with {code})"
    )

  def _start(self) -> None:
    path = os.pathsep.join(entry for entry in sys.path if entry)
    self._process = subprocess.Popen(
      [sys.executable, "-P", str(_PROGRAM)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      env={**os.environ, "PYTHONPATH": path},
      start_new_session=True,  # Ctrl-C is the parent's to handle
    )
    self._owner = os.getpid()

  def end(self) -> int | None:
    """Kills it, if there is one; its exit code."""
    process, self._process = self._process, None
    if process is None or self._owner != os.getpid():
      return None
    with contextlib.suppress(OSError):
      process.stdin.close()
    process.kill()
    process.stdout.close()
    return process.wait()


_CHILD = _Child()
atexit.register(_CHILD.end)

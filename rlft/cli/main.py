"""`rlft COMMAND ...`: finds the sub-command, and imports nothing but that one.

A sub-command is a file of this folder that defines `SUMMARY` (a string literal),
`add_arguments(parser)` and `run(args) -> int`. `args.overrides` holds the line's
`--config.FIELD=VALUE`, for `config.from_args`.
"""

from __future__ import annotations

import argparse
import ast
import collections
import contextlib
import difflib
import importlib
import os
import select
import signal
import sys
import textwrap
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlft.cli import interrupts
from rlft.core import platform
from rlft.core.compiled import keep_compiled
from rlft.core.errors import ConfigError, RlftError, StoppedError

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: launchers start such a run again
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as a shell has it: nobody starts it again


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command.

  Args:
    argv: the words after `rlft`; None takes them from the process.

  Returns:
    The exit code: the command's own; 2 for a mistake that rlft can name, which is then
    one line on stderr (set RLFT_TRACEBACK=1 for the traceback); 1 where a device is out
    of memory; 75 for a run that was asked to stop and has saved its state; 130 after
    Ctrl-C, which saves in the same way.
  """
  try:
    try:
      code = _run(list(sys.argv[1:] if argv is None else argv))
    except SystemExit as error:  # of argparse
      code = error.code
    sys.stdout.flush()  # or the interpreter does, and complains
    return code
  except BrokenPipeError:
    if not _nobody_reads():
      raise
    return 128 + signal.SIGPIPE  # as any program whose output is cut by `head`


def _nobody_reads() -> bool:
  """Whether who read our output has ended; then what is left of it goes nowhere."""
  gone = False
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError):  # it may be no file
      reader = select.poll()
      reader.register(stream.fileno(), 0)
      if reader.poll(0):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        gone = True
  return gone


def _run(argv: list[str]) -> int:
  try:
    with interrupts.listening():
      return _dispatch(argv)
  except BrokenPipeError:
    raise
  except StoppedError as error:
    print("rlft:", error, file=sys.stderr)
    return EXIT_INTERRUPTED if error.interrupted else EXIT_STOPPED
  except RlftError as error:
    if os.environ.get("RLFT_TRACEBACK") == "1":
      if _alone():
        raise
      traceback.print_exc()
    print("rlft: error:", " ".join(str(error).split()), file=sys.stderr)
    return _leave(2)
  except KeyboardInterrupt as error:
    print("rlft:", *error.args or ["interrupted"], file=sys.stderr)
    return _leave(EXIT_INTERRUPTED)
  except Exception as error:
    if _out_of_memory(error) and os.environ.get("RLFT_TRACEBACK") != "1":
      from rlft.cli import memory

      print("rlft: error:", memory.explain(error), file=sys.stderr)
      return _leave(1)
    if _alone():
      raise
    traceback.print_exc()
    of_jax = isinstance(error, sys.modules["jax"].errors.JaxRuntimeError)
    if of_jax or "Gloo" in str(error):  # whose errors are ValueErrors at times
      _await_verdict(str(error))
    return _leave(1)


def _dispatch(argv: list[str]) -> int:
  from rlft.cli import overrides as lines

  argv, overrides = lines.split_overrides(argv)
  if not argv or argv[0] in ("-h", "--help", "help"):
    print(_help())
    return 0 if argv else 2
  if argv[0] == "--version":
    import rlft

    print("rlft", rlft.__version__)
    return 0
  name, summaries = argv[0], _summaries()
  if name not in summaries:
    near = difflib.get_close_matches(name, summaries, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    commands = ", ".join(summaries)
    raise ConfigError(f"unknown command {name!r}{hint} (commands: {commands})")
  platform.choose()  # before the command's module imports jax
  platform.join()
  command = importlib.import_module(f"rlft.cli.{name.replace('-', '_')}")
  if getattr(command, "KEEP_COMPILED", True) and "jax" in sys.modules:
    keep_compiled()
  if not _alone():
    _check_hosts(name, command)
  args = parse(name, command, argv[1:], overrides)
  try:
    return command.run(args)
  except KeyboardInterrupt:
    workdir = getattr(args, "workdir", None)
    raise KeyboardInterrupt(interrupts.kept(workdir and Path(workdir))) from None


def parse(
  name: str, command: Any, words: Sequence[str], overrides: Sequence[tuple[str, str]]
) -> argparse.Namespace:
  """The command line of a command, or the error of a word that it does not take."""
  parser = argparse.ArgumentParser(
    prog=f"rlft {name}",
    description=_wrapped(command.__doc__ or command.SUMMARY),
    formatter_class=argparse.RawDescriptionHelpFormatter,
    # An abbreviation that works today is ambiguous after the next release.
    allow_abbrev=False,
  )
  command.add_arguments(parser)
  args, rest = parser.parse_known_args(words)
  if rest:
    raise _unknown_word(name, rest[0], parser)
  if overrides and not hasattr(args, "config"):
    raise ConfigError(f"rlft {name} has no --config to override: {overrides[0][0]!r}")
  args.overrides = overrides
  return args


def _wrapped(text: str, width: int = 80) -> str:
  """Paragraphs at the width of a terminal; what is indented stays as it is."""
  paragraphs = textwrap.dedent(text).strip().split("\n\n")
  return "\n\n".join(
    one if one.startswith(" ") else textwrap.fill(one, width, break_on_hyphens=False)
    for one in paragraphs
  )


def _unknown_word(name: str, word: str, parser: argparse.ArgumentParser) -> ConfigError:
  """The error of a word that the command does not take; names what was meant."""
  from rlft.cli import fields

  flag, equals, value = word.partition("=")
  path = flag.lstrip("-").replace("config.", "", 1)
  settings = parser.get_default("settings")
  meant = fields.ending(path, settings) if settings else []
  meant = [f"--config.{one}{equals}{value}" for one in meant]
  if not meant:
    flags = [one for action in parser._actions for one in action.option_strings]
    meant = difflib.get_close_matches(flag, flags, n=1)
  hint = f"; did you mean {fields.either(meant)}?" if meant else ""
  return ConfigError(
    f"rlft {name} does not take {word!r}{hint} (see rlft {name} --help)"
  )


def _out_of_memory(error: Exception) -> bool:
  """Whether a device is; nothing heavy is imported to know it."""
  kinds = [kind.__name__ for kind in type(error).__mro__]
  return "JaxRuntimeError" in kinds and "RESOURCE_EXHAUSTED" in str(error)


def _alone() -> bool:
  """Whether this is the only process of the run."""
  jax = sys.modules.get("jax")
  if jax is None or not jax.distributed.is_initialized():
    return True
  return jax.process_count() == 1


def _check_hosts(name: str, command: Any) -> None:
  """One of several processes: refuses what cannot be, and leaves stdout to the first.

  Raises:
    ConfigError: the command runs on one host, or the hosts differ.
  """
  import jax

  from rlft.core import hosts

  if not getattr(command, "MANY_HOSTS", False):
    raise ConfigError(
      f"rlft {name} runs on one host, with all of its devices; {jax.process_count()} "
      "processes were started"
    )
  # Counted here: a message would need as many devices on each already.
  counts = collections.Counter(device.process_index for device in jax.devices())
  if len(set(counts.values())) > 1 or len(counts) < jax.process_count():
    raise ConfigError(
      f"processes have {dict(counts)} devices: each needs as many as the others. "
      "Look for a host whose accelerators did not start"
    )
  asked = hosts.everyone(os.environ.get("RLFT_ROLLOUTS", ""))
  if len(set(asked)) > 1:
    raise ConfigError(f"RLFT_ROLLOUTS differs between the processes: {asked}")
  if not hosts.first():
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115, until the process ends


def _await_verdict(error: str) -> None:
  """Gives jax the time to say which process has died: it ends this one as it does."""
  if "RESOURCE_EXHAUSTED" in error:
    return
  seconds = platform.heartbeat_seconds() + 5
  print(
    "rlft: a computation with other processes failed: one of them has ended or died. "
    f"Within {seconds} s jax names it below; a run with checkpoints goes on from the "
    "last one when it is started again",
    file=sys.stderr,
    flush=True,
  )
  time.sleep(seconds)


def _leave(code: int) -> int:
  """The exit code; one of several processes ends at once with it.

  At an orderly end jax waits for the others, and they wait for this one in the middle
  of a computation: nobody would ever be told.
  """
  if not _alone():
    with contextlib.suppress(OSError):  # who reads them may be gone
      sys.stdout.flush()
      sys.stderr.flush()
    os._exit(code)
  return code


def _literals(name: str) -> dict[str, str]:
  """Command -> a text that its file defines; read from the source, not by import."""
  found = {}
  for path in sorted(Path(__file__).parent.glob("*.py")):
    for node in ast.parse(path.read_bytes()).body:
      if isinstance(node, ast.Assign | ast.AnnAssign):
        target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
        if isinstance(target, ast.Name) and target.id == name:
          found[path.stem.replace("_", "-")] = ast.literal_eval(node.value)
  return found


def _summaries() -> dict[str, str]:
  """Command -> its SUMMARY, quickstart first."""
  found = _literals("SUMMARY")
  return dict(sorted(found.items(), key=lambda item: (item[0] != "quickstart", item)))


GROUPS = ("start here", "train", "sample and evaluate", "study", "look and plan")


def _help() -> str:
  summaries, groups = _summaries(), _literals("GROUP")
  width = max(map(len, summaries), default=0)
  lines = []
  for group in (*GROUPS, "more"):
    own = [name for name in summaries if groups.get(name, "more") == group]
    lines += ["", f"{group}:"] if own else []
    lines += [f"  {name:<{width}}  {summaries[name]}" for name in own]
  commands = "\n".join(lines)
  return f"""usage: rlft COMMAND [--config=FILE[:ARG]] [--config.FIELD=VALUE ...] [...]

Reinforcement learning of language models in JAX.
{commands}

`rlft COMMAND --help` tells what a command takes, and all of its settings;
`rlft --version` prints the version.
"""


if __name__ == "__main__":
  sys.exit(main())

"""Reward functions that workers import, and that do what they must not.

A text says what befalls its row: "raise", "hang", "exit", "kill", "stop", "slow",
"leak", "eat", "nan" or "none"; any other is worth its number of characters.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import time

_LEAKED = []


def score(*, completions, **columns):
  return [_one(text) for text in completions]


def _one(text):
  if "raise" in text:
    raise ZeroDivisionError("length 0")
  if "hang" in text:
    re.match(r"(a+)+$", "a" * 60 + "b")  # hours in C, with the interpreter's lock
  if "exit" in text:
    os._exit(0)
  if "kill" in text:
    os.kill(os.getpid(), signal.SIGKILL)
  if "stop" in text:
    sys.exit("enough")
  if "slow" in text:
    time.sleep(0.3)
  if "leak" in text:
    _LEAKED.append(bytearray(40 << 20))
  if "eat" in text:
    eaten = []
    while True:
      eaten.append(b"x" * (16 << 20))
      time.sleep(0.01)
  return {"nan": float("nan"), "none": None}.get(text, len(text))


def size(*, completions, scale=1, **columns):
  return [scale * len(text) for text in completions]


def weigh(*, completions, function, **columns):
  return [2 * value for value in function(completions=completions)]


def too_few(*, completions, **columns):
  return [1.0]


async def later(*, completions, **columns):
  async def one(text):
    await asyncio.sleep(0.05)
    return _one(text)

  return await asyncio.gather(*map(one, completions))


def echo(*, completions, finished, answer, id, **columns):
  return [1000 * i + 10 * int(a) + f for i, a, f in zip(id, answer, finished)]


def process(*, completions, **columns):
  return [float(os.getpid())] * len(completions)


def heavy_modules(*, completions, **columns):
  heavy = {"jax", "flax", "transformers", "torch"} & set(sys.modules)
  return [float(len(heavy))] * len(completions)


def secret(*, completions, **columns):
  known = [name for name in ("HF_TOKEN", "MY_API_KEY") if name in os.environ]
  return [float(len(known))] * len(completions)


def noisy(*, completions, **columns):
  print('{"values": [9, 9, 9, 9]}')
  os.write(1, b"\x00\x00\x00\x00\x00\x00\x00\x02{}")
  left = sys.stdin.read()
  return [float(len(left)) for _ in completions]


def orphans(*, completions, **columns):
  """Leaves a child behind in each call, which holds everything it inherits open."""
  child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
  return [float(child.pid)] * len(completions)


def forks(*, completions, **columns):
  """Comes back twice."""
  if os.fork() == 0:
    return [-1.0] * len(completions)
  os.wait()
  return [1.0] * len(completions)


def chatty(*, completions, **columns):
  """Prints 20 MB."""
  for _ in range(20):
    print("x" * 999_999)
  return [1.0] * len(completions)


def last_words(*, completions, **columns):
  print("about to end", flush=True)
  os._exit(3)


def removes_its_directory(*, completions, **columns):
  """What stood there, which it removes with the directory."""
  found = len(os.listdir())
  with open("left", "w") as file:
    file.write("x")
  shutil.rmtree(os.getcwd())
  return [float(found)] * len(completions)

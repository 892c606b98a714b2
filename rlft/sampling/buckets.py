"""Sizes that programs are compiled for."""

from __future__ import annotations


def bucket(size: int, least: int = 16) -> int:
  """The smallest of least, 1.5 least, 2 least, 3 least, 4 least, ... that holds size.

  Shapes come in these steps, so that a run compiles a handful of programs and wastes
  at most a third of each.
  """
  power = least
  while power < size:
    if least > 1 and power * 3 // 2 >= size:
      return power * 3 // 2
    power *= 2
  return power

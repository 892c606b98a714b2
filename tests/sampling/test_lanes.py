"""The schedule of hosts that sample in one program, against a model of the device."""

from __future__ import annotations

import numpy as np

from rlft.core import hosts
from rlft.sampling.lanes import Lanes


def test_a_lane_without_prompts_does_not_stop_the_others():
  """Its empty slots count as done: to wait for so many would decode nothing."""
  count, slots, of = 8, 4, 2
  part = hosts.Share(0, of, (0, 1), None)
  lanes = Lanes(None, part, alone=False, count=count)
  lanes.open(slots)
  left = np.zeros(of * slots, int)  # tokens until a slot is done
  length = lambda lane, prompt: 1 if lane == 0 else 64
  ended, turns = [], 0
  while lanes.busy():
    turns += 1
    assert turns < 100
    while any(taken := lanes.take(1)):
      for lane, pairs in enumerate(taken):
        for slot, prompt in pairs:
          left[lane * slots + slot] = length(lane, prompt)
    enough = lanes.free() + of if lanes.waiting() else of * slots + 1
    while (left == 0).sum() < enough and left.any():
      left = np.maximum(left - 1, 0)
    ended += lanes.end(left == 0)
  assert sorted(prompt for _, prompt in ended) == list(range(count))


def test_one_lane_is_a_host_alone():
  lanes = Lanes(None, hosts.Share(1, 4, (0, 1, 2, 3), None), alone=True, count=3)
  lanes.open(2)
  assert (lanes.of, lanes.index, lanes.first) == (1, 0, 0)
  assert lanes.take(2) == [[(0, 0), (1, 1)]]
  assert (lanes.free(), lanes.waiting()) == (0, True)
  assert lanes.end(np.array([False, True])) == [(1, 1)]
  assert lanes.take(2) == [[(1, 2)]]
  assert not lanes.waiting() and lanes.busy()

"""Rollouts of given texts, and reward functions that worker processes can import."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest

from rlft.core.types import Rollout


@pytest.fixture(scope="session")
def samples():
  """The module `sample_rewards`, importable here and in worker processes."""
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(Path(__file__).parent))
    yield importlib.import_module("sample_rewards")


@pytest.fixture(scope="session")
def rollout_of():
  """Makes a rollout of texts, as `generate` would give it."""
  return _rollout_of


def _rollout_of(
  prompt_ids, texts, ids=None, finished=True, prompt=(3, 2), eos=0, chosen=None
) -> Rollout:
  """
  Args:
    prompt_ids: of the prompts; texts are as many for each.
    texts: the completions.
    ids: their tokens; by default one for each character, and `eos` where it finished.
    finished: of all rows, or of each.
    prompt: the prompt bucket, and the real tokens in it.
    chosen: of each token of each row; by default all.
  """
  rows = len(texts)
  finished = np.broadcast_to(finished, rows)
  if ids is None:
    ids = [
      [5 + i for i in range(len(t))] + [eos] * bool(f) for t, f in zip(texts, finished)
    ]
  wide, real = prompt
  tokens = np.full((rows, wide + max(map(len, ids)) + 2), 1, np.int32)
  mask = np.zeros(tokens.shape, bool)
  completion_mask = np.zeros(tokens.shape, bool)
  for row, own in enumerate(ids):
    end = wide + len(own)
    tokens[row, wide:end] = own
    mask[row, wide - real : end] = True
    completion_mask[row, wide:end] = True if chosen is None else chosen[row]
  zero = np.zeros(tokens.shape, np.float32)
  samples = rows // len(prompt_ids)
  return Rollout(
    tokens=tokens,
    mask=mask,
    completion_mask=completion_mask,
    logp=zero,
    raw_logp=zero,
    finished=np.array(finished),
    prompt_lengths=np.full(rows, real, np.int32),
    lengths=np.array([len(x) for x in ids], np.int32),
    prompt_ids=np.repeat(prompt_ids, samples).astype(np.int32),
    completions=list(texts),
    samples=samples,
  )

"""Fixtures of the training tests."""

from __future__ import annotations

import jax
import pytest


@pytest.fixture(scope="package", autouse=True)
def _quick_compilation():
  """Tiny programs that run a few times: compiling them is nearly all of the time."""
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", before)

"""rlft: reinforcement learning of language models in JAX.

    policy = rlft.load("path/or/hub-id")
    rollout = rlft.generate(policy, ["1 + 1 ="], samples=4, max_new_tokens=8)
    logp_BT = rlft.score(policy, rollout.tokens, rollout.mask)
    result = rlft.algorithms.grpo.run(policy, prompts, reward, config)

Names and subpackages load on first use (PEP 562), so that `import rlft` imports no jax
and starts no device; `rlft --help` stays quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rlft.core import platform as _platform

if TYPE_CHECKING:
  from rlft.core.compiled import keep_compiled
  from rlft.core.types import Example, Rollout
  from rlft.models.hub import Policy, load, save
  from rlft.sampling.generate import generate
  from rlft.sampling.score import score
  from rlft.training.progress import Progress

  __version__: str

# Before jax starts: with libtpu and no TPU it looks for one, and logs errors.
_platform.choose()

__all__ = [
  "Example",
  "Policy",
  "Progress",
  "Rollout",
  "generate",
  "keep_compiled",
  "load",
  "save",
  "score",
]

_HOME = {
  "Example": "rlft.core.types",
  "Policy": "rlft.models.hub",
  "Progress": "rlft.training.progress",
  "Rollout": "rlft.core.types",
  "generate": "rlft.sampling.generate",
  "keep_compiled": "rlft.core.compiled",
  "load": "rlft.models.hub",
  "save": "rlft.models.hub",
  "score": "rlft.sampling.score",
}
_PACKAGES = (
  "algorithms",
  "core",
  "models",
  "objectives",
  "probes",
  "rewards",
  "sampling",
  "tasks",
  "text",
  "training",
)


def __getattr__(name: str) -> Any:
  if name == "__version__":
    value = _version()
  elif name in _PACKAGES:
    value = importlib.import_module(f"rlft.{name}")
  elif name in _HOME:
    value = getattr(importlib.import_module(_HOME[name]), name)
  else:
    raise AttributeError(f"module 'rlft' has no attribute {name!r}")
  globals()[name] = value  # the next access does not come through here
  return value


def __dir__() -> list[str]:
  return sorted({*__all__, *_PACKAGES, "__version__"})


def _version() -> str:
  from importlib import metadata

  try:
    return metadata.version("rlft")
  except metadata.PackageNotFoundError:  # a checkout on sys.path, never installed
    return "0+unknown"

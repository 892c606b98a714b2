"""The sampler, and the scorer that agrees with it."""

from rlft.core.lazy import modules

__getattr__, __dir__ = modules(__name__)

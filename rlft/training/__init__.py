"""Train steps, and the loops, records and checkpoints around them."""

from rlft.core.lazy import modules

__getattr__, __dir__ = modules(__name__)

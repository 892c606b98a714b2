"""Rewards: their contract, ready-made and learned ones, worker processes."""

from rlft.core.lazy import modules

__getattr__, __dir__ = modules(__name__)

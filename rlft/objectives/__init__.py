"""Losses and estimates: arrays in, arrays out."""

from rlft.core.lazy import modules

__getattr__, __dir__ = modules(__name__)

"""Methods, one file each: `run` of a policy, data, mostly a reward, and settings."""

from rlft.core.lazy import modules

__getattr__, __dir__ = modules(__name__)

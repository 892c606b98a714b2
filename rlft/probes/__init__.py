"""What a policy can do: evaluation, reports, reward models held against data."""

from rlft.core.lazy import modules

__getattr__, __dir__ = modules(__name__)

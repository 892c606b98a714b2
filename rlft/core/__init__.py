"""What every layer may use: types, errors, randomness, meshes, hosts."""

from rlft.core.lazy import modules

__getattr__, __dir__ = modules(__name__)

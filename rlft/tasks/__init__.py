"""Problems with their judges; prompts and preferences in any form."""

from rlft.core.lazy import modules

__getattr__, __dir__ = modules(__name__)

"""Models: the decoder, its heads and cache, and checkpoints in and out."""

import os

from rlft.core.lazy import modules

# transformers reads tokenizers here; that torch is absent is no news to anybody.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

__getattr__, __dir__ = modules(__name__)

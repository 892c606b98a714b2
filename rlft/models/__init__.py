"""Models: the decoder, its heads and cache, and checkpoints in and out."""

import os

# transformers reads tokenizers here; that torch is absent is no news to anybody.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

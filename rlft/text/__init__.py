"""Texts and chats to token ids."""

from rlft.core.lazy import modules

__getattr__, __dir__ = modules(__name__)

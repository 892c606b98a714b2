"""Mistral: Llama with a sliding window on every layer."""

from __future__ import annotations

from typing import Any

from rlft.models.decoder import DecoderConfig
from rlft.models.families import llama, table
from rlft.models.families.table import Family


def _from_hf(hf: dict[str, Any]) -> DecoderConfig:
  # An absent window is the published 4096; null means none.
  window = hf.get("sliding_window", 4096)
  if window is not None:
    window = table.size(hf, "sliding_window", 4096)
  local = [True] * table.size(hf, "num_hidden_layers")
  return DecoderConfig(**llama.settings(hf, windows=table.windows(hf, local, window)))


def _to_hf(config: DecoderConfig) -> dict[str, Any]:
  window = config.windows[0] if config.windows else None
  return llama.to_settings(config) | {"sliding_window": window}


MISTRAL = Family(
  "MistralForCausalLM", "mistral", "model.", llama.WEIGHTS, _from_hf, _to_hf
)

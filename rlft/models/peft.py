"""PEFT's LoRA adapters: a directory of changes, merged into its base while it is read.

  W + scale * B A, scale = alpha / r, or alpha / sqrt(r) with `use_rslora`

A tensor is merged when it is read, rows at a time, so that nothing is held twice.

Source: Hu et al. 2021 (arXiv 2106.09685); Kalajdzievski 2023 (arXiv 2312.03732); the
names of huggingface/peft.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from rlft.core.errors import CheckpointError
from rlft.models import tensorfile, weights
from rlft.models.families import Family

CONFIG, FILE = "adapter_config.json", "adapter_model.safetensors"
# What changes the result and is not computed, with the values that are.
_ONLY = {
  "peft_type": ("LORA",),
  "use_dora": (False, None),
  "bias": ("none", None),
  "lora_bias": (False, None),
  "init_lora_weights": (True, False, None, "gaussian"),
  "layer_replication": (None,),
  "target_parameters": (None, []),
  "trainable_token_indices": (None, [], {}),
  "alora_invocation_tokens": (None,),
  "use_qalora": (False, None),
  "use_bdlora": (False, None),
}


class Adapted:
  """The tensors of a base with an adapter merged in (a `weights.Source`)."""

  def __init__(
    self,
    base: weights.Source,
    family: Family,
    tied: bool,
    about: dict[str, Any],
    file: tensorfile.TensorFile,
  ):
    self._base, self._file, self._about = base, file, about
    for key, legal in _ONLY.items():
      if about.get(key) not in legal:
        raise self._error(f"has {key}={about[key]!r:.60}, which is not supported")
    self._names = weights.names_in(base, family)
    self._across = {w.name for w in family.weights if not w.transpose}
    self._factors: dict[str, dict[str, str]] = {}  # tensor -> {"A": name, "B": name}
    self._whole: dict[str, str] = {}  # tensor that is replaced -> name
    for name in file:
      plain = name.removeprefix("base_model.model.").replace(".default.", ".")
      found = re.fullmatch(r"(.*)\.lora_([AB])\.weight", plain)
      if found:
        self._factors.setdefault(found[1] + ".weight", {})[found[2]] = name
      elif "lora_" in plain or plain == name:
        raise self._error(f"has the tensor {name!r}, which is not supported")
      else:
        plain = plain.replace(".modules_to_save.", ".").replace(".base_layer.", ".")
        self._whole[plain] = name
    ends = {weights.name_of(family, path) for path in ("embedding", "head")}
    changed = ends & (set(self._factors) | set(self._whole))
    if tied and changed and not ends <= set(self._whole):
      raise self._error(f"changes {sorted(changed)} alone of a tied model")
    for name, pair in self._factors.items():
      self._check(name, pair)

  def _error(self, what: str) -> CheckpointError:
    folder = self._file.path.parent
    return CheckpointError(
      f"{folder} is a PEFT adapter that {what}. Merge it where torch and peft are "
      'installed: python -c "from peft import AutoPeftModelForCausalLM as M; '
      f"M.from_pretrained('{folder}').merge_and_unload()"
      f".save_pretrained('{folder}-merged')\""
    )

  def _check(self, name: str, pair: dict[str, str]) -> None:
    if name not in self._names:
      raise self._error(f"changes {name!r}, which its base does not have")
    if set(pair) != {"A", "B"}:
      raise self._error(f"has one factor alone of {name!r}")
    a, b = (self._file.shape(pair[factor]) for factor in "AB")
    shape = self.shape(name)
    out = shape[::-1] if self._crosses(name) else shape
    rank, _ = self._rank(name)
    if len(out) != 2 or a != (rank, out[1]) or b != (out[0], rank):
      raise self._error(f"has factors {b} x {a} for {name!r} of {shape}, rank {rank}")
    for factor in pair.values():
      weights.check_dtype(self._file.infos[factor].dtype, factor, self._file.path)

  def _crosses(self, name: str) -> bool:
    """Whether the tensor is [in, out] (GPT-2), where B A is [out, in]."""
    return re.sub(r"\.\d+\.", ".{}.", name) in self._across

  def _rank(self, name: str) -> tuple[int, float]:
    """(r, scale) of a tensor: a pattern matches the end of the module's name."""
    module, out = name.removesuffix(".weight"), []
    for key, patterns in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
      value = self._about.get(key)
      for pattern, own in (self._about.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
          value = own
          break
      if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise self._error(f"has {key}={value!r:.60}, which is no positive number")
      out.append(value)
    rank, alpha = out
    root = math.sqrt(rank) if self._about.get("use_rslora") else rank
    return int(rank), alpha / root

  def names(self) -> set[str]:
    return set(self._names) | set(self._whole)

  def where(self, name: str) -> str:
    if name in self._whole:
      return str(self._file.path)
    return self._base.where(self._names[name])

  def shape(self, name: str) -> tuple[int, ...]:
    if name in self._whole:
      return self._file.shape(self._whole[name])
    return self._base.shape(self._names[name])

  def dtype(self, name: str) -> str:
    if name in self._whole:
      return self._file.infos[self._whole[name]].dtype
    return self._base.dtype(self._names[name])

  def chunks(self, name: str, whole: bool) -> Iterator[tuple[int, np.ndarray]]:
    if name in self._whole:
      rows = self._file.chunks(self._whole[name], whole)
    else:
      rows = self._base.chunks(self._names[name], whole)
    if name not in self._factors:
      yield from rows
      return
    a, b = (
      next(self._file.chunks(self._factors[name][f], True))[1].astype(np.float32)
      for f in "AB"
    )
    left, right = (a.T, b.T) if self._crosses(name) else (b, a)
    _, scale = self._rank(name)
    for first, chunk in rows:
      update = left[first : first + chunk.shape[0]] @ right
      yield first, chunk.astype(np.float32) + np.float32(scale) * update

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
  "bias": ("none", None),
  "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}
# What says how the adapter was made, or is read here. Of any other setting only a
# false value is known to change nothing.
_READ = {
  *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"),
  *("base_model_name_or_path", "revision", "modules_to_save", "task_type"),
  *("auto_mapping", "inference_mode", "peft_version", "lora_dropout", "eva_config"),
  *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
  *("megatron_config", "megatron_core", "qalora_group_size", "runtime_config"),
  *("fan_in_fan_out", "ensure_weight_tying"),  # the family and the tensors tell these
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
    """Checks the adapter.

    Args:
      base, family, tied: the base's tensors, whose names they have, and whether its
        embedding is its head too.
      about: adapter_config.json.
      file: the adapter's tensors.

    Raises:
      CheckpointError: it is of a kind that is not supported, or does not fit.
    """
    self._base, self._file, self._about = base, file, about
    for key, value in ({"peft_type": None} | about).items():
      if value not in _ONLY[key] if key in _ONLY else value and key not in _READ:
        raise self._error(f"has {key}={value!r:.60}, which is not supported")
    self._names = weights.names_in(base, family)
    self._across = {w.name for w in family.weights if not w.transpose}
    self._factors: dict[str, dict[str, str]] = {}  # tensor -> {"A": name, "B": name}
    self._whole: dict[str, str] = {}  # tensor that is replaced -> name
    for name in file:
      self._place(name)
    if not self._factors and not self._whole:
      raise self._error("changes nothing: its file is empty")
    self.tied = tied and self._stay_tied(family)
    for name, pair in self._factors.items():
      self._check(name, pair)
    saved = about.get("modules_to_save") or []
    if not isinstance(saved, list):
      raise self._error(f"has modules_to_save={saved!r:.60}, which is no list")
    for module in saved:  # the end of a name
      lost = [n for n in self._names if f"{module}." in n and n not in self._whole]
      if lost:
        raise self._error(f"saved {module!r} by its config, but not {lost[0]!r}")

  def _place(self, name: str) -> None:
    plain = name.removeprefix("base_model.model.").replace(".default.", ".")
    found = re.fullmatch(r"(.*)\.lora_(?:embedding_)?([AB])(\.weight)?", plain)
    if found:
      place, key = self._factors.setdefault(found[1] + ".weight", {}), found[2]
    else:
      # Where tokens were added, what wraps an end is saved too, beside the end itself.
      place, key = self._whole, re.sub(r"\.(modules_to_save|base_layer)\.", ".", plain)
      twice = (
        ".modules_to_save." in plain and f"base_model.model.{key}" in self._file.infos
      )
      if twice or ".original_module." in plain:
        return
    if key in place or plain == name or (not found and "lora_" in plain):
      raise self._error(f"has the tensor {name!r}, which is not supported")
    weights.check_dtype(self._file.infos[name].dtype, name, self._file.path)
    place[key] = name

  def _stay_tied(self, family: Family) -> bool:
    """Whether a tied model is tied still, which it is not once one end was trained.

    The other end then keeps the base's tensor, as in the model that was trained. (To
    merge into the shared tensor, as PEFT does with a warning, would change both.)
    """
    ends = head, embedding = [weights.name_of(family, p) for p in ("head", "embedding")]
    factors, whole = set(ends) & set(self._factors), set(ends) & set(self._whole)
    if not factors and not whole:
      return True
    if not factors and len(whole) == 2 and weights.equal(self, head, embedding):
      del self._whole[head]
      self._names.pop(head, None)
      return True
    shared = self._names.get(embedding) or self._names.get(head)
    if shared is not None:
      self._names |= dict.fromkeys(ends, shared)
    return False

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

  def _crosses(self, name: str) -> bool:
    """Whether the tensor is [in, out] (GPT-2), where B A is [out, in]."""
    return re.sub(r"\.\d+\.", ".{}.", name) in self._across

  def _rank(self, name: str) -> tuple[int, float]:
    """(r, scale) of a tensor: a pattern matches the end of the module's name."""
    module, out = name.removesuffix(".weight"), []
    for key, patterns in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
      value = self._about.get(key)
      for pattern, own in self._patterns(patterns).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
          value = own
          break
      if type(value) not in (int, float) or not 0 < value < 1e9:
        raise self._error(f"has {key}={value!r:.60}, which is no positive number")
      out.append(value)
    rank, alpha = out
    return rank, alpha / (math.sqrt(rank) if self._about.get("use_rslora") else rank)

  def _patterns(self, key: str) -> dict[str, Any]:
    """Patterns of names, which are regular expressions that somebody published."""
    patterns = self._about.get(key) or {}
    if not isinstance(patterns, dict):
      raise self._error(f"has {key}={patterns!r:.60}, which is no dict")
    for pattern in patterns:
      # Repeated groups can take for ever.
      bounded = not re.search(r"\)[*+?{]", pattern) and len(pattern) < 200
      try:
        re.compile(pattern)
      except (re.error, RecursionError, OverflowError):
        bounded = False
      if not bounded or len(re.findall(r"[*+{]", pattern)) > 3:
        raise self._error(f"has the pattern {pattern!r:.60} in {key}")
    return patterns

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

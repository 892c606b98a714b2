"""Model families: Hugging Face's configs and tensor names, translated to the decoder.

One small file a family; a name in config.json resolves here and nowhere else.
"""

from __future__ import annotations

from typing import Any

from rlft.core.errors import CheckpointError, ConfigError
from rlft.models.decoder import DecoderConfig
from rlft.models.families.gemma import GEMMA, GEMMA2, GEMMA3
from rlft.models.families.gpt2 import GPT2
from rlft.models.families.llama import LLAMA
from rlft.models.families.mistral import MISTRAL
from rlft.models.families.neox import NEOX
from rlft.models.families.opt import OPT
from rlft.models.families.phi import PHI3
from rlft.models.families.qwen import QWEN2, QWEN3
from rlft.models.families.table import Family, Weight

__all__ = [
  "FAMILIES",
  "Family",
  "Weight",
  "classifier_of",
  "resolve",
  "to_hf",
  "trunk_of_classifier",
]

FAMILIES = (
  LLAMA,
  MISTRAL,
  QWEN2,
  QWEN3,
  GEMMA,
  GEMMA2,
  GEMMA3,
  GPT2,
  NEOX,
  OPT,
  PHI3,
)


def resolve(hf: dict[str, Any]) -> Family:
  """The family that a config.json names.

  Args:
    hf: the contents of config.json.

  Raises:
    CheckpointError: it names none, one that is not supported, or remote code.
  """
  if hf.get("quantization_config"):
    raise CheckpointError(
      "config.json has a 'quantization_config': quantised weights cannot be trained; "
      "use the unquantised checkpoint, or a GGUF file, which is dequantised on loading"
    )
  architectures = hf.get("architectures") or []
  if not isinstance(architectures, list):
    raise CheckpointError(
      f"config.json: 'architectures' is {architectures!r:.80}; it must be a list"
    )
  # Published Phi-3 still names the code that transformers has had since as its own.
  if hf.get("auto_map") and architectures != [PHI3.architecture]:
    raise CheckpointError(
      f"config.json has an 'auto_map' ({sorted(hf['auto_map'])}): the model wants to "
      "run Python code that comes with the checkpoint. rlft never runs it. If the "
      "weights are those of a supported architecture, remove 'auto_map' and name it "
      "in 'architectures'"
    )
  for family in FAMILIES:
    if family.architecture in architectures:
      return family
    if not architectures and family.model_type == hf.get("model_type"):
      return family
  supported = ", ".join(family.architecture for family in FAMILIES)
  raise CheckpointError(
    f"config.json names the architecture {architectures or hf.get('model_type')!r}, "
    f"which is not supported; supported: {supported}"
  )


def trunk_of_classifier(hf: dict[str, Any]) -> dict[str, Any] | None:
  """What a classifier's config.json says of its trunk; None where it is none.

  Published reward models are "...ForSequenceClassification": a trunk without a
  language-model head, so its embeddings are tied here.
  """
  architectures = hf.get("architectures")
  for family in FAMILIES:
    if architectures == [classifier_of(family)]:
      labels = ("num_labels", "id2label", "label2id", "problem_type")
      return {key: value for key, value in hf.items() if key not in labels} | {
        "architectures": [family.architecture],
        "tie_word_embeddings": True,
      }
  return None


def classifier_of(family: Family) -> str:
  """The architecture of a family's classifiers."""
  stem = family.architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
  stem += "Text" if family is GEMMA3 else ""
  return f"{stem}ForSequenceClassification"


def to_hf(config: DecoderConfig, like: Family | None = None) -> dict[str, Any]:
  """What config.json must say of a decoder.

  Args:
    config: the architecture.
    like: the family it came from; it is tried first. Then any family that can
      express the config serves.

  Returns:
    The contents of config.json, without token ids.

  Raises:
    ConfigError: no family can express the config.
  """
  for family in ((like,) if like else ()) + FAMILIES:
    hf = {
      "architectures": [family.architecture],
      "model_type": family.model_type,
      **family.to_hf(config),
    }
    try:
      same = family.from_hf(hf) == config
    except CheckpointError:  # e.g. a window of 0 where one is needed
      continue
    if same:
      return hf
  raise ConfigError(
    f"no Hugging Face architecture computes {config}; a model that is to be saved must "
    "keep to the switches of one family"
  )

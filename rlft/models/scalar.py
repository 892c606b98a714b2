"""Scalar models: value, reward and outcome models, a trunk with one number a token.

  value[b, t] = hidden[b, t] . kernel + bias

Parameters are {"trunk": the decoder's, "head": {"kernel": [E], "bias": []}}. The trunk
has no language-model head: its config ties the embeddings, so that nothing is kept,
sharded or optimised that no value reads.

Letters: B rows, T tokens, E hidden size.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rlft.core import rng
from rlft.core.errors import CheckpointError, ConfigError
from rlft.core.hosts import spread
from rlft.core.mesh import replicated, tree_shardings
from rlft.models import decoder as decoders
from rlft.models import families, hub, tensorfile, weights
from rlft.models.decoder import Decoder, DecoderConfig, positions_from_mask
from rlft.models.hub import Policy

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

Kind = Literal["reward", "value", "outcome"]
_KINDS = ("reward", "value", "outcome")
_HEAD, _ABOUT = "value_head.safetensors", "value_head.json"


@dataclasses.dataclass(frozen=True)
class ScalarModel:
  """A model that gives each token one number.

  Attributes:
    model: the trunk; its config ties the embeddings.
    params: {"trunk": ..., "head": {"kernel": [E], "bias": []}}; the head is float32.
    tokenizer: of the policy that it came from.
    config: the architecture, `model.config`.
    eos_ids: the tokens that end a completion.
    hf_config, generation_config: as for `Policy`.
    mean, std: of the raw values on reference responses; a reward is
      `(raw - mean) / std`. 0 and 1 before normalisation.
    kind: "reward" (read at the last token), "value" (of the state before a token) or
      "outcome" (the logit that a prefix ends in a right answer).
  """

  model: Decoder
  params: dict[str, Any]
  tokenizer: PreTrainedTokenizerBase | None
  config: DecoderConfig
  eos_ids: tuple[int, ...] = ()
  hf_config: dict[str, Any] = dataclasses.field(default_factory=dict)
  generation_config: dict[str, Any] = dataclasses.field(default_factory=dict)
  mean: float = 0.0
  std: float = 1.0
  kind: Kind = "reward"


def init_scalar(
  policy: Policy,
  seed: int = 0,
  init: Literal["reward", "zero"] = "reward",
  kind: Kind | None = None,
) -> ScalarModel:
  """A scalar model on a policy's trunk.

  Args:
    policy: gives the trunk; its arrays are shared, not copied.
    seed: of the head.
    init: "reward": kernel ~ N(0, 1 / (E + 1)), bias 0; "zero": both 0, for a value
      model, whose first values are then 0 everywhere.
    kind: what the model is; None is "value" with `init="zero"`, else "reward".

  Raises:
    ConfigError: an unknown `init` or `kind`, or a seed out of range.

  Source: the std 1 / sqrt(E + 1) of Stiennon et al. 2020 (arXiv 2009.01325), as the
  reproduction of Huang et al. 2024 (arXiv 2403.17031) has it.
  """
  if init not in ("reward", "zero"):
    raise ConfigError(f"init={init!r}: choose 'reward' or 'zero'")
  kind = kind or ("value" if init == "zero" else "reward")
  if kind not in _KINDS:
    raise ConfigError(f"kind={kind!r}: choose one of {_KINDS}")
  width = policy.config.output_width
  kernel_E = jnp.zeros(width, jnp.float32)
  if init == "reward":
    key = rng.key(rng.check_seed(seed), rng.Purpose.INIT)
    kernel_E = jax.random.normal(key, (width,), jnp.float32) / math.sqrt(width + 1)
  config = dataclasses.replace(policy.config, tie_embeddings=True)
  trunk = {name: leaf for name, leaf in policy.params.items() if name != "head"}
  return ScalarModel(
    model=policy.model.clone(config=config),
    params={
      "trunk": trunk,
      "head": _place_head({"kernel": kernel_E, "bias": 0.0}, policy.model.mesh),
    },
    tokenizer=policy.tokenizer,
    config=config,
    eos_ids=policy.eos_ids,
    hf_config=policy.hf_config,
    generation_config=policy.generation_config,
    kind=kind,
  )


def as_value(reward: ScalarModel) -> ScalarModel:
  """A value model that starts as the reward model: arrays are shared, not copied.

  The normalisation goes into the head, so that the first values are in the units of the
  normalised rewards: kernel / std, (bias - mean) / std.

  Raises:
    ConfigError: an outcome model, whose values are logits: no expected rewards.
  """
  if reward.kind == "outcome":
    raise ConfigError(
      "an outcome model's values are logits of being right, not rewards, and cannot "
      "start a value model: give a reward model, or none"
    )
  head = reward.params["head"]
  head = {
    "kernel": head["kernel"] / reward.std,
    "bias": (head["bias"] - reward.mean) / reward.std,
  }
  params = {"trunk": reward.params["trunk"], "head": head}
  return dataclasses.replace(reward, params=params, mean=0.0, std=1.0, kind="value")


def place(scalar: ScalarModel, mesh: Mesh | None) -> ScalarModel:
  """The model on a mesh: the trunk by the rules of policies, the head copied."""
  model = scalar.model.clone(mesh=mesh)
  params = scalar.params
  if mesh is not None:
    layout = tree_shardings(
      mesh, decoders.param_axes(model), decoders.param_shapes(model)
    )
    trunk = spread(params["trunk"], layout)
    params = {"trunk": trunk, "head": _place_head(params["head"], mesh)}
  return dataclasses.replace(scalar, model=model, params=params)


def _place_head(head: Mapping[str, Any], mesh: Mesh | None) -> dict[str, jax.Array]:
  head = {name: jnp.asarray(x, jnp.float32) for name, x in head.items()}
  return head if mesh is None else spread(head, replicated(mesh))


# ------------------------------------------------------------------------ the values


def scalar_head(head: Mapping[str, jax.Array], hidden: jax.Array) -> jax.Array:
  """hidden . kernel + bias, accumulated in float32.

  Args:
    head: "kernel" [E] and "bias" [].
    hidden: [..., E].

  Returns:
    float32 [...].
  """
  # Not in bfloat16, and not on a matrix unit that would cut float32 inputs to it: the
  # differences of values are what is trained on.
  product = hidden.astype(jnp.float32) * head["kernel"].astype(jnp.float32)
  return jnp.sum(product, axis=-1) + head["bias"].astype(jnp.float32)


def token_values(
  model: Decoder, params: Mapping, tokens_BT: jax.Array, mask_BT: jax.Array
) -> jax.Array:
  """The head's raw output at every token: of the state that has read it.

  Pure, differentiable, the same for any padding side.

  Args:
    model: the trunk.
    params: {"trunk", "head"}.
    tokens_BT: int32; anything may lie under a pad.
    mask_BT: bool, True on real tokens.

  Returns:
    float32 [B, T]; 0 where masked.
  """
  hidden_BTE = _hidden(model, params, tokens_BT, mask_BT)
  return jnp.where(mask_BT, scalar_head(params["head"], hidden_BTE), 0.0)


def last_value(
  model: Decoder, params: Mapping, tokens_BT: jax.Array, mask_BT: jax.Array
) -> jax.Array:
  """The raw value at the last real token of each row, where a reward is read.

  Args:
    model, params, tokens_BT, mask_BT: as for `token_values`.

  Returns:
    float32 [B]; 0 for a row without a real token.
  """
  hidden_BTE = _hidden(model, params, tokens_BT, mask_BT)
  last_B = jnp.max(jnp.where(mask_BT, jnp.arange(mask_BT.shape[1]), -1), axis=1)
  at_B11 = jnp.maximum(last_B, 0)[:, None, None]
  hidden_BE = jnp.take_along_axis(hidden_BTE, at_B11, axis=1)[:, 0]
  return jnp.where(last_B >= 0, scalar_head(params["head"], hidden_BE), 0.0)


def _hidden(model, params, tokens_BT, mask_BT) -> jax.Array:
  chex.assert_rank([tokens_BT, mask_BT], 2)
  chex.assert_equal_shape([tokens_BT, mask_BT])
  hidden_BTE = model.apply(
    {"params": params["trunk"]},
    jnp.where(mask_BT, tokens_BT, 0),
    positions_from_mask(mask_BT),
    mask_BT,
  ).hidden
  # On the input of the head: what lies under a pad has no gradient, not even 0 * NaN.
  return jnp.where(mask_BT[..., None], hidden_BTE, 0.0)


# --------------------------------------------------------------------------- on disk


def save_scalar(scalar: ScalarModel, path: str | os.PathLike[str]) -> None:
  """Saves a scalar model: the trunk as a Hugging Face directory, with the head in it.

  The head is `value_head.safetensors`; mean, std and kind are in `value_head.json`. The
  directory appears whole or not at all, as with `rlft.save`.

  Raises:
    CheckpointError, ConfigError: as `rlft.save`; the head is not finite.
  """
  head = {name: np.asarray(x, np.float32) for name, x in scalar.params["head"].items()}
  _check_head(head, scalar.config.output_width, "the value head")
  about = {"kind": scalar.kind, "mean": float(scalar.mean), "std": float(scalar.std)}
  _check_about(about, "the scalar model")

  def write(folder: pathlib.Path) -> None:
    tensors = {name: (x.dtype, x.shape) for name, x in head.items()}
    tensorfile.write(folder / _HEAD, tensors, head.values())
    (folder / _ABOUT).write_text(json.dumps(about, indent=2, sort_keys=True) + "\n")

  trunk = Policy(
    model=scalar.model,
    params=scalar.params["trunk"],
    tokenizer=scalar.tokenizer,
    config=scalar.config,
    hf_config=scalar.hf_config,
    generation_config=scalar.generation_config,
    eos_ids=scalar.eos_ids,
  )
  hub.save(trunk, path, extra=write)


def load_scalar(
  path: str | os.PathLike[str], mesh: Mesh | None = None, dtype: Any = jnp.float32
) -> ScalarModel:
  """Loads what `save_scalar` wrote, or a reward model of Hugging Face.

  Of the latter, "...ForSequenceClassification" with one label, the kind is "reward" and
  mean and std are 0 and 1: scores are raw, since nothing tells their scale.

  Args:
    path: the directory or hub id.
    mesh: where parameters live.
    dtype: of the trunk's parameters and computation; the head stays float32.

  Raises:
    CheckpointError: it is no scalar model, or its files are damaged.
  """
  dtype = hub.check_place(mesh, dtype)
  path = hub.locate(path)
  if not (path / _ABOUT).is_file() or not (path / _HEAD).is_file():
    return _load_classifier(hub.open_model(path), mesh, dtype)
  try:
    about = json.loads((path / _ABOUT).read_bytes())
  except (ValueError, RecursionError) as error:
    raise CheckpointError(f"{path / _ABOUT} is not valid JSON: {error}") from error
  _check_about(about, str(path / _ABOUT))
  file = tensorfile.TensorFile(path / _HEAD)
  head = {name: next(file.chunks(name, whole=True))[1] for name in file}
  policy = hub.load(path, mesh=mesh, dtype=dtype)
  if not policy.config.tie_embeddings:
    raise CheckpointError(f"{path}: the trunk of a scalar model has no lm head")
  _check_head(head, policy.config.output_width, str(path / _HEAD))
  return ScalarModel(
    model=policy.model,
    params={"trunk": policy.params, "head": _place_head(head, mesh)},
    tokenizer=policy.tokenizer,
    config=policy.config,
    eos_ids=policy.eos_ids,
    hf_config=policy.hf_config,
    generation_config=policy.generation_config,
    mean=about["mean"],
    std=about["std"],
    kind=about["kind"],
  )


def _load_classifier(opened: hub.Opened, mesh: Mesh | None, dtype: Any) -> ScalarModel:
  path, source = opened.path, opened.source
  trunk = families.trunk_of_classifier(opened.hf)
  if trunk is None:
    raise CheckpointError(
      f"{path} is not a reward or value model: it has no {_ABOUT} and {_HEAD}, and its "
      f"architecture, {opened.hf.get('architectures')}, no score for a text. Load a "
      "policy with rlft.load, and put a head on it with init_scalar"
    )
  family = families.resolve(trunk)
  width = family.from_hf(trunk).output_width
  names = source.names() & {"score.weight", "score.bias"}
  found = {name: source.shape(name) for name in sorted(names)}
  labels = found.get("score.weight", (0,))[0]
  if labels > 1:
    raise CheckpointError(
      f"{path} is a classifier of {labels} labels; a reward model has one score "
      "('score.weight' of one row)"
    )
  if {"score.bias": (1,)} | found != {"score.weight": (1, width), "score.bias": (1,)}:
    raise CheckpointError(
      f"{path}: a reward model of this width has a 'score.weight' of shape "
      f"{(1, width)}; this one has {found}"
    )
  head = {"kernel": weights.read_array(source, "score.weight")[0]}
  bias = "score.bias" in names
  head["bias"] = (
    weights.read_array(source, "score.bias")[0] if bias else np.zeros((), np.float32)
  )
  _check_head(head, width, f"{path}: its score")
  # A language-model head has no use here; a classifier's file has it only by accident.
  beside = {*names, weights.name_of(family, "head")}
  policy = hub.read_policy(dataclasses.replace(opened, hf=trunk), mesh, dtype, beside)
  return ScalarModel(
    model=policy.model,
    params={"trunk": policy.params, "head": _place_head(head, mesh)},
    tokenizer=policy.tokenizer,
    config=policy.config,
    eos_ids=policy.eos_ids,
    hf_config=policy.hf_config,
    generation_config=policy.generation_config,
  )


def _check_about(about: Any, where: str) -> None:
  number = lambda x: isinstance(x, int | float) and math.isfinite(x)
  if not (
    isinstance(about, dict)
    and about.get("kind") in _KINDS
    and number(about.get("mean"))
    and number(about.get("std"))
    and about["std"] > 0
  ):
    raise CheckpointError(
      f"{where}: kind must be one of {_KINDS}, mean finite and std positive; it has "
      f"{about!r:.200}"
    )


def _check_head(head: Mapping[str, np.ndarray], width: int, where: str) -> None:
  shapes = {name: x.shape for name, x in head.items()}
  if shapes != {"kernel": (width,), "bias": ()}:
    raise CheckpointError(
      f"{where} has {shapes}; the trunk makes it {{'kernel': ({width},), 'bias': ()}}"
    )
  if not all(np.isfinite(x.astype(np.float32)).all() for x in head.values()):
    raise CheckpointError(f"{where}: its weights are not finite")


# ------------------------------------------------------------------------ tokenizers


def check_same_tokenizer(a: Policy | ScalarModel, b: Policy | ScalarModel) -> None:
  """Raises `ConfigError` when two models do not give the same ids to the same tokens.

  What one model sampled is what the other reads: ids, never text. Where one has no
  tokenizer, the sizes of the vocabularies must be equal.
  """
  cure = "; both must come from one base model"
  if a.tokenizer is None or b.tokenizer is None:
    if a.config.vocab_size != b.config.vocab_size:
      raise ConfigError(
        f"the models have vocabularies of {a.config.vocab_size} and "
        f"{b.config.vocab_size} tokens{cure}"
      )
    return
  if a.tokenizer is b.tokenizer:
    return
  first, second = a.tokenizer.get_vocab(), b.tokenizer.get_vocab()
  for token in sorted(first.keys() | second.keys()):
    if first.get(token) != second.get(token):
      raise ConfigError(
        f"the models have different tokenizers (of {len(first)} and {len(second)} "
        f"tokens): {token!r} is {first.get(token)} in the one and {second.get(token)} "
        f"in the other{cure}"
      )

"""Control tokens: new entries of the tokenizer, new rows of the embedding.

Letters: V vocabulary, E embedding width, N new tokens.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import zlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from rlft.core import rng
from rlft.core.errors import ConfigError, DataError
from rlft.core.mesh import sharding
from rlft.models.decoder import param_axes

if TYPE_CHECKING:
  from rlft.models.hub import Policy
  from rlft.models.scalar import ScalarModel

# In standard deviations of the old rows. Measured: a row's largest probability at any
# place of 4 texts, over 1 / V, at noise 0, 0.3 and 1 is 0.2, 0.4 and 2.8 for the mini
# model, and 0.03, 0.8 and 92,306 (all of it) for SmolLM2-135M. At 0.01 two tokens are
# nearly one, and training has to tear them apart first.
NOISE = 0.3


def check_ids(
  rows: Iterable[Sequence[int]], model: Policy | ScalarModel, name: str
) -> None:
  """Raises `DataError` for an id that the embedding has no row for.

  A compiled program would read another row instead. Tokenizers of published models can
  have a few tokens more than the embedding has rows.

  Args:
    rows: token ids.
    model: gives the vocabulary, and the tokenizer that knows the token's text.
    name: of such a row, for the message.
  """
  size = model.config.vocab_size
  for i, row in enumerate(rows):
    ids = np.asarray(row)
    if not ids.size or (ids.min() >= 0 and ids.max() < size):
      continue
    wrong = int(ids[(ids < 0) | (ids >= size)][0])
    vocab = {} if model.tokenizer is None else model.tokenizer.get_vocab()
    token = next((token for token, at in vocab.items() if at == wrong), None)
    if token is None:
      raise DataError(
        f"{name} {i} has the token id {wrong}, but the model has a vocabulary of "
        f"{size}; was it made by another tokenizer?"
      )
    raise DataError(
      f"{name} {i} has the token {token!r} (id {wrong}), but the embedding has only "
      f"{size} rows; leave it out, or give it one with rlft.models.tokens.add_tokens"
    )


def add_tokens(policy: Policy, tokens: Sequence[str], seed: int = 0) -> Policy:
  """A policy that knows some more tokens; what it was given stays as it is.

  new row = mean of the old rows + 0.3 * their standard deviation * N(0, 1)

  The tokens are special ones: text is never merged into them, and they are no part of a
  completion's text. An embedding that is padded beyond its tokenizer gives its free
  rows; else it grows, and tokens that the tokenizer had beyond it get rows too. A mesh
  gets the new arrays by its rules (`core.mesh`): a vocabulary that its axis does not
  divide any more is copied.

  Args:
    policy: the model and its tokenizer.
    tokens: such as "[GOOD]". One that is a special token already is used as it is, with
      its row, so that a model which has been trained with it can be given again.
    seed: of the noise, without which two new tokens would be the same one.

  Returns:
    Policy of the same architecture; `tokenizer.convert_tokens_to_ids` gives the ids.

  Raises:
    ConfigError: there is no tokenizer, a token is empty or given twice, or it is an
      ordinary token, which texts may hold.

  Source: Hewitt 2021, Initializing New Word Embeddings for Pretrained Language Models:
    the logit of a mean row is at most the log of the mean exp(logit), so N new tokens
    take no more than N / (V + N) of the probability, where rows of another size can
    take nearly all of it. The noise is ours, as large as that bound bears.
  """
  old = policy.tokenizer
  if old is None:
    raise ConfigError("the policy has no tokenizer to add tokens to")
  if isinstance(tokens, str) or not all(isinstance(t, str) and t for t in tokens):
    raise ConfigError(f"tokens={tokens!r}: give a list of strings, none of them empty")
  if len(set(tokens)) < len(tokens):
    raise ConfigError(f"tokens={tokens!r}: one is given twice")
  rng.check_seed(seed)
  vocab = old.get_vocab()
  special = {t.content for t in old.added_tokens_decoder.values() if t.special}
  special |= set(old.all_special_tokens)
  for token in tokens:
    if token in vocab and token not in special:
      raise ConfigError(
        f"{token!r} is an ordinary token of this tokenizer, which texts may hold; "
        "choose another one"
      )
  rows = policy.config.vocab_size
  new = [token for token in tokens if token not in vocab]
  rowless = [token for token, i in vocab.items() if i >= rows]
  if not new and not set(tokens) & set(rowless):
    return policy
  from transformers import AddedToken

  tokenizer = copy.deepcopy(old)
  added = [AddedToken(token, special=True, normalized=False) for token in new]
  tokenizer.add_tokens(added, special_tokens=True)
  new += rowless  # the table grows over them
  ids = tuple(tokenizer.convert_tokens_to_ids(new))
  config = dataclasses.replace(
    policy.config, vocab_size=max(rows, *(i + 1 for i in ids))
  )
  model = policy.model.clone(config=config)
  params, axes = dict(policy.params), param_axes(model)
  key = rng.key(seed, rng.Purpose.INIT)
  for name in ("embedding", "head"):
    if name not in params:  # the head of a tied model
      continue
    own = jax.random.fold_in(key, zlib.crc32(name.encode()))
    # By name: a token's row does not depend on which others are added with it.
    keys = [jax.random.fold_in(own, zlib.crc32(token.encode())) for token in new]
    grow = functools.partial(
      _grow,
      used=min(max(vocab.values()) + 1, rows),
      ids=ids,
      axis=axes[name].index("vocab"),
    )
    place = _layout(params[name], model.mesh, axes[name], config.vocab_size)
    grow = jax.jit(grow, static_argnames="size", out_shardings=place)
    params[name] = grow(params[name], jnp.stack(keys), size=config.vocab_size)
  hf_config = policy.hf_config
  if hf_config:
    hf_config = {**hf_config, "vocab_size": config.vocab_size}
  return dataclasses.replace(
    policy,
    model=model,
    params=params,
    tokenizer=tokenizer,
    config=config,
    hf_config=hf_config,
  )


def _layout(table: jax.Array, mesh: Any, axes: tuple, size: int) -> Any:
  if mesh is None:
    return None
  shape = [size if axis == "vocab" else n for axis, n in zip(axes, table.shape)]
  return sharding(mesh, axes, shape)


def _grow(table, keys_N, *, used, ids, axis, size):
  """The table with `size` rows along `axis`, the rows `ids` of them made anew."""
  table_VE = jnp.moveaxis(table, axis, 0)
  rows_VE = table_VE[:used].astype(jnp.float32)
  noise_NE = jax.vmap(lambda k: jax.random.normal(k, rows_VE.shape[1:]))(keys_N)
  new_NE = rows_VE.mean(0) + NOISE * rows_VE.std(0) * noise_NE
  table_VE = jnp.pad(table_VE, ((0, size - table_VE.shape[0]), (0, 0)))
  table_VE = table_VE.at[jnp.asarray(ids)].set(new_NE.astype(table.dtype))
  return jnp.moveaxis(table_VE, 0, axis)

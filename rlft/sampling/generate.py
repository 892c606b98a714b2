"""`generate`: prompts in, a `Rollout` out; the host side of the sampler.

Letters: N prompts, K samples of each, S slots in flight, P prompt bucket, C completion
bucket, B = N * K rows of the result.

Prompts flow through S slots. When a quarter of them has ended, their completions are
read, and waiting prompts are prefilled into them; until then the host sleeps.
"""

from __future__ import annotations

import functools
import operator
import os
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlft.core import hosts, rng
from rlft.core.errors import ConfigError, DataError
from rlft.core.mesh import ROLLOUT_RULES, batch_shards, tree_shardings
from rlft.core.types import Rollout
from rlft.models.decoder import (
  Decoder,
  param_axes,
  param_shapes,
  unstack_layers,
)
from rlft.models.hub import Policy, check_policy
from rlft.models.tokens import check_ids
from rlft.sampling import decode as device
from rlft.sampling.buckets import bucket
from rlft.sampling.lanes import Lanes
from rlft.sampling.logits import MIN_TEMPERATURE, Sampling
from rlft.sampling.stops import StopTable, compile_stops, decode_completion
from rlft.tasks.prompts import Prompts, as_examples, is_data
from rlft.text.encode import Prompt, encode_prompts, is_text

PREFILL_TOKENS = 8192  # prompt tokens prefilled at once, about
EOS_BUCKET = 8


def compilations() -> int:
  """How many sampler programs this process has compiled."""
  return sum(device.TRACES.values())


def rollout_layout(
  model: Decoder, params: dict, dtype: Any = None
) -> tuple[Decoder, dict]:
  """The model and its parameters, as decoding wants them.

  Parameters are cast once, moved to the rollout layout of the mesh (tensor-parallel or
  copied, so that no token waits for weights to be gathered), and, except on TPU,
  unstacked: there a slice of stacked layers inside the loop would be a copy. Of several
  processes each gets them on its own devices, where those can work alone (see
  `core.hosts.alone`): a token waits for no other host either.

  Args:
    model: the training model.
    params: its parameters, stacked when `model.scan`.
    dtype: of the rollout; the model's when None.

  Returns:
    (model, params) for `sampling.decode`.
  """
  dtype = jnp.dtype(model.dtype if dtype is None else dtype)
  leaf = jax.tree.leaves(params)[0]
  platform = next(iter(leaf.devices())).platform
  scan = model.scan and platform == "tpu"
  target = model.clone(dtype=dtype, scan=scan, remat="none")
  if model.mesh is not None and model.mesh.size > 1:
    if leaf.dtype != dtype:
      # Before they move: else float32 is sent, and held once more in the new layout.
      params = _convert(params, dtype, 0)
    layout = tree_shardings(
      model.mesh, param_axes(model), param_shapes(model), ROLLOUT_RULES
    )
    params = hosts.spread(params, layout)
    if hosts.alone(model.mesh):
      params = hosts.on_own_devices(params, model.mesh)
      target = target.clone(mesh=hosts.share(model.mesh).mesh)
  unstack = model.scan and not scan
  if unstack or jax.tree.leaves(params)[0].dtype != dtype:
    params = _convert(params, dtype, model.config.layers if unstack else 0)
  return target, params


@functools.partial(jax.jit, static_argnums=(1, 2))
def _convert(params: dict, dtype: Any, layers: int) -> dict:
  """The parameters in another dtype, unstacked unless `layers` is 0."""
  params = jax.tree.map(lambda x: x.astype(dtype), params)
  return unstack_layers(params, layers) if layers else params


_layout_of: list = []  # one entry: (weak references to the source, model, layout)


def _cached_layout(model: Decoder, params: dict, dtype: Any):
  """`rollout_layout`, kept while the same parameters come again."""
  dtype = jnp.dtype(model.dtype if dtype is None else dtype)
  leaves = jax.tree.leaves(params)
  if _layout_of:
    sources, key, layout = _layout_of[0]
    same = key == (model, dtype) and len(sources) == len(leaves)
    if same and all(ref() is leaf for ref, leaf in zip(sources, leaves)):
      return layout
  _layout_of.clear()
  layout = rollout_layout(model, params, dtype)
  if all(a is b for a, b in zip(leaves, jax.tree.leaves(layout[1]))):
    return layout  # nothing was converted; to keep it would keep the source alive
  # Freed with its source: a training step that donates its parameters must not leave
  # a second model in memory.
  forget = lambda _: _layout_of.clear()
  sources = [weakref.ref(leaf, forget) for leaf in leaves]
  _layout_of.append((sources, (model, dtype), layout))
  return layout


def generate(
  policy: Policy,
  prompts: Sequence[Prompt] | Sequence[Sequence[int]] | Prompts,
  *,
  chat: bool = False,
  samples: int = 1,
  max_new_tokens: int | Sequence[int] = 128,
  temperature: float | Sequence[float] = 1.0,
  top_p: float | Sequence[float] = 1.0,
  top_k: int | Sequence[int] = 0,
  min_p: float | Sequence[float] = 0.0,
  stop: str | Sequence[str] = (),
  seed: int = 0,
  step: int = 0,
  prompt_ids: Sequence[int] | None = None,
  forced: Sequence[Sequence[int]] | None = None,
  again: str | Sequence[str] = (),
  purpose: rng.Purpose = rng.Purpose.ROLLOUT,
  max_rows: int = 128,
  dtype: Any = None,
  on_progress: Callable[[int, int], None] | None = None,
) -> Rollout:
  """Samples completions.

  Noise is addressed by `(seed, purpose, step, prompt_id, sample, t)`: the same call
  gives the same tokens however many devices or rows there are, and another `step`
  gives new ones.

  Of several processes each gives as many prompts of its own and gets their completions;
  all must call, for the weights move between them, but none waits for another's tokens
  where `core.hosts.alone` is true.

  Args:
    policy: the model.
    prompts: N texts or lists of messages, or N lists of token ids; or a data set in any
      form, see `tasks.prompts`, whose rows bring their ids.
    chat: put texts into the tokenizer's chat template, see `text.encode`; lists of
      messages always are.
    samples: K, completions of each prompt; they share its prefill.
    max_new_tokens: tokens that the policy may choose; one for all, or one a prompt.
    temperature: 0 is greedy; one for all or one a prompt, like the filters below.
    top_p: smallest set with this mass; 1 is off.
    top_k: so many most likely tokens; 0 is off.
    min_p: tokens at least so likely, relative to the most likely one; 0 is off.
    stop: strings that end a completion, exact across token boundaries (of the text
      that the policy chose). The text is cut before them; the tokens are kept.
    seed, step: integers that address the noise.
    prompt_ids: the data set's index of each prompt; 0 to N - 1 when None.
    forced: for each prompt, token ids that open its completions; in `tokens`, but not
      in `completion_mask`.
    again: strings (of what the policy chose) after which the forced tokens enter once
      more, as a control token does before every step; not together with `stop`. They
      fit in `sampling.decode.MOST_AGAIN` times; a row that needs more is truncated.
    purpose: which stream of noise.
    max_rows: most rows in flight on all processes (but at least one prompt's samples a
      shard of the batch); further prompts wait for a free slot.
    dtype: of the computation; the policy's when None.
    on_progress: called with (prompts that ended, N) now and then.

  Returns:
    `Rollout` with B = N * K rows, in the order of the prompts. Its `completions` are
    empty strings when the policy has no tokenizer.

  Raises:
    ConfigError: a setting is out of range.
    DataError: an empty prompt, a token id outside the vocabulary, or a prompt that
      leaves no room for `max_new_tokens`. All before any device work.
  """
  began = time.perf_counter()
  check_policy(policy)
  model, config = policy.model, policy.model.config
  prompts, prompt_ids = _read(prompts, prompt_ids)
  count = len(prompts)
  if count == 0:
    raise DataError("no prompts: `generate` needs at least one")
  ids = _encode(policy, prompts, chat)
  for name, value in (("samples", samples), ("max_rows", max_rows)):
    if not _is_int(value) or value < 1:
      raise ConfigError(f"{name}={value!r}: give an integer of at least 1")
  samples = int(samples)
  each = _settings(
    count,
    temperature=temperature,
    top_p=top_p,
    top_k=top_k,
    min_p=min_p,
    max_new_tokens=max_new_tokens,
  )
  rng.check_seed(seed)
  if not _is_int(step) or not 0 <= step < 2**31:
    raise ConfigError(f"step={step!r}: a step is an integer from 0 to 2**31 - 1")
  prompt_ids = np.atleast_1d(np.arange(count) if prompt_ids is None else prompt_ids)
  forced = [[]] * count if forced is None else forced
  for name, given in (("prompt_ids", prompt_ids), ("forced", forced)):
    if len(given) != count:
      raise ConfigError(
        f"{name} needs one entry for each of {count} prompts: {given!r}"
      )
  if prompt_ids.dtype.kind not in "iu" or not (
    prompt_ids.ndim == 1 and prompt_ids.min() >= 0 and prompt_ids.max() < 2**31
  ):
    raise ConfigError(f"prompt_ids={prompt_ids!r}: give integers from 0 to 2**31 - 1")
  forced = _checked(forced, policy, "forced")
  if again and stop:
    raise ConfigError(f"again={again!r} and stop={stop!r}: give one of them")
  lengths = np.array([len(x) for x in ids])
  times = 1 + (device.MOST_AGAIN if again else 0)
  budget = each["max_new_tokens"] + times * np.array([len(f) for f in forced])
  rooms = np.array([config.longest_sample(int(n)) for n in lengths])
  over = np.flatnonzero(lengths + budget > rooms)
  if over.size:
    i = int(over[0])
    limit = f"the model has {config.max_positions} positions"
    if rooms[i] < config.max_positions:
      limit = (
        f"beyond {rooms[i]} tokens its {config.rope_scaling.kind!r} rotary scaling "
        "rotates the whole text otherwise, which would make log-probs of the tokens "
        "before untrue"
      )
    raise DataError(
      f"prompt {i} (id {prompt_ids[i]}) has {lengths[i]} tokens and may get "
      f"{budget[i]} more, but {limit}; "
      "shorten it or lower max_new_tokens"
    )

  stops = [stop] if isinstance(stop, str) else stop
  marks = [again] if isinstance(again, str) and again else again
  table = _stop_table(policy, marks or stops)
  rollout_model, params = _cached_layout(model, policy.params, dtype)
  rules = hosts.put(_rules(policy, table, bool(marks)), rollout_model.mesh)
  sizes = [int(lengths.max()), int(budget.max()), max(map(len, forced))]
  part = hosts.share(model.mesh)
  lanes = Lanes(rollout_model.mesh, part, hosts.alone(model.mesh), count)
  if lanes.of > 1:  # one program for all: its shapes are too
    sizes = np.max(hosts.everyone(sizes), axis=0).tolist()
  wide, capacity = bucket(sizes[0]), min(bucket(sizes[1]), config.max_positions)
  queue = bucket(sizes[2], 1) if sizes[2] else 0
  shards = batch_shards(rollout_model.mesh) // lanes.of
  slots = min(bucket(count, 1), max(1, max_rows // part.of // samples))
  slots = -(-slots // shards) * shards
  group = max(1, min(slots // 4, PREFILL_TOKENS // wide))
  group = -(-group // shards) * shards
  lanes.open(slots)

  put = lambda tree: hosts.put(tree, rollout_model.mesh)
  drawn_from = put((np.uint32(seed), np.int32(step), np.int32(purpose)))
  every = slots * lanes.of
  state = device.jit_empty(rollout_model, every, samples, wide, capacity, queue)
  results: dict[int, tuple] = {}
  while lanes.busy():
    while any(taken := lanes.take(group)):
      own = [(lanes.first + slot, prompt) for slot, prompt in taken[lanes.index]]
      batch = _batch(own, group, every, wide, queue, ids, prompt_ids, forced, each)
      batch = lanes.place(batch)
      state = device.jit_insert(rollout_model, params, state, batch, *drawn_from)
    # A lane without prompts left has free slots: not they, but others must end.
    enough = lanes.free() + group * lanes.of if lanes.waiting() else every + 1
    limits = put((np.int32(capacity * 2), np.int32(enough)))
    state = device.jit_decode(rollout_model, params, state, rules, *limits)
    ended = lanes.end(lanes.flags(state.done_B).reshape(every, samples).all(-1))
    _harvest(lanes, state, ended, samples, results)
    if on_progress is not None:
      on_progress(len(results), count)
  steps = int(state.steps)
  del state
  rollout = _assemble(
    policy, ids, prompt_ids, results, samples, wide, capacity, stops, forced
  )
  seconds = time.perf_counter() - began
  new_tokens = int(rollout.lengths.sum())
  rollout.stats.update(
    seconds=seconds,
    steps=steps,
    new_tokens=new_tokens,
    tokens_per_second=new_tokens / seconds,
    rows=every * samples,
  )
  return rollout


def _read(prompts: Any, prompt_ids: Any) -> tuple[list[Any], Any]:
  """Bare prompts, and the ids of their rows where none were given."""
  if not isinstance(prompts, str | os.PathLike | Mapping):
    prompts = list(prompts)
  if not is_data(prompts):
    return prompts, prompt_ids
  examples = as_examples(prompts)
  if prompt_ids is None:
    prompt_ids = [e.id for e in examples]
  return [e.prompt for e in examples], prompt_ids


def _encode(policy: Policy, prompts, chat: bool) -> list[list[int]]:
  """Token ids of each prompt, checked."""
  texts = [is_text(p) for p in prompts]
  if any(texts) and not all(texts):
    raise DataError("prompts mixes texts and token ids; give one kind")
  if any(texts):
    if policy.tokenizer is None:
      raise DataError("the policy has no tokenizer: give prompts as lists of token ids")
    prompts = encode_prompts(policy.tokenizer, prompts, chat)
  ids = _checked(prompts, policy, "prompt")
  for i, row in enumerate(ids):
    if not row:
      raise DataError(f"prompt {i} is empty: there is nothing to continue")
  return ids


def _is_int(value: Any) -> bool:
  return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _checked(rows: Sequence[Any], policy: Policy, name: str) -> list[list[int]]:
  """The rows as lists of ints, all of them in the vocabulary."""
  out = []
  for i, row in enumerate(rows):
    try:
      out.append([operator.index(token) for token in row])
    except TypeError as error:
      raise DataError(
        f"{name} {i} is {row!r}; give a list of integer token ids"
      ) from error
  check_ids(out, policy, name)
  return out


def _settings(count: int, **given) -> dict[str, np.ndarray]:
  """Sampling settings as one value for each prompt, checked."""
  most = 2**31 - 1
  legal = {
    "temperature": (
      np.float32,
      lambda x: (x == 0) | ((x >= MIN_TEMPERATURE) & (x <= 1 / MIN_TEMPERATURE)),
      f"0, or from {MIN_TEMPERATURE} to {1 / MIN_TEMPERATURE}",
    ),
    "top_p": (np.float32, lambda x: (x > 0) & (x <= 1), "in (0, 1]; 1 is off"),
    "top_k": (np.int32, lambda x: (x >= 0) & (x <= most), "0 (off) or positive"),
    "min_p": (np.float32, lambda x: (x >= 0) & (x < 1), "in [0, 1); 0 is off"),
    "max_new_tokens": (np.int32, lambda x: (x >= 1) & (x <= most), "at least 1"),
  }
  out = {}
  for name, value in given.items():
    dtype, legal_range, words = legal[name]
    array = np.asarray(value)
    if array.ndim > 1 or (array.ndim == 1 and array.size != count):
      raise ConfigError(f"{name} has shape {array.shape}; give one, or one a prompt")
    if array.dtype.kind not in "iuf" or (dtype is np.int32 and array.dtype.kind == "f"):
      kind = "an integer" if dtype is np.int32 else "a number"
      raise ConfigError(f"{name}={value!r} is not {kind}")
    if not np.all(legal_range(array)):
      raise ConfigError(f"{name}={value!r}: must be {words}")
    out[name] = np.broadcast_to(array.astype(dtype), (count,))
  return out


def _stop_table(policy: Policy, stops: Sequence[str]) -> StopTable:
  if policy.tokenizer is not None:
    return compile_stops(stops, policy.tokenizer, policy.config.vocab_size)
  if stops:
    raise ConfigError(f"stop={stops!r} needs a tokenizer, and the policy has none")
  return StopTable(np.zeros((1, policy.config.vocab_size), np.int32), -1, ())


def _rules(policy: Policy, table: StopTable, again: bool) -> device.Rules:
  eos = sorted(set(policy.eos_ids))
  wide = -(-max(1, len(eos)) // EOS_BUCKET) * EOS_BUCKET
  return device.Rules(
    eos_Z=np.array(eos + [-1] * (wide - len(eos)), np.int32),
    next_state_XV=np.asarray(table.next_state, np.int32),
    stop_state=np.int32(table.terminal),
    again=np.bool_(again),
  )


def _batch(taken, group, slots, wide, queue, ids, prompt_ids, forced, each):
  """`Prompts` for the (slot, prompt) pairs taken, padded to the group's size."""
  tokens = np.zeros((group, wide), np.int32)
  mask = np.zeros((group, wide), bool)
  slot = np.full((group,), slots, np.int32)
  address = np.zeros((group,), np.int32)
  queue_ids = np.zeros((group, queue), np.int32)
  queue_length = np.zeros((group,), np.int32)
  rows = [prompt for _, prompt in taken]
  for i, (place, prompt) in enumerate(taken):
    row = ids[prompt]
    tokens[i, wide - len(row) :] = row
    mask[i, wide - len(row) :] = True
    slot[i], address[i] = place, prompt_ids[prompt]
    queue_ids[i, : len(forced[prompt])] = forced[prompt]
    queue_length[i] = len(forced[prompt])

  def pick(name, default):
    out = np.full((group,), default, each[name].dtype)
    out[: len(rows)] = each[name][rows]
    return out

  sampling = Sampling(
    temperature_B=pick("temperature", 1.0),
    top_k_B=pick("top_k", 0),
    top_p_B=pick("top_p", 1.0),
    min_p_B=pick("min_p", 0.0),
    max_new_B=pick("max_new_tokens", 1),
  )
  return device.Prompts(slot, tokens, mask, address, sampling, queue_ids, queue_length)


def _harvest(lanes, state, ended, samples, results) -> None:
  """Reads the completions of the slots that ended."""
  if not ended and lanes.of == 1:
    return  # of several lanes all read, or none
  fields = (
    state.tokens_BC,
    state.logp_BC,
    state.raw_logp_BC,
    state.chosen_BC,
    state.finished_B,
    state.cache.cursor_B,
  )
  host = [lanes.read(x) for x in fields]
  for slot, prompt in ended:
    rows = slice(slot * samples, (slot + 1) * samples)
    results[prompt] = tuple(x[rows].copy() for x in host)


def _assemble(
  policy, ids, prompt_ids, results, samples, wide, capacity, stops, forced
) -> Rollout:
  """Puts the prompts' results together, in their order."""
  count = len(ids)
  rows, total = count * samples, wide + capacity
  tokens = np.zeros((rows, total), np.int32)
  mask = np.zeros((rows, total), bool)
  completion_mask = np.zeros((rows, total), bool)
  logp = np.zeros((rows, total), np.float32)
  raw_logp = np.zeros((rows, total), np.float32)
  finished = np.zeros((rows,), bool)
  lengths = np.zeros((rows,), np.int32)
  index = np.arange(capacity)
  for i in range(count):
    at = slice(i * samples, (i + 1) * samples)
    got, got_logp, got_raw, chosen, finished[at], lengths[at] = results[i]
    real = index < lengths[at][:, None]
    tokens[at, wide - len(ids[i]) : wide] = ids[i]
    mask[at, wide - len(ids[i]) : wide] = True
    tokens[at, wide:] = np.where(real, got, 0)
    mask[at, wide:] = real
    completion_mask[at, wide:] = chosen & real
    logp[at, wide:] = np.where(real, got_logp, 0)
    raw_logp[at, wide:] = np.where(real, got_raw, 0)
  completions = [
    _text(policy, tokens[row, wide:end], completion_mask[row, wide:end], stops)
    for row, end in enumerate(wide + lengths)
  ]
  return Rollout(
    tokens=tokens,
    mask=mask,
    completion_mask=completion_mask,
    logp=logp,
    raw_logp=raw_logp,
    finished=finished,
    prompt_lengths=np.repeat([len(x) for x in ids], samples).astype(np.int32),
    lengths=lengths,
    prompt_ids=np.repeat(prompt_ids, samples).astype(np.int32),
    completions=completions,
    samples=samples,
  )


def _text(policy, tokens, chosen, stops) -> str:
  """A completion's text: without its EOS, cut before the stop that ended it.

  Forced text is kept whole, for the automaton does not read it: a stop string inside a
  tool's answer ends nothing.
  """
  if policy.tokenizer is None:
    return ""
  if tokens.size and chosen[-1] and tokens[-1] in policy.eos_ids:
    tokens, chosen = tokens[:-1], chosen[:-1]
  edges = np.flatnonzero(np.diff(chosen)) + 1
  return "".join(
    decode_completion(policy.tokenizer, run.tolist(), stops if own[0] else ())
    for run, own in zip(np.split(tokens, edges), np.split(chosen, edges))
    if run.size
  )

"""The sampler's device side: prefill, insert, decode.

Letters: S slots (prompts in flight), K samples of a prompt, B = S * K rows, I prompts
inserted at once, P prompt bucket, C completion capacity, Q forced-token queue,
E hidden size, V vocabulary, X stop-automaton states, Z end-of-sequence ids.

A prompt is prefilled once and its K rows share its keys. One step of the loop chooses
a token for every row (or takes it from the row's queue), records it, and feeds it. The
loop ends on the device: nothing crosses to the host for a token.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from rlft.core import rng
from rlft.core.mesh import constrain
from rlft.models.cache import Cache, empty_cache
from rlft.models.decoder import Decoder, positions_from_mask
from rlft.models.heads import lm_logits
from rlft.sampling.logits import Sampling, choose

# A row has room for its forced tokens so many times more, where they enter again.
MOST_AGAIN = 16

# How often each program was traced, which is how often it was compiled.
TRACES = {"insert": 0, "decode": 0}


@struct.dataclass
class Rules:
  """When rows end; traced, so that changing them compiles nothing inside a bucket.

  Attributes:
    eos_Z: int32, ids that end a row; -1 fills the bucket.
    next_state_XV: int32, the stop automaton; the last state that a stop reaches
      absorbs.
    stop_state: int32 scalar, the absorbing state; -1 when there are no stops.
    again: bool scalar: a stop does not end a row, but has its forced tokens enter once
      more, as a control token does before every step.
  """

  eos_Z: jax.Array
  next_state_XV: jax.Array
  stop_state: jax.Array
  again: jax.Array


@struct.dataclass
class DecodeState:
  """Everything that decoding carries; donated from call to call.

  Attributes:
    cache: keys and values; `cache.cursor_B` is each row's completion length.
    hidden_BE: the state that predicts each row's next token.
    tokens_BC: int32, completions so far.
    logp_BC, raw_logp_BC: float32, see `core.types.Rollout`; 0 on forced tokens.
    chosen_BC: bool, tokens that the policy chose.
    done_B: bool, the row has ended (an empty slot's rows are done).
    finished_B: bool, it ended by EOS or a stop rather than by its length.
    stop_state_B: int32, state of the stop automaton.
    chosen_B: int32, tokens chosen so far; bounded by `sampling.max_new_B`.
    keys_B: uint32 [B, 2], address of each row's noise.
    queue_BQ, queue_length_B, queue_at_B: int32, forced tokens, how many, how many
      were taken. They enter with `chosen` False and log-probability 0.
    sampling: each row's parameters.
    steps: int32 scalar, steps of the loop so far.
  """

  cache: Cache
  hidden_BE: jax.Array
  tokens_BC: jax.Array
  logp_BC: jax.Array
  raw_logp_BC: jax.Array
  chosen_BC: jax.Array
  done_B: jax.Array
  finished_B: jax.Array
  stop_state_B: jax.Array
  chosen_B: jax.Array
  keys_B: jax.Array
  queue_BQ: jax.Array
  queue_length_B: jax.Array
  queue_at_B: jax.Array
  sampling: Sampling
  steps: jax.Array


@struct.dataclass
class Prompts:
  """Prompts to insert and what their rows need.

  Attributes:
    slots_I: int32, the slot of each; a slot out of range is padding and is dropped.
    tokens_IP, mask_IP: int32 and bool, left-padded.
    ids_I: int32, the data set index that addresses the noise.
    sampling: parameters, [I] each.
    queue_IQ, queue_length_I: int32, forced tokens that open the completion.
  """

  slots_I: jax.Array
  tokens_IP: jax.Array
  mask_IP: jax.Array
  ids_I: jax.Array
  sampling: Sampling
  queue_IQ: jax.Array
  queue_length_I: jax.Array


@struct.dataclass
class Prefilled:
  """Keys and values [I, N, P, H] of every layer, and the last hidden state."""

  k: Any
  v: Any
  hidden_IE: jax.Array
  position_IP: jax.Array


def empty_state(
  model: Decoder, slots: int, samples: int, prompt: int, completion: int, queue: int
) -> DecodeState:
  """A state in which every slot is free; sizes are S, K, P, C and Q."""
  config, rows = model.config, slots * samples
  zeros = lambda *shape, dtype=jnp.int32: jnp.zeros(shape, dtype)
  cache = empty_cache(
    layers=config.layers,
    slots=slots,
    samples=samples,
    prompt=prompt,
    completion=completion,
    kv_heads=config.kv_heads,
    head_dim=config.head_dim,
    dtype=model.dtype,
    stacked=model.scan,
  )
  state = DecodeState(
    cache=cache,
    hidden_BE=zeros(rows, config.output_width, dtype=model.dtype),
    tokens_BC=zeros(rows, completion),
    logp_BC=zeros(rows, completion, dtype=jnp.float32),
    raw_logp_BC=zeros(rows, completion, dtype=jnp.float32),
    chosen_BC=zeros(rows, completion, dtype=bool),
    done_B=jnp.ones((rows,), bool),
    finished_B=zeros(rows, dtype=bool),
    stop_state_B=zeros(rows),
    chosen_B=zeros(rows),
    keys_B=zeros(rows, 2, dtype=jnp.uint32),
    queue_BQ=zeros(rows, queue),
    queue_length_B=zeros(rows),
    queue_at_B=zeros(rows),
    sampling=Sampling(
      temperature_B=zeros(rows, dtype=jnp.float32),
      top_k_B=zeros(rows),
      top_p_B=jnp.ones((rows,), jnp.float32),
      min_p_B=zeros(rows, dtype=jnp.float32),
      max_new_B=zeros(rows),
    ),
    steps=zeros(),
  )
  return _placed(state, model)


def _placed(state: DecodeState, model: Decoder) -> DecodeState:
  """Pins the state to the mesh: rows over the batch axes, key heads over tensor."""
  lead = (None,) if model.scan else ()
  kv_axes = (*lead, "batch", "act_heads", None, None)
  pin = lambda x: constrain(x, model.mesh, kv_axes)
  rows = lambda x: constrain(x, model.mesh, ("batch",) + (None,) * (x.ndim - 1))
  cache = state.cache
  cache = Cache(
    prompt_k=jax.tree.map(pin, cache.prompt_k),
    prompt_v=jax.tree.map(pin, cache.prompt_v),
    k=jax.tree.map(pin, cache.k),
    v=jax.tree.map(pin, cache.v),
    prompt_mask_SP=rows(cache.prompt_mask_SP),
    prompt_position_SP=rows(cache.prompt_position_SP),
    start_B=rows(cache.start_B),
    cursor_B=rows(cache.cursor_B),
  )
  rest = jax.tree.map(
    lambda x: rows(x) if x.ndim else x, state.replace(cache=None, steps=None)
  )
  return rest.replace(cache=cache, steps=state.steps)


def prefill(
  model: Decoder, params: dict, tokens_IP: jax.Array, mask_IP: jax.Array
) -> Prefilled:
  """Runs left-padded prompts once: their keys and the state after the last token."""
  position_IP = positions_from_mask(mask_IP)
  out = model.apply({"params": params}, tokens_IP, position_IP, mask_IP, return_kv=True)
  if model.scan:
    k, v = out.kv
  else:
    k, v = (tuple(layers) for layers in out.kv)
  return Prefilled(k, v, out.hidden[:, -1], position_IP)


def insert(
  state: DecodeState,
  prompts: Prompts,
  prefilled: Prefilled,
  seed: jax.Array,
  step: jax.Array,
  purpose: jax.Array,
) -> DecodeState:
  """Puts prefilled prompts into slots and starts their K rows afresh."""
  cache = state.cache
  slots, samples = cache.prompt_mask_SP.shape[0], _samples(state)
  slots_I = prompts.slots_I
  put = lambda store, new: store.at[slots_I].set(new.astype(store.dtype), mode="drop")
  if cache.stacked:
    put_kv = lambda store, new: store.at[:, slots_I].set(
      new.astype(store.dtype), mode="drop"
    )
  else:
    put_kv = put

  # Row of each inserted prompt's samples; padding lies beyond the last row.
  rows_J = (slots_I[:, None] * samples + jnp.arange(samples)).reshape(-1)
  rows_J = jnp.where(jnp.repeat(slots_I, samples) < slots, rows_J, slots * samples)
  each = lambda x: jnp.repeat(x, samples, axis=0)
  put_row = lambda store, new: store.at[rows_J].set(
    jnp.broadcast_to(new, (rows_J.size, *store.shape[1:])).astype(store.dtype),
    mode="drop",
  )
  sample_J = jnp.tile(jnp.arange(samples), slots_I.size)
  keys_J = jax.random.key_data(
    rng.row_keys(rng.key(seed, purpose, step), each(prompts.ids_I), sample_J)
  )
  return state.replace(
    cache=cache.replace(
      prompt_k=jax.tree.map(
        lambda store, k: put_kv(store, k.swapaxes(-1, -2)), cache.prompt_k, prefilled.k
      ),
      prompt_v=jax.tree.map(put_kv, cache.prompt_v, prefilled.v),
      prompt_mask_SP=put(cache.prompt_mask_SP, prompts.mask_IP),
      prompt_position_SP=put(cache.prompt_position_SP, prefilled.position_IP),
      start_B=put_row(cache.start_B, each(prompts.mask_IP.sum(-1).astype(jnp.int32))),
      cursor_B=put_row(cache.cursor_B, 0),
    ),
    hidden_BE=put_row(state.hidden_BE, each(prefilled.hidden_IE)),
    tokens_BC=put_row(state.tokens_BC, 0),
    logp_BC=put_row(state.logp_BC, 0.0),
    raw_logp_BC=put_row(state.raw_logp_BC, 0.0),
    chosen_BC=put_row(state.chosen_BC, False),
    done_B=put_row(state.done_B, False),
    finished_B=put_row(state.finished_B, False),
    stop_state_B=put_row(state.stop_state_B, 0),
    chosen_B=put_row(state.chosen_B, 0),
    keys_B=put_row(state.keys_B, keys_J),
    queue_BQ=put_row(state.queue_BQ, each(prompts.queue_IQ)),
    queue_length_B=put_row(state.queue_length_B, each(prompts.queue_length_I)),
    queue_at_B=put_row(state.queue_at_B, 0),
    sampling=jax.tree.map(
      lambda store, new: put_row(store, each(new)), state.sampling, prompts.sampling
    ),
  )


def _samples(state: DecodeState) -> int:
  return state.done_B.shape[0] // state.cache.prompt_mask_SP.shape[0]


def decode_step(
  model: Decoder, params: dict, state: DecodeState, rules: Rules
) -> DecodeState:
  """One token for every row that is not done."""
  index_B = state.cache.cursor_B
  capacity = state.tokens_BC.shape[1]
  active_B = ~state.done_B

  logits_BV = lm_logits(params, model.config, state.hidden_BE)
  keys_B = jax.random.wrap_key_data(state.keys_B, impl="threefry2x32")
  token_B, logp_B, raw_logp_B = choose(
    logits_BV, state.sampling, rng.uniforms(keys_B, index_B)
  )

  forced_B = state.queue_at_B < state.queue_length_B
  if state.queue_BQ.shape[1]:
    at_B = jnp.minimum(state.queue_at_B, state.queue_BQ.shape[1] - 1)
    queued_B = jnp.take_along_axis(state.queue_BQ, at_B[:, None], axis=1)[:, 0]
    token_B = jnp.where(forced_B, queued_B, token_B)
  chosen_B = active_B & ~forced_B

  rows_B = jnp.arange(index_B.size)
  place_B = jnp.where(active_B, index_B, capacity)  # beyond the end: dropped
  record = lambda store, new: store.at[rows_B, place_B].set(
    new, mode="drop", unique_indices=True, indices_are_sorted=True
  )
  # Forced text cannot complete a stop: the automaton reads what the policy chose.
  next_B = jnp.where(forced_B, 0, rules.next_state_XV[state.stop_state_B, token_B])
  stop_state_B = jnp.where(active_B, next_B, state.stop_state_B)
  stop_B = chosen_B & (stop_state_B == rules.stop_state)
  again_B = stop_B & rules.again
  ended_B = chosen_B & (token_B[:, None] == rules.eos_Z).any(-1) | stop_B & ~again_B
  # The token that is forced then takes the automaton back to its start.
  queue_at_B = jnp.where(again_B, 0, state.queue_at_B + (forced_B & active_B))
  count_B = state.chosen_B + chosen_B
  length_B = index_B + active_B
  most_B = state.sampling.max_new_B + (1 + MOST_AGAIN) * state.queue_length_B
  spent_B = count_B >= state.sampling.max_new_B
  spent_B |= (length_B >= most_B) | (length_B >= capacity)

  out = model.apply(
    {"params": params},
    token_B[:, None],
    (state.cache.start_B + index_B)[:, None],
    None,
    cache=state.cache,
  )
  return state.replace(
    cache=out.cache.replace(cursor_B=length_B),
    hidden_BE=out.hidden[:, 0],
    tokens_BC=record(state.tokens_BC, token_B),
    logp_BC=record(state.logp_BC, jnp.where(chosen_B, logp_B, 0.0)),
    raw_logp_BC=record(state.raw_logp_BC, jnp.where(chosen_B, raw_logp_B, 0.0)),
    chosen_BC=record(state.chosen_BC, chosen_B),
    done_B=state.done_B | ended_B | spent_B,
    finished_B=state.finished_B | ended_B,
    stop_state_B=stop_state_B,
    chosen_B=count_B,
    queue_at_B=queue_at_B,
    steps=state.steps + 1,
  )


def decode(
  model: Decoder,
  params: dict,
  state: DecodeState,
  rules: Rules,
  max_steps: jax.Array,
  free_slots: jax.Array,
) -> DecodeState:
  """Decodes until `free_slots` slots have ended, all have, or `max_steps` are done."""
  samples = _samples(state)
  last = state.steps + max_steps

  def go_on(state):
    done_S = state.done_B.reshape(-1, samples).all(-1)
    return (state.steps < last) & ~done_S.all() & (done_S.sum() < free_slots)

  step = lambda state: _placed(decode_step(model, params, state, rules), model)
  return jax.lax.while_loop(go_on, step, state)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5))
def jit_empty(model, slots, samples, prompt, completion, queue):
  return empty_state(model, slots, samples, prompt, completion, queue)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def jit_insert(model, params, state, prompts, seed, step, purpose):
  TRACES["insert"] += 1
  prefilled = prefill(model, params, prompts.tokens_IP, prompts.mask_IP)
  return _placed(insert(state, prompts, prefilled, seed, step, purpose), model)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def jit_decode(model, params, state, rules, max_steps, free_slots):
  TRACES["decode"] += 1
  return decode(model, params, state, rules, max_steps, free_slots)

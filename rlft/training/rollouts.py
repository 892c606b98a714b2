"""From prompts to an RL batch: what PPO and GRPO share outside their losses.

Letters: B rows (prompts x samples), T tokens, P prompt columns, C completion columns,
T = P + C.

  prompts_of -> sample -> region -> score_rows -> (the algorithm's advantages) ->
  minibatches

Everything per token is [B, C], the completion's columns only: neither heads nor losses
see the prompt. Of several processes each samples, judges and holds rows of its own;
host arrays have those alone, and what is put on the mesh joins them.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import struct
from jax.sharding import Mesh

from rlft.core import hosts, rng
from rlft.core.errors import ConfigError, DataError
from rlft.core.mesh import batch_shards, constrain
from rlft.core.rng import Purpose
from rlft.core.types import Example, Reward, Rollout
from rlft.models.hub import Policy
from rlft.models.scalar import ScalarModel, scalar_head
from rlft.rewards.forms import RewardOf
from rlft.sampling.buckets import bucket
from rlft.sampling.generate import generate
from rlft.sampling.score import completion_hidden, completion_logp
from rlft.sampling.stops import by_stop
from rlft.tasks.prompts import opened
from rlft.training.data import encode_prompts, place
from rlft.training.step import COUNT

log = logging.getLogger(__name__)


@struct.dataclass
class RLBatch:
  """Rows of a rollout with what a policy or value loss needs; None where unused.

  Attributes:
    tokens, mask: [B, T], a prompt, at once its completion, then padding.
    start: int32 [B], where the completion begins.
    loss_mask: bool [B, C], tokens that the policy chose, of rows that train.
    old_logp: float32 [B, C], of the policy before this iteration's updates.
    behaviour_logp: float32 [B, C], of the sampler.
    ref_logp: float32 [B, C], of the reference.
    advantage, returns, old_value: float32 [B, C].
  """

  tokens: Any
  mask: Any
  start: Any
  loss_mask: Any
  old_logp: Any
  advantage: Any
  behaviour_logp: Any = None
  ref_logp: Any = None
  returns: Any = None
  old_value: Any = None


@dataclasses.dataclass(frozen=True)
class Region:
  """The rows of a rollout without the padding inside them, as training takes them.

  Attributes:
    tokens, mask: [B, T], a prompt, at once its completion, then padding.
    start: int32 [B], where the completion begins.
    chosen: bool [B, C], tokens that the policy chose.
    logp: float32 [B, C], of the sampler, under temperature only.
    columns: C.
  """

  tokens: np.ndarray
  mask: np.ndarray
  start: np.ndarray
  chosen: np.ndarray
  logp: np.ndarray
  columns: int


def prompts_of(
  examples: Sequence[Example], iteration: int, count: int, seed: int
) -> list[Example]:
  """The prompts of an iteration: each once an epoch, every epoch in another order.

  A function of integers alone, so a resumed run goes on with the prompts that the
  killed one would have taken. No iteration has a prompt twice: what is left over at the
  end of an epoch waits for the next one's order.

  Args:
    examples: the training prompts.
    iteration: from 0.
    count: prompts of an iteration, at most all of them.
    seed: of the order.
  """
  size = len(examples)
  if count > size:
    raise ConfigError(
      f"prompts_per_iteration={count}, but there are only {size} training prompts: "
      "set it to at most that, or give more prompts"
    )
  per_epoch = size // count
  epoch, at = divmod(iteration, per_epoch)
  order = rng.numpy(seed, rng.Stream.PROMPTS, epoch).permutation(size)
  return [examples[i] for i in order[at * count : (at + 1) * count]]


def usable(
  policy: Policy,
  examples: Sequence[Example],
  max_new_tokens: int,
  chat: bool = False,
  few_shot: str = "",
) -> list[Example]:
  """The examples whose prompt leaves room for a completion; the others are counted in a
  warning, with their ids. Left to the sampler, one would end a run in whichever
  iteration draws it.

  Args:
    policy: what samples.
    examples: to be sampled.
    max_new_tokens, chat: of sampling.
    few_shot: text before every prompt.

  Raises:
    DataError: none is left.
  """
  longest = policy.config.longest_sample
  prompts = encode_prompts(policy.tokenizer, opened(examples, few_shot), chat)
  fits = [0 < len(ids) <= longest(len(ids)) - max_new_tokens for ids in prompts]
  room = max(0, longest(1) - max_new_tokens)
  what = (
    f"of {len(examples)} prompts are empty or longer than the {room} tokens that "
    f"max_new_tokens={max_new_tokens} leaves of the model's {longest(1)} positions"
  )
  if not any(fits):
    short = min(map(len, prompts))
    cure = f"; the shortest has {short}: lower max_new_tokens" if short else ""
    raise DataError(f"all {what}{cure}")
  if out := [e.id for e, good in zip(examples, fits) if not good]:
    more = ", ..." if len(out) > 8 else ""
    ids = ", ".join(map(str, out[:8])) + more
    log.warning("%d %s, and are left out (ids %s)", len(out), what, ids)
  return [e for e, good in zip(examples, fits) if good]


def sample(
  policy: Policy,
  examples: Sequence[Example],
  *,
  samples: int,
  temperature: float,
  max_new_tokens: int,
  seed: int,
  step: int,
  stop: Sequence[str] = (),
  chat: bool = False,
  purpose: Purpose = Purpose.ROLLOUT,
  max_rows: int = 128,
  on_progress: Callable[[int, int], None] | None = None,
) -> Rollout:
  """Completions of the examples, under temperature only: the scored distribution."""
  return generate(
    policy,
    encode_prompts(policy.tokenizer, [e.prompt for e in examples], chat),
    samples=samples,
    max_new_tokens=max_new_tokens,
    temperature=temperature,
    stop=stop,
    seed=seed,
    step=step,
    prompt_ids=[e.id for e in examples],
    purpose=purpose,
    max_rows=max_rows,
    on_progress=on_progress,
  )


def prompt_columns(rollout: Rollout) -> int:
  """P: where the completion region starts."""
  return int(np.argmax(rollout.mask[0])) + int(rollout.prompt_lengths[0])


def region(rollout: Rollout) -> Region:
  """Rows moved to the left, in the buckets of the longest row and completion.

  Sampling pads prompts on the left and completions on the right, each to its own
  longest; a row has less than half of both on most tasks. The shape is the same on all
  processes.
  """
  at, total = prompt_columns(rollout), rollout.tokens.shape[1]
  longest = int((rollout.prompt_lengths + rollout.lengths).max())
  sizes = [int(rollout.lengths.max()), longest, at, total - at]
  most, longest, widest, room = np.max(hosts.everyone(sizes), axis=0).tolist()
  columns = min(bucket(most), room)
  width = min(bucket(longest), widest + columns)
  shift_B1 = (at - rollout.prompt_lengths)[:, None]
  index_BT = np.minimum(np.arange(width) + shift_B1, total - 1)
  mask_BT = np.take_along_axis(rollout.mask, index_BT, axis=1)
  mask_BT &= np.arange(width) + shift_B1 < total
  tokens_BT = np.take_along_axis(rollout.tokens, index_BT, axis=1)
  return Region(
    tokens=np.where(mask_BT, tokens_BT, 0).astype(np.int32),
    mask=mask_BT,
    start=rollout.prompt_lengths.astype(np.int32),
    chosen=rollout.completion_mask[:, at : at + columns],
    logp=rollout.raw_logp[:, at : at + columns],
    columns=columns,
  )


def judge(
  reward: RewardOf, rollout: Rollout, prompts: Sequence[Example], mesh: Mesh | None
) -> Reward:
  """The checked reward of a rollout, the same on all hosts that hold its rows."""
  judged = reward(rollout, prompts)
  check_reward(judged, rollout)
  value, known, step = hosts.as_lead((judged.value, judged.judged, judged.step), mesh)
  return dataclasses.replace(judged, value=value, judged=known, step=step)


def final_rewards(value_B: np.ndarray, chosen_BC: np.ndarray) -> np.ndarray:
  """[B, C]: each row's value at its last chosen token; a row without one gets none."""
  out_BC = np.zeros(chosen_BC.shape, np.float32)
  rows = np.flatnonzero(chosen_BC.any(1))
  last = chosen_BC.shape[1] - 1 - np.argmax(chosen_BC[rows, ::-1], axis=1)
  out_BC[rows, last] = value_B[rows]
  return out_BC


def with_steps_added(reward: Reward, rollout: Rollout) -> Reward:
  """A checked reward whose steps are added to the value of their row."""
  check_reward(reward, rollout)
  if reward.step is None:
    return reward
  value_B = reward.value + reward.step.sum(1)
  return dataclasses.replace(reward, value=value_B.astype(np.float32), step=None)


def values(reward: Reward, rollout: Rollout) -> list[np.float32 | None]:
  """What each row is worth, its steps included; None where it was not judged.

  As float32, so that a threshold is compared as one: float(0.7) is above it.
  """
  reward = with_steps_added(reward, rollout)
  return [x if known else None for x, known in zip(reward.value, reward.judged)]


def join_groups(
  groups: Sequence[tuple[Rollout, Reward, int]], size: int
) -> tuple[Rollout, Reward]:
  """One rollout of groups out of several: (rollout, its reward, index of the group).

  Prompts are padded to the longest on the left, completions on the right. Seconds and
  counts are of whole rewards, also where only some of their groups are taken.
  """
  rewards = list({id(reward): reward for _, reward, _ in groups}.values())
  at = [prompt_columns(rollout) for rollout, _, _ in groups]
  after = [r.tokens.shape[1] - p for (r, _, _), p in zip(groups, at)]
  left, right = max(at), max(after)
  rows = [slice(g * size, (g + 1) * size) for _, _, g in groups]

  def wide(name):
    parts = []
    for (rollout, _, _), own, columns, row in zip(groups, at, after, rows):
      grow = ((0, 0), (left - own, right - columns))
      parts.append(np.pad(getattr(rollout, name)[row], grow))
    return np.concatenate(parts)

  plain = lambda name: np.concatenate(
    [getattr(rollout, name)[row] for (rollout, _, _), row in zip(groups, rows)]
  )
  first = groups[0][0]
  rollout = dataclasses.replace(
    first,
    **{
      name: wide(name)
      for name in ("tokens", "mask", "completion_mask", "logp", "raw_logp")
    },
    **{
      name: plain(name)
      for name in ("finished", "prompt_lengths", "lengths", "prompt_ids")
    },
    completions=[
      text for (r, _, _), row in zip(groups, rows) for text in r.completions[row]
    ],
  )
  judged = lambda pick: np.concatenate(
    [pick(reward)[row] for (_, reward, _), row in zip(groups, rows)]
  )
  reward = Reward(
    value=judged(lambda r: r.value),
    judged=judged(lambda r: r.judged),
    each={
      name: judged(lambda r, name=name: r.each[name]) for name in groups[0][1].each
    },
    seconds=sum(r.seconds for r in rewards),
    counts={name: sum(r.counts[name] for r in rewards) for name in groups[0][1].counts},
  )
  return rollout, reward


# ------------------------------------------------------------------------ scoring


@functools.partial(jax.jit, static_argnums=(0,), static_argnames="columns")
def _logp_block(model, params, lora, tokens, mask, start, temperature, *, columns):
  logp_BC, _ = completion_logp(
    model, params, tokens, mask, start, columns, temperature, lora
  )
  return logp_BC


@functools.partial(jax.jit, static_argnums=(0,), static_argnames="columns")
def _value_block(model, params, tokens, mask, start, *, columns):
  # One column more than there are tokens: the last state's value is of use too.
  hidden = completion_hidden(model, params["trunk"], tokens, mask, start, columns + 1)
  return scalar_head(params["head"], hidden)


def start_logp(
  policy: Policy,
  rows: Region,
  temperature: float,
  lora: dict | None = None,
  max_tokens: int = 16384,
) -> Callable[[], np.ndarray]:
  """Starts the log-probs [B, C] of a rollout's completions on the device.

  Returns:
    A function that waits for them: the host can judge completions meanwhile.
  """
  heat = hosts.put(np.float32(temperature), policy.model.mesh)
  run = lambda *block: _logp_block(
    policy.model,
    policy.params,
    lora,
    *block,
    heat,
    columns=rows.columns,
  )
  return _start(run, policy.model.mesh, rows, max_tokens)


def start_values(
  scalar: ScalarModel, rows: Region, max_tokens: int = 16384
) -> Callable[[], np.ndarray]:
  """Starts the values [B, C + 1] of the states before each token, and after C of them;
  see `start_logp`.
  """
  run = lambda *block: _value_block(
    scalar.model, scalar.params, *block, columns=rows.columns
  )
  return _start(run, scalar.model.mesh, rows, max_tokens)


def _start(run, mesh, rows: Region, max_tokens: int) -> Callable[[], np.ndarray]:
  """Runs a program on blocks of rows of one size, so that it is compiled once."""
  count, width = rows.tokens.shape
  shards = batch_shards(mesh)
  of = hosts.share(mesh).of
  shards //= of
  size = min(count, max(1, max_tokens // of // width))
  blocks = -(-count // size)
  size = -(-count // blocks)  # even blocks: less padding in the last one
  size = -(-size // shards) * shards
  out = []
  for first in range(0, count, size):
    block = [x[first : first + size] for x in (rows.tokens, rows.mask, rows.start)]
    short = size - len(block[0])
    if short:
      grow = lambda x, short=short: ((0, short),) + ((0, 0),) * (x.ndim - 1)
      block = [np.pad(x, grow(x), mode="edge") for x in block]
    block = hosts.place_own(tuple(block), mesh)
    out.append(hosts.paced(run(*block)))
  return lambda: np.concatenate([hosts.own_rows(x, mesh) for x in out])[:count]


# ------------------------------------------------------------------------ updates


def minibatches(
  batch: RLBatch, count: int, seed: int, iteration: int, epoch: int, mesh: Any
) -> Iterator[RLBatch]:
  """One epoch in `count` parts, every row exactly once, in an order of its own.

  A part without a token in the loss is left out: an update on nothing would still move
  the weights by the optimiser's momentum, and count in every mean.

  Of several processes each gives its own rows; a part takes rows of all of them, the
  ones that it would take of one process.
  """
  trains_B = hosts.together(batch.loss_mask.any(1), mesh)
  take = lambda part: place(jax.tree.map(lambda x: x[part], batch), mesh)
  if hosts.several():
    whole = hosts.place_own(batch, mesh)
    take = lambda part: hosts.paced(_take_rows(whole, part, mesh))
  order = rng.numpy(seed, rng.Stream.MINIBATCHES, iteration, epoch).permutation(
    len(trains_B)
  )
  for part in np.split(order, count):
    if trains_B[part].any():
      yield take(part)


@functools.partial(jax.jit, static_argnums=2)
def _take_rows(batch: RLBatch, rows, mesh) -> RLBatch:
  """Rows by their numbers, spread over the mesh anew."""
  take = lambda x: constrain(x[rows], mesh, ("batch",) + (None,) * (x.ndim - 1))
  return jax.tree.map(take, batch)


def check_rows(
  prompts: int, samples: int, minibatch_count: int, micro_batches: int, mesh: Any
) -> None:
  """Raises `ConfigError` when an iteration's rows cannot be divided."""
  rows, shards = prompts * samples, batch_shards(mesh)
  micro_batches = max(1, micro_batches)  # 0 chooses one that fits
  need = minibatch_count * micro_batches * shards
  if rows % need:
    raise ConfigError(
      f"prompts_per_iteration x samples_per_prompt = {prompts} x {samples} = {rows} "
      f"rows must be a multiple of minibatches x micro_batches x batch shards = "
      f"{minibatch_count} x {micro_batches} x {shards} = {need}"
    )
  of = hosts.share(mesh).of
  if prompts % of:
    raise ConfigError(
      f"prompts_per_iteration={prompts} cannot be shared equally by the {of} parts of "
      f"the hosts: use a multiple of {of}"
    )


# ------------------------------------------------------------------------ numbers


def check_reward(reward: Reward, rollout: Rollout) -> None:
  """Raises `DataError` when a reward does not fit its rollout."""
  rows = len(rollout.finished)
  if reward.value.shape != (rows,) or reward.judged.shape != (rows,):
    raise DataError(
      f"the reward has shapes {reward.value.shape} and {reward.judged.shape} for "
      f"{rows} rows"
    )
  if not np.isfinite(reward.value[reward.judged]).all():
    row = int(np.flatnonzero(reward.judged & ~np.isfinite(reward.value))[0])
    raise DataError(
      f"the reward of row {row} (prompt {rollout.prompt_ids[row]}) is "
      f"{reward.value[row]}: rewards are finite, None where there is no judgement"
    )
  if reward.step is None:
    return
  chosen_BC = rollout.completion_mask[:, prompt_columns(rollout) :]
  if reward.step.shape != chosen_BC.shape:
    raise DataError(
      f"the rewards of steps have shape {reward.step.shape}, the completions "
      f"{chosen_BC.shape}"
    )
  # GAE reads rewards where the policy chose; what is paid elsewhere would be lost.
  wrong_BC = np.where(chosen_BC, ~np.isfinite(reward.step), reward.step != 0)
  if wrong_BC.any():
    row, column = np.argwhere(wrong_BC)[0]
    raise DataError(
      f"the reward of a step of row {row} (prompt {rollout.prompt_ids[row]}) is "
      f"{reward.step[row, column]} at completion token {column}: pay finite numbers, "
      "at tokens that the policy chose"
    )


def rollout_metrics(
  rollout: Rollout,
  reward: Reward,
  mesh: Mesh | None = None,
  eos_ids: Sequence[int] = (),
) -> dict[str, float]:
  """What people look at in a rollout; every mean is over what it is a mean of, and NaN
  where that is nothing. Of several processes, over the rows of all.

  A completion has ended by a token ("completion/eos", of `eos_ids`), by a stop string
  ("completion/stopped"), or was cut ("completion/truncated").
  """
  own = {"value": reward.value, "judged": reward.judged, "each": dict(reward.each)}
  own |= {"lengths": rollout.lengths, "finished": rollout.finished}
  own |= {"stopped": by_stop(rollout, eos_ids)}
  rows = hosts.together(own, mesh)
  values, lengths = rows["value"][rows["judged"]], rows["lengths"]
  out = {
    "reward/mean": float(values.mean(dtype=np.float64)) if values.size else np.nan,
    "reward/std": float(values.std(dtype=np.float64)) if values.size else np.nan,
    "reward/judged": float(rows["judged"].mean()),
  }
  for name, each in rows["each"].items():
    known = each[~np.isnan(each)]
    out[f"reward/{name}/mean"] = (
      float(known.mean(dtype=np.float64)) if known.size else np.nan
    )
    out[f"reward/{name}/std"] = (
      float(known.std(dtype=np.float64)) if known.size else np.nan
    )
  unique = len(set(zip(rollout.prompt_ids.tolist(), rollout.completions)))
  counts = dict(reward.counts) | {
    "unique": unique,
    "tokens_per_second": rollout.stats["tokens_per_second"],
  }
  parts = hosts.each_part(counts, mesh)
  names = dict.fromkeys(name for part in parts for name in part)
  counts = {name: sum(float(part.get(name, 0)) for part in parts) for name in names}
  unique, speed = counts.pop("unique"), counts.pop("tokens_per_second")
  out |= {f"reward/{name}": x for name, x in counts.items()}
  return out | {
    "completion/length_mean": float(lengths.mean()),
    "completion/length_max": float(lengths.max()),
    "completion/truncated": float(1 - rows["finished"].mean()),
    "completion/ended": float(rows["finished"].mean()),
    "completion/eos": float((rows["finished"] & ~rows["stopped"]).mean()),
    "completion/stopped": float(rows["stopped"].mean()),
    "completion/unique": unique / len(lengths),
    "rollout/tokens_per_second": speed,
  }


class Means:
  """Metrics of an iteration's updates: means, and the largest of what ends in "_max".

  A mean over tokens or rows is one over those of all updates: each counts for as many
  as it had.
  Reading a metric waits for its update, so they are kept as they are until `read`.
  Updates that were skipped, as their numbers are not finite, are counted ("skipped")
  and in no mean; where there is no other, the means are theirs.
  """

  def __init__(self):
    self._all: list[Mapping[str, Any]] = []

  def add(self, metrics: Mapping[str, Any]) -> None:
    self._all.append(metrics)

  def first(self) -> dict[str, float]:
    """Metrics of the first update; {} without one."""
    first = jax.device_get(self._all[:1])
    return {name: float(x) for one in first for name, x in one.items()}

  def read(self) -> dict[str, float]:
    """One number for each metric."""
    each = jax.device_get(self._all)
    skipped = [one for one in each if one.get("skipped")]
    out = {"skipped": float(len(skipped))} if each else {}
    each = [one for one in each if not one.get("skipped")] or skipped
    names = dict.fromkeys(name for one in each for name in one if name != "skipped")
    for name in names:
      if name.startswith(COUNT):
        continue
      of = [one for one in each if name in one]
      values = np.array([one[name] for one in of], np.float64)
      count = "loss_denominator" if name == "loss" else COUNT + name
      counts = np.array([one.get(count, 1.0) for one in of], np.float64)
      mean = (values * counts).sum() / max(counts.sum(), 1e-9)
      out[name] = float(values.max() if name.endswith("_max") else mean)
    return out

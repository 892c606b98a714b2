"""Best-of-n: sample n completions, keep the one with the highest reward.

  y* = argmax_i r(x, y_i),  y_1 ... y_n ~ pi(. | x)

As inference it needs a reward and n times the sampling; no weights change. It is at
most log n - (n - 1) / n nats from the policy (`objectives.estimates.best_of_n_kl`).
`distill` trains on what was kept, so that one sample is worth what the best of n was.

Source: Nakano et al. 2021 (arXiv 2112.09332), section 3.2; the KL's bound Beirami et
al. 2024 (2401.01879).

Letters: P prompts, N samples of each, B = P x N rows, M samples to draw from, R draws.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlft.algorithms import sft
from rlft.core import rng
from rlft.core.errors import ConfigError, DataError
from rlft.core.types import Example
from rlft.models.hub import Policy, check_policy
from rlft.objectives.estimates import best_of_n_value, bootstrap_interval
from rlft.rewards.forms import ONCE, as_reward
from rlft.tasks.prompts import Prompts, as_examples
from rlft.training import rollouts

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class BestOfNConfig:
  """Best-of-n.

  Attributes:
    n: samples of each prompt.
    temperature: of sampling; there are no filters.
    max_new_tokens, stop, chat: of sampling.
    threshold: the reward from which a kept completion is a training row; None takes
      all.
    max_rows: completions in flight.
    seed: of the samples.
  """

  n: int = 16
  temperature: float = 1.0
  max_new_tokens: int = 256
  stop: tuple[str, ...] = ()
  chat: bool = False
  threshold: float | None = None
  max_rows: int = 128
  seed: int = 0

  def __post_init__(self):
    for name in ("n", "max_new_tokens", "max_rows"):
      if getattr(self, name) < 1:
        raise ConfigError(f"{name}={getattr(self, name)}: at least 1")
    if not self.temperature > 0:
      raise ConfigError(
        f"temperature={self.temperature}: samples must differ, so it must be positive"
      )
    if self.threshold is not None and not np.isfinite(self.threshold):
      raise ConfigError(f"threshold={self.threshold}: give a number, or None")
    rng.check_seed(self.seed)


@dataclasses.dataclass
class BestOfNResult:
  """What was sampled, and what was kept.

  Attributes:
    examples: the P prompts that were sampled: those that leave room for a completion.
    texts: the kept completion of each prompt; None where no sample was judged.
    rewards: of the kept ones, float32 [P]; NaN where there is none.
    kept: int32 [P], which sample; -1 where there is none.
    rows: (prompt, token ids) to train on: kept completions that ended by themselves and
      reach the threshold. After a stop string, which may end inside a token, the text
      stands in place of the ids.
    completions: all samples, P lists of N.
    reward: float32 [P, N], of all samples; NaN where one was not judged.
    unjudged: prompts without a judged sample.
    truncated: prompts whose kept completion was cut by the length limit.
    sampled_solutions: P x N.
    seconds: wall clock.
  """

  examples: list[Example]
  texts: list[str | None]
  rewards: np.ndarray
  kept: np.ndarray
  rows: list[tuple[str, tuple[int, ...] | str]]
  completions: list[list[str]]
  reward: np.ndarray
  unjudged: int
  truncated: int
  sampled_solutions: int
  seconds: float

  def curve(
    self, value_PN: np.ndarray | None = None
  ) -> list[tuple[int, tuple[float, float, float]]]:
    """(k, mean over prompts with its 95 % interval) of the best of k, as k grows to N.

    Unbiased: every subset of k samples counts (see `estimates.best_of_n_value`).
    Prompts with fewer than k judged samples are left out, all NaN where none is left.

    Args:
      value_PN: what is averaged, such as correctness; the reward itself when None.
    """
    judged_PN = ~np.isnan(self.reward)
    value_PN = self.reward if value_PN is None else np.asarray(value_PN, np.float32)
    out = []
    for k in sizes(self.reward.shape[1]):
      value_P = best_of_n_value(self.reward, judged_PN, k, value_PN)
      out.append((k, bootstrap_interval(np.asarray(value_P), seed=0)))
    return out


def sizes(n: int) -> list[int]:
  """1, 2, 4 ... below n, and n."""
  return [2**i for i in range(n.bit_length()) if 2**i < n] + [n]


def run(
  policy: Policy,
  examples: Prompts,
  reward: Any,
  config: BestOfNConfig,
  on_progress: Callable[[int, int], None] | None = None,
) -> BestOfNResult:
  """Samples n completions of each prompt and keeps the best; the first of equal ones.

  Args:
    policy: what samples.
    examples: the prompts, see `tasks.prompts`; those without room for a completion
      are left out.
    reward: in any form, see `rewards.forms`; rewards of steps are added to that of
      their row. A sample that was not judged is never kept.
    config: see `BestOfNConfig`.
    on_progress: called with (prompts done, prompts to do) while sampling.

  Raises:
    ConfigError, DataError: before any device work.
    RewardError: of the reward.
  """
  examples = as_examples(examples)
  if not examples:
    raise DataError("no prompts")
  reward = as_reward(reward, examples, config=ONCE)
  if len({e.id for e in examples}) != len(examples):
    raise DataError("two prompts have the same id: their noise would be equal")
  check_policy(policy)
  if not policy.eos_ids:
    raise ConfigError("the policy has no eos_ids: nothing could end a completion")
  began = time.perf_counter()
  examples = rollouts.usable(policy, examples, config.max_new_tokens, config.chat)
  rollout = rollouts.sample(
    policy,
    examples,
    samples=config.n,
    temperature=config.temperature,
    max_new_tokens=config.max_new_tokens,
    stop=config.stop,
    chat=config.chat,
    seed=config.seed,
    step=0,
    max_rows=config.max_rows,
    on_progress=on_progress,
  )
  judged = rollouts.with_steps_added(reward(rollout, examples), rollout)
  shape = len(examples), config.n
  reward_PN = np.where(judged.judged, judged.value, np.nan).reshape(shape)
  reward_PN = reward_PN.astype(np.float32)
  kept_P = _best(reward_PN)
  texts, rewards, rows, truncated = [], [], [], 0
  for p, (example, k) in enumerate(zip(examples, kept_P)):
    row = p * config.n + k
    texts.append(rollout.completions[row] if k >= 0 else None)
    rewards.append(reward_PN[p, k] if k >= 0 else np.nan)
    if k < 0:
      continue
    if not rollout.finished[row]:
      truncated += 1  # it would teach to stop in the middle
      continue
    enough = config.threshold is None or rewards[-1] >= config.threshold
    if enough and texts[-1].strip():
      tokens = tuple(rollout.tokens[row][rollout.completion_mask[row]].tolist())
      ended = tokens[-1] in policy.eos_ids
      rows.append((example.prompt, tokens if ended else texts[-1]))
  unjudged = int((kept_P < 0).sum())
  if unjudged:
    log.warning("%d of %d prompts have no sample that was judged", unjudged, shape[0])
  elif config.n > 1 and (reward_PN == reward_PN[:, :1]).all():
    log.warning(
      "all %d samples of each prompt have the same reward: the first is kept, which is "
      "no better than another. Look at what the reward gives; raise temperature=%g",
      config.n,
      config.temperature,
    )
  if not rollout.finished.any():
    log.warning(
      "every sample was cut at max_new_tokens=%d: raise it, or let completions end, by "
      "stop or chat",
      config.max_new_tokens,
    )
  return BestOfNResult(
    examples=examples,
    texts=texts,
    rewards=np.array(rewards, np.float32),
    kept=kept_P,
    rows=rows,
    completions=[
      rollout.completions[p * config.n : (p + 1) * config.n] for p in range(shape[0])
    ],
    reward=reward_PN,
    unjudged=unjudged,
    truncated=truncated,
    sampled_solutions=len(rollout.finished),
    seconds=time.perf_counter() - began,
  )


best_of_n = run  # another name


def _best(reward_PN: np.ndarray) -> np.ndarray:
  """int32 [P]: the first sample of the highest reward; -1 where all are NaN."""
  judged_PN = ~np.isnan(reward_PN)
  best_P = np.argmax(np.where(judged_PN, reward_PN, -np.inf), axis=1)
  return np.where(judged_PN.any(1), best_P, -1).astype(np.int32)


# --------------------------------------------------------------------- distillation


def distill(
  policy: Policy,
  examples: Prompts,
  reward: Any,
  config: BestOfNConfig,
  train: sft.SFTConfig,
  on_event: Callable[[str, dict[str, Any]], None] | None = None,
) -> tuple[sft.SFTResult, BestOfNResult]:
  """Trains a policy on the best of its own samples.

  Args:
    policy: samples, and is where training starts; its parameters are not changed.
    examples, reward, config: see `run`.
    train: how the kept rows train.
    on_event: called with ("sample" | "train", values) for progress.

  Returns:
    What training gave, and what it was trained on.

  Raises:
    ConfigError, DataError: before any device work; and `DataError` when nothing that
      was kept can be trained on.
    RewardError: of the reward.
  """
  if train.chat != config.chat:
    raise ConfigError(
      f"chat={config.chat} of sampling and chat={train.chat} of training: prompts must "
      "be the same in both"
    )
  sft.check(policy, train)  # not after hours of sampling
  tell = on_event or (lambda kind, values: None)
  best = run(
    policy,
    examples,
    reward,
    config,
    lambda done, of: tell("sample", {"done": done, "of": of}),
  )
  return train_on(policy, best, train, tell), best


def train_on(
  policy: Policy,
  best: BestOfNResult,
  train: sft.SFTConfig,
  tell: Callable[[str, dict[str, Any]], None],
) -> sft.SFTResult:
  """The training half of `distill`."""
  if not best.rows:
    raise DataError(
      f"none of {len(best.texts)} kept completions can be trained on: {best.unjudged} "
      f"prompts have no judged sample, {best.truncated} were cut by the length limit, "
      "the others are blank or below the threshold. Lower threshold, or raise n or "
      "max_new_tokens"
    )
  return sft.train(
    policy,
    best.rows,
    train,
    lambda step, of, metrics: tell("train", {"step": step, "of": of, **metrics}),
  )


# ----------------------------------------------------------------------- simulation


def simulate(
  reward_PM, n: int, reps: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
  """Best-of-n, many times over, from samples that are there already.

  Every draw takes n of a prompt's M judged samples without replacement and keeps the
  best, the first drawn of equal ones. For the diversity of what best-of-n gives, which
  would else need n times as much sampling. Draws of a prompt share samples: what they
  keep is less diverse than that of new samples, the more so the nearer n is to M.

  Args:
    reward_PM: float [P, M]; NaN is not judged.
    n: samples of a draw.
    reps: R, draws of each prompt.
    seed: of the draws.

  Returns:
    (index_PR, value_PR): int32 and float32 [P, R], the sample that was kept and its
    reward; -1 and NaN for prompts with fewer than n judged samples. Their mean's limit
    is `estimates.best_of_n_value`.

  Raises:
    ConfigError: n or reps below 1, or n above M.

  Source: Kirk et al. 2023 (arXiv 2310.06452), whose released code draws 16 of many so.
  """
  reward_PM = np.asarray(reward_PM, np.float32)
  if reward_PM.ndim != 2:
    raise DataError(f"rewards of shape {reward_PM.shape}: give [prompts, samples]")
  if n < 1 or reps < 1 or n > reward_PM.shape[1]:
    raise ConfigError(
      f"n={n} (1 to the {reward_PM.shape[1]} samples of a prompt), reps={reps} (at "
      "least 1)"
    )
  key = rng.key(rng.check_seed(seed), rng.Purpose.EVALUATION)
  index_RP, value_RP = _simulate(jnp.asarray(reward_PM), n, reps, key)
  return np.asarray(index_RP).T, np.asarray(value_RP).T


@functools.partial(jax.jit, static_argnums=(1, 2))
def _simulate(reward_PM, n: int, reps: int, key):
  judged_PM = ~jnp.isnan(reward_PM)
  enough_P = jnp.sum(judged_PM, axis=1) >= n

  def draw(rep_key):
    order_PM = jnp.where(judged_PM, jax.random.uniform(rep_key, reward_PM.shape), -1.0)
    _, drawn_Pn = jax.lax.top_k(order_PM, n)  # in an order of chance too
    paid_Pn = jnp.take_along_axis(reward_PM, drawn_Pn, axis=1)
    first_P1 = jnp.argmax(paid_Pn, axis=1, keepdims=True)
    kept_P = jnp.take_along_axis(drawn_Pn, first_P1, axis=1)[:, 0]
    value_P = jnp.take_along_axis(paid_Pn, first_P1, axis=1)[:, 0]
    return jnp.where(enough_P, kept_P, -1), jnp.where(enough_P, value_P, jnp.nan)

  return jax.lax.map(draw, jax.random.split(key, reps))

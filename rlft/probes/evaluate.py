"""Samples a policy on a task's prompts and reports how well it reasons."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from rlft.core import hosts
from rlft.core.errors import ConfigError
from rlft.core.rng import Purpose, check_seed
from rlft.core.types import Example, Rollout, Verdict
from rlft.models.hub import Policy, check_policy
from rlft.probes import reasoning
from rlft.rewards.verifiable import Judge, judge_all, title_of, verdicts_of_all
from rlft.sampling.conditioned import label_tokens
from rlft.sampling.generate import generate
from rlft.sampling.stops import by_stop
from rlft.tasks.prompts import Prompts, as_examples, opened
from rlft.training.data import encode_prompts
from rlft.training.rollouts import usable


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """How a policy is evaluated.

  Attributes:
    samples: K, sampled completions of each prompt.
    ks: the k of pass@k and maj@k, none above K.
    temperature: of the K samples; greedy@1 is a completion of its own.
    max_new_tokens: longest completion.
    stop: strings that end a completion.
    few_shot: text put before every prompt.
    chat: put prompts into the tokenizer's chat template.
    seed: addresses the samples and the bootstrap.
    max_rows: completions in flight.
  """

  samples: int = 16
  ks: tuple[int, ...] = (1, 4, 16)
  temperature: float = 1.0
  max_new_tokens: int = 256
  stop: tuple[str, ...] = ()
  few_shot: str = ""
  chat: bool = False
  seed: int = 0
  max_rows: int = 128

  def __post_init__(self):
    if self.samples < 1:
      raise ConfigError(f"samples={self.samples}: at least 1")
    if not self.ks or not all(1 <= k <= self.samples for k in self.ks):
      raise ConfigError(
        f"ks={self.ks}: each k of pass@k and maj@k is from 1 to samples={self.samples}"
      )
    check_seed(self.seed)


@dataclasses.dataclass
class Evaluation:
  """What was sampled, what the task says of it, and the report.

  Attributes:
    report: see `probes.reasoning.report`; and "judge", who judged, and "left_out", how
      many of the prompts given left no room for a completion: they are in no mean.
    examples: the P prompts that were sampled.
    greedy, samples: completions: P texts, and P lists of K.
    greedy_verdicts, sample_verdicts: the same, judged.
    seconds: of sampling.
    sampled_solutions: completions sampled, the greedy ones included.
  """

  report: dict[str, Any]
  examples: list[Example]
  greedy: list[str]
  samples: list[list[str]]
  greedy_verdicts: list[Verdict]
  sample_verdicts: list[list[Verdict]]
  seconds: float
  sampled_solutions: int


def evaluate(
  policy: Policy,
  examples: Prompts,
  judge: Judge,
  config: EvalConfig,
  *,
  known_chains: Mapping[int, Collection[reasoning.Chain]] | None = None,
  sampler: Callable[..., Rollout] = generate,
  score: Callable[[list[list[int]]], Sequence[float]] | None = None,
  on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
  """Evaluates a policy: greedy@1, maj@k, pass@k, chains, luck.

  Args:
    policy: the model.
    examples: P prompts, see `tasks.prompts`.
    judge: the task's.
    config: see `EvalConfig`. Two policies evaluated under one seed see the same noise.
    known_chains: chains that are not novel, see `probes.reasoning.report`.
    sampler: called as `generate` is; of a policy that is conditioned, say.
    score: of rows of ids, a prompt and what was chosen after it, and an end after a
      stop string, such as `rewards.learned.score_rows`; adds rerank@k and weighted@k to
      the report.
    on_progress: called with (prompts done, prompts to do); each counts twice.

  Returns:
    `Evaluation`; of several processes each samples and judges a part of the prompts,
    and all get the whole.
  """
  check_policy(policy)
  examples = as_examples(examples)
  mesh, given = policy.model.mesh, len(examples)
  if score is not None and hosts.several():
    raise ConfigError("reranking runs on one host: evaluate without `score`, or there")
  most = config.max_new_tokens + label_tokens(sampler)
  everybody = usable(policy, examples, most, config.chat, config.few_shot)
  examples, real = hosts.own_evenly(everybody, mesh)
  prompts = encode_prompts(
    policy.tokenizer, opened(examples, config.few_shot), config.chat
  )
  total, of = 2 * len(everybody), hosts.share(mesh).of

  def sample(samples: int, temperature: float, before: int):
    tell = on_progress or (lambda done, of: None)
    return sampler(
      policy,
      prompts,
      samples=samples,
      max_new_tokens=config.max_new_tokens,
      temperature=temperature,
      stop=config.stop,
      seed=config.seed,
      prompt_ids=[e.id for e in examples],
      purpose=Purpose.EVALUATION,
      max_rows=config.max_rows,
      # As if the others were as far.
      on_progress=lambda done, _: tell(min(total, (before + done) * of), total),
    )

  count, k = len(examples), config.samples
  greedy = sample(1, 0.0, 0)
  drawn = sample(k, config.temperature, count)
  rows_of = lambda rollout, samples: rollout.completions[: real * samples]
  greedy_texts, texts = rows_of(greedy, 1), rows_of(drawn, k)
  greedy_verdicts = judge_all(judge, greedy_texts, examples[:real]) if real else []
  verdicts = judge_all(judge, texts, examples[:real]) if real else []
  scores = None
  if score is not None:
    chosen = zip(drawn.tokens, drawn.completion_mask, by_stop(drawn, policy.eos_ids))
    scores = score(
      [
        [*prompts[i // k], *row[mask].tolist(), *policy.eos_ids[: int(stopped)]]
        for i, (row, mask, stopped) in enumerate(chosen)
      ]
    )
  seconds = greedy.stats["seconds"] + drawn.stats["seconds"]
  greedy_verdicts = verdicts_of_all(greedy_verdicts, mesh)
  verdicts = verdicts_of_all(verdicts, mesh)
  parts = hosts.each_part([greedy_texts, texts], mesh)
  greedy_texts, texts = ([text for part in parts for text in part[i]] for i in (0, 1))
  examples, count = everybody, len(everybody)
  rows = lambda flat: [flat[i * k : (i + 1) * k] for i in range(count)]
  report = reasoning.report(
    rows(verdicts),
    examples,
    greedy=greedy_verdicts,
    ks=config.ks,
    seed=config.seed,
    known_chains=known_chains,
    scores=None if scores is None else rows(scores),
  )
  report |= {"judge": title_of(judge), "left_out": given - count}
  return Evaluation(
    report=report,
    examples=list(examples),
    greedy=greedy_texts,
    samples=rows(texts),
    greedy_verdicts=greedy_verdicts,
    sample_verdicts=rows(verdicts),
    seconds=seconds,
    sampled_solutions=count * (k + 1),
  )

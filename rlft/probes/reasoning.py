"""How well and in how many ways a model solves the problems of a task.

Letters: P prompts, K samples of a prompt.

Every metric is a mean over prompts of one value per prompt, with a 95 % bootstrap
interval over prompts; the values are kept, so that two models that were evaluated on
the same prompts can be compared prompt by prompt. Of one prompt:

    greedy@1       1 if the greedy completion is correct; also under its name in
                   Havrilla et al. 2024, maj@1
    pass@k         probability that one of k samples is correct, unbiased
    maj@k          probability that a vote of k samples gives the gold answer, ties
                   broken at random (for k < K a mean over random subsets); k > 1
    rerank@k       probability that the highest-scored of k samples is correct, and
    weighted@k     that a vote of k samples weighted by their scores gives the gold
                   answer; both only with scores, and as maj@k otherwise
    unique_chains  distinct operation chains among its sound samples
    novel_chains   those of them that are not in `known_chains`
    lucky          share of its correct samples that are inconsistent; NaN without a
                   correct sample, and such a prompt is left out
    no_answer      share of its samples without an answer

A sample is sound when it is correct and not known to be inconsistent: lucky samples are
no solutions, and as nearly every wrong chain is unique they would pass for diversity.
A value that needs more samples than a prompt has is NaN.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from rlft.core.errors import ConfigError
from rlft.core.types import Example, Verdict
from rlft.objectives import estimates

Chain = tuple[str, ...]


def report(
  verdicts_PK: Sequence[Sequence[Verdict]],
  examples: Sequence[Example],
  greedy: Sequence[Verdict] | None = None,
  ks: Sequence[int] = (1, 4, 16),
  seed: int = 0,
  known_chains: Mapping[int, Collection[Chain]] | None = None,
  scores: Sequence[Sequence[float]] | None = None,
) -> dict[str, Any]:
  """Metrics of one model on one set of prompts; the module says what they are.

  Args:
    verdicts_PK: what the task says of each sample, a list for each prompt; lists may
      differ in length.
    examples: the P prompts, in the same order.
    greedy: what the task says of the greedy completion of each prompt; without it
      greedy@1 and maj@1 are not reported.
    ks: the k of pass@k, maj@k, rerank@k and weighted@k, each at least 1.
    seed: addresses the bootstrap and the subsets.
    known_chains: for each example id, the chains that do not count as novel, such as
      `correct_chains` of the model before training; without it novel_chains is not
      reported.
    scores: what a reward model or ORM says of each sample, [P][K] as verdicts_PK;
      without it rerank@k and weighted@k are not reported.

  Returns:
    {"metrics": {name: {"mean", "low", "high", "prompts"}}, "per_prompt": {name:
    float32 [P]}, "prompt_ids": [P], "totals": {...}}. `prompts` counts those with a
    value. Totals are counts over all samples: samples, correct, lucky, no_answer,
    not_judged (which count as wrong), unique_chains (and novel_chains), and the pooled
    lucky_share = lucky / correct.

  Raises:
    ConfigError: no prompts, lengths that differ, a k below 1, or a score that is not
      finite.
  """
  _check(verdicts_PK, examples, greedy, ks, scores)
  values = {}
  if greedy is not None:
    values["greedy@1"] = np.array([v.correct for v in greedy], np.float32)
    values["maj@1"] = values["greedy@1"]
  values |= _estimates(verdicts_PK, ks, seed, scores)
  correct_P = _count(verdicts_PK, lambda verdict: verdict.correct)
  lucky_P = _count(verdicts_PK, _is_lucky)
  silent_P = _count(verdicts_PK, lambda verdict: verdict.answer is None)
  samples_P = np.array([len(row) for row in verdicts_PK], np.float32)
  unique = [_sound_chains(row) for row in verdicts_PK]
  values["unique_chains"] = np.array([len(chains) for chains in unique], np.float32)
  by_id = correct_chains(verdicts_PK, examples)
  totals: dict[str, Any] = {
    "samples": int(samples_P.sum()),
    "correct": int(correct_P.sum()),
    "lucky": int(lucky_P.sum()),
    "lucky_share": _share(lucky_P.sum(), correct_P.sum()).item(),
    "no_answer": int(silent_P.sum()),
    "not_judged": sum(not verdict.judged for row in verdicts_PK for verdict in row),
    "unique_chains": sum(map(len, by_id.values())),
  }
  if known_chains is not None:
    known = {example.id: set(known_chains.get(example.id, ())) for example in examples}
    novel = [chains - known[e.id] for chains, e in zip(unique, examples)]
    values["novel_chains"] = np.array([len(chains) for chains in novel], np.float32)
    totals["novel_chains"] = sum(len(by_id[name] - known[name]) for name in by_id)
  values["lucky"] = _share(lucky_P, correct_P)
  values["no_answer"] = _share(silent_P, samples_P)
  return {
    "metrics": {name: _interval(value_P, seed) for name, value_P in values.items()},
    "per_prompt": values,
    "prompt_ids": [example.id for example in examples],
    "totals": totals,
  }


def compare(
  report_a: Mapping[str, Any], report_b: Mapping[str, Any], seed: int = 0
) -> dict[str, dict[str, float]]:
  """What changed from report a to report b, prompt by prompt.

  Args:
    report_a, report_b: two reports on the same prompts in the same order.
    seed: addresses the bootstrap.

  Returns:
    {name: {"a", "b", "difference", "low", "high", "prompts"}} for the metrics that
    both have: means over the prompts where both have a value, the mean of b - a and
    its 95 % paired-bootstrap interval. An interval without 0 is a change beyond the
    choice of prompts; it says nothing of the choice of training seed.

  Raises:
    ConfigError: the prompts differ.
  """
  if report_a["prompt_ids"] != report_b["prompt_ids"]:
    raise ConfigError(
      "the two reports are not of the same prompts in the same order, so they cannot"
      " be paired; evaluate both models on one list of examples."
    )
  changes = {}
  for name, a_P in report_a["per_prompt"].items():
    if name not in report_b["per_prompt"]:
      continue
    b_P = report_b["per_prompt"][name]
    both_P = ~np.isnan(a_P) & ~np.isnan(b_P)
    difference, low, high = estimates.paired_bootstrap_interval(a_P, b_P, seed)
    changes[name] = {
      "a": _share(a_P[both_P].sum(), both_P.sum()).item(),
      "b": _share(b_P[both_P].sum(), both_P.sum()).item(),
      "difference": difference,
      "low": low,
      "high": high,
      "prompts": int(both_P.sum()),
    }
  return changes


def correct_chains(
  verdicts_PK: Sequence[Sequence[Verdict]], examples: Sequence[Example]
) -> dict[int, set[Chain]]:
  """The distinct chains of the sound samples of each example id.

  Args:
    verdicts_PK, examples: as for `report`; prompts of one id share a set.
  """
  chains: dict[int, set[Chain]] = {}
  for row, example in zip(verdicts_PK, examples, strict=True):
    chains.setdefault(example.id, set()).update(_sound_chains(row))
  return chains


def _check(verdicts_PK, examples, greedy, ks, scores) -> None:
  lengths = {"verdicts": len(verdicts_PK), "examples": len(examples)}
  if greedy is not None:
    lengths["greedy"] = len(greedy)
  if scores is not None:
    lengths["scores"] = len(scores)
  if len(set(lengths.values())) > 1:
    raise ConfigError(f"one entry a prompt is needed in each of: {lengths}.")
  if not examples:
    raise ConfigError("no prompts to report on.")
  if any(k < 1 for k in ks):
    raise ConfigError(f"ks is {tuple(ks)}; each k is at least 1.")
  for example, row, marks in zip(examples, verdicts_PK, scores or ()):
    if len(row) != len(marks) or not np.all(np.isfinite(marks)):
      raise ConfigError(
        f"example {example.id} has {len(row)} samples and scores {list(marks)}; each"
        " sample needs one finite score."
      )


def _estimates(
  verdicts_PK, ks: Sequence[int], seed: int, scores
) -> dict[str, np.ndarray]:
  answer_PK, valid_PK = _answer_ids(verdicts_PK)
  gold_P = np.zeros(len(answer_PK), np.int32)
  most = answer_PK.shape[1]
  values: dict[str, np.ndarray] = {}
  for k in ks:
    pass_P = estimates.pass_at_k((answer_PK == 0) & valid_PK, valid_PK, k)
    values[f"pass@{k}"] = np.asarray(pass_P)
  score_PK = np.zeros(answer_PK.shape, np.float32)
  for prompt, marks in enumerate(scores or ()):
    score_PK[prompt, : len(marks)] = marks
  key = jax.random.key(seed)
  for k in ks:
    if k == 1:
      continue  # maj@1 is greedy; a vote of one sample would be pass@1
    everyone = k == most and valid_PK.all()
    if everyone:
      maj_P = estimates.maj_at_k(answer_PK, gold_P, valid_PK)
    else:
      maj_P, _ = estimates.maj_subset(answer_PK, gold_P, valid_PK, k, key)
    values[f"maj@{k}"] = np.asarray(maj_P)
    if scores is None:
      continue
    samples = answer_PK, score_PK, gold_P, valid_PK
    for name, mode in (("rerank", "best"), ("weighted", "weighted")):
      if everyone:
        value_P = estimates.rerank(*samples, mode=mode)
      else:
        value_P, _ = estimates.rerank_subset(*samples, k, key, mode=mode)
      values[f"{name}@{k}"] = np.asarray(value_P)
  return values


def _answer_ids(verdicts_PK) -> tuple[np.ndarray, np.ndarray]:
  """Answers as integers: 0 the gold one, -1 none, others as they come; and validity.

  Correctness is the task's word, not a comparison of texts.
  """
  most = max(1, *map(len, verdicts_PK))
  answer_PK = np.full((len(verdicts_PK), most), -1, np.int32)
  valid_PK = np.zeros(answer_PK.shape, bool)
  for prompt, row in enumerate(verdicts_PK):
    wrong: dict[str, int] = {}
    for sample, verdict in enumerate(row):
      valid_PK[prompt, sample] = True
      if verdict.correct:
        answer_PK[prompt, sample] = 0
      elif verdict.answer is not None:
        number = wrong.setdefault(verdict.answer, len(wrong) + 1)
        answer_PK[prompt, sample] = number
  return answer_PK, valid_PK


def _is_lucky(verdict: Verdict) -> bool:
  return verdict.correct and verdict.consistent is False


def _sound_chains(row: Sequence[Verdict]) -> set[Chain]:
  sound = (verdict for verdict in row if verdict.correct and not _is_lucky(verdict))
  return {verdict.chain for verdict in sound if verdict.chain is not None}


def _count(verdicts_PK, holds) -> np.ndarray:
  return np.array([sum(map(holds, row)) for row in verdicts_PK], np.float32)


def _share(part, whole) -> np.ndarray:
  """part / whole, NaN where whole is 0."""
  part, whole = np.asarray(part, np.float32), np.asarray(whole, np.float32)
  return np.where(whole > 0, part / np.maximum(whole, 1), np.nan).astype(np.float32)


def _interval(value_P: np.ndarray, seed: int) -> dict[str, float]:
  mean, low, high = estimates.bootstrap_interval(value_P, seed)
  prompts = int(np.sum(~np.isnan(value_P)))
  return {"mean": mean, "low": low, "high": high, "prompts": prompts}

"""Return-conditioned RL: labels, masks, balance, sampling; and that labels matter."""

from __future__ import annotations

import collections
import dataclasses
import logging
import re

import jax
import numpy as np
import pytest

import rlft
from rlft.algorithms import return_conditioned as rc
from rlft.algorithms import sft
from rlft.core.errors import ConfigError, DataError
from rlft.core.types import Example, Reward, Verdict
from rlft.models.decoder import Decoder, DecoderConfig, init_params
from rlft.models.hub import Policy
from rlft.models.tokens import add_tokens
from rlft.probes.evaluate import EvalConfig, evaluate
from rlft.sampling.stops import decode_completion
from rlft.tasks.tokenizer import word_tokenizer
from rlft.training.optimizer import OptimizerConfig

LABELS = (rc.GOOD, rc.BAD)
EXAMPLES = [Example(10 + i, f"q{i}\n", f"{i},{i}", str(i)) for i in range(6)]
TRAIN = sft.SFTConfig(
  optimizer=OptimizerConfig(learning_rate=1e-2, schedule="constant", eps=1e-5),
  batch_size=32,
)
CONFIG = rc.RCRLConfig(
  train=TRAIN, samples_per_prompt=8, max_new_tokens=16, marks=(",",), seed=3
)
STEPS = dataclasses.replace(CONFIG, labels="step")


def judge(text: str, example: Example) -> Verdict:
  """Right when it begins with a digit: random weights often are, and often not."""
  return Verdict(text[:1] or None, text[:1].isdigit(), None, None)


@pytest.fixture(scope="module")
def policy() -> Policy:
  """Random weights that choose nearly uniformly; five tokens end a completion."""
  tokenizer = word_tokenizer(["q"])
  ends = (tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(["####", " ####"]))
  config = DecoderConfig(
    vocab_size=len(tokenizer),
    width=32,
    layers=1,
    heads=2,
    kv_heads=2,
    head_dim=16,
    mlp_width=32,
    max_positions=64,
  )
  model = Decoder(config)
  params = init_params(model, jax.random.key(0))
  return Policy(model, params, tokenizer, config, eos_ids=ends)


@pytest.fixture
def untrained(monkeypatch):
  """Training replaced by a recorder: what is decided before it is exact."""
  rows = []

  def train(policy, data, config, on_step=None, saving=None):
    rows.extend(data)
    return sft.SFTResult(policy, [1.0], 1, sum(sum(r.weight) for r in data), 0.0)

  monkeypatch.setattr(sft, "train", train)
  return rows


def solution(labels, tokens=(5, 6, 7), ends=(3,)):
  return rc.Labelled(1, "", (2, 3), tuple(tokens), ends, (), tuple(labels))


# ------------------------------------------------------------- rows


def test_labels_stand_before_their_steps_and_are_not_in_the_loss():
  row = rc.labelled_row(solution([True, False], range(5, 10), (3, 5)), 90, 91)
  assert row.tokens == (2, 3, 90, 5, 6, 7, 91, 8, 9)
  assert row.weight == (0, 0, 0, 1, 1, 1, 0, 1, 1)
  row = rc.labelled_row(solution([False]), 90, 91)
  assert row.tokens == (2, 3, 91, 5, 6, 7) and row.weight == (0, 0, 0, 1, 1, 1)


def test_a_step_ends_with_the_token_that_completes_its_mark(policy):
  read = lambda text: policy.tokenizer(text)["input_ids"]
  ends = lambda text, *marks: rc.step_ends(policy, [*read(text), 0], marks)
  # "12, 3": the comma and its space are one token.
  assert len(read("12, 3")) == 4 and ends("12, 3", ",") == [3, 5]
  assert ends("12, 3", ", 3") == [4, 5]
  assert ends("1,2,", ",") == [2, 4, 5]  # the last step is the end alone
  assert ends("123", ",") == [4] and ends("1,q", ",", "q") == [2, 3, 4]
  assert rc.step_ends(policy, read("1,2,"), (",",)) == [2, 4]


@pytest.mark.parametrize(
  "ratio, good, bad", [(0, 30, 10), (1, 10, 10), (2, 20, 10), (6, 30, 5), (99, 30, 1)]
)
def test_balance_leaves_some_out(ratio, good, bad):
  kinds = [[True, True], [True, True], [True, False], [True, True]] * 10
  given = [solution(labels, (i,)) for i, labels in enumerate(kinds)]
  kept = rc.balance(given, ratio, 0)
  assert collections.Counter(all(s.labels) for s in kept) == {True: good, False: bad}
  assert [s.tokens for s in kept] == sorted(s.tokens for s in kept)
  assert kept == rc.balance(given, ratio, 0)
  if ratio:
    assert kept != rc.balance(given, ratio, 1)
  only = [s for s in given if all(s.labels)]
  assert rc.balance(only, ratio, 0) == only


# ------------------------------------------------------------- labels


def check_rows(result, rows, judged=lambda s: [judge(s.text, None).correct]):
  """Every row is its solution with the labels that `judged` gives."""
  good, bad = result.policy.tokenizer.convert_tokens_to_ids(list(LABELS))
  assert len(rows) == len(result.solutions)
  for row, one in zip(rows, result.solutions):
    assert list(one.labels) == judged(one)
    due = list(one.prompt)
    for start, end, label in zip((0, *one.ends), one.ends, one.labels):
      due += [good if label else bad, *one.tokens[start:end]]
    assert row.tokens == tuple(due)
    plain = [t for t, w in zip(row.tokens, row.weight) if w]
    assert plain == list(one.tokens)
    assert decode_completion(result.policy.tokenizer, one.tokens[:-1]) == one.text


def test_outcomes_per_solution(policy, untrained):
  events = []
  result = rc.run(
    policy, EXAMPLES, judge, CONFIG, on_event=lambda kind, v: events.append(kind)
  )
  check_rows(result, untrained)
  stats = result.stats
  assert result.sampled_solutions == stats["samples"] == 48
  cut = round(stats["truncated"] * 48)
  assert len(untrained) == 48 - cut - stats["empty"]
  assert 0 < cut < 48 and stats["not_judged"] == 0
  assert stats["labelled_good"] + stats["labelled_bad"] == len(untrained)
  assert min(stats["labelled_good"], stats["labelled_bad"]) > 3
  assert {"sample", "round"} <= set(events)
  assert {s.prompt_id for s in result.solutions} == {e.id for e in EXAMPLES}
  assert all(s.tokens[-1] in policy.eos_ids for s in result.solutions)
  assert rc.GOOD not in policy.tokenizer.get_vocab()


def test_outcomes_per_step_and_balance(policy, untrained):
  config = dataclasses.replace(STEPS, good_per_bad=0.5)
  result = rc.run(policy, EXAMPLES, judge, config)
  check_rows(
    result, untrained, lambda s: [judge(s.text, None).correct] * (s.text.count(",") + 1)
  )
  stats = result.stats
  assert stats["kept_good"] == min(
    stats["labelled_good"], round(stats["labelled_bad"] / 2)
  )
  several = [s for s in result.solutions if len(s.labels) > 1]
  assert several and stats["kept_bad_labels"] > stats["kept_bad"]
  assert stats["without_marks"] > 0


def test_sft_rows_are_good_and_come_on_top(policy, untrained):
  pairs = [(e.prompt, e.solution) for e in EXAMPLES]
  result = rc.run(policy, EXAMPLES, judge, STEPS, sft_rows=pairs)
  good, bad = result.policy.tokenizer.convert_tokens_to_ids(list(LABELS))
  assert len(untrained) == len(result.solutions) + len(pairs)
  read = lambda text: tuple(policy.tokenizer(text)["input_ids"])
  for row, (prompt, text) in zip(untrained, pairs):
    first, rest = text.split(",")
    assert row.tokens == (*read(prompt), good, *read(first + ","), good, *read(rest), 0)
    assert bad not in row.tokens
  untrained.clear()
  off = dataclasses.replace(STEPS, mix_sft=False)
  result = rc.run(policy, EXAMPLES, judge, off, sft_rows=pairs)
  assert len(untrained) == len(result.solutions)


def test_an_orm_labels_each_prefix(policy, untrained):
  """Its value at the last token of a step; what it cannot tell is left out."""
  digits = set(policy.tokenizer.convert_tokens_to_ids(list("01234")))
  unknown = policy.tokenizer.convert_tokens_to_ids("9")

  def orm(rows):
    """1 where the prefix ends with a mark after a small digit."""
    out = []
    for row in rows:
      value = np.array([0.0] + [float(t in digits) for t in row[:-1]])
      value[np.array(row) == unknown] = np.nan  # only matters at a step's end
      out.append(np.where(np.roll(np.array(row) == unknown, 1), np.nan, value))
    return out

  config = dataclasses.replace(STEPS, value="orm", threshold=0.5)
  result = rc.run(policy, EXAMPLES, judge, config, orm=orm)
  assert result.stats["not_judged"] > 0
  check_rows(
    result,
    untrained,
    lambda s: [s.tokens[end - 2] in digits if end > 1 else False for end in s.ends],
  )
  labels = {label for s in result.solutions for label in s.labels}
  assert labels == {True, False}
  with pytest.raises(ConfigError, match="one value for each token"):
    rc.run(policy, EXAMPLES, judge, config, orm=lambda rows: [[0.0]] * len(rows))


@pytest.mark.parametrize("estimate", ["mean", "any"])
def test_continuations_value_prefixes(policy, untrained, estimate):
  """Right with a small digit: once it is there, all that ends is right."""
  seen = []

  small = re.compile("[0-4]").search

  def has_small(text, example):
    seen.append(text)
    return Verdict("0", bool(small(text)))

  config = dataclasses.replace(
    STEPS, value="rollouts", estimate=estimate, continuations=8, threshold=0.01
  )
  result = rc.run(policy, EXAMPLES, has_small, config)
  prefixes = {
    (s.prompt_id, s.tokens[:end]) for s in result.solutions for end in s.ends[:-1]
  }
  assert result.stats["continuations"] == 8 * len(prefixes)
  assert result.sampled_solutions == 48 + 8 * len(prefixes) == len(seen)
  value_of, surely, perhaps = {}, [], []
  for one in result.solutions:
    assert one.values[-1] == bool(small(one.text))
    for end, value in zip(one.ends[:-1], one.values):
      key = (one.prompt_id, one.tokens[:end])
      assert value_of.setdefault(key, value) == value
      text = decode_completion(policy.tokenizer, one.tokens[:end])
      # What is judged is the whole text, its prefix too.
      assert sum(t.startswith(text) for t in seen[48:]) >= 8
      (surely if small(text) else perhaps).append(value)
  if estimate == "any":
    assert set(surely + perhaps) <= {0.0, 1.0} and np.mean(surely) > 0.9
  else:
    assert np.mean(surely) > np.mean(perhaps) + 0.2
    assert min(surely) < 1  # those that were cut are no solutions
    assert {v * 8 % 1 for v in value_of.values()} == {0.0}
    assert len({*value_of.values()}) > 3
  check_rows(result, untrained, lambda s: [v >= 0.01 for v in s.values])


def test_what_the_reward_cannot_judge_is_left_out(policy, untrained):
  def reward(rollout, examples):
    rows = len(rollout.completions)
    value = np.arange(rows, dtype=np.float32) % 3
    return Reward(value=value, judged=np.arange(rows) % 2 == 0)

  config = dataclasses.replace(CONFIG, threshold=1.0)
  result = rc.run(policy, EXAMPLES, judge, config, reward=reward)
  stats = result.stats
  assert stats["not_judged"] > 5
  assert {s.values[0] for s in result.solutions} == {0.0, 1.0, 2.0}
  assert all(s.labels == (s.values[0] >= 1,) for s in result.solutions)


def test_what_the_judge_fails_on_is_left_out(policy, untrained):
  fails = lambda text, e: None if e.id == EXAMPLES[0].id else judge(text, e)
  result = rc.run(policy, EXAMPLES, fails, CONFIG)
  assert result.stats["not_judged"] > 0
  assert EXAMPLES[0].id not in {s.prompt_id for s in result.solutions}


# ------------------------------------------------------------- sampling


def test_the_label_opens_every_step(policy):
  conditioned = add_tokens(policy, LABELS)
  prompts, settings = ["q1\n", "q23\n"], {"samples": 4, "max_new_tokens": 16, "seed": 1}
  for label, config in ((rc.BAD, STEPS), (rc.GOOD, CONFIG)):
    rollout = rc.sampler(config, label)(conditioned, prompts, stop=(), **settings)
    forced = conditioned.tokenizer.convert_tokens_to_ids(label)
    entered = 0
    for i, text in enumerate(rollout.completions):
      row = rollout.tokens[i][rollout.mask[i]][rollout.prompt_lengths[i] :].tolist()
      own = rollout.tokens[i][rollout.completion_mask[i]].tolist()
      steps = rc.step_ends(conditioned, own, (",",)) if config is STEPS else [len(own)]
      due = []
      for start, end in zip((0, *steps), steps):
        due += [forced, *own[start:end]]
      assert row in (due, [*due, forced])  # a label that nothing followed any more
      entered += len(steps)
      assert not re.search(r"\[|GOOD|BAD", text)
    assert entered > len(rollout.completions) or config is CONFIG
    scored = rlft.score(conditioned, rollout.tokens, rollout.mask)
    chosen = rollout.completion_mask
    assert np.abs(scored - rollout.logp)[chosen].max() < 1e-4


def test_a_policy_that_knows_no_labels(policy):
  with pytest.raises(ConfigError, match=r"does not know '\[GOOD\]'"):
    rc.generate_conditioned(policy, ["q"])


# ------------------------------------------------------------- learning


def learn(policy, config, **given):
  """(share right under GOOD, under BAD) after training."""
  prompts = [Example(i, f"q{i}\n", "", "") for i in range(40)]
  result = rc.run(policy, prompts, judge, config, **given)
  shares = []
  for label in LABELS:
    held = [Example(100 + i, f"q{100 + i}\n", "", "") for i in range(16)]
    settings = EvalConfig(samples=8, ks=(1, 8), max_new_tokens=16)
    report = evaluate(
      result.policy, held, judge, settings, sampler=rc.sampler(config, label)
    ).report
    shares.append(report["metrics"]["pass@1"]["mean"])
  return shares


def permuted(rollout, examples):
  """The true outcomes, each on another row."""
  right = np.array([judge(text, None).correct for text in rollout.completions])
  value = np.random.default_rng(0).permutation(right).astype(np.float32)
  return Reward(value=value, judged=np.ones(len(value), bool))


@pytest.mark.slow
@pytest.mark.parametrize("labels", ["solution", "step"])
def test_labels_matter_and_permuted_ones_do_not(policy, labels):
  config = dataclasses.replace(
    CONFIG, labels=labels, train=dataclasses.replace(TRAIN, epochs=6)
  )
  good, bad = learn(policy, config)
  assert good > 0.85 and bad < 0.15
  good, bad = learn(policy, config, reward=permuted)
  assert abs(good - bad) < 0.2


# ------------------------------------------------------------- bad input


@pytest.mark.parametrize(
  "change, match",
  [
    ({"labels": "token"}, "labels='token'"),
    ({"value": "reward"}, "value='reward'"),
    ({"estimate": "max"}, "estimate='max'"),
    ({"accept": "all"}, "accept='all'"),
    ({"temperature": 0.0}, "temperature=0.0"),
    ({"threshold": float("nan")}, "threshold=nan"),
    ({"good_per_bad": -1.0}, "good_per_bad=-1.0"),
    ({"continuations": 0}, "continuations=0"),
    ({"labels": "step", "marks": ()}, "needs marks"),
    ({"value": "rollouts"}, "needs labels='step'"),
    ({"train": dataclasses.replace(TRAIN, loss_on="all")}, "loss is on steps only"),
    (
      {"train": sft.SFTConfig(optimizer=OptimizerConfig(freeze=("embedding",)))},
      "could not be learned",
    ),
  ],
)
def test_settings_are_checked(change, match):
  with pytest.raises(ConfigError, match=match):
    dataclasses.replace(CONFIG, **change)


def test_bad_input_is_named_before_sampling(policy, monkeypatch):
  monkeypatch.setattr(rc, "generate", None)
  orm = dataclasses.replace(CONFIG, value="orm")
  for examples, config, given, match in (
    ([], CONFIG, {}, "no training prompts"),
    (EXAMPLES[:1] * 2, CONFIG, {}, "the same id"),
    (EXAMPLES, orm, {}, "orm is None"),
    (EXAMPLES, CONFIG, {"orm": len}, "value='outcome'"),
    (EXAMPLES, CONFIG, {"base": add_tokens(policy, ["[X]"])}, "another vocabulary"),
  ):
    with pytest.raises((ConfigError, DataError), match=match):
      rc.run(policy, examples, judge, config, **given)


def test_no_marks_no_good_ones_no_ends(policy, untrained, caplog):
  with pytest.raises(DataError, match=r"none of .* has one of marks=.'@'"):
    rc.run(policy, EXAMPLES, judge, dataclasses.replace(STEPS, marks=("@",)))
  never = lambda text, example: Verdict(None, False)
  with pytest.raises(DataError, match="is GOOD, and there are no SFT"):
    rc.run(policy, EXAMPLES, never, CONFIG)
  mute = dataclasses.replace(policy, eos_ids=(1,))
  with pytest.raises(DataError, match="ended by itself"):
    rc.run(mute, EXAMPLES, judge, dataclasses.replace(CONFIG, max_new_tokens=1))
  assert not untrained
  always = lambda text, example: Verdict("1", True)
  with caplog.at_level(logging.WARNING):
    rc.run(policy, EXAMPLES, always, CONFIG)
  assert "no labelled solution is BAD" in caplog.text

"""Expert Iteration: what is accepted and kept, what is trained, and when it stops.

The loop's decisions are tested with sampling and training replaced by recorders, which
makes each of them exact; then the whole runs on a tiny real policy.
"""

from __future__ import annotations

import dataclasses
import logging
import types

import jax
import numpy as np
import pytest

from rlft.algorithms import expert_iteration as ei
from rlft.algorithms import sft
from rlft.core.errors import ConfigError, DataError, RewardError
from rlft.core.types import Example, Rollout, Verdict
from rlft.sampling.score import score
from rlft.tasks import arithmetic
from rlft.training.data import encode_rows
from rlft.training.optimizer import OptimizerConfig

EOS, UNK = 0, 1
EXAMPLES = [Example(4, "3 4\n", "", "7"), Example(2, "5 6\n", "", "11")]


def solution(prompt_id=1, text="t", chain=("c",), lucky=False, round=1):
  return ei.Solution(prompt_id, text, chain, lucky, round)


def rollout_of(tokenizer, prompt_ids, texts, finished=None, stopped=False):
  """A rollout of these texts, as `generate` would give it."""
  ids = [tokenizer(t)["input_ids"] + ([] if stopped else [EOS]) for t in texts]
  width = max(map(len, ids)) + 3
  tokens = np.full((len(ids), width), UNK, np.int32)
  mask = np.zeros((len(ids), width), bool)
  for i, row in enumerate(ids):
    tokens[i, 2 : 2 + len(row)] = row
    mask[i, 2 : 2 + len(row)] = True
  samples = len(texts) // len(prompt_ids)
  zero = np.zeros(tokens.shape, np.float32)
  return Rollout(
    tokens=tokens,
    mask=mask,
    completion_mask=mask,
    logp=zero,
    raw_logp=zero,
    finished=np.ones(len(ids), bool) if finished is None else np.array(finished),
    prompt_lengths=np.full(len(ids), 2),
    lengths=mask.sum(1),
    prompt_ids=np.repeat(prompt_ids, samples),
    completions=list(texts),
    samples=samples,
    stats={"seconds": 1.0, "tokens_per_second": 1.0},
  )


# ------------------------------------------------------------------------- collect

OK = Verdict("7", True, True, ("3+4=7",))


def collect(policy, texts, verdicts=None, rewards=None, **kwargs):
  rollout = rollout_of(policy.tokenizer, [4, 2], texts, **kwargs)
  count = len(texts)
  return ei.collect(
    rollout, verdicts or [OK] * count, rewards or [1.0] * count, 1.0, 3, (EOS,)
  )


def test_accepted_samples_know_their_prompt(policy):
  texts = ["1", "2", "3", "4"]
  found = collect(policy, texts, rewards=[1.0, 0.0, 2.0, 0.999])
  assert [(s.prompt_id, s.text, s.round) for s in found] == [(4, "1", 3), (2, "3", 3)]


@pytest.mark.parametrize("reward", [None, float("nan"), 0.5, -1.0])
def test_what_was_not_judged_or_not_enough_is_not_accepted(policy, reward):
  assert collect(policy, ["1", "2"], rewards=[reward, reward]) == []


@pytest.mark.parametrize("text", ["", " ", "\n"])
def test_an_empty_completion_is_not_accepted_whatever_it_is_worth(policy, text):
  assert collect(policy, [text, text], rewards=[5.0, 5.0]) == []


def test_a_cut_completion_is_not_accepted(policy):
  """It would be trained as if it had ended where the length limit cut it."""
  found = collect(policy, ["1", "2"], finished=[False, True])
  assert [s.text for s in found] == ["2"]


def test_lucky_is_right_by_a_wrong_chain(policy):
  verdicts = [
    Verdict("7", True, False, ("a",)),
    Verdict("7", True, None, None),
    Verdict("7", True, True, ("a",)),
    Verdict("8", False, False, ("a",)),
  ]
  found = collect(policy, list("1234"), verdicts)
  assert [s.lucky for s in found] == [True, False, False, False]
  assert ei.lucky_share(found) == 0.25
  assert ei.lucky_share([]) == 0.0


def test_the_sampled_tokens_are_kept(policy):
  (a, _) = collect(policy, ["3+4=7", "1"])
  assert a.tokens == (*policy.tokenizer("3+4=7")["input_ids"], EOS)
  # A stop string may end inside a token: there the cut text is the solution.
  (a, _) = collect(policy, ["3+4=7", "1"], stopped=True)
  assert a.tokens == () and a.text == "3+4=7"


# -------------------------------------------------------------------------- dedupe


def test_prompts_are_never_merged():
  both = [solution(1), solution(2)]
  for by in ("chain", "text", "none"):
    assert ei.dedupe(both, by) == both


def test_dedupe_by_chain_keeps_the_first():
  a, b = solution(text="3+4=7"), solution(text="4+3=7", round=2)
  assert ei.dedupe([a, b], "chain") == [a]
  assert ei.dedupe([a, b], "text") == [a, b]
  assert ei.dedupe([a, a], "none") == [a, a]


def test_dedupe_by_text_reads_no_white_space_at_the_ends():
  a, b = solution(text="x", chain=("a",)), solution(text=" x\n", chain=("b",))
  assert ei.dedupe([a, b], "text") == [a]


@pytest.mark.parametrize("kind", [{"lucky": True}, {"chain": None}])
def test_lucky_and_unreadable_are_the_same_only_to_the_letter(kind):
  a, b = solution(text="x", **kind), solution(text="y", **kind)
  assert ei.dedupe([a, b, a], "chain") == [a, b]


def test_a_lucky_solution_does_not_push_out_a_valid_one():
  lucky, valid = solution(lucky=True), solution(text="u")
  assert ei.dedupe([lucky, valid], "chain") == [lucky, valid]


# ----------------------------------------------------------------------------- cap


def test_cap_keeps_rare_chains_first():
  common = [solution(i, chain=("common",)) for i in range(3)]
  rare = solution(0, text="r", chain=("rare",))
  assert ei.cap([*common, rare], 1) == [*common[1:], rare]
  assert ei.cap([*common, rare], 2) == [*common, rare]
  assert ei.cap([*common, rare], 0) == [*common, rare]


def test_cap_is_for_each_prompt():
  many = [solution(i, text=str(j), chain=(str(j),)) for i in (1, 2) for j in range(5)]
  kept = ei.cap(many, 3)
  assert [s.prompt_id for s in kept] == [1] * 3 + [2] * 3
  assert kept == [s for s in many if s in kept]  # in their order


@pytest.mark.parametrize("kind", [{"lucky": True}, {"chain": None}])
def test_cap_does_not_prefer_what_is_rare_because_it_is_wrong(kind):
  valid = [solution(i, chain=("valid",)) for i in range(3)]
  wrong = solution(0, **{"text": "w", "chain": ("unique",), **kind})
  assert ei.cap([wrong, *valid], 1) == valid


# -------------------------------------------------------------------- the loop itself


@pytest.fixture
def lab(monkeypatch, policy):
  """The loop with sampling and training recorded. `say` answers for round r, prompt."""
  record = types.SimpleNamespace(prompts=[], samplers=[], sampled=0, steps=[])
  record.trained, record.starts, record.configs = [], [], []
  record.say = lambda step, text: "3+4=7 #### 7"

  def generate(policy, prompts, *, samples, step, prompt_ids, **kwargs):
    texts = [policy.tokenizer.decode(ids) for ids in prompts]
    record.prompts.append(texts)
    record.samplers.append(policy)
    record.steps.append((step, kwargs["seed"]))
    record.sampled += len(prompts) * samples
    said = [record.say(step, text) for text in texts for _ in range(samples)]
    return rollout_of(policy.tokenizer, prompt_ids, said)

  def train(start, rows, config, on_step=None, timers=None):
    record.starts.append(start)
    record.trained.append(list(rows))
    record.configs.append(config)
    after = dataclasses.replace(start, generation_config={"after": len(record.starts)})
    return sft.SFTResult(after, [1.0], 2, 10, 0.1)

  monkeypatch.setattr(ei, "generate", generate)
  monkeypatch.setattr(ei.sft, "train", train)
  record.run = lambda examples=EXAMPLES, judge=judge, base=None, **kwargs: ei.run(
    policy,
    examples,
    judge,
    kwargs.pop("config", CONFIG),
    base=base,
    **kwargs,
  )
  return record


def judge(text, example):
  answer = text.partition("#### ")[2] or None
  chain = tuple(text.partition(" ####")[0].split(", "))
  return Verdict(answer, answer == example.answer, "bad" not in text, chain)


CONFIG = ei.EIConfig(rounds=2, samples_per_prompt=3, max_new_tokens=48, seed=5)
ROWS = [("3 4\n", "3+4=7 #### 7")]


def replace(**kwargs):
  return dataclasses.replace(CONFIG, **kwargs)


def test_sampled_solutions_are_counted_exactly(lab):
  result = lab.run()
  assert result.sampled_solutions == lab.sampled == 2 * 2 * 3
  assert [r["sampled_solutions"] for r in result.rounds] == [6, 12]
  assert result.update_tokens == 20


def test_every_round_has_fresh_noise_and_the_last_policy(lab, policy):
  lab.run(config=replace(rounds=3, start="previous"))
  assert lab.steps == [(1, 5), (2, 5), (3, 5)]
  assert [p.generation_config.get("after") for p in lab.samplers] == [None, 1, 2]


@pytest.mark.parametrize(
  ("start", "expected"),
  [("base", ["base", "base"]), ("sft", ["sft", "sft"]), ("previous", ["sft", 1])],
)
def test_start_is_what_each_round_trains(lab, policy, start, expected):
  base = dataclasses.replace(policy, generation_config={"after": "base"})
  lab.run(base=base, config=replace(start=start))
  assert [p.generation_config.get("after", "sft") for p in lab.starts] == expected


def test_base_is_the_policy_where_there_is_no_other(lab, policy):
  lab.run(config=replace(start="base"))
  assert lab.starts == [policy, policy]


def test_solutions_of_all_rounds_are_kept_once(lab):
  lab.say = lambda step, text: f"{'3+4' if step == 1 else '4+3'}=7 #### 7"
  result = lab.run()
  assert [(s.prompt_id, s.round) for s in result.solutions] == [(4, 1), (4, 2)]
  assert [len(rows) for rows in lab.trained] == [1, 2]
  assert [r["new"] for r in result.rounds] == [1, 1]
  assert result.rounds[0]["accepted"] == 0.5  # one of two prompts, all samples
  assert result.rounds[0]["prompts_solved"] == 0.5


def test_training_rows_are_the_sampled_tokens(lab, policy):
  lab.run(config=replace(rounds=1))
  ((prompt, tokens),) = lab.trained[0]
  assert prompt == "3 4\n"
  assert tokens == (*policy.tokenizer("3+4=7 #### 7")["input_ids"], EOS)


def test_text_where_the_trained_model_ends_otherwise(lab, policy):
  base = dataclasses.replace(policy, eos_ids=(UNK,))
  lab.run(base=base, config=replace(rounds=1))
  assert lab.trained[0] == [("3 4\n", "3+4=7 #### 7")]


@pytest.mark.parametrize("mix", [True, False])
def test_mixing_of_sft_rows(lab, mix):
  lab.run(sft_rows=ROWS, config=replace(mix_sft=mix))
  assert [row in rows for rows in lab.trained for row in ROWS] == [mix, mix]


def test_few_shot_is_for_the_first_policy_and_not_for_training(lab):
  lab.run(config=replace(few_shot="1 2\n3\n"))
  assert lab.prompts == [["1 2\n3\n3 4\n", "1 2\n3\n5 6\n"], ["3 4\n", "5 6\n"]]
  assert {prompt for rows in lab.trained for prompt, _ in rows} == {"3 4\n"}


@pytest.mark.parametrize(("accept", "kept"), [("consistent", 0), ("final", 1)])
def test_lucky_solutions(lab, accept, kept):
  lab.say = lambda step, text: "bad #### 7"
  result = lab.run(config=replace(accept=accept), sft_rows=ROWS)
  assert len(result.solutions) == kept
  first = result.rounds[0]
  assert first["lucky_of_correct"] == 1.0
  assert first["lucky_of_accepted"] == first["lucky_of_kept"] == float(kept)


def test_growing_lucky_share_is_warned_of(lab, caplog):
  lab.say = lambda step, text: f"{'good' if step == 1 else 'bad'} #### 7"
  with caplog.at_level(logging.WARNING):
    lab.run(config=replace(accept="final"))
  assert "round 2: the lucky share of the training set grew from 0.0% to 50.0%" in (
    caplog.text
  )


def test_all_accepted(lab):
  lab.say = lambda step, text: "a #### " + ("7" if "3" in text else "11")
  assert [r["accepted"] for r in lab.run().rounds] == [1.0, 1.0]


# ------------------------------------------------------------------- dev, early stop


def scores(*values):
  """A dev score that gives these values in turn: first of the start."""
  left = list(values)
  return lambda policy: left.pop(0)


def after(result):
  return result.policy.generation_config.get("after", 0)


@pytest.mark.parametrize(
  ("values", "best"),
  [((0.1, 0.5, 0.4, 0.3), 1), ((0.1, 0.2, 0.5, 0.3), 2), ((0.1, 0.2, 0.3, 0.4), 3),
   ((0.9, 0.2, 0.3, 0.4), 0), ((0.1, 0.5, 0.5, 0.5), 1)],
)  # fmt: skip
def test_the_best_round_by_dev_score_is_returned(lab, values, best):
  result = lab.run(dev_score=scores(*values), config=replace(rounds=3))
  assert after(result) == best
  assert [r["dev"] for r in result.rounds] == list(values[1:])


def test_without_a_dev_split_the_last_round_is_returned(lab):
  assert after(lab.run()) == 2


@pytest.mark.parametrize(("patience", "rounds"), [(0, 5), (1, 2), (2, 3)])
def test_patience(lab, patience, rounds):
  values = (0.1, 0.5, 0.4, 0.3, 0.2, 0.1)
  config = replace(rounds=5, patience=patience)
  result = lab.run(dev_score=scores(*values), config=config)
  assert len(result.rounds) == rounds and after(result) == 1


# ---------------------------------------------------------------- nothing is accepted


def test_nothing_accepted_and_nothing_to_train_on(lab):
  lab.say = lambda step, text: "3+4=8 #### 8"
  with pytest.raises(DataError, match=r"none of 6 samples .*correct: 0.0%.*few_shot"):
    lab.run()
  assert not lab.trained


def test_nothing_accepted_with_sft_rows(lab, caplog):
  lab.say = lambda step, text: "" if step == 1 else "3+4=7 #### 7"
  with caplog.at_level(logging.WARNING):
    result = lab.run(sft_rows=ROWS)
  assert "round 1: none of 6 samples was accepted" in caplog.text
  assert lab.trained[0] == ROWS and len(lab.trained[1]) == 2
  assert result.rounds[0]["accepted"] == 0 and len(result.solutions) == 1


def test_nothing_new_in_a_later_round(lab, caplog):
  lab.say = lambda step, text: "" if step == 2 else "3+4=7 #### 7"
  with caplog.at_level(logging.WARNING):
    lab.run()
  assert "round 2: none of 6" in caplog.text
  assert lab.trained[0] == lab.trained[1]


# ------------------------------------------------------------------------- rewards


def test_reward_function_of_ones_own(lab):
  """Its values decide, not the judge's."""
  lab.say = lambda step, text: "wrong"

  def by_prompt(*, prompts, completion_ids, answer, **columns):
    assert len(completion_ids) == len(prompts) and completion_ids[0][-1] == EOS
    return [None if a == "7" else 0.7 for a in answer]

  result = lab.run(reward=by_prompt, config=replace(threshold=0.6))
  assert {s.prompt_id for s in result.solutions} == {2}
  assert result.rounds[0]["not_judged"] == 0.5
  assert result.rounds[0]["accepted"] == 0.5


def test_reward_function_that_breaks_its_contract(lab):
  def short(**_):
    return [1.0]

  def rude(**_):
    raise OSError("gone")

  with pytest.raises(RewardError, match=r"short returned 1 values for 6"):
    lab.run(reward=short)
  with pytest.raises(RewardError, match=r"rude raised OSError"):
    lab.run(reward=rude)
  with pytest.raises(RewardError, match=r"nan"):
    lab.run(reward=lambda **_: [float("nan")] * 6)
  assert not lab.trained


def test_judge_that_raises(lab):
  def rude(text, example):
    raise OSError("gone")

  with pytest.raises(RewardError, match=r"rude failed on 6 of 6 .*gone.* id 4"):
    lab.run(judge=rude)

  def touchy(text, example):
    if example.id == 2:
      raise SystemExit
    return judge(text, example)

  result = lab.run(judge=touchy)
  assert [one["not_judged"] for one in result.rounds] == [0.5, 0.5]
  assert {s.prompt_id for s in result.solutions} == {4}


# ------------------------------------------------------------------------ bad input


def test_bad_input_is_refused_before_sampling(lab, policy):
  with pytest.raises(DataError, match="no training prompts"):
    lab.run(examples=[])
  with pytest.raises(DataError, match="same id"):
    lab.run(examples=[EXAMPLES[0], EXAMPLES[0]])
  odd = sft.SFTConfig(batch_size=5, micro_batches=2)
  with pytest.raises(ConfigError, match="batch_size=5"):
    lab.run(config=replace(train=odd))
  chat = sft.SFTConfig(chat=True)
  with pytest.raises(ConfigError, match="chat template"):
    lab.run(config=replace(train=chat))
  other = types.SimpleNamespace(get_vocab=dict, eos_token_id=0)
  with pytest.raises(ConfigError, match="another vocabulary"):
    lab.run(base=dataclasses.replace(policy, tokenizer=other))
  assert not lab.prompts


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("rounds", 0),
    ("samples_per_prompt", 0),
    ("max_new_tokens", 0),
    ("max_rows", 0),
    ("max_per_prompt", -1),
    ("patience", -1),
    ("temperature", 0.0),
    ("threshold", float("nan")),
    ("accept", "strict"),
    ("dedupe", "chains"),
    ("start", "prev"),
    ("seed", -1),
  ],
)
def test_config_values_out_of_range(field, value):
  with pytest.raises(ConfigError, match=field):
    ei.EIConfig(**{field: value})


def test_few_shot_and_chat_exclude_each_other():
  with pytest.raises(ConfigError, match="choose one"):
    ei.EIConfig(few_shot="x", train=sft.SFTConfig(chat=True))


# ------------------------------------------------------------ a tiny policy, for real

TRAIN = sft.SFTConfig(
  optimizer=OptimizerConfig(learning_rate=1e-2, b2=0.98), batch_size=8, max_length=128
)
REAL = ei.EIConfig(
  # Gently: the first updates of a fresh Adam at the rate above undo what was learned.
  train=dataclasses.replace(
    TRAIN, optimizer=OptimizerConfig(learning_rate=2e-3, b2=0.98), epochs=40
  ),
  rounds=2,
  samples_per_prompt=4,
  max_new_tokens=48,
  seed=3,
)


@pytest.fixture(scope="module")
def examples():
  return arithmetic.generate("train", 8)


@pytest.fixture(scope="module")
def start(policy, examples):
  """A policy that has seen the solutions often enough to find some."""
  rows = [(e.prompt, e.solution) for e in examples]
  return sft.train(policy, rows, dataclasses.replace(TRAIN, epochs=150)).policy


@pytest.fixture(scope="module")
def real(start, examples):
  return ei.run(start, examples, arithmetic.judge, REAL)


def test_real_run_accepts_and_counts(real, examples):
  assert real.sampled_solutions == 2 * 8 * 4
  assert real.rounds[0]["samples"] == 32
  assert real.solutions
  by_id = {e.id: e for e in examples}
  for s in real.solutions:
    verdict = arithmetic.judge(s.text, by_id[s.prompt_id])
    assert verdict.correct and verdict.consistent and not s.lucky
  keys = [(s.prompt_id, s.chain) for s in real.solutions]
  assert len(set(keys)) == len(keys)


def test_real_run_makes_what_it_accepted_more_likely(real, start, examples):
  prompt_of = {e.id: e.prompt for e in examples}
  rows = encode_rows(
    start.tokenizer,
    EOS,
    [(prompt_of[s.prompt_id], s.tokens) for s in real.solutions],
    max_length=128,
  )
  width = max(len(row.tokens) for row in rows)
  pad = lambda x: [*x, *[0] * (width - len(x))]
  tokens = np.array([pad(row.tokens) for row in rows])
  weight = np.array([pad(row.weight) for row in rows])
  mask = np.arange(width) < np.array([[len(row.tokens)] for row in rows])
  before, end = (
    (score(p, tokens, mask) * weight).sum() / weight.sum() for p in (start, real.policy)
  )
  assert 0 < -end < 0.75 * -before


def test_real_run_is_deterministic(real, start, examples):
  again = ei.run(start, examples, arithmetic.judge, REAL)
  assert again.solutions == real.solutions
  for a, b in zip(
    jax.tree.leaves(again.policy.params), jax.tree.leaves(real.policy.params)
  ):
    np.testing.assert_array_equal(a, b)


def test_leak_control_shuffled_answers_are_not_found(start, examples):
  """Nothing but the reference answer can make a sample correct."""
  answers = [e.answer for e in examples]
  wrong = next(
    moved for moved in (answers[k:] + answers[:k] for k in range(1, len(answers)))
    if all(a != b for a, b in zip(moved, answers))
  )  # fmt: skip
  shuffled = [dataclasses.replace(e, answer=a) for e, a in zip(examples, wrong)]
  rows = [(e.prompt, e.solution) for e in examples]
  config = dataclasses.replace(REAL, rounds=1)
  right = ei.run(start, examples, arithmetic.judge, config)
  result = ei.run(start, shuffled, arithmetic.judge, config, sft_rows=rows)
  assert result.rounds[0]["accepted"] <= 0.1 < right.rounds[0]["accepted"]


def test_a_prompt_beyond_the_budget_is_left_out_by_name(start, examples, caplog):
  long = dataclasses.replace(examples[1], prompt="1" * 100)
  with pytest.raises(
    DataError,
    match=r"all of 1 prompts .* than the 80 .*; the shortest has \d+: lower max_new",
  ):
    ei.run(start, [long], arithmetic.judge, REAL)
  result = ei.run(start, [examples[0], long], arithmetic.judge, REAL, sft_rows=ROWS)
  assert result.rounds[0]["samples"] == REAL.samples_per_prompt
  assert f"left out (ids {long.id})" in caplog.text

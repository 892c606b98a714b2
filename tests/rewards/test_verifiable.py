"""Judges, ready-made reward functions, and what worked steps are paid."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import transformers

import rlft
from rlft.core.errors import ConfigError, DataError, RewardError
from rlft.core.types import Example, Verdict
from rlft.rewards.contract import RewardConfig, call_reward
from rlft.rewards.verifiable import (
  answer_reward,
  format_reward,
  judge_all,
  length_penalty,
  make_reward,
  overlong_penalty,
  step_ends,
  step_match,
  title_of,
  verdict_reward,
)
from rlft.sampling.stops import decode_completion
from rlft.tasks import arithmetic, gsm8k

EXAMPLES = [Example(7, "p7", "s7", "a7"), Example(9, "p9", "s9", "a9")]
COMPLETIONS = ["a", "b", "c", "d"]
SUM = Example(3, "3 4 5\n", "3+4=7, 7+5=12 #### 12", "12")


@pytest.mark.parametrize(
  ("correct", "consistent", "final", "strict"),
  [
    (True, True, 1, 1),
    (True, None, 1, 1),  # the task cannot tell
    (True, False, 1, 0),  # lucky
    (False, True, 0, 0),
    (False, None, 0, 0),
    (False, False, 0, 0),
  ],
)
def test_verdict_reward(correct, consistent, final, strict):
  verdict = Verdict("1", correct, consistent)
  assert verdict_reward(verdict, "final") == final
  assert verdict_reward(verdict, "consistent") == strict


def test_unknown_acceptance_is_not_the_lenient_one():
  with pytest.raises(ConfigError, match="accept='strict'"):
    verdict_reward(Verdict("1", True, False), "strict")


def test_judge_sees_the_samples_own_example():
  seen = []
  judge = lambda text, example: seen.append((text, example.id)) or Verdict(None, False)
  assert len(judge_all(judge, COMPLETIONS, EXAMPLES)) == 4
  assert seen == [("a", 7), ("b", 7), ("c", 9), ("d", 9)]


@pytest.mark.parametrize("examples", [[], EXAMPLES + EXAMPLES[:1]])
def test_completions_that_do_not_divide(examples):
  with pytest.raises(DataError, match=r"4 completions .* examples"):
    judge_all(lambda text, example: None, COMPLETIONS, examples)


def test_judge_that_raises_is_named_with_its_row():
  def picky_judge(text, example):
    raise KeyError("no such unit")

  with pytest.raises(
    RewardError, match=r"picky_judge failed on 4 of 4 .*KeyError.* sample 0 .* id 7"
  ):
    judge_all(picky_judge, COMPLETIONS, EXAMPLES)
  with pytest.raises(RewardError, match=r"gave True: give an .*Verdict\(answer, corr"):
    judge_all(lambda text, example: True, COMPLETIONS, EXAMPLES)


@pytest.mark.parametrize(
  "error", [KeyError("unit"), SystemExit(1), KeyboardInterrupt(), GeneratorExit()]
)
def test_what_a_judge_raises_costs_its_row(error, caplog):
  def judge(text, example):
    if text == "b":
      raise error
    return Verdict(text, text == "c")

  found = judge_all(judge, COMPLETIONS, EXAMPLES)
  assert [v.judged for v in found] == [True, False, True, True]
  assert [verdict_reward(v, "final") for v in found] == [0.0, None, 1.0, 0.0]
  assert re.search(
    "judge failed on 1 of 4 .*sample 1 of the example with id 7", caplog.text
  )


def test_a_ctrl_c_while_judging_ends_the_run():
  def judge(text, example):
    signal.raise_signal(signal.SIGINT)
    return Verdict(text, True)

  with pytest.raises(KeyboardInterrupt):
    judge_all(judge, COMPLETIONS, EXAMPLES)


# ------------------------------------------------------------------ whole completions


@pytest.mark.parametrize(("accept", "lucky"), [("final", 1), ("consistent", 0)])
def test_answer_reward(rollout_of, accept, lucky):
  texts = ["3+4=7, 7+5=12 #### 12", "3+4=8, 8+5=12 #### 12", "3+4=7 #### 7", ""]
  function = answer_reward(arithmetic.judge, accept)
  assert call_reward(function, rollout_of([3], texts), [SUM]) == [1, lucky, 0, 0]
  with pytest.raises(ConfigError, match="accept='strict'"):
    answer_reward(arithmetic.judge, "strict")


def test_the_judge_sees_the_whole_example(rollout_of):
  seen = []
  judge = lambda text, example: seen.append((text, example)) or Verdict(None, False)
  call_reward(answer_reward(judge), rollout_of([7, 9], COMPLETIONS), EXAMPLES)
  assert seen == [(t, EXAMPLES[i // 2]) for i, t in enumerate(COMPLETIONS)]


def test_the_judge_sees_the_columns_of_the_row(rollout_of):
  examples = [dataclasses.replace(e, columns={"unit": f"u{e.id}"}) for e in EXAMPLES]
  asked = []

  def judge(text, example):
    asked.append(example)
    return Verdict(None, False)

  make_reward(judge, "final")(rollout_of([7, 9], COMPLETIONS), examples)
  assert asked[:4] == [examples[0]] * 2 + [examples[1]] * 2


def test_a_report_names_its_judge():
  strict = functools.partial(gsm8k.judge, check="strict")
  assert title_of(strict) == "gsm8k.judge(check='strict')"
  assert title_of(arithmetic.judge) == "arithmetic.judge"


def test_strict_or_numeric_is_the_judges_matter(rollout_of):
  example = Example(0, "q", "#### 18", "18")
  rollout = rollout_of([0], ["#### 18.0", "#### 18"])
  strict = functools.partial(gsm8k.judge, check="strict")
  assert call_reward(answer_reward(gsm8k.judge), rollout, [example]) == [1, 1]
  assert call_reward(answer_reward(strict), rollout, [example]) == [0, 1]


def test_format_reward(rollout_of):
  rollout = rollout_of([3], ["<a>\n</a>", "x<a>\n</a>", "<a></a>x", "<a>x</a>"])
  assert call_reward(format_reward("<a>.*</a>"), rollout, [SUM]) == [1, 0, 0, 1]
  with pytest.raises(ConfigError, match=r"format pattern '\('"):
    format_reward("(")


def test_length_penalty(rollout_of):
  rollout = rollout_of([3], ["", "123", "1234567"])  # 1, 4 and 8 tokens with EOS
  got = call_reward(length_penalty(8), rollout, [SUM])
  assert got == pytest.approx([-0.1 / 8**5, -0.1 / 32, -0.1])
  got = call_reward(length_penalty(4, coef=2.0, power=1.0), rollout, [SUM])
  assert got == pytest.approx([-0.5, -2, -4])
  for bad in ({"max_tokens": 0}, {"coef": -1.0}, {"power": 0.0}):
    with pytest.raises(ConfigError, match="length_penalty"):
      length_penalty(**{"max_tokens": 8, **bad})


def test_overlong_penalty(rollout_of):
  """L_max 10, L_cache 4: free up to 6 tokens, -1 from 10 on."""
  lengths = (1, 6, 7, 9, 10, 11, 50)
  rollout = rollout_of([3], ["1" * (n - 1) for n in lengths])
  got = call_reward(overlong_penalty(10, 4), rollout, [SUM])
  assert got == [0, 0, -0.25, -0.75, -1, -1, -1]
  for bad in (0, 11):
    with pytest.raises(ConfigError, match=f"buffer={bad}"):
      overlong_penalty(10, bad)


def test_make_reward(rollout_of):
  texts = ["3+4=7, 7+5=12 #### 12", "3+4=8, 8+5=12 #### 12", "", "#### 12"]
  rollout = rollout_of([3], texts, finished=[True, True, True, False])
  config = RewardConfig(missing_eos="replace", missing_eos_value=-1.0)
  reward = make_reward(
    arithmetic.judge, "consistent", config, extra=[length_penalty(64)]
  )(rollout, [SUM])
  assert reward.each["correct"].tolist() == [1, 1, 0, 1]
  assert reward.each["consistent"].tolist() == [1, 0, 0, 0]
  short = reward.each["length"]
  assert (short < 0).all()
  np.testing.assert_allclose(reward.value, [1 + short[0], short[1], short[2], -1])
  final = make_reward(arithmetic.judge)(rollout, [SUM])
  assert final.value.tolist() == [1, 1, 0, 1]
  with pytest.raises(ConfigError, match="accept='both'"):
    make_reward(arithmetic.judge, "both")


def test_ready_made_rewards_run_in_workers(rollout_of):
  from rlft.rewards.pool import PoolConfig

  rollout = rollout_of([3], ["3+4=7, 7+5=12 #### 12", "#### 13"])
  extra = [length_penalty(64), overlong_penalty(64, 8), format_reward(".*12")]
  judge = functools.partial(arithmetic.judge)
  here = make_reward(judge, extra=extra)(rollout, [SUM])
  with make_reward(judge, extra=extra, pool=PoolConfig(workers=1)) as pooled:
    there = pooled(rollout, [SUM])
  np.testing.assert_array_equal(here.value, there.value)
  assert here.each.keys() == there.each.keys()


# ------------------------------------------------------------------ worked steps


@pytest.fixture(scope="module")
def mini():
  folder = Path(rlft.__file__).parent / "assets" / "mini"
  return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.fixture(scope="module")
def bpe():
  """Byte-level, with merges over the ends of steps and through characters."""
  core = tokenizers.Tokenizer(tokenizers.models.BPE())
  core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  core.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=267,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    special_tokens=["<eos>"],
    show_progress=False,
  )
  text = ["3+4=7, 7+5=12 #### 12", "🙂: 3+4=7, é7+5=12,🙃 #### 12", "=12, 12-2=10"]
  core.train_from_iterator(text * 9, trainer)
  return transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


@pytest.fixture(params=["mini", "bpe"])
def tokenizer(request):
  return request.getfixturevalue(request.param)


def sampled(rollout_of, tokenizer, texts, finished=True, prompt_ids=(3,), **kwargs):
  """A rollout of the tokens of these texts."""
  eos = tokenizer.eos_token_id
  ids = [
    tokenizer.encode(t) + [eos] * bool(f)
    for t, f in zip(texts, np.broadcast_to(finished, len(texts)))
  ]
  return rollout_of(list(prompt_ids), texts, ids, finished, eos=eos, **kwargs)


def ends_of(rollout, tokenizer, steps=arithmetic.steps):
  """The text that stands before and in each ending token, for each row."""
  ends_BC = step_ends(rollout, tokenizer, steps)
  assert ends_BC.dtype == bool
  assert ends_BC.shape == (len(rollout.tokens), rollout.tokens.shape[1] - 3)
  rows = [row[3:].tolist() for row in rollout.tokens]
  return [
    [decode_completion(tokenizer, row[: c + 1]) for c in np.flatnonzero(ends)]
    for row, ends in zip(rows, ends_BC)
  ]


def test_steps_end_where_the_tokens_say(rollout_of, mini):
  rollout = sampled(rollout_of, mini, ["3+4=7, 7+5=12 #### 12", "#### 12", ""])
  assert ends_of(rollout, mini) == [["3+4=7", "3+4=7, 7+5=12"], [], []]


def test_ends_are_exact_for_any_bytes(rollout_of, tokenizer):
  """Against a search over all prefixes of the tokens."""
  texts = [
    "3+4=7, 7+5=12 #### 12",
    "7+5=12,12-2=10, 3+4=7",
    "3 + 4 = 7 ,\n 7+5= 1 2, x",
    ", ,3+4=7,, 1=1, 2+2=5",
  ]
  if tokenizer.encode("é", add_special_tokens=False) != [tokenizer.unk_token_id]:
    texts += ["é3+4=7, 🙂,7+5=12,🙃🙃 #### 12", "🙂: 3+4=7, é7+5=12,🙃,3+4=7"]
  texts = [decode_completion(tokenizer, tokenizer.encode(t)) for t in texts]
  rollout = sampled(rollout_of, tokenizer, texts)
  for text, found in zip(texts, ends_of(rollout, tokenizer)):
    expected = []
    ids = tokenizer.encode(text)
    for end, _ in arithmetic.steps(text):
      before = [decode_completion(tokenizer, ids[:n]) for n in range(len(ids) + 1)]
      expected.append(next(b for b in before if b.startswith(text[:end])))
    assert found == list(dict.fromkeys(expected))


def test_a_token_may_hold_more_than_the_end(rollout_of, bpe):
  ids = bpe.encode("3+4=7, 7+5=12 #### 12")
  pieces = [bpe.decode(i) for i in ids]
  assert any(re.search("[0-9],", piece) for piece in pieces), pieces
  rollout = sampled(rollout_of, bpe, ["3+4=7, 7+5=12 #### 12"])
  ((first, second),) = ends_of(rollout, bpe)
  assert first.startswith("3+4=7") and second.startswith("3+4=7, 7+5=12")
  assert len(first) < len(second)


@pytest.mark.parametrize(
  "junk", [b"\xff", b"\xf0\x9f", b"\xe2\x82\xff", b"\xc3\xc3\xa9"]
)
def test_bytes_that_are_no_text(rollout_of, bpe, junk):
  """One U+FFFD stands for one to three bytes."""
  alphabet = {b: i for i, b in enumerate(_single_bytes(bpe))}
  data = junk + b",3+4=7," + junk + b",7+5=12"
  ids = [alphabet[bytes([b])] for b in data]
  text = decode_completion(bpe, ids)
  rollout = rollout_of([3], [text], [[*ids, bpe.eos_token_id]])
  ends = np.flatnonzero(step_ends(rollout, bpe, arithmetic.steps)[0])
  assert ends.tolist() == [len(junk) + 5, len(data) - 1]


def _single_bytes(tokenizer):
  from rlft.sampling.stops import token_bytes

  return token_bytes(tokenizer)


def test_a_cut_completion_has_no_step_at_its_very_end(rollout_of, mini):
  texts = ["3+4=7, 7+5=1", "3+4=7, 7+5=12,", "3+4=7"]
  rollout = sampled(rollout_of, mini, texts, finished=False)
  assert ends_of(rollout, mini) == [["3+4=7"], ["3+4=7", "3+4=7, 7+5=12"], []]
  done = sampled(rollout_of, mini, texts[2:])
  assert ends_of(done, mini) == [["3+4=7"]]


def test_no_step_ends_after_a_stop_string(rollout_of, mini):
  rollout = sampled(rollout_of, mini, ["3+4=7, 7+5=12 #### 12"])
  rollout = dataclasses.replace(rollout, completions=["3+4=7"])  # cut before ","
  assert ends_of(rollout, mini) == [["3+4=7"]]


def test_no_step_ends_at_a_forced_token(rollout_of, mini):
  ids = mini.encode("3+4=7, 7+5=12")
  chosen = np.ones(len(ids), bool)
  chosen[: len(mini.encode("3+4=7"))] = False
  rollout = rollout_of([3], ["3+4=7, 7+5=12"], [ids], chosen=[chosen])
  assert ends_of(rollout, mini) == [["3+4=7, 7+5=12"]]
  # A stop cut off in the middle: the tokens' own text is read.
  cut = dataclasses.replace(rollout, completions=["3+4=7 7+5=12"])
  assert ends_of(cut, mini) == [["3+4=7, 7+5=12"]]


def test_texts_of_another_tokenizer(rollout_of, mini, bpe):
  rollout = sampled(rollout_of, mini, ["3+4=7, 7+5=12"])
  with pytest.raises(DataError, match=r"row 0 \(prompt 3\).*not that of its tokens"):
    step_ends(rollout, bpe, arithmetic.steps)
  with pytest.raises(DataError, match="a policy with a tokenizer"):
    step_ends(dataclasses.replace(rollout, completions=[]), mini, arithmetic.steps)


def pay(rollout_of, tokenizer, texts, examples=(SUM,), weight=None, **kwargs):
  ids = [e.id for e in examples]
  rollout = sampled(rollout_of, tokenizer, texts, prompt_ids=ids, **kwargs)
  paid_BC = step_match(arithmetic.steps, tokenizer, weight)(rollout, examples)
  assert paid_BC.dtype == np.float32
  ends_BC = step_ends(rollout, tokenizer, arithmetic.steps)
  assert paid_BC.shape == ends_BC.shape and not paid_BC[~ends_BC].any()
  return [row[ends].tolist() for row, ends in zip(paid_BC, ends_BC)]


def test_step_match(rollout_of, mini):
  texts = [
    "3+4=7, 7+5=12 #### 12",
    "4+5=9, 9+3=12 #### 12",  # another way: only its last result is the reference's
    "7+5=12, 3+4=7, 3+4=7, 5+2=7 #### 7",  # any order, each result once
    "1+1=7, 3+5=9",  # results only
    "#### 12",
    "",
  ]
  half = 0.5
  assert pay(rollout_of, mini, texts) == [
    [half, half], [0, half], [half, half, 0, 0], [half, 0], [], [],
  ]  # fmt: skip
  assert pay(rollout_of, mini, texts[:2], weight=0.1) == [
    pytest.approx([0.1, 0.1]), pytest.approx([0, 0.1]),
  ]  # fmt: skip
  with pytest.raises(ConfigError, match="step weight nan"):
    step_match(arithmetic.steps, mini, math.nan)


def test_a_result_may_be_in_the_reference_twice(rollout_of, mini):
  twice = Example(5, "", "3+4=7, 9-2=7, 7+7=14 #### 14", "14")
  text = "3+4=7, 4+3=7, 5+2=7, 7+7=14 #### 14"
  third = pytest.approx(1 / 3)
  assert pay(rollout_of, mini, [text], [twice]) == [[third, third, 0, third]]


def test_each_row_has_its_own_reference(rollout_of, mini):
  other = Example(4, "", "3+3=6 #### 6", "6")
  blank = Example(5, "", "#### 6", "6")
  texts = ["3+4=7", "3+3=6"] * 3
  assert pay(rollout_of, mini, texts, [SUM, other, blank]) == [
    [0.5], [0], [0], [1], [0], [0],
  ]  # fmt: skip


def test_two_steps_in_one_token_pay_together(rollout_of, bpe):
  bpe = transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizers.Tokenizer.from_str(bpe.backend_tokenizer.to_str()),
    eos_token="<eos>",
  )
  bpe.add_tokens(["3+4=7,7+5=12"])
  rollout = sampled(rollout_of, bpe, ["3+4=7,7+5=12"])
  assert rollout.lengths[0] == 2
  paid = step_match(arithmetic.steps, bpe)(rollout, [SUM])
  assert paid[0].tolist() == [1.0, 0, 0, 0]
  assert step_ends(rollout, bpe, arithmetic.steps).sum() == 1


def test_dense_reward_beside_the_final_one(rollout_of, mini):
  rollout = sampled(rollout_of, mini, ["3+4=7, 7+5=12 #### 12", "3+4=7 #### 7"])
  reward = make_reward(arithmetic.judge, step=step_match(arithmetic.steps, mini))(
    rollout, [SUM]
  )
  assert reward.value.tolist() == [1, 0]
  assert reward.step.sum(1).tolist() == reward.each["steps"].tolist() == [1, 0.5]


def test_reference_steps_of_gsm8k_pay_one(rollout_of, mini, data_dir):
  """Real solutions, read back through a tokenizer: every result is found once."""
  examples = gsm8k.load(data_dir / "gsm8k", "train", limit=200)
  core = tokenizers.Tokenizer(tokenizers.models.BPE())
  core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  core.decoder = tokenizers.decoders.ByteLevel()
  core.train_from_iterator(
    [e.solution for e in examples],
    tokenizers.trainers.BpeTrainer(
      vocab_size=600,
      initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
      special_tokens=["<eos>"],
      show_progress=False,
    ),
  )
  bpe = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
  rollout = sampled(
    rollout_of, bpe, [e.solution for e in examples], prompt_ids=[e.id for e in examples]
  )
  total_B = step_match(gsm8k.steps, bpe)(rollout, examples).sum(1)
  steps_B = np.array([len(gsm8k.steps(e.solution)) for e in examples])
  np.testing.assert_allclose(total_B, steps_B > 0, rtol=1e-6)
  assert (steps_B > 0).mean() > 0.95 and 3 < steps_B.mean() < 4

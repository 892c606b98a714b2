"""A prompt without room for a completion is left out and counted, by every method."""

from __future__ import annotations

import functools

import pytest

from rlft.algorithms import best_of_n, expert_iteration, grpo, ppo, sft
from rlft.algorithms import return_conditioned as rc
from rlft.core.errors import DataError
from rlft.core.types import Example, Verdict
from rlft.models.tokens import add_tokens
from rlft.probes.evaluate import EvalConfig, evaluate
from rlft.rewards.contract import compose
from rlft.sampling.conditioned import GOOD, generate_conditioned
from rlft.training.iterations import check_run
from rlft.training.outcomes import sample_outcomes

SIZES = {10: 3, 11: 4, 12: 200, 13: 2, 14: 3}
EXAMPLES = [Example(i, " ".join(["3"] * n), " 4", "1") for i, n in SIZES.items()]
KEPT = [i for i in SIZES if i != 12]
TRAIN = sft.SFTConfig(batch_size=2)
ROWS = [("3 4", "7"), ("4 4", "8")]
RL = {"iterations": 1, "prompts_per_iteration": 4, "samples_per_prompt": 2}
SHORT = {"max_new_tokens": 4}


def judge(text: str, example: Example) -> Verdict:
  assert example.id != 12
  return Verdict("1", len(text) % 2 == 0)


def flat(*, completions, id, **_):
  assert 12 not in id
  return [float(len(text) % 2) for text in completions]


def ids(examples):
  return [e.id for e in examples]


def _best(policy):
  found = best_of_n.best_of_n(
    policy, EXAMPLES, compose([flat]), best_of_n.BestOfNConfig(n=2, **SHORT)
  )
  assert ids(found.examples) == KEPT and len(found.texts) == len(found.reward) == 4
  assert found.sampled_solutions == 8


def _evaluate(policy):
  """What stands before every prompt counts as well."""
  config = EvalConfig(samples=1, ks=(1,), few_shot="3 " * 59, **SHORT)
  found = evaluate(policy, EXAMPLES, judge, config)
  assert ids(found.examples) == [10, 13, 14] == found.report["prompt_ids"]
  assert found.report["left_out"] == 2 and len(found.greedy) == 3


def test_a_label_takes_a_position_too(policy):
  config = EvalConfig(samples=1, ks=(1,), few_shot="3 " * 59, max_new_tokens=5)
  under = functools.partial(generate_conditioned, label=GOOD)
  found = evaluate(add_tokens(policy, (GOOD,)), EXAMPLES, judge, config, sampler=under)
  assert ids(found.examples) == [13] and found.report["left_out"] == 4


def _expert_iteration(policy):
  config = expert_iteration.EIConfig(
    rounds=1, samples_per_prompt=2, train=TRAIN, **SHORT
  )
  found = expert_iteration.run(policy, EXAMPLES, judge, config, sft_rows=ROWS)
  assert found.sampled_solutions == 8


def _return_conditioned(policy):
  config = rc.RCRLConfig(train=TRAIN, samples_per_prompt=2, **SHORT)
  with pytest.raises(DataError, match="none of 8 samples ended"):
    rc.run(policy, EXAMPLES, judge, config, sft_rows=ROWS)


def _outcomes(policy):
  found = sample_outcomes(policy, EXAMPLES, judge, lambda text: [], 2, **SHORT)
  assert [one.prompt_id for one in found] == [i for i in KEPT for _ in range(2)]


def _on_policy(policy):
  """What PPO and GRPO ask before anything else."""
  for config in (grpo.preset("dr_grpo", **RL, **SHORT), ppo.PPOConfig(**RL, **SHORT)):
    assert ids(check_run(policy, EXAMPLES, config, None)) == KEPT


@pytest.mark.parametrize(
  "method",
  [
    _best,
    _evaluate,
    _expert_iteration,
    _return_conditioned,
    _outcomes,
  ]
  + [_on_policy],
)
def test_it_is_left_out_and_named(policy, method, caplog):
  method(policy)
  assert "of 5 prompts are empty or longer than" in caplog.text
  assert "left out (ids " in caplog.text and "12)" in caplog.text

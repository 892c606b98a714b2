"""The sampler from outside: what a `Rollout` promises, for every family."""

from __future__ import annotations

import dataclasses
import functools
import gc
import pathlib
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import transformers

import rlft
from rlft.core.errors import ConfigError, DataError
from rlft.core.mesh import make_mesh, tree_shardings
from rlft.core.rng import Purpose
from rlft.models import hub
from rlft.models.decoder import init_params, param_axes, param_shapes
from rlft.sampling import decode, generate, score
from rlft.sampling.generate import compilations, rollout_layout

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "models"
NAMES = sorted(path.name for path in GOLDEN.iterdir())
V = 72


@pytest.fixture(scope="module", autouse=True)
def compile_quickly():
  """The same programs, less optimised: compiling is most of the time spent here."""
  quick = {"xla_backend_optimization_level": 0}
  quick["xla_llvm_disable_expensive_passes"] = True
  again = functools.partial(jax.jit, static_argnums=0, compiler_options=quick)
  with pytest.MonkeyPatch.context() as patch:
    for name in ("jit_insert", "jit_decode"):
      slow = getattr(decode, name).__wrapped__
      patch.setattr(decode, name, again(slow, donate_argnums=2))
    patch.setattr(score, "_jit_token_logp", again(score._jit_token_logp.__wrapped__))
    yield


@functools.cache
def policy_of(name: str) -> hub.Policy:
  return hub.load(GOLDEN / name)


def letters() -> transformers.PreTrainedTokenizerFast:
  """72 tokens of one to three letters: stop strings lie across their boundaries."""
  words = ["<eos>", "<pad>", *"abcdefghij", "ab", "bc", "cd", "abc", "a b", " a", "\n"]
  words += [a + b for a in "defghij" for b in "abcdefghij"]
  vocab = {word: i for i, word in enumerate(words[:V])}
  backend = tokenizers.Tokenizer(
    tokenizers.models.BPE(vocab, [], unk_token="<pad>", fuse_unk=False)
  )
  backend.decoder = tokenizers.decoders.Fuse()
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>"
  )


@pytest.fixture(scope="module")
def policy() -> hub.Policy:
  """A llama with a tokenizer; its EOS is token 5, unlike its pad."""
  return dataclasses.replace(policy_of("llama"), tokenizer=letters(), eos_ids=(5,))


# Four slots of two rows, prompts up to 16, completions up to 16: nearly every test here
# runs in this one bucket and compiles nothing of its own.
SAMPLES, SLOTS, ROWS = 2, 4, 8
PROMPTS = [[7, 8, 9], [3], list(range(20, 36)), [40, 41, 42, 43, 44]]


def sample(policy, prompts=None, **settings):
  settings = {"samples": SAMPLES, "max_new_tokens": 16, "max_rows": ROWS} | settings
  return rlft.generate(policy, PROMPTS if prompts is None else prompts, **settings)


def assert_same(a, b) -> None:
  """The same completions, token for token; the prompt's bucket may differ."""
  n = min(a.tokens.shape[1], b.tokens.shape[1])
  np.testing.assert_array_equal(a.lengths, b.lengths)
  for one, other in ((a.tokens, b.tokens), (a.mask, b.mask)):
    np.testing.assert_array_equal(one[:, -n:], other[:, -n:])
  np.testing.assert_array_equal(a.completion_mask[:, -n:], b.completion_mask[:, -n:])
  np.testing.assert_array_equal(a.finished, b.finished)
  np.testing.assert_allclose(a.logp[:, -n:], b.logp[:, -n:], atol=1e-4)
  assert a.completions == b.completions


def rows_of(rollout) -> list[list[int]]:
  """The completions as lists of ids."""
  wide = rollout.tokens.shape[1] - rollout_capacity(rollout)
  return [
    row[wide : wide + n].tolist() for row, n in zip(rollout.tokens, rollout.lengths)
  ]


def rollout_capacity(rollout) -> int:
  """Completion columns: what lies right of the left-padded prompts."""
  last = rollout.mask.shape[1] - np.argmax(rollout.mask[:, ::-1], axis=1)
  starts = last - rollout.lengths
  assert (starts == starts[0]).all()  # every completion begins in the same column
  return rollout.tokens.shape[1] - int(starts[0])


# ------------------------------------------------------------- sampler == scorer


# Between them they run every branch of the decoder; `pytest -m slow` has the others.
FAST = {"gemma2", "gemma3_text", "gpt_neox", "llama", "opt_350m"}


@pytest.mark.parametrize(
  "name",
  [pytest.param(n, marks=[] if n in FAST else [pytest.mark.slow]) for n in NAMES],
)
def test_the_sampled_distribution_is_the_scored_one(name):
  """correctness.md 8 and 12, at three temperatures, with and without filters."""
  policy = policy_of(name)
  rng = np.random.default_rng(0)
  lengths, new = [1, 7, 20, 2, 13, 19, 5, 16], 15
  if name in ("llama_dynamic", "phi3_longrope"):  # beyond 12 tokens they rotate anew
    lengths, new = [1, 4, 3, 2, 4, 3, 1, 2], 8
  prompts = [rng.integers(0, V, n).tolist() for n in lengths]
  temperature = np.array([0.3, 1.0, 2.0, 0.0, 0.3, 1.0, 2.0, 2.0])
  settings = {
    "top_k": [0, 0, 0, 0, 20, 0, 9, 0],
    "top_p": [1.0, 1.0, 1.0, 1.0, 1.0, 0.8, 0.9, 1.0],
    "min_p": [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.01, 0.3],
  }
  filtered = np.repeat(np.arange(8) >= 4, 2)
  rollout = rlft.generate(
    policy, prompts, samples=2, max_new_tokens=new, temperature=temperature, **settings
  )
  chosen = rollout.completion_mask
  assert chosen.sum() > 6.5 * new
  # Where temperature is 0, log-probs are those of temperature 1.
  scored_at = np.repeat(np.where(temperature == 0, 1.0, temperature), 2)
  for t in (0.3, 1.0, 2.0):
    rows = scored_at == t
    assert chosen[rows].any()
    logp = rlft.score(policy, rollout.tokens, rollout.mask, temperature=t)[rows]
    difference = np.abs(np.where(chosen[rows], logp - rollout.raw_logp[rows], 0))
    assert difference.max() < 1e-4, f"temperature {t}: {difference.max()}"
  plain = ~filtered[:, None] & chosen
  np.testing.assert_array_equal(rollout.logp[plain], rollout.raw_logp[plain])
  more = (rollout.logp - rollout.raw_logp)[filtered][chosen[filtered]]
  assert more.min() > -1e-6 and more.max() > 0.01  # what is left is likelier
  assert not rollout.logp[~chosen].any() and not rollout.raw_logp[~chosen].any()
  # Greedy: each token is the most likely one, so no temperature changes it.
  greedy = rows_of(rollout)[6]
  assert greedy == rows_of(rollout)[7]


# ------------------------------------------------------------- rows and their ends


def test_a_rollout_says_what_it_holds(policy):
  rollout = sample(policy)
  wide = 16
  assert rollout.tokens.shape == (8, 32) and rollout.samples == 2
  assert rollout_capacity(rollout) == 16
  for row in range(8):
    prompt, end = PROMPTS[row // 2], wide + rollout.lengths[row]
    assert rollout.tokens[row][rollout.mask[row]][: len(prompt)].tolist() == prompt
    real = np.zeros(32, bool)
    real[wide - len(prompt) : end] = True
    np.testing.assert_array_equal(rollout.mask[row], real)
    chosen = np.zeros(32, bool)
    chosen[wide:end] = True
    np.testing.assert_array_equal(rollout.completion_mask[row], chosen)
  assert rollout.prompt_lengths.tolist() == [3, 3, 1, 1, 16, 16, 5, 5]
  assert rollout.prompt_ids.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
  assert (rollout.logp[rollout.completion_mask] < 0).all()
  assert rollout.logp.dtype == rollout.raw_logp.dtype == np.float32
  assert rollout.tokens.dtype == np.int32
  twins = rows_of(rollout)
  assert all(twins[2 * i] != twins[2 * i + 1] for i in range(4))  # samples differ


def test_eos_ends_a_row_and_stays_in_it(policy):
  """Peers' defect 4: EOS is returned, chosen, scored; the text is without it."""
  ends = dataclasses.replace(policy, eos_ids=(5, 60, 61, 62, 63, 64))
  rollout = sample(ends, temperature=2.0)
  rows = rows_of(rollout)
  assert 0 < rollout.finished.sum() < 8, "the seed shows only one of the two cases"
  for i, row in enumerate(rows):
    assert not set(row[:-1]) & set(ends.eos_ids)
    assert rollout.finished[i] == (row[-1] in ends.eos_ids)
    assert rollout.finished[i] or len(row) == 16  # truncated: cut by the limit only
    last = 16 + len(row) - 1
    assert rollout.completion_mask[i, last] and rollout.logp[i, last] < 0
    kept = row[:-1] if rollout.finished[i] else row
    assert rollout.completions[i] == "".join(
      ends.tokenizer.convert_ids_to_tokens(t) for t in kept if t > 1
    )


def test_eos_at_the_length_limit_counts_as_finished(policy):
  first = [row[0] for row in rows_of(sample(policy, max_new_tokens=1))]
  rollout = sample(dataclasses.replace(policy, eos_ids=(first[0],)), max_new_tokens=1)
  np.testing.assert_array_equal(rollout.finished, np.array(first) == first[0])
  assert rollout.finished[0]


def test_a_completion_of_eos_alone(policy):
  """reliability.md B4: a valid row of length 1 with an empty text."""
  rollout = sample(dataclasses.replace(policy, eos_ids=tuple(range(V))))
  assert rollout.lengths.tolist() == [1] * 8 and rollout.finished.all()
  assert rollout.completion_mask.sum() == 8 and (rollout.logp[:, 16] < 0).all()
  assert rollout.completions == [""] * 8
  again = rlft.score(policy, rollout.tokens, rollout.mask)
  np.testing.assert_allclose(again[:, 16], rollout.logp[:, 16], atol=1e-4)


def test_pad_may_be_eos(policy):
  """correctness.md 1: no code compares a token with a pad id."""
  tokenizer = letters()
  tokenizer.pad_token = tokenizer.eos_token  # as in SmolLM2
  tied = dataclasses.replace(policy, tokenizer=tokenizer)
  prompts = [[*row[:-1], 5] for row in PROMPTS]  # prompts may hold EOS
  rollout = sample(tied, prompts)
  assert_same(rollout, sample(policy, prompts))
  assert rollout.lengths.max() > 1
  assert [rollout.tokens[2 * i, 15] for i in range(4)] == [5] * 4


def test_max_new_tokens_of_each_prompt(policy):
  none = dataclasses.replace(policy, eos_ids=(), tokenizer=None)
  rollout = sample(none, max_new_tokens=[1, 16, 7, 3])
  assert rollout.lengths.tolist() == [1, 1, 16, 16, 7, 7, 3, 3]
  assert not rollout.finished.any()
  # A shorter limit cuts the same rows.
  longer = rows_of(sample(none, max_new_tokens=16))
  for row, other in zip(rows_of(rollout), longer):
    assert row == other[: len(row)]


def test_stop_strings_across_tokens(policy):
  free = dataclasses.replace(policy, eos_ids=(0,))
  texts = sample(free, temperature=1.5).completions
  # A stop in the middle of a text that the policy writes anyhow: it must end there.
  text = max(texts, key=len)
  stop = next(
    text[i : i + 3] for i in range(4, len(text) - 4) if text.find(text[i : i + 3]) == i
  )
  rollout = sample(free, temperature=1.5, stop=[stop, "never seen"])
  pieces = free.tokenizer.convert_ids_to_tokens(list(range(V)))
  for i, (row, whole) in enumerate(zip(rows_of(rollout), texts)):
    written = "".join(pieces[t] for t in row if t > 1)
    before = "".join(pieces[t] for t in row[:-1] if t > 1)
    by_stop = stop in whole
    assert rollout.finished[i] == (by_stop or row[-1] == 0)
    assert rollout.completions[i] == whole.split(stop)[0]
    assert (stop in written) == by_stop and stop not in before
  assert_same(rollout, sample(free, temperature=1.5, stop=(stop,)))


def test_without_a_tokenizer(policy):
  bare = dataclasses.replace(policy, tokenizer=None)
  rollout = sample(bare)
  np.testing.assert_array_equal(rollout.tokens, sample(policy).tokens)
  assert rollout.completions == [""] * 8
  with pytest.raises(DataError, match="no tokenizer"):
    sample(bare, ["abc"])
  with pytest.raises(ConfigError, match="needs a tokenizer"):
    sample(bare, stop="a")


def test_texts_are_prompts(policy):
  ids = [policy.tokenizer(text)["input_ids"] for text in ("abc", "jfab")]
  assert_same(sample(policy, ["abc", "jfab"]), sample(policy, ids))


# ------------------------------------------------------------- forced tokens


def test_forced_tokens_open_the_completion(policy):
  none = dataclasses.replace(policy, eos_ids=(5, 9))
  forced = [[5, 9, 11], [], [30], [31, 32]]  # EOS that is forced ends nothing
  rollout = sample(none, forced=forced, max_new_tokens=[4, 13, 4, 13], temperature=2.0)
  for i, row in enumerate(rows_of(rollout)):
    given = forced[i // 2]
    n = len(given)
    assert row[:n] == given and len(row) > n
    at = slice(16, 16 + n)
    assert rollout.mask[i, at].all() and not rollout.completion_mask[i, at].any()
    assert not rollout.logp[i, at].any() and not rollout.raw_logp[i, at].any()
    limit = (4, 13, 4, 13)[i // 2]
    assert rollout.completion_mask[i].sum() == len(row) - n <= limit
    assert rollout.finished[i] or len(row) == n + limit
  chosen = rollout.completion_mask
  scored = rlft.score(none, rollout.tokens, rollout.mask, temperature=2.0)
  assert np.abs(scored - rollout.logp)[chosen].max() < 1e-4
  # Forcing what would have been chosen changes nothing that follows.
  free = sample(none, temperature=2.0)
  head = [row[:1] for row in rows_of(free)[::2]]
  same = rows_of(sample(none, temperature=2.0, forced=head))[::2]
  for one, other in zip(rows_of(free)[::2], same):
    assert one[: len(other)] == other[: len(one)] or len(one) == 1


@pytest.mark.slow
def test_forced_tokens_enter_again_after_each_mark(policy):
  """As sampling step by step would do it, with a prompt that grows by every step."""
  marks, label = ["d", "ab", "h"], [30, 31]
  none = dataclasses.replace(policy, eos_ids=())
  settings = {"samples": 1, "temperature": 0.0}
  forced = [label, [], label, label[:1]]
  whole = sample(none, forced=forced, again=marks, **settings)
  entered = []
  for i, row in enumerate(rows_of(whole)):
    prompt, left, found = list(PROMPTS[i]), 16, []
    while left and found[-1:] != [0]:  # token 0 ends the text
      step = sample(
        none,
        [prompt + found],
        forced=[forced[i]],
        stop=marks,
        **settings | {"max_new_tokens": left},
      )
      found += rows_of(step)[0]
      left -= int(step.completion_mask.sum())
      entered.append(len(forced[i]))
    assert row == found and whole.finished[i] == (found[-1] == 0)
    assert whole.completion_mask[i].sum() == 16 - left
  assert len(entered) > 8 and {0, 1, 2} == set(entered)
  scored = rlft.score(none, whole.tokens, whole.mask)
  chosen = whole.completion_mask
  assert np.abs(scored - whole.logp)[chosen].max() < 1e-4
  assert not whole.logp[~chosen].any() and "".join(marks) not in whole.completions[0]


def test_a_row_with_too_many_marks_is_cut(policy):
  """Each token is a mark: its labels fit in so many times, whatever the others need."""
  none = dataclasses.replace(policy, eos_ids=())
  marks = list("abcdefghij \n")
  rows = {}
  for limit in (4, 40):
    rollout = sample(
      none,
      [[7, 8, 9], [3]],
      samples=1,
      forced=[[30], []],
      again=marks,
      max_new_tokens=[40, limit],
    )
    rows[limit] = rows_of(rollout)[0]
    assert not rollout.finished[0]
    assert set(rows[limit][::2]) == {30}
  assert rows[4] == rows[40]
  assert len(rows[4]) == 40 + decode.MOST_AGAIN + 1


# ------------------------------------------------------------- noise


def test_the_same_call_gives_the_same_tokens(policy):
  assert_same(sample(policy), sample(policy))


@pytest.mark.parametrize(
  "change",
  [
    {"step": 1},
    {"seed": 1},
    {"purpose": Purpose.EVALUATION},
    {"prompt_ids": [4, 5, 6, 7]},
  ],
)
def test_new_noise_for_each_address(policy, change):
  """Peers' defect 3: every row of a new step is new, at temperature 2."""
  first = rows_of(sample(policy, temperature=2.0))
  other = rows_of(sample(policy, temperature=2.0, **change))
  assert all(a != b for a, b in zip(first, other))


def test_noise_belongs_to_the_prompt_not_to_its_place(policy):
  order = [2, 0, 3, 1]
  first = sample(policy, prompt_ids=[10, 11, 12, 2**31 - 1])
  moved = sample(
    policy, [PROMPTS[i] for i in order], prompt_ids=[12, 10, 2**31 - 1, 11]
  )
  rows, other = rows_of(first), rows_of(moved)
  for place, i in enumerate(order):
    assert other[2 * place : 2 * place + 2] == rows[2 * i : 2 * i + 2]
  # Of more samples, the first are the same.
  wider = rows_of(sample(policy, PROMPTS[:1], samples=5, prompt_ids=[10]))
  assert wider[:2] == rows[:2]


def test_settings_of_each_prompt_are_its_own(policy):
  """A row among others is the row alone: nothing leaks from its neighbours."""
  settings = {
    "temperature": [0.0, 1.0, 2.0, 0.5],
    "top_k": [0, 3, 0, 0],
    "top_p": [1.0, 1.0, 0.5, 1.0],
    "min_p": [0.0, 0.0, 0.0, 0.2],
    "max_new_tokens": [16, 4, 9, 16],
  }
  rows = rows_of(sample(policy, **settings))
  for i, prompt in enumerate(PROMPTS):
    one = {name: value[i] for name, value in settings.items()}
    alone = sample(policy, [prompt] * 4, prompt_ids=[i] * 4, **one)
    assert rows_of(alone) == rows[2 * i : 2 * i + 2] * 4
  assert rows[0] == rows[1]  # greedy


# ------------------------------------------------------------- refill


def many(policy, **settings):
  rng = np.random.default_rng(1)
  prompts = [rng.integers(0, V, n % 13 + 1).tolist() for n in range(23)]
  limits = (rng.integers(1, 17, 23)).tolist()
  ends = dataclasses.replace(policy, eos_ids=(5, 60, 61, 62))
  settings = {"temperature": 1.5, "stop": ["a", "ed"]} | settings
  forced = [[8] * (n % 3) for n in range(23)]
  return sample(ends, prompts, max_new_tokens=limits, forced=forced, **settings)


def test_refill_equals_one_batch(policy):
  """More prompts than slots: the same tokens, in the order of the prompts."""
  seen = []
  few = many(
    policy, max_rows=ROWS, on_progress=lambda done, of: seen.append((done, of))
  )
  assert few.stats["rows"] == ROWS
  assert_same(few, many(policy, max_rows=64))
  assert_same(few, many(policy, max_rows=1))  # one slot: a prompt's samples at least
  assert seen == sorted(seen) and seen[-1] == (23, 23) and len(seen) > 3
  assert few.prompt_ids.tolist() == np.repeat(np.arange(23), 2).tolist()


def test_a_row_at_the_last_position_leaves_no_nan_behind():
  """Learned positions end; a row that waits there must not spoil its slot's next."""
  policy = dataclasses.replace(policy_of("gpt2"), eos_ids=())
  limit = policy.config.max_positions
  prompts = [[1] * (limit - 10)] + [[2, 3, 4]] * 15
  rollout = rlft.generate(
    policy, prompts, max_new_tokens=[10] + [16] * 15, max_rows=8, seed=3
  )
  assert np.isfinite(rollout.logp).all()
  assert rollout.lengths[0] == 10


# ------------------------------------------------------------- compiled once


def test_settings_compile_nothing(policy):
  """Peers' defect 5: 20 different calls inside one bucket."""
  programs = (decode.jit_empty, decode.jit_insert, decode.jit_decode, generate._convert)
  compiled = lambda: sum(program._cache_size() for program in programs)
  sample(policy, stop="xyz")
  before, real = compilations(), compiled()
  rng = np.random.default_rng(0)
  for i in range(20):
    count = int(rng.integers(3, 5))
    sample(
      dataclasses.replace(policy, eos_ids=tuple(range(i % 8 + 1))),
      [rng.integers(0, V, rng.integers(1, 17)).tolist() for _ in range(count)],
      temperature=float(rng.uniform(0, 2)) * (i % 5 != 0),
      top_k=int(rng.integers(0, 90)),
      top_p=float(rng.uniform(0.1, 1)),
      min_p=[0.0] * count if i % 2 else 0.1,
      max_new_tokens=int(rng.integers(1, 17)),
      stop=["xyz", "ab\n", "q"][: i % 3 + 1],
      seed=i,
      step=i * 7,
      prompt_ids=(np.arange(count) * 1000).tolist(),
      purpose=Purpose.ROLLOUT if i % 2 else Purpose.EVALUATION,
      dtype=(None, jnp.float32, np.dtype("float32"))[i % 3],
    )
  assert compilations() == before
  assert compiled() == real, "a program was compiled again without being traced"
  sample(policy, max_new_tokens=17)  # the next bucket
  assert compilations() > before


def test_rollout_parameters_are_converted_once_and_freed(policy):
  params = init_params(policy.model, jax.random.key(0))
  mine = dataclasses.replace(policy, params=params)
  sample(mine)
  held = generate._layout_of[0]
  sample(mine, seed=1)
  assert generate._layout_of[0] is held
  # A policy that changes after an update is seen, and its conversion compiled before.
  known = generate._convert._cache_size()
  changed = params | {"embedding": params["embedding"] + 1.0}
  assert rows_of(sample(dataclasses.replace(mine, params=changed))) != rows_of(
    sample(mine)
  )
  assert generate._convert._cache_size() == known
  leaf = weakref.ref(params["layers"]["mlp"]["up"]["kernel"])
  del params, mine, changed, held
  gc.collect()
  assert leaf() is None and not generate._layout_of, "the old model stays in memory"


# ------------------------------------------------------------- bad input


@pytest.fixture
def no_device(monkeypatch):
  """Fails a test that reaches the device before the input is checked."""

  def refuse(*args, **kwargs):
    raise AssertionError("device work before the checks were done")

  for name in ("jit_empty", "jit_insert", "jit_decode"):
    monkeypatch.setattr(decode, name, refuse)
  monkeypatch.setattr(generate, "rollout_layout", refuse)
  generate._layout_of.clear()


@pytest.mark.parametrize(
  ("prompts", "message"),
  [
    ([], "no prompts"),
    ("abc", "one string"),
    ([[1], []], "prompt 1 is empty"),
    ([""], "prompt 0 is empty"),
    ([[1], [2, 72]], "prompt 1 has the token id 72"),
    ([[-1]], "vocabulary of 72"),
    ([[1.5]], "integer token ids"),
    ([1, 2], "integer token ids"),
    ([[1], "a"], "mixes"),
    ([[1] * 113], "113 tokens and may get 16 more"),
  ],
)
def test_bad_prompts(policy, no_device, prompts, message):
  before = compilations()
  with pytest.raises(DataError, match=message):
    sample(policy, prompts)
  assert compilations() == before


@pytest.mark.parametrize(
  "settings",
  [
    {"temperature": -0.1},
    {"temperature": float("nan")},
    {"temperature": float("inf")},
    {"temperature": 1e-30},  # logits / temperature would be inf
    {"temperature": [1.0, 1.0]},
    {"temperature": "hot"},
    {"temperature": None},
    {"temperature": True},
    {"top_p": 0.0},
    {"top_p": 1.1},
    {"top_p": float("nan")},
    {"top_k": -1},
    {"top_k": 2.5},
    {"top_k": 2**31},
    {"min_p": -0.1},
    {"min_p": 1.0},
    {"max_new_tokens": 0},
    {"max_new_tokens": 2**32},
    {"max_new_tokens": [1, 2, 3]},
    {"max_new_tokens": 1.5},
    {"samples": 0},
    {"samples": 1.5},
    {"samples": True},
    {"max_rows": 0},
    {"seed": -1},
    {"seed": 2**32},
    {"seed": 0.5},
    {"seed": None},
    {"seed": True},
    {"step": -1},
    {"step": 2**31},
    {"step": 1.0},
    {"prompt_ids": [0, 1]},
    {"prompt_ids": [0.5, 1.5, 2.5, 3.5]},
    {"prompt_ids": [0, 1, 2, -1]},
    {"prompt_ids": [0, 1, 2, 2**31]},
    {"prompt_ids": 3},
    {"forced": [[1]]},
    {"again": ["a"], "stop": ["b"]},
    {"again": [""]},
    {"stop": [""]},
    {"stop": [3]},
    {"stop": None},
  ],
  ids=str,
)
def test_bad_settings(policy, no_device, settings):
  before = compilations()
  with pytest.raises(ConfigError):
    sample(policy, **settings)
  assert compilations() == before


def test_a_path_is_no_policy():
  with pytest.raises(ConfigError, match="policy is 'mini', and no Policy: "):
    rlft.generate("mini", PROMPTS)


@pytest.mark.parametrize("token", [72, -1, 0.5])
def test_bad_forced_tokens(policy, no_device, token):
  with pytest.raises(DataError, match="forced 2"):
    sample(policy, forced=[[], [1], [2, token], []])


# ------------------------------------------------------------- meshes


@pytest.fixture(scope="module")
def on_no_mesh(policy):
  return many(policy)


@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 1, 1), (2, 4, 1), (2, 2, 2)])
def test_every_mesh_samples_the_same_tokens(policy, on_no_mesh, shape):
  count = int(np.prod(shape))
  mesh = make_mesh(*shape, devices=jax.devices()[:count])
  loaded = hub.load(GOLDEN / "llama", mesh=mesh)
  sharded = dataclasses.replace(loaded, tokenizer=policy.tokenizer)
  rollout = many(sharded)
  assert_same(rollout, on_no_mesh)
  if count > 1:
    layout = generate._layout_of[0][2][1]
    kernel = layout["layer_0"]["mlp"]["up"]["kernel"]
    local = kernel.addressable_shards[0].data.shape
    # Split by tensor alone: no weight is gathered for a token.
    assert local == (kernel.shape[0], kernel.shape[1] // shape[2])


def test_rollout_weights_are_cast_before_they_move(policy, monkeypatch):
  """What crosses the network, and lies twice on a chip, is bfloat16."""
  moved = []
  put = jax.device_put

  def watch(tree, *more):
    moved.extend(x.dtype for x in jax.tree.leaves(tree))
    return put(tree, *more)

  mesh = make_mesh(2, 2, 2)
  model = policy.model.clone(mesh=mesh)
  layout = tree_shardings(mesh, param_axes(model), param_shapes(model))
  params = jax.device_put(policy.params, layout)
  monkeypatch.setattr(jax, "device_put", watch)
  target, out = rollout_layout(model, params, jnp.bfloat16)
  assert moved and set(moved) == {jnp.dtype(jnp.bfloat16)}
  assert {x.dtype for x in jax.tree.leaves(out)} == {jnp.dtype(jnp.bfloat16)}
  assert not target.scan and "layer_0" in out
  q = out["layer_0"]["attention"]["q"]["kernel"]
  assert q.addressable_shards[0].data.shape == (q.shape[0], q.shape[1] // 2)

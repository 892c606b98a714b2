"""Real processes that are asked to stop, or killed, and started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from rlft.core import compiled
from rlft.training import metrics

pytestmark = pytest.mark.slow
ITERATIONS = 12
COMMANDS = {
  "grpo": {
    "task.train": 40,
    "grpo.iterations": ITERATIONS,
    "grpo.prompts_per_iteration": 2,
    "grpo.samples_per_prompt": 4,
    "grpo.max_new_tokens": 24,
    "grpo.mask_truncated": False,  # of which there are many
    "grpo.optimizer.learning_rate": 1e-4,
    "checkpoint.every": 2,
    "dev_prompts": 0,
    "eval_prompts": 0,
  },
  "sft": {  # 20 updates
    "task.train": 40,
    "sft.batch_size": 4,
    "sft.epochs": 2,
    "sft.optimizer.schedule": "cosine",
    "checkpoint.every": 4,
    "eval_prompts": 0,
  },
  "expert-iteration": {  # 4 updates, then two rounds
    "task.train": 8,
    "sft_first.batch_size": 4,
    "sft_first.epochs": 2,
    "ei.rounds": 2,
    "ei.samples_per_prompt": 4,
    "ei.max_new_tokens": 24,
    "ei.max_rows": 8,
    "ei.train.batch_size": 4,
    "dev_prompts": 8,
    "eval.max_new_tokens": 24,
    "eval_prompts": 0,
    "checkpoint.every": 1,
  },
  "return-conditioned": {  # 4 updates, then about 10
    "task.train": 8,
    "sft_first.batch_size": 4,
    "sft_first.epochs": 2,
    "rcrl.labels": "step",
    "rcrl.marks": "(',',)",
    "rcrl.value": "rollouts",
    "rcrl.continuations": 2,
    "rcrl.samples_per_prompt": 4,
    "rcrl.max_new_tokens": 24,
    "rcrl.max_rows": 32,
    "rcrl.train.batch_size": 4,
    "eval_prompts": 0,
    "checkpoint.every": 2,
  },
  "dpo": {"dpo.batch_size": 4, "dpo.lora.rank": 2, "checkpoint.every": 3},
  "reward-model": {"train.batch_size": 4, "checkpoint.every": 3},
}
# Sends itself a signal in a phase, when it has come to it so many times.
SIGNALLED = """
import os, sys
from rlft.cli import main, progress, runs
from rlft.training.checkpoint import Checkpointer

number, phase, count = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
seen, writers = 0, []

def come_to(here):
  global seen
  seen += here == phase
  if here == phase and seen == count:
    for writer in writers if phase != "save" else ():
      writer.wait_until_finished()  # so that a test can tell what is saved
    os.kill(os.getpid(), number)

heard, judge_of, save = progress.Events.__call__, runs.judge_of, Checkpointer.save

def hear(self, kind, values):
  heard(self, kind, values)
  come_to(kind)

def judging(task):
  judge = judge_of(task)
  return lambda text, example: (come_to("judge"), judge(text, example))[1]

def saving(self, step, *args):
  writers[:] = [self._orbax]
  write = self._orbax.save
  if phase == "save":
    def alone(path, args):
      print("beside", len(list(path.parent.glob("*tmp*"))), "others")
      write(path, args=args)
    self._orbax.save = alone
  saved = save(self, step, *args)
  self._orbax.save = write
  if phase == "save" and seen == count - 1:
    print("in flight:", not self._path(step).exists())
  come_to("save")
  return saved

progress.Events.__call__, runs.judge_of, Checkpointer.save = hear, judging, saving
sys.exit(main.main(sys.argv[4:]))
"""


def start(workdir, *more, command="grpo", signalled=None):
  """A process; `signalled` is (signal, phase, count), see above."""
  words = [sys.executable, "-m", "rlft.cli.main"]
  if signalled:
    number, phase, count = signalled
    words = [sys.executable, "-c", SIGNALLED, str(int(number)), phase, str(count)]
  words += [command, f"--workdir={workdir}"]
  words += [f"--config.{name}={value}" for name, value in COMMANDS[command].items()]
  return subprocess.Popen(
    [*words, *more],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    env=os.environ | {"XLA_FLAGS": ""},
    start_new_session=True,
  )


def finish(process):
  said, _ = process.communicate(timeout=300)
  return process.returncode, said


def lines(workdir):
  return (workdir / "metrics.jsonl").read_text().count("\n") if (
    workdir / "metrics.jsonl"
  ).exists() else 0  # fmt: skip


def until_lines(process, workdir, count):
  while lines(workdir) < count:
    assert process.poll() is None, process.communicate()
    time.sleep(0.02)


def same(one, other):
  """Weights and metrics, but for the clock."""
  due, found = metrics.read(one), metrics.read(other)
  clocks = ("time", "second")
  for a, b in zip(due, found, strict=True):
    for name in a:
      if not any(word in name for word in clocks):
        assert a[name] == b[name], name
  solutions = "solutions.jsonl"
  if (one / solutions).exists():
    assert (one / solutions).read_bytes() == (other / solutions).read_bytes()
  mine, theirs = (
    load_file(path / "model" / "model.safetensors") for path in (one, other)
  )
  assert mine.keys() == theirs.keys()
  for name in mine:
    np.testing.assert_array_equal(mine[name], theirs[name])


@pytest.fixture(scope="module", autouse=True)
def kept(tmp_path_factory):
  """What one process compiled, the next ones load, as with every command."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv(compiled.VARIABLE, str(tmp_path_factory.mktemp("compiled")))
    # A test in the background ignores Ctrl-C, and what it starts would too.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("straight")
  code, said = finish(start(workdir))
  assert code == 0, said
  steps = [line["step"] for line in metrics.read(workdir)]
  assert steps == list(range(1, ITERATIONS + 1))
  return workdir


def test_sigterm_saves_and_ends_with_75(straight, tmp_path):
  first = start(tmp_path)
  until_lines(first, tmp_path, 3)
  first.send_signal(signal.SIGTERM)
  code, said = finish(first)
  assert code == 75 and "the same command goes on from there" in said
  done = lines(tmp_path)
  assert 3 <= done < ITERATIONS
  code, said = finish(start(tmp_path))
  assert code == 0 and f"going on after iteration {done}" in said
  same(straight, tmp_path)


def test_ctrl_c_saves_too_and_a_second_one_ends_at_once(straight, tmp_path):
  first = start(tmp_path)
  until_lines(first, tmp_path, 1)
  os.killpg(first.pid, signal.SIGINT)  # as a terminal does it
  code, said = finish(first)
  assert code == 130 and "the same command goes on from there" in said
  assert "Traceback" not in said
  done = lines(tmp_path)
  second = start(tmp_path)
  until_lines(second, tmp_path, min(done + 1, ITERATIONS))
  os.killpg(second.pid, signal.SIGINT)
  time.sleep(0.05)
  os.killpg(second.pid, signal.SIGINT)
  code, said = finish(second)
  assert code == 130 and "ended at once" in said
  assert "Traceback" not in said
  code, said = finish(start(tmp_path))
  assert code == 0
  same(straight, tmp_path)


def test_kills_at_any_moment_cost_nothing_but_time(straight, tmp_path):
  generator = np.random.default_rng(0)
  for _ in range(4):
    process = start(tmp_path)
    until_lines(process, tmp_path, min(lines(tmp_path) + 2, ITERATIONS))
    time.sleep(generator.uniform(0, 0.5))
    process.kill()
    finish(process)
  code, said = finish(start(tmp_path))
  assert code == 0, said
  same(straight, tmp_path)


def test_two_writers_are_refused(tmp_path):
  first = start(tmp_path)
  until_lines(first, tmp_path, 1)
  code, said = finish(start(tmp_path))
  assert code == 2 and str(first.pid) in said
  first.kill()
  finish(first)


def test_changed_settings_are_named(tmp_path):
  first = start(tmp_path)
  until_lines(first, tmp_path, 2)
  first.send_signal(signal.SIGTERM)
  assert finish(first)[0] == 75
  other = "--config.grpo.max_new_tokens=16"
  record = (tmp_path / "resolved_config.json").read_bytes()
  code, said = finish(start(tmp_path, other))
  assert code == 2 and "grpo.max_new_tokens: 24 there, 16 here" in said
  assert (tmp_path / "resolved_config.json").read_bytes() == record
  code, said = finish(start(tmp_path, other, "--allow_changed=grpo.max_new_tokens"))
  assert code == 0
  assert "changed setting grpo.max_new_tokens: 24 -> 16" in said
  assert json.loads((tmp_path / "resolved_config.json").read_text())["grpo"][
    "max_new_tokens"
  ] == 16  # fmt: skip


def go(workdir, command, number, phase, count, *more):
  """A process that is signalled: its exit code, and what it said."""
  signalled = number, phase, count
  return finish(start(workdir, *more, command=command, signalled=signalled))


def test_supervised_training_survives_signals(tmp_path):
  """SIGTERM, SIGKILL inside an update, and SIGTERM while a checkpoint is written."""
  straight, broken = tmp_path / "straight", tmp_path / "broken"
  assert finish(start(straight, command="sft"))[0] == 0
  assert [line["step"] for line in metrics.read(straight)] == list(range(1, 21))

  code, said = go(broken, "sft", signal.SIGTERM, "train", 3)
  assert code == 75 and "after update 4 of 20; the state is saved" in said
  assert lines(broken) == 4
  code, said = go(broken, "sft", signal.SIGKILL, "train", 6)  # update 10; 8 are saved
  assert code == -signal.SIGKILL and "going on after update 4" in said
  assert lines(broken) == 10
  code, said = go(broken, "sft", signal.SIGTERM, "save", 1)
  assert code == 75 and "going on after update 8" in said
  assert "in flight: True" in said and said.count("beside 0 others") == 2
  assert "after update 13 of 20" in said
  saved = sorted(path.name for path in (broken / "checkpoints").iterdir())
  assert saved == ["00000012", "00000013"]
  assert finish(start(broken, command="sft"))[0] == 0
  same(straight, broken)


@pytest.mark.parametrize("command", ["dpo", "reward-model"])
def test_training_on_pairs_survives_signals(command, tmp_path):
  path = tmp_path / "pairs.jsonl"
  row = lambda i: {"prompt": f"{i}", "chosen": f"+{i}=9", "rejected": f"{i % 7}"}
  path.write_text("".join(json.dumps(row(i)) + "\n" for i in range(40)))
  more = f"--config.preferences.path={path}", "--config.preferences.held_out=0.1"
  straight, broken = tmp_path / "straight", tmp_path / "broken"
  code, said = finish(start(straight, *more, command=command))
  assert code == 0, said
  assert [line["step"] for line in metrics.read(straight)] == list(range(1, 11))
  assert go(broken, command, signal.SIGKILL, "train", 5, *more)[0] == -signal.SIGKILL
  code, said = go(broken, command, signal.SIGTERM, "train", 1, *more)
  assert code == 75 and "going on after update 3" in said
  assert finish(start(broken, *more, command=command))[0] == 0
  same(straight, broken)


def test_expert_iteration_survives_signals(tmp_path):
  """In its supervised stage; then while it samples, judges, and trains."""
  command = "expert-iteration"
  straight, broken = tmp_path / "straight", tmp_path / "broken"
  code, said = finish(start(straight, command=command))
  assert code == 0, said
  rounds = [line for line in metrics.read(straight) if "round/round" in line]
  assert [line["round/round"] for line in rounds] == [1, 2]

  def killed(phase, count):
    code, said = go(broken, command, signal.SIGKILL, phase, count)
    assert code == -signal.SIGKILL, said
    return said

  def stopped(phase, count):
    code, said = go(broken, command, signal.SIGTERM, phase, count)
    assert code == 75, said
    return said

  killed("train", 3)
  said = killed("sample", 2)
  assert "sft: going on after update 2" in said
  said = killed("judge", 12)  # eight dev prompts, then samples
  assert "sft: going on after update 4" in said and "train" not in said
  assert "after sampling round 1 of 2" in stopped("sample", 2)
  said = killed("train", 2)
  assert "going on after half-round 1" in said and "sample" not in said
  assert "after sampling round 1 of 2" in stopped("train", 1)
  said = killed("sample", 2)
  assert "going on after half-round 1" in said
  said = killed("train", 2)
  assert "going on after half-round 2" in said
  code, said = finish(start(broken, command=command))
  assert code == 0 and "going on after half-round 3" in said
  same(straight, broken)


def test_return_conditioned_survives_signals(tmp_path):
  """After its supervised stage: while it continues samples, after that, and trains."""
  command = "return-conditioned"
  straight, broken = tmp_path / "straight", tmp_path / "broken"
  code, said = finish(start(straight, command=command))
  assert code == 0, said
  record = metrics.read(straight)
  assert [line["step"] for line in record[:-1]] == list(range(1, len(record)))
  assert record[-1]["step"] == len(record) - 1 and "round/round" in record[-1]
  assert go(broken, command, signal.SIGKILL, "continue", 1)[0] == -signal.SIGKILL
  code, said = go(broken, command, signal.SIGTERM, "sample", 1)
  assert code == 75 and "after sampling and labelling" in said
  code, said = go(broken, command, signal.SIGKILL, "train", 5)
  assert code == -signal.SIGKILL and "continue" not in said
  for what in ("going on after update", "this run of rlft return-conditioned is fin"):
    code, said = finish(start(broken, command=command))
    assert code == 0 and f"broken: {what}" in said
    same(straight, broken)


def test_settings_of_supervised_training_may_change_but_not_its_model(tmp_path):
  assert go(tmp_path, "sft", signal.SIGTERM, "train", 2)[0] == 75
  sizes = {"vocab_size": 0, "width": 32, "layers": 1, "heads": 2, "kv_heads": 2}
  sizes |= {"head_dim": 16, "mlp_width": 64, "max_positions": 256}
  other = [f"--config.model.decoder.{name}={size}" for name, size in sizes.items()]
  code, said = finish(start(tmp_path, *other, command="sft"))
  assert code == 2 and "weights.model" in said
  lower = "--config.sft.optimizer.learning_rate=1e-5"
  code, said = finish(start(tmp_path, lower, command="sft"))
  assert code == 0
  assert "changed setting sft.optimizer.learning_rate: 0.0001 -> 1e-05" in said
  rates = [line["learning_rate"] for line in metrics.read(tmp_path)]
  assert len(rates) == 20 and rates[2] > 5e-5 and max(rates[3:]) <= 1e-5

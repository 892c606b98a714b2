"""One process of a run of several: what tests/reliability/test_hosts.py starts.

python one_of_several.py messages|stuck|raises|sft|ei|ppo|lora|grpo OUT FSDP TENSOR

Joins as RLFT_COORDINATOR and the others say; process 0 writes what was computed to OUT.
"""

from __future__ import annotations

import json
import sys
import time
import types
from pathlib import Path

from rlft.core import platform

platform.join()

import jax  # noqa: E402
import numpy as np  # noqa: E402

import rlft  # noqa: E402
from rlft.algorithms import expert_iteration, grpo, ppo, sft  # noqa: E402
from rlft.cli import main as command_line  # noqa: E402
from rlft.cli.rl import dev_score  # noqa: E402
from rlft.cli.runs import TaskConfig  # noqa: E402
from rlft.core import hosts, watchdog  # noqa: E402
from rlft.core.errors import RewardError  # noqa: E402
from rlft.core.mesh import ROLLOUT_RULES, make_mesh, sharding  # noqa: E402
from rlft.models import scalar  # noqa: E402
from rlft.models.lora import LoRAConfig  # noqa: E402
from rlft.probes.evaluate import EvalConfig  # noqa: E402
from rlft.rewards.learned import reward_model_reward  # noqa: E402
from rlft.rewards.verifiable import make_reward  # noqa: E402
from rlft.tasks import arithmetic  # noqa: E402
from rlft.training.checkpoint import Checkpointer  # noqa: E402
from rlft.training.optimizer import OptimizerConfig  # noqa: E402

ADAM = OptimizerConfig(learning_rate=1e-4, schedule="constant", eps=1e-5)
ROLLOUTS = {
  "optimizer": ADAM,
  "iterations": 2,
  "prompts_per_iteration": 16,
  "samples_per_prompt": 4,
  "max_new_tokens": 32,
  "epochs": 2,
  "minibatches": 2,
  "max_rows": 32,
  "eval_every": 2,
}


def messages(mesh):
  """The primitives, each against what it must give; a number for each process."""
  part = hosts.share(mesh)
  x = np.arange(24, dtype=np.float32).reshape(8, 3)
  own = hosts.own_part(x, mesh)
  assert len(own) * part.of == 8
  rows = hosts.place_own({"x": own}, mesh)["x"]
  assert rows.shape == x.shape
  np.testing.assert_array_equal(hosts.own_rows(rows), own)
  joined = hosts.together({"odd": own[:, 0] % 2 == 1, "n": own[:, 1].astype(int)}, mesh)
  np.testing.assert_array_equal(joined["odd"], x[:, 0] % 2 == 1)
  np.testing.assert_array_equal(joined["n"], x[:, 1])
  five, real = hosts.own_evenly(list("abcde"), mesh)
  assert len(five) == -(-5 // part.of)
  told = hosts.each_part(five[:real], mesh)
  assert [letter for letters in told for letter in letters] == list("abcde")
  # Where several hosts hold the same rows, what the first of them says counts.
  said = hosts.as_lead(own[:, 0] + 100 * jax.process_index(), mesh)
  lead = part.leads[part.index]
  np.testing.assert_array_equal(said, own[:, 0] + 100 * lead)
  # Weights that every part has, computed with by each part alone.
  axes = ("embed", "mlp"), (4, 8)
  whole = hosts.spread(np.ones((4, 8), np.float32), sharding(mesh, *axes))
  copied = jax.device_put(whole, sharding(mesh, *axes, ROLLOUT_RULES))
  alone = hosts.on_own_devices(copied, mesh)
  factor = 2.0 + part.index
  assert float(jax.jit(lambda w: (w * factor).sum())(alone)) == 32 * factor
  # Many programs with collectives, none of which is waited for.
  total = jax.jit(lambda x: x + x.sum())
  for _ in range(60):
    hosts.paced(total(rows))
  return None, {"parts": part.of, "processes": hosts.everyone(jax.process_index())}


def stuck():
  """Process 0 waits for a message of process 1, which waits for something else."""
  with watchdog.watching(4, f"process {jax.process_index()}"):
    watchdog.beat("the last step")
    hosts.everyone("hello") if hosts.first() else sleeps()


def raises():
  """Process 1 fails on its own rows while a save runs; through the command's exits."""
  workdir = sys.argv[2]

  def run(args):
    x = hosts.put(np.zeros(1 << 20, np.float32), make_mesh())
    with Checkpointer(workdir) as checkpoints:
      checkpoints.save(1, {"x": x}, {}, {})
      if not hosts.first():
        raise RewardError("a reward of process 1")
      hosts.everyone("hello")
    return 0

  nothing = lambda parser: None
  command = {"MANY_HOSTS": True, "SUMMARY": "", "add_arguments": nothing, "run": run}
  sys.modules["rlft.cli.sft"] = types.SimpleNamespace(**command)
  platform.join = lambda: None  # it has
  sys.exit(command_line.main(["sft"]))


def sleeps():
  time.sleep(600)


def train(name, mesh):
  """A short run of an algorithm: its policy, and every number of it."""
  policy = rlft.load("mini", mesh=mesh)
  examples = arithmetic.generate("train", 64)
  dev = arithmetic.generate("dev", 7)
  log = {}

  def on_event(kind, values):
    if kind in ("iteration", "round"):
      log[len(log)] = {k: v for k, v in values.items() if isinstance(v, float | int)}

  config = EvalConfig(samples=1, ks=(1,), max_new_tokens=32)
  score = dev_score(TaskConfig(), dev, config)
  supervised = sft.SFTConfig(optimizer=ADAM, batch_size=16)
  if name == "sft":
    rows = [(e.prompt, e.solution) for e in examples]
    result = sft.train(policy, rows, supervised)
    log = dict(enumerate(result.losses)) | {"tokens": result.update_tokens}
  elif name == "ei":
    # 29 prompts: shares that are not equal.
    config = expert_iteration.EIConfig(
      train=supervised, rounds=2, samples_per_prompt=4, max_new_tokens=32
    )
    result = expert_iteration.run(
      policy, examples[:29], arithmetic.judge, config, on_event=on_event
    )
    log["solutions"] = [one.tokens for one in result.solutions]
  else:
    reward = make_reward(arithmetic.judge)
    if name == "lora":  # adapters, a head on their trunk, and a reward model
      model = scalar.init_scalar(policy, seed=1)
      config = ppo.PPOConfig(lora=LoRAConfig(rank=4), value="shared", **ROLLOUTS)
      reward = reward_model_reward(model, policy)
      result = ppo.run(policy, examples, reward, config, on_event=on_event)
    elif name == "ppo":
      config = ppo.PPOConfig(value_optimizer=ADAM, scale_rewards=True, **ROLLOUTS)
      result = ppo.run(policy, examples, reward, config, on_event=on_event)
    else:
      config = grpo.preset("grpo", **ROLLOUTS)
      result = grpo.run(policy, examples, reward, config, on_event=on_event)
  log["dev"] = score(result.policy)
  return result.policy, log


def main(name: str, out: str, fsdp: str, tensor: str) -> None:
  if name == "stuck":
    return stuck()
  if name == "raises":
    return raises()
  mesh = make_mesh(-1, int(fsdp), int(tensor))
  policy, log = messages(mesh) if name == "messages" else train(name, mesh)
  if policy is not None:
    rlft.save(policy, Path(out) / "model")
  if hosts.first():
    Path(out).mkdir(parents=True, exist_ok=True)
    (Path(out) / "log.json").write_text(json.dumps(log))


if __name__ == "__main__":
  main(*sys.argv[1:])

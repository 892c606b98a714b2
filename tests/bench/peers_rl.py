"""Training speed of rlft's GRPO and PPO beside their peers: TRL and Tunix.

  python tests/bench/peers_rl.py --trl-python TORCH_ENV/bin/python \
    --tunix-python TUNIX_ENV/bin/python --json peers_rl.json

Run by the interpreter that has rlft. Form and model are those of peers.py: a process
for each peer for the whole run, interleaved rounds, ratios within a round. A round is
one iteration of each in the library's own training loop: rollout, reward, scores,
advantages, and one update with all rows. Tokens are those sampled; seconds are of the
whole iteration. Memory is the most that a process ever held, imports and compilation
included.

What is equal: the Llama architecture at the same sizes, random float32 weights; prompts
of random tokens, others in every iteration; every row runs to its full length (nothing
can end it); sampling at temperature 1 without filters; a reward function that counts
the tokens it is given and draws a random number for each row; one epoch, one minibatch;
Adam (rate 1e-6, eps 1e-5, no weight decay) after a clip of the gradient's norm at 1;
each library's own default for threads. GRPO is Dr. GRPO without a reference: rewards
less their group's mean, losses over a constant. PPO has a policy, a value model of its
size and a reference, and subtracts a KL on each token from the reward.

What is not:
- Memory settings. All but "tunix-whole" add gradients over 4 micro-batches, each a
  quarter of the rows; "trl" also recomputes activations, which is its default.
- Old log-probabilities. In GRPO the peers take the ratio to be 1, which costs nothing.
  rlft takes its sampler's; the first iteration (and every 16th) compares them with the
  scorer's. In PPO Tunix scores all rows again, in every iteration.
- Prompts. rlft keeps one copy of a prompt's cache for all of its samples; the peers
  prefill every sample. Tunix's PPO knows no groups: it is given each prompt repeatedly.
- Scoring. rlft scores all rows at once; Tunix's PPO does so for values, and goes by
  micro-batches for log-probabilities. The KL has each library's own default estimator
  and weight, and each gathers its own metrics; nothing is logged or saved.
- Tokenizers: rlft's and TRL's are of `tokenizers`; Tunix's are a few lines of Python.
TRL's PPO is left out: current releases have none.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import sys
import time
from pathlib import Path

import peers

SHAPES = {
  "S": {"prompts": 4, "samples": 8, "prompt": 64, "new": 128},
  "small": {"prompts": 4, "samples": 2, "prompt": 8, "new": 8},
}
MICRO_BATCHES = 4
RATE = 1e-6
FOREVER = 1_000_000  # iterations: the end of stdin ends a worker
# The goals: method -> peer -> rlft's tokens/s over the peer's.
TARGETS = {
  "grpo": {"trl": 1.3, "trl-nockpt": 1.3, "tunix": 1.7, "tunix-whole": 1.7},
  "ppo": {"tunix": 1.5, "tunix-whole": 1.5},
}
# And whose peak memory rlft's must be below.
LEANER_THAN = {"grpo": "trl", "ppo": "tunix"}


class Turn:
  """The moment between two iterations: answers for the last, waits for the next."""

  def __init__(self, answers, versions: tuple[str, ...]):
    self.answers, self.began, self.tokens = answers, None, 0
    self.versions, self.source = versions, random.Random(0)

  def __call__(self) -> None:
    """Called before the first iteration, and when all work of one is done."""
    from importlib import metadata

    if self.began is not None:
      answer = {
        "tokens": self.tokens,
        "seconds": time.perf_counter() - self.began,
        "peak_gb": peers.peak_gb(),
        "versions": {n: metadata.version(n) for n in self.versions},
      }
      print(json.dumps(answer), file=self.answers, flush=True)
    if not sys.stdin.readline():
      raise SystemExit  # the libraries' loops would never end
    self.began, self.tokens = time.perf_counter(), 0

  def reward(self, lengths: list[int]) -> list[float]:
    """Random rewards of rows of so many tokens.

    Whole numbers: Tunix's PPO cuts the others off.
    """
    self.tokens += sum(lengths)
    return [float(self.source.randrange(8)) for _ in lengths]


def _prompts(shape, word) -> list[str]:
  """Prompts of 16 iterations; each token is `word` of its id."""
  source = random.Random(1)
  return [
    " ".join(word(source.randrange(3, peers.SIZES["vocab"])) for _ in range(length))
    for length in [shape["prompt"]] * (16 * shape["prompts"])
  ]


# ------------------------------------------------------------------ the peers
#
# Each trains until `turn`, which it calls between iterations, ends the process.


def _rlft(method, shape, turn):
  policy = peers.rlft_policy()
  import numpy as np

  from rlft.algorithms import grpo, ppo
  from rlft.cli.bench_rl import worded
  from rlft.core.types import Example, Reward
  from rlft.training.optimizer import OptimizerConfig

  def reward(rollout, examples):
    value = turn.reward([int(n) for n in rollout.lengths])
    return Reward(value=np.asarray(value, np.float32), judged=np.ones(len(value), bool))

  optimizer = OptimizerConfig(learning_rate=RATE, schedule="constant", eps=1e-5)
  settings = {
    "optimizer": optimizer,
    "iterations": FOREVER,
    "prompts_per_iteration": shape["prompts"],
    "samples_per_prompt": shape["samples"],
    "max_new_tokens": shape["new"],
    "micro_batches": MICRO_BATCHES,
  }
  if method == "grpo":
    run = grpo.run
    config = grpo.preset("dr_grpo", mask_truncated=False, **settings)
  else:
    run = ppo.run
    config = ppo.PPOConfig(
      epochs=1,
      minibatches=1,
      truncated="score",
      value_optimizer=optimizer,
      **settings,
    )
  texts = _prompts(shape, "w{}".format)
  examples = [Example(i, text, "", "") for i, text in enumerate(texts)]
  turn()
  run(
    worded(policy),
    examples,
    reward,
    config,
    on_event=lambda kind, values: turn() if kind == "iteration" else None,
  )


def _trl(method, shape, turn, checkpointing=True):
  import tempfile

  import datasets
  import tokenizers
  import transformers
  import trl

  words = {f"w{i}": i for i in range(peers.SIZES["vocab"])}
  core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
  core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  # Both lie beyond the model's vocabulary: no row ends, and none is padded.
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=core, eos_token="<end>", pad_token="<pad>"
  )

  def reward(completion_ids, **others):
    return turn.reward([len(ids) for ids in completion_ids])

  class Turns(transformers.TrainerCallback):
    def on_train_begin(self, *args, **others):
      turn()

    def on_step_end(self, *args, **others):
      turn()

  rows = shape["prompts"] * shape["samples"]
  config = trl.GRPOConfig(
    output_dir=tempfile.mkdtemp(),
    beta=0.0,
    loss_type="dr_grpo",
    scale_rewards=False,
    num_generations=shape["samples"],
    per_device_train_batch_size=rows // MICRO_BATCHES,
    gradient_accumulation_steps=MICRO_BATCHES,
    gradient_checkpointing=checkpointing,
    max_completion_length=shape["new"],
    temperature=1.0,
    top_p=1.0,
    top_k=0,
    num_iterations=1,
    max_steps=FOREVER,
    learning_rate=RATE,
    lr_scheduler_type="constant",
    adam_epsilon=1e-5,
    weight_decay=0.0,
    max_grad_norm=1.0,
    use_vllm=False,
    use_cpu=True,
    bf16=False,
    logging_strategy="no",
    save_strategy="no",
    eval_strategy="no",
    report_to="none",
    disable_tqdm=True,
  )
  trl.GRPOTrainer(
    model=peers.torch_model(),
    reward_funcs=reward,
    args=config,
    train_dataset=datasets.Dataset.from_dict({"prompt": _prompts(shape, "w{}".format)}),
    processing_class=tokenizer,
    callbacks=[Turns()],
  ).train()


class Words(peers.Tokenizer):
  """Decodes too; and no token that is sampled means padding."""

  decode = staticmethod(lambda ids: " ".join(map(str, ids)))
  pad_id = staticmethod(lambda: -1)


def _tunix(method, shape, turn, whole=False):
  import jax
  import numpy as np
  import optax
  from flax import nnx
  from tunix.rl import rl_cluster as clusters
  from tunix.rl import utils
  from tunix.rl.grpo import drgrpo_learner
  from tunix.rl.ppo import ppo_learner
  from tunix.rl.rollout import base_rollout

  class Critic(nnx.Module):
    """Tunix scores with `segment_ids`, which its Llama does not know; the attention
    mask, which it is given too, says the same."""

    def __init__(self, model):
      self.model = model

    def __call__(
      self, input_tokens, positions, cache, attention_mask, segment_ids=None
    ):
      return self.model(input_tokens, positions, cache, attention_mask)

  # A batch of GRPO is of prompts, one of PPO of rows.
  repeats = 1 if method == "grpo" else shape["samples"]
  batch = shape["prompts"] * repeats
  part = batch if whole else batch // MICRO_BATCHES

  def optimizer():
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(RATE, eps=1e-5))

  training = clusters.RLTrainingConfig(
    actor_optimizer=optimizer(),
    critic_optimizer=optimizer(),
    eval_every_n_steps=FOREVER,
    max_steps=FOREVER,
    mini_batch_size=batch,
    train_micro_batch_size=part,
    rollout_micro_batch_size=batch,
    compute_logps_micro_batch_size=part,
  )
  rollout = base_rollout.RolloutConfig(
    max_tokens_to_generate=shape["new"],
    max_prompt_length=shape["prompt"],
    kv_cache_size=shape["prompt"] + shape["new"],
    temperature=1.0,
    top_p=1.0,
    eos_tokens=[-1],
  )
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
  model = peers.tunix_model()
  others = {}
  if method == "ppo":
    others["critic"] = Critic(utils.create_critic_model(model))
    others["reference"] = nnx.clone(model)
  cluster = clusters.RLCluster(
    actor=model,
    tokenizer=Words(),
    cluster_config=clusters.ClusterConfig(
      role_to_mesh=dict.fromkeys(clusters.Role, mesh),
      training_config=training,
      rollout_config=rollout,
    ),
    **others,
  )
  del model, others  # the cluster has copies of its own

  def reward(prompts, completions, **kwargs):
    return turn.reward([len(text.split()) for text in completions])

  if method == "grpo":
    config = drgrpo_learner.DrGRPOConfig(
      num_generations=shape["samples"], num_iterations=1, beta=0.0
    )
    learner = drgrpo_learner.DrGRPOLearner(cluster, config, reward_fns=reward)
    trainers = [cluster.actor_trainer]
  else:
    config = ppo_learner.PPOConfig(num_iterations=1)
    learner = ppo_learner.PPOLearner(cluster, config, reward_fns=reward)
    trainers = [cluster.actor_trainer, cluster.critic_trainer]

  def batches():  # the loop asks for one when it has started the last one's updates
    texts, size = _prompts(shape, str), shape["prompts"]
    while True:
      for at in range(0, len(texts), size):
        jax.block_until_ready([nnx.state(trainer.model) for trainer in trainers])
        turn()
        yield {"prompts": np.repeat(np.array(texts[at : at + size]), repeats)}

  learner.train(batches())


PEERS = {
  "rlft": (_rlft, ("jax",)),
  "trl": (_trl, ("trl", "transformers", "torch")),
  "trl-nockpt": (
    functools.partial(_trl, checkpointing=False),
    ("trl", "transformers", "torch"),
  ),
  "tunix": (_tunix, ("google-tunix", "jax")),
  "tunix-whole": (functools.partial(_tunix, whole=True), ("google-tunix", "jax")),
}


def work(peer: str, method: str, shape_name: str) -> None:
  """One peer's process: an iteration, and a line of JSON, for each line of stdin."""
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)  # what a library prints must not mix with the answers
  train, versions = PEERS[peer]
  train(method, SHAPES[shape_name], Turn(answers, versions))


# ------------------------------------------------------------------ the comparison


def memory(method: str, found: dict) -> str:
  """Whether the goal for memory is met, in words."""
  other = LEANER_THAN[method]
  if other not in found:
    return ""
  ours, theirs = (found[peer]["peak_gb"] for peer in ("rlft", other))
  verdict = "met" if ours < theirs else "not met"
  return f"Peak memory below {other}'s: {ours:.2f} of {theirs:.2f} GB, {verdict}.\n"


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--trl-python", help="has torch and trl")
  parser.add_argument("--tunix-python", help="has google-tunix")
  parser.add_argument(
    "--method", choices=TARGETS, action="append", help="default: both"
  )
  parser.add_argument("--rounds", type=int, default=7)
  parser.add_argument("--json", type=Path, help="where all numbers go")
  parser.add_argument(
    "--small", action="store_true", help="a tiny shape: does everything run?"
  )
  parser.add_argument("--worker", choices=PEERS, help=argparse.SUPPRESS)
  args = parser.parse_args()
  shape = "small" if args.small else "S"
  if args.worker:
    return work(args.worker, args.method[0], shape)
  pythons = {"rlft": sys.executable}
  if args.trl_python:
    pythons |= {"trl": args.trl_python, "trl-nockpt": args.trl_python}
  if args.tunix_python:
    pythons |= {"tunix": args.tunix_python, "tunix-whole": args.tunix_python}
  results = {}
  for method in args.method or TARGETS:
    commands = {
      peer: [python, __file__, "--worker", peer, "--method", method]
      + ["--small"] * args.small
      for peer, python in pythons.items()
      if peer == "rlft" or peer in TARGETS[method]
    }
    results[method] = peers.compare(
      SHAPES[shape], commands, args.rounds, TARGETS[method]
    )
    print(f"{method.upper()}, one iteration.", peers.markdown(shape, results[method]))
    print(memory(method, results[method]["peers"]), flush=True)
  if args.json:
    args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
  main()

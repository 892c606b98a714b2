"""The programs of an algorithm as abstract shapes: what `rlft plan` compiles.

The programs are those that a run calls, and their shapes the largest that a run gives
them. Nothing is allocated.

Letters: B rows, T tokens, C completion columns, P prompt columns, S slots, K samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlft.algorithms import grpo, ppo, sft
from rlft.cli.abstract import Shape, Shapes, chip_bytes, prompts, rules, scalar
from rlft.cli.estimates import Counter
from rlft.cli.grpo import GRPORun
from rlft.cli.ppo import PPORun
from rlft.cli.runs import ModelConfig
from rlft.cli.sft import SFTRun
from rlft.core import hosts
from rlft.core.errors import ConfigError
from rlft.core.mesh import batch_shards
from rlft.models import hub, peft
from rlft.models.decoder import Decoder, DecoderConfig
from rlft.rewards import learned
from rlft.sampling import decode as device
from rlft.sampling.buckets import bucket
from rlft.sampling.generate import PREFILL_TOKENS
from rlft.training import parts, rollouts
from rlft.training.data import TrainBatch

Run = PPORun | GRPORun | SFTRun
RUNS: Mapping[str, type] = {"ppo": PPORun, "grpo": GRPORun, "sft": SFTRun}
_REWARD_TOKENS = 16384  # `max_tokens` of learned rewards, which no command changes


@dataclasses.dataclass(frozen=True)
class Program:
  """A program of the algorithm, and what it is called with.

  Attributes:
    name, phase: "decode" of "rollout", and so on.
    function: the jitted function.
    arguments, keywords: shapes, and what is static.
    holds: names of the residents that its arguments hold.
    runs: how often an iteration runs it.
    model_flops: of one run on all chips, by hand (see `estimates`); where a loop has no
      static length, of one turn.
    turns: how often that loop turns in one run; 1 without one.
  """

  name: str
  phase: str
  function: Any
  arguments: tuple
  holds: tuple[str, ...]
  runs: int
  model_flops: float
  turns: int = 1
  keywords: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def lower(self) -> Any:
    """The `jax.stages.Lowered`."""
    return self.function.lower(*self.arguments, **self.keywords)


@dataclasses.dataclass(frozen=True)
class Plan:
  """All that an algorithm holds and runs on a mesh.

  Attributes:
    residents: name -> bytes of a chip that stay there from program to program.
    programs: in the order of an iteration.
    tokens: sampled in an iteration at most (of SFT: tokens of an update).
    rows, width: of an update.
    in_flight: rows that decode at once.
    cache_bytes: of a chip, keys and values of those.
  """

  residents: dict[str, int]
  programs: tuple[Program, ...]
  tokens: int
  rows: int
  width: int
  in_flight: int = 0
  cache_bytes: int = 0


def architecture(model: ModelConfig) -> DecoderConfig:
  """The architecture of a configured model, without its weights.

  Raises:
    ConfigError: it cannot be known here.
  """
  if model.decoder is not None:
    if model.decoder.vocab_size == 0:
      raise ConfigError(
        "model.decoder.vocab_size=0 takes the size of the task's tokenizer: a plan "
        "needs the number"
      )
    return model.decoder
  path = hub.named(model.path)
  found = _architecture_at(path)
  if found is None:
    base = _base(path)
    of = "" if path == base else f" is an adapter, and its base {base!r}"
    raise ConfigError(
      f"model.path={model.path!r}{of} is no directory with a config.json here: give "
      "the architecture as model.decoder, as configs/plan_7b_ppo.py does"
    )
  return found


def _architecture_at(path: str) -> DecoderConfig | None:
  """Of a model that lies here; nothing is downloaded for a plan."""
  here = hub.expand(_base(path))
  gguf = here.suffix == ".gguf" and here.is_file()
  return hub.architecture(path) if gguf or (here / "config.json").is_file() else None


def _base(path: str) -> str:
  """The path of the whole model, which is another one for an adapter."""
  here = hub.expand(path)
  return hub.named(hub.base_of(here)) if (here / peft.CONFIG).is_file() else path


def make_plan(run: Run, mesh: Mesh, prompt: int) -> Plan:
  """The programs and the residents of a run on a mesh.

  Args:
    run: the settings.
    mesh: of devices that need not be there.
    prompt: the longest prompt, in tokens (nothing of SFT depends on it).

  Raises:
    ConfigError: the rows do not divide the mesh, a row is longer than the model's
      positions, or an architecture is not known.
  """
  config = architecture(run.model)
  if isinstance(run, SFTRun):
    return _plan_sft(run, config, mesh)
  return _OnPolicy(run, config, mesh, prompt).plan()


def _plan_sft(run: SFTRun, config: DecoderConfig, mesh: Mesh) -> Plan:
  method, shapes = run.sft, Shapes(mesh)
  least = max(1, method.micro_batches)  # 0 chooses one that fits
  need = least * batch_shards(mesh)
  if method.batch_size % need:
    raise ConfigError(
      f"batch_size={method.batch_size} must be a multiple of micro_batches x batch "
      f"shards = {least} x {batch_shards(mesh)} = {need}"
    )
  model = Decoder(
    config, dtype=jnp.dtype(method.compute_dtype), mesh=mesh, remat=method.remat
  )
  given = shapes.params(model, jnp.dtype(run.model.dtype))
  state = shapes.state(given, method.optimizer)
  rows, width = method.batch_size, bucket(min(method.max_length, config.max_positions))
  batch = TrainBatch(
    shapes.rows(rows, width),
    shapes.rows(rows, width, dtype=jnp.bool_),
    shapes.rows(rows, width, dtype=jnp.float32),
  )
  step = sft.make_train_step(model, method.optimizer, method.micro_batches)
  program = Program(
    "train step",
    "update",
    step,
    (state, batch),
    ("policy", "Adam of policy"),
    1,
    3 * Counter(config).forward(rows, width, width),
  )
  residents = {
    "policy": chip_bytes(state.params),
    "Adam of policy": chip_bytes(state.opt_state),
    "policy as given": chip_bytes(given),
  }
  return Plan(residents, (program,), rows * width, rows, width)


class _OnPolicy:
  """Puts the plan of PPO or GRPO together: what `ppo._Run` and `grpo._Run` do."""

  def __init__(self, run: Any, config: DecoderConfig, mesh: Mesh, prompt: int):
    self.run, self.config, self.mesh, self.prompt = run, config, mesh, prompt
    self.ppo = isinstance(run, PPORun)
    self.method = method = run.ppo if self.ppo else run.grpo
    most = config.longest_sample(prompt)
    if prompt < 1 or prompt + method.max_new_tokens > most:
      raise ConfigError(
        f"--prompt_tokens={prompt} and max_new_tokens={method.max_new_tokens}: prompts "
        f"have at least 1 token, and both together at most the {most} "
        "positions of the model"
      )
    counts = method.prompts_per_iteration, method.samples_per_prompt
    divided = method.minibatches, method.micro_batches
    rollouts.check_rows(*counts, *divided, mesh)
    # Each host samples prompts of its own, and feeds their rows; here is the first one.
    self.share = hosts.share_of(mesh, mesh.devices.flat[0].process_index)
    if counts[0] % self.share.of:
      raise ConfigError(
        f"prompts_per_iteration={counts[0]} cannot be shared equally by the "
        f"{self.share.of} parts of the hosts: use a multiple of {self.share.of}"
      )
    self.own_shards = batch_shards(mesh) // self.share.of
    self.rows = counts[0] * counts[1]
    self.own_rows = self.rows // self.share.of
    # As `generate` and `rollouts.region` have them; a test compares with a run.
    self.wide = bucket(prompt)
    self.capacity = min(bucket(method.max_new_tokens), config.max_positions)
    total = self.wide + self.capacity
    self.columns = min(bucket(method.max_new_tokens), self.capacity)
    self.width = min(bucket(prompt + method.max_new_tokens), total)
    self.shapes, self.count = Shapes(mesh), Counter(config)
    self.given = jnp.dtype(run.model.dtype)  # of weights as they were loaded
    self.model = Decoder(
      config,
      dtype=jnp.dtype(method.compute_dtype),
      mesh=mesh,
      remat=method.remat,
      lora_scale=method.lora.scale if method.lora else 1.0,
    )
    self.residents: dict[str, int] = {}
    self.programs: list[Program] = []

  def plan(self) -> Plan:
    """Everything, in the order of an iteration."""
    method, shapes, model = self.method, self.shapes, self.model
    start = shapes.params(model, self.given)
    params: dict[str, Any] = {"policy": start}
    base, loss = None, method.loss
    if method.lora is not None:
      params, base = {"lora": shapes.lora(model, start, method.lora)}, start
      # While it samples: the base with its adapters merged in.
      self.residents["merged policy"] = chip_bytes(start)
    if self.ppo and method.value == "shared":
      params["head"] = shapes.head(self.config)
    state = shapes.state(params, method.optimizer)
    self._state("policy", state)
    # The policy as it was given is the reference, and the base of adapters; without
    # either it stays too, for the run holds it.
    needs_reference = self.ppo or bool(loss.kl_coef or method.kl_reward)
    reference = "reference" if needs_reference or base is not None else "given policy"
    self.residents[reference] = chip_bytes(start)
    in_flight = self._rollout()
    own = ("policy",) if base is None else ("policy", reference)
    adapters = state.params.get("lora")
    if method.old_logp != "sampler":
      weights = state.params.get("policy", base)
      self._logp("policy logp", own, weights, adapters)
    if needs_reference:
      self._logp("reference logp", (reference,), start, None)
    value = self._values(state, base, own) if self.ppo else None
    if self.run.reward.learned:
      self._rewards()
    if self.run.dev_prompts:
      self.residents["best policy"] = chip_bytes(shapes.params(model, jnp.float32))
    if value is not None:
      self._value_step(*value)
    capped = bool(loss.importance_cap and method.old_logp != "sampler")
    if self.ppo:
      make, static = ppo.make_policy_step, ppo._static_loss(method)
      batch = self._batch("returns", "old_value", behaviour_logp=capped)
    else:
      make, static = grpo.make_train_step, grpo._static_loss(method)
      batch = self._batch(behaviour_logp=capped, ref_logp=bool(loss.kl_coef))
    step = make(model, static, method.optimizer, method.micro_batches)
    self._update(
      "policy step",
      ("Adam of policy", *own),
      step,
      (state, batch, base, scalar(self.mesh, jnp.float32)),
      self.columns,
      trained=1 if base is None else 0,
    )
    return Plan(
      self.residents,
      tuple(self.programs),
      self.rows * method.max_new_tokens,
      self.rows // method.minibatches,
      self.width,
      *in_flight,
    )

  def _state(self, name: str, state: Any) -> None:
    self.residents[name] = chip_bytes(state.params)
    self.residents[f"Adam of {name}"] = chip_bytes(state.opt_state)

  def _rollout(self) -> tuple[int, int]:
    """The weights as the sampler has them; prefill and decode.

    Each host runs them on its own rows; here all are one program over the whole mesh,
    which gives a chip the same work (libtpu compiles for no part of a pod).

    Returns:
      (rows in flight, bytes of a chip for their keys and values).
    """
    method, samples = self.method, self.method.samples_per_prompt
    count, shards = method.prompts_per_iteration // self.share.of, self.own_shards
    model = self.model.clone(remat="none")
    params = self.shapes.params(model, model.dtype, rollout=True)
    slots = min(bucket(count, 1), max(1, method.max_rows // self.share.of // samples))
    slots = -(-slots // shards) * shards
    group = max(1, min(slots // 4, PREFILL_TOKENS // self.wide))
    group = -(-group // shards) * shards
    runs, waves = -(-count // group), -(-count // slots)
    slots, group = slots * self.share.of, group * self.share.of
    state = self.shapes.decode_state(model, slots, samples, self.wide, self.capacity)
    self.residents["rollout copy"] = chip_bytes(params)
    mesh = self.mesh
    batch, int32 = prompts(mesh, group, self.wide), scalar(mesh, jnp.int32)
    address = scalar(mesh, jnp.uint32), int32, int32
    table = rules(mesh, self.config.vocab_size)
    # `rollout_layout` casts, then moves; the cast sends nothing and holds less.
    cast = self.shapes.params(model, model.dtype)
    layout = jax.tree.map(lambda x: x.sharding, params)
    move = jax.jit(lambda tree: tree, out_shardings=layout)
    copy = ("rollout copy",)
    self.programs += [
      Program("rollout copy", "rollout", move, (cast,), copy, 1, 0.0),
      Program(
        "prefill",
        "rollout",
        device.jit_insert,
        (model, params, state, batch, *address),
        ("rollout copy",),
        runs,
        self.count.forward(group, self.wide, 0),
      ),
      Program(
        "decode",
        "rollout",
        device.jit_decode,
        (model, params, state, table, int32, int32),
        ("rollout copy",),
        waves,
        self.count.token(slots * samples, self.wide + self.capacity),
        turns=method.max_new_tokens,
      ),
    ]
    cache = state.cache
    stored = cache.prompt_k, cache.prompt_v, cache.k, cache.v
    return slots * samples, chip_bytes(stored)

  def _score(
    self, name, holds, function, lead, rows, width, heads, more=(), **keywords
  ) -> None:
    """A score program on a block of rows: (*lead, tokens, mask, *more)."""
    row = self.shapes.rows
    block = row(rows, width), row(rows, width, dtype=jnp.bool_)
    self.programs.append(
      Program(
        name,
        "score",
        function,
        (*lead, *block, *more),
        holds,
        -(-self.rows // rows),
        self.count.forward(rows, width, heads),
        keywords=keywords,
      )
    )

  def _block(self) -> int:
    """Rows of a block, as `rollouts._start` takes them."""
    return self._of_all(self.own_rows, self.method.max_tokens, self.width, even=True)

  def _of_all(self, rows: int, max_tokens: int, width: int, even: bool) -> int:
    """Rows of a block of all hosts, of which each gives as many of its own."""
    of, shards = self.share.of, self.own_shards
    size = min(rows, max(1, max_tokens // of // width))
    if even:
      size = -(-rows // -(-rows // size))
    return -(-size // shards) * shards * of

  def _logp(self, name, holds, weights, lora) -> None:
    rows = self._block()
    more = self.shapes.rows(rows), scalar(self.mesh, jnp.float32)
    lead, heads = (self.model, weights, lora), self.columns
    self._score(
      name, holds, rollouts._logp_block, lead, rows, self.width, heads, more,
      columns=self.columns,
    )  # fmt: skip

  def _values(self, state, base, own) -> tuple | None:
    """Scores of the value model; (model, state) of a separate one."""
    run, method, shapes = self.run, self.method, self.shapes
    trained = None
    if method.value == "shared":
      model, _ = shapes.scalar_model(self.model, self.given)
      trunk = dict(state.params.get("policy", base))
      trunk.pop("head", None)
      holds = own
      params = {"trunk": trunk, "head": state.params["head"]}
    else:
      given = self.given if not run.value else jnp.float32
      model = self._other(run.value)
      model, params = shapes.scalar_model(model, given)
      if run.value:
        self.residents["given value"] = chip_bytes(params)
      trained = model, shapes.state(params, method.value_optimizer)
      params, holds = trained[1].params, ("value",)
      self._state("value", trained[1])
    rows = self._block()
    self._score(
      "values", holds, rollouts._value_block, (model, params), rows, self.width, 0,
      (shapes.rows(rows),), columns=self.columns,
    )  # fmt: skip
    return trained

  def _other(self, path: str) -> Decoder:
    """The decoder of a model at a path; where nothing is there yet, as the policy."""
    config = _architecture_at(path) or self.config
    return self.model.clone(config=config, lora_scale=1.0)

  def _rewards(self) -> None:
    """A learned reward, on rows as they were sampled; see `rewards.learned`."""
    choice = self.run.reward
    # `load_scalar` gives float32, weights and computation.
    model = self._other(choice.model).clone(dtype=jnp.dtype(jnp.float32), remat="none")
    model, params = self.shapes.scalar_model(model, jnp.float32)
    self.residents["reward model"] = chip_bytes(params)
    every = choice.kind == "orm_dense"
    jitted = learned._jit_token_values if every else learned._jit_last_value
    width = bucket(self.wide + self.capacity)
    rows = self._of_all(bucket(self.own_rows, 1), _REWARD_TOKENS, width, even=False)
    self._score("rewards", ("reward model",), jitted, (model, params), rows, width, 0)

  def _batch(self, *names: str, **there: bool) -> rollouts.RLBatch:
    """A minibatch, with the optional fields that are named."""
    rows, row = self.rows // self.method.minibatches, self.shapes.rows
    real: Shape = row(rows, self.columns, dtype=jnp.float32)
    return rollouts.RLBatch(
      tokens=row(rows, self.width),
      mask=row(rows, self.width, dtype=jnp.bool_),
      start=row(rows),
      loss_mask=row(rows, self.columns, dtype=jnp.bool_),
      old_logp=real,
      advantage=real,
      **dict.fromkeys(names, real),
      **{name: real for name, is_there in there.items() if is_there},
    )

  def _value_step(self, model, state) -> None:
    method = self.method
    loss = ppo._static_loss(method)
    step = ppo.make_value_step(
      model, loss, method.value_optimizer, method.micro_batches
    )
    batch = self._batch("returns", "old_value")
    holds = ("value", "Adam of value")
    self._update("value step", holds, step, (state, batch), 0)

  def _update(self, name, holds, step, arguments, heads, trained: int = 1) -> None:
    method = self.method
    rows = self.rows // method.minibatches
    # Backward: gradients of activations and, unless frozen, of weights.
    flops = (2 + trained) * self.count.forward(rows, self.width, heads)
    runs = method.epochs * method.minibatches
    self.programs.append(Program(name, "update", step, arguments, holds, runs, flops))


def name_of(run: Run) -> str:
  """ "ppo", "grpo" or "sft"."""
  return next(name for name, cls in RUNS.items() if type(run) is cls)


def knobs(run: Run, plan: Plan, mesh: Mesh) -> dict[str, Any]:
  """Settings that change memory and speed, but no result; what a run would choose."""
  names = ("micro_batches", "remat", "max_rows", "max_tokens")
  method = getattr(run, name_of(run))
  found = {name: getattr(method, name) for name in names if hasattr(method, name)}
  if not found["micro_batches"]:
    dtype = jnp.dtype(method.compute_dtype)
    model = Decoder(architecture(run.model), dtype=dtype, mesh=mesh, remat=method.remat)
    found["micro_batches"] = parts.micro_batches(
      plan.rows, plan.width, model, parts.device_memory(mesh)
    )
  return found

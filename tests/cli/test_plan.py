"""`rlft plan`: the shapes are a run's, the counts are a hand's, mistakes are named."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from rlft.algorithms import ppo, sft
from rlft.cli import compiling, planning, reports, rl, runs, searching
from rlft.cli import config as configs
from rlft.cli.estimates import CHIPS, GIB, Counter, roofline
from rlft.cli.main import main
from rlft.core import costs
from rlft.core.errors import CheckpointError, ConfigError
from rlft.core.mesh import make_mesh
from rlft.core.types import Example, Reward
from rlft.models.decoder import DecoderConfig, param_shapes
from rlft.models.lora import LoRAConfig
from rlft.sampling import decode as device
from rlft.tasks import arithmetic
from rlft.training import rollouts

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = DecoderConfig(
  vocab_size=512,
  width=32,
  layers=3,
  heads=4,
  kv_heads=2,
  head_dim=16,
  mlp_width=64,
  max_positions=256,
  tie_embeddings=False,
)


def tiny_ppo(**changes) -> planning.PPORun:
  settings = {
    "iterations": 1,
    "prompts_per_iteration": 16,
    "samples_per_prompt": 2,
    "max_new_tokens": 16,
    "epochs": 1,
    "minibatches": 2,
    "micro_batches": 2,
    "max_rows": 16,
    "max_tokens": 256,
    "old_logp": "recompute",
  }
  return planning.PPORun(
    model=runs.ModelConfig(decoder=TINY),
    mesh=runs.MeshConfig(data=2, fsdp=2, tensor=2),
    ppo=ppo.PPOConfig(**settings | changes),
  )


def plan_here(run, prompt=16):
  """A plan for the virtual devices of this machine."""
  mesh = make_mesh(run.mesh.data, run.mesh.fsdp, run.mesh.tensor)
  return planning.make_plan(run, mesh, prompt)


def named(plan, name):
  return next(one for one in plan.programs if one.name == name)


# ------------------------------------------------------------- the shapes are a run's


def shapes_of(tree):
  """Shape, dtype and (on the mesh) layout of every array."""

  def one(x):
    if not hasattr(x, "shape"):  # a model, or nothing
      return x
    home = getattr(x, "sharding", None)
    spec = home.spec if isinstance(home, jax.sharding.NamedSharding) else None
    return x.shape, x.dtype.name, spec

  return jax.tree.map(one, tree, is_leaf=lambda x: x is None)


class Recorder:
  """A jitted function that remembers what it was first called with."""

  def __init__(self, function):
    self.function, self.arguments, self.keywords = function, None, None

  def __call__(self, *arguments, **keywords):
    if self.arguments is None:
      self.arguments, self.keywords = shapes_of(arguments), keywords
    return self.function(*arguments, **keywords)


@pytest.mark.slow
def test_programs_are_called_with_the_shapes_of_a_run(monkeypatch):
  """PPO for one iteration: every program of the plan, argument by argument."""
  seen = {}

  def watch(module, name, key):
    seen[key] = Recorder(getattr(module, name))
    monkeypatch.setattr(module, name, seen[key])

  watch(device, "jit_insert", "prefill")
  watch(device, "jit_decode", "decode")
  watch(rollouts, "_logp_block", "policy logp")
  watch(rollouts, "_value_block", "values")
  for maker, key in (
    ("make_policy_step", "policy step"),
    ("make_value_step", "value step"),
  ):
    make = getattr(ppo, maker)

    def recorded(*arguments, make=make, key=key):
      return seen.setdefault(key, Recorder(make(*arguments)))

    monkeypatch.setattr(ppo, maker, recorded)

  run = tiny_ppo()
  policy = runs.make_policy(run.model, run.mesh)
  text = arithmetic.generate("train", 1)[0].prompt
  prompt = len(policy.tokenizer([text])["input_ids"][0])
  examples = [Example(i, text, "", "") for i in range(16)]
  judge = lambda rollout, _: Reward(
    value=jnp.arange(32.0), judged=jnp.ones(32, bool), counts={}
  )
  monkeypatch.setattr(rollouts, "rollout_metrics", lambda *_: {})
  ppo.run(policy, examples, judge, run.ppo)

  monkeypatch.undo()
  plan = plan_here(run, prompt)
  for name in ("policy logp", "values", "value step", "policy step"):
    program = named(plan, name)
    assert shapes_of(program.arguments) == seen[name].arguments, name
    assert dict(program.keywords) == seen[name].keywords, name
  for name in ("prefill", "decode"):
    # Weights and caches are unstacked on a CPU, and only there.
    planned, real = shapes_of(named(plan, name).arguments), seen[name].arguments
    assert planned[3:] == real[3:], name
    state, held = planned[2], real[2]
    assert state.replace(cache=None) == held.replace(cache=None), name
    assert state.cache.cursor_B == held.cache.cursor_B
    each = [(shape[1:], kind) for shape, kind, _ in (state.cache.k,)]
    assert each * TINY.layers == [(shape, kind) for shape, kind, _ in held.cache.k]


def test_a_plan_shows_the_micro_batches_that_its_programs_and_a_run_choose():
  method = sft.SFTConfig(batch_size=32, max_length=128)
  run = planning.SFTRun(model=runs.ModelConfig(decoder=TINY), sft=method)
  mesh = make_mesh(devices=jax.devices()[:1])
  plan = planning.make_plan(run, mesh, 0)
  assert planning.knobs(run, plan, mesh)["micro_batches"] == 4
  (program,) = plan.programs
  assert "tensor<4x8x128xi32>" in program.lower().as_text()


# -------------------------------------------------------------- the counts are a hand's


def tiny_sft(remat: str) -> planning.SFTRun:
  method = sft.SFTConfig(batch_size=8, micro_batches=2, max_length=32, remat=remat)
  return planning.SFTRun(model=runs.ModelConfig(decoder=TINY), sft=method)


@pytest.mark.parametrize(
  ("remat", "linear", "attention"),
  [pytest.param("none", 3, 3, marks=pytest.mark.slow), ("dots", 3, 4)],
)
def test_the_train_step_does_what_a_hand_counts(remat, linear, attention):
  """In a loop over micro-batches and, with remat, one over layers in it.

  The head is always made again for the backward pass.
  """
  mesh = make_mesh(devices=jax.devices()[:1])
  plan = planning.make_plan(tiny_sft(remat), mesh, 0)
  (program,) = plan.programs
  text = program.lower().compile().as_text()
  tokens, width, heads = 8 * 32, 32, 64
  weights = 3 * (32 * 64 + 2 * 32 * 32 + 64 * 32 + 3 * 32 * 64)
  by_hand = linear * 2 * tokens * weights
  by_hand += attention * 4 * 3 * heads * width * tokens
  head = 2 * tokens * 32 * 512
  assert costs.count(text, mesh.shape).flops == by_hand + 4 * head
  assert program.model_flops == 3 * (
    2 * tokens * weights + 4 * 3 * heads * width * tokens + head
  )
  assert text.count("while(") >= (1 if remat == "none" else 2)


def test_weights_are_counted_whole():
  count = runs.weight_count(TINY)
  norms = (2 * TINY.layers + 1) * TINY.width
  assert Counter(TINY).weights == count - norms - 2 * 512 * 32


def test_residents_are_all_models():
  """Policy and value with moments, reference, reward model and the rollout's copy."""
  run = tiny_ppo(compute_dtype="bfloat16")
  run = dataclasses.replace(
    run, reward=rl.RewardChoice(kind="reward_model", model="not/there")
  )
  weights = sum(x.size for x in jax.tree.leaves(param_shapes(planning.Decoder(TINY))))
  found = plan_here(run).residents
  close = lambda name, expected: found[name] == pytest.approx(expected, rel=0.03)
  head = 512 * 32
  assert close("policy", 4 * weights / 4)  # fsdp x tensor; data has copies
  assert close("Adam of policy", 8 * weights / 4)
  assert close("reference", 4 * weights / 4)
  assert close("rollout copy", 2 * weights / 2)
  assert close("value", 4 * (weights - head) / 4)
  assert close("Adam of value", 8 * (weights - head) / 4)
  assert close("reward model", 4 * (weights - head) / 4)
  assert len(found) == 7


def test_lora_shares_its_base_with_the_reference():
  found = plan_here(tiny_ppo(lora=LoRAConfig(rank=2))).residents
  assert found["policy"] < found["reference"] / 2
  assert "merged policy" in found


def test_rooflines():
  chip = CHIPS["v5e"]
  work = costs.Cost(flops=197e12, hbm_bytes=819e9 / 2)
  work.collectives["all-gather", "fsdp"] = 50e9
  work.collectives["all-reduce", "tensor"] = 100e9
  mesh = {"data": 4, "fsdp": 2, "tensor": 2}
  found = roofline(chip, work, mesh, 1)
  assert found.compute == 1 and found.hbm == 0.5
  assert found.network == pytest.approx(1.5)  # half of 200 GB/s for each axis
  assert found.bound == "network" and found.seconds == found.network
  work.collectives["all-reduce", "data"] = 10e9
  one, two = (roofline(chip, work, mesh, n).network - 1.5 for n in (1, 2))
  assert one == pytest.approx(0.1)
  assert two == pytest.approx(10e9 * 2 / 4 / (25e9 / 8))  # between slices


# ------------------------------------------------------------------- mistakes are named


@pytest.mark.parametrize(
  ("topology", "message"),
  [
    ("v9:4x4", "give a chip of"),
    ("v5e", "the shape of a slice"),
    ("v5e:4x", "the shape of a slice"),
  ],
)
def test_topologies_that_are_none(topology, message):
  with pytest.raises(ConfigError, match=message):
    compiling.target(topology)


def test_no_compiler(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ConfigError, match=r"pip install \"rlft\[plan\]\""):
    compiling.target("v5e:4x4")


@pytest.mark.parametrize(
  ("run", "prompt", "message"),
  [
    (tiny_ppo(minibatches=3), 16, "must be a multiple of"),
    (tiny_ppo(), 250, "256 positions"),
    (
      dataclasses.replace(tiny_ppo(), model=runs.ModelConfig(path="no/model")),
      16,
      "model.decoder",
    ),
    (
      dataclasses.replace(
        tiny_ppo(),
        model=runs.ModelConfig(decoder=dataclasses.replace(TINY, vocab_size=0)),
      ),
      16,
      "a plan needs the number",
    ),
  ],
)
def test_runs_that_cannot_be(run, prompt, message):
  with pytest.raises(ConfigError, match=message):
    plan_here(run, prompt)


def test_the_architecture_of_an_adapter_is_its_base_s(tmp_path):
  for base in ("mini", "owner/gone"):
    about = {"peft_type": "LORA", "base_model_name_or_path": base}
    (tmp_path / "adapter_config.json").write_text(json.dumps(about))
    model = runs.ModelConfig(path=str(tmp_path))
    match = (
      "no adapter_model.saf" if base == "mini" else "adapter, and its base 'owner/g"
    )
    with pytest.raises((CheckpointError, ConfigError), match=match):
      planning.architecture(model)
  golden = Path(__file__).parents[1] / "golden" / "peft" / "llama_added"
  assert planning.architecture(runs.ModelConfig(path=str(golden))).vocab_size == 74


def test_command_line_mistakes(capsys, tmp_path):
  file = tmp_path / "config.py"
  file.write_text("from ml_collections import ConfigDict\nget_config = ConfigDict\n")
  line = ["plan", f"--config={file}", "--topology=v5e:4x4"]
  assert main([*line, "--slices=0"]) == 2
  assert "--slices=0: at least 1" in capsys.readouterr().err
  assert main(line) == 2
  assert "a plan is of one of these algorithms" in capsys.readouterr().err


# -------------------------------------------------------------------------- the verdict


def measured(name, phase, peak, residents=0.0):
  return compiling.Measured(name, phase, 1, 1, arguments=peak, others=residents)


def report_of(*programs, residents, mesh=(2, 2, 2), **settings):
  knobs = {"micro_batches": 1, "remat": "full", "max_rows": 64, "max_tokens": 4096}
  return compiling.Report(
    dict(zip(("data", "fsdp", "tensor"), mesh)),
    knobs | settings,
    {name: size * GIB for name, size in residents.items()},
    programs,
    16 * GIB,
    1000,
  )


@pytest.mark.parametrize(
  ("name", "phase", "peak", "residents", "settings", "message"),
  [
    ("step", "update", 12, {"policy": 5}, {}, "FITS with 4.00 GiB"),
    ("step", "update", 20, {"policy": 15}, {}, "by 4.00.*mesh.fsdp up"),
    ("step", "update", 20, {"policy": 15}, {"mesh": (1, 4, 2)}, "more chips"),
    ("step", "update", 20, {"policy": 5}, {}, "micro_batches=1 up"),
    ("step", "update", 20, {"policy": 5}, {"remat": "none"}, "remat=none to full"),
    ("decode", "rollout", 20, {"policy": 5}, {}, "max_rows=64 down"),
    ("values", "score", 20, {"policy": 5}, {}, "max_tokens=4096 down"),
    ("decode", "rollout", 20, {"rollout copy": 12}, {}, "mesh.tensor up"),
  ],
)
def test_verdicts(name, phase, peak, residents, settings, message):
  small = measured("small", "update", GIB)
  worst = measured(name, phase, peak * GIB)
  said = reports.verdict(report_of(small, worst, residents=residents, **settings))
  assert re.search(message, said), said
  assert name in said


# --------------------------------------------------------------------------- the search


def fake_target(chip="v5e"):
  return compiling.Target(f"{chip}:2x1", 1, CHIPS[chip], jax.devices()[:2])


def test_meshes():
  found = list(searching.meshes(16, 2))
  assert all(a * b * c == 16 and a % 2 == 0 for a, b, c in found)
  assert len(set(found)) == len(found) == 10


def test_the_estimate_moves_with_every_knob():
  size = functools.partial(
    searching.step_bytes, mesh=(1, 8, 4), rows=4, width=1024, size=2, micro_batches=2
  )
  llama = configs.load(str(CONFIGS / "plan_7b_ppo.py")).model.decoder
  config = DecoderConfig(**llama)
  none, dots, full = (size(config, remat=x) for x in ("none", "dots", "full"))
  assert none > 1.5 * dots > 1.5 * full
  assert size(config, remat="dots", rows=2) < 0.7 * dots
  assert size(config, remat="dots", mesh=(1, 8, 8)) < dots


def test_ranking_puts_what_fits_first():
  found = searching.rank(tiny_ppo(), fake_target(), 16)
  assert len(found) == 39 and all(one.bytes < 16 * GIB for one in found)
  seconds = [one.seconds for one in found]
  assert seconds == sorted(seconds)
  narrow = dataclasses.replace(fake_target().chip, hbm=found[0].bytes * 0.9)
  target = dataclasses.replace(fake_target(), chip=narrow)
  again = searching.rank(tiny_ppo(), target, 16)
  fits = [one.bytes * searching.MARGIN <= narrow.hbm for one in again]
  assert fits == sorted(fits, reverse=True)


# ------------------------------------------------------------------- the real compiler


@functools.cache
def tpu(topology):
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("no libtpu: rlft plan was NOT checked (pip install rlft[plan])")
  try:
    return compiling.target(topology)
  except ConfigError as error:  # held by another process
    pytest.skip(f"libtpu gives no topology, rlft plan was NOT checked: {error}")


@pytest.mark.slow
def test_a_plan_for_v5e(tmp_path, capsys):
  """A small PPO on 16 chips: every program compiles, and the numbers hang together."""
  wide = dataclasses.replace(
    TINY, width=512, heads=8, kv_heads=8, head_dim=64, mlp_width=1024, vocab_size=4096
  )
  run = dataclasses.replace(
    tiny_ppo(
      prompts_per_iteration=64, max_rows=64, minibatches=1, micro_batches=1,
      compute_dtype="bfloat16", remat="dots", max_new_tokens=128,
    ),
    model=runs.ModelConfig(decoder=wide),
    mesh=runs.MeshConfig(data=2, fsdp=4, tensor=2),
  )  # fmt: skip
  report = compiling.compile_plan(run, tpu("v5e:4x4"), 128, cache=tmp_path)
  names = [one.name for one in report.programs]
  assert names == [
    "rollout copy", "prefill", "decode", "policy logp", "reference logp", "values",
    "value step", "policy step",
  ]  # fmt: skip
  assert report.complete and report.fits
  by_name = {one.name: one for one in report.programs}
  for name in ("prefill", "policy logp", "reference logp", "values"):
    one = by_name[name]
    assert one.flops == pytest.approx(one.model_flops / 16, rel=0.02), name
  step = by_name["policy step"]
  assert 1 <= step.flops / (step.model_flops / 16) < 1.35
  decode = by_name["decode"]
  assert decode.turns == 128 and decode.per_turn is not None
  # No weight crosses the network for a token: only activations of its rows do.
  layer = 2 * 512 * 1024 / 2
  assert decode.per_turn[2] < layer
  together = sum(report.residents.values())
  assert all(one.peak >= together for one in report.programs)
  again = compiling.compile_plan(run, tpu("v5e:4x4"), 128, cache=tmp_path)
  assert again == report  # from the cache, seconds included
  reports.print_report(report, tpu("v5e:4x4"))
  assert "verdict: FITS" in capsys.readouterr().out


@pytest.mark.slow
def test_what_the_compiler_refuses_is_a_verdict(tmp_path, capsys):
  """The command: the step needs more than a chip has, and one says how much."""
  file = tmp_path / "config.py"
  shapes = dataclasses.asdict(dataclasses.replace(TINY, width=8192, mlp_width=65536))
  file.write_text(
    "from ml_collections import ConfigDict\n"
    f"get_config = lambda: ConfigDict(dict(model=dict(decoder={shapes!r}),"
    "sft=dict(batch_size=16, max_length=256)))\n"
  )
  tpu("v5e:4x4")
  out = tmp_path / "plan.json"
  line = ["plan", f"--config={file}", "--topology=v5e:4x4", "--cache=", f"--json={out}"]
  assert main(line) == 1
  assert "DOES NOT FIT" in capsys.readouterr().out
  assert json.loads(out.read_text())["programs"][0]["needs"] > 16 * 2**30

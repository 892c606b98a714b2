"""Numbers of a plan that need no compiler: chips, model FLOPs, rooflines, memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from rlft.core.costs import Cost
from rlft.models.decoder import DecoderConfig
from rlft.training.parts import MEMORY

GIB = 2.0**30


class Counter:
  """FLOPs of a decoder's matrix products, by hand; 2 for a multiply-add.

  forward = tokens * (2 N + 4 L H T) + 2 E V * tokens that the head reads

  N counts the weights of the layers' matrices, H heads * head_dim. Attention counts all
  T x T pairs, causal or not, as PaLM (arXiv 2204.02311, appendix B) does. A training
  step is three times that: 6 N a token.
  """

  def __init__(self, config: DecoderConfig):
    self.config = config
    heads = config.heads * config.head_dim
    keys = config.kv_heads * config.head_dim
    attention = config.width * (2 * heads + 2 * keys)
    mlp = (3 if config.gated_mlp else 2) * config.width * config.mlp_width
    self.weights = config.layers * (attention + mlp)
    if config.embed_width:
      self.weights += 2 * config.width * config.embed_width
    self.pair = 4 * config.layers * heads
    self.head = 2 * config.output_width * config.vocab_size

  def forward(self, rows: int, width: int, heads: int) -> float:
    """Of rows of `width` tokens, of which the head reads `heads`."""
    tokens = rows * width
    inner = tokens * (2 * self.weights + self.pair * width)
    return float(inner + rows * heads * self.head)

  def token(self, rows: int, context: int) -> float:
    """Of one decoded token of each row, attending to `context` places."""
    return float(rows * (2 * self.weights + self.pair * context + self.head))


@dataclasses.dataclass(frozen=True)
class Chip:
  """What a chip can do.

  Attributes:
    flops: bfloat16 peak, a second.
    hbm: bytes that a program may use, which the compiler names when they are exceeded
      (libtpu 0.0.52); the chips have 16, 95 and 32 GB.
    hbm_bytes: a second, to and from HBM.
    ici_bytes: a second that a chip can send over all of its links to other chips.
    torus: dimensions of the network between chips.
    dcn_bytes: a second and chip between slices.

  Source: the tables of Google's pages on the three chips
  (https://docs.cloud.google.com/tpu/docs/v5e, .../v5p, .../v6e). They name the
  bandwidth of links in both directions; a chip sends half of it.
  """

  name: str
  flops: float
  hbm: float
  hbm_bytes: float
  ici_bytes: float
  torus: int
  dcn_bytes: float


CHIPS = {
  chip.name: chip
  for chip in (
    Chip("v5e", 197e12, MEMORY["TPU v5 lite"], 819e9, 400e9 / 2, 2, 25e9 / 8),
    Chip("v5p", 459e12, MEMORY["TPU v5"], 2765e9, 1200e9 / 2, 3, 50e9 / 8),
    Chip("v6e", 918e12, MEMORY["TPU v6 lite"], 1638e9, 800e9 / 2, 2, 100e9 / 8),
  )
}


@dataclasses.dataclass(frozen=True)
class Roofline:
  """The least seconds that parts of a program's work take on a chip.

  Attributes:
    compute: at the peak of the matrix units.
    hbm: at the bandwidth of HBM.
    network: at the bandwidth of one dimension of the torus for each axis of the mesh,
      one axis after the other; between slices, that of the data-centre network.
  """

  compute: float
  hbm: float
  network: float

  @property
  def seconds(self) -> float:
    """All three at once: the longest."""
    return max(self.compute, self.hbm, self.network)

  @property
  def bound(self) -> str:
    """What takes the longest."""
    parts = dataclasses.asdict(self)
    return max(parts, key=parts.get)


def roofline(chip: Chip, cost: Cost, mesh: Mapping[str, int], slices: int) -> Roofline:
  """The roofline of what a chip does in a program.

  Args:
    chip: which.
    cost: of one chip.
    mesh: axis -> size.
    slices: along the axis "data".
  """
  network = 0.0
  for axis, sent in cost.by_axis().items():
    seconds = sent / (chip.ici_bytes / chip.torus)
    if slices > 1 and "data" in axis.split("+"):
      # A hierarchy: inside a slice all is reduced, and a chip carries its share on.
      seconds = max(seconds, sent * slices / mesh["data"] / chip.dcn_bytes)
    network += seconds
  return Roofline(cost.flops / chip.flops, cost.hbm_bytes / chip.hbm_bytes, network)

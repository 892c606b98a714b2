"""In how many parts an update is taken: by hand, and the update stays what it was."""

from __future__ import annotations

import types

import jax
import numpy as np
import pytest

from rlft.algorithms import sft
from rlft.core.mesh import make_mesh
from rlft.models.decoder import Decoder, DecoderConfig, init_params
from rlft.training import parts
from rlft.training.data import TrainBatch
from rlft.training.optimizer import OptimizerConfig
from rlft.training.step import init_state

SIZES = {"vocab_size": 32, "width": 16, "layers": 2, "heads": 2, "kv_heads": 2}
SIZES |= {"head_dim": 8, "mlp_width": 32, "max_positions": 1024}
MODEL = Decoder(DecoderConfig(**SIZES))


@pytest.mark.parametrize(
  ("rows", "width", "chosen"),
  [
    (32, 192, 8),  # 4 rows of 192 are 768 tokens, 8 are too many
    (32, 32, 1),  # 1,024 tokens
    (33, 32, 3),  # 11 rows: a divisor
    (7, 512, 7),  # of a prime number of rows
    (4, 4096, 4),  # one row is more than there should be
    (1, 16, 1),
  ],
)
def test_on_a_cpu_a_part_stays_near_the_caches(rows, width, chosen):
  assert parts.micro_batches(rows, width, MODEL, None) == chosen


def test_rows_of_a_shard_count():
  on_mesh = MODEL.clone(mesh=make_mesh(2, 2, 2))
  assert parts.micro_batches(32, 192, on_mesh, None) == 2  # of 8 rows


def test_on_an_accelerator_the_fewest_that_leave_room():
  # Remat keeps T x D x 4 bytes of a row and layer: 2 layers x 512 x 16 x 4 = 64 KiB.
  full = MODEL.clone(remat="full")
  room = lambda rows: rows * 2**16 / parts.SHARE
  assert parts.micro_batches(64, 512, full, room(64)) == 1
  assert parts.micro_batches(64, 512, full, room(64) - 1) == 2
  assert parts.micro_batches(64, 512, full, room(9)) == 8
  assert parts.micro_batches(64, 512, full, 1.0) == 64
  half = full.clone(dtype=jax.numpy.bfloat16)
  assert parts.micro_batches(64, 512, half, room(32)) == 1
  plain = parts.micro_batches(64, 512, MODEL, room(256))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(parts.attention, "kernel_fits", lambda *shape: True)
    assert parts.micro_batches(64, 512, MODEL, room(256)) < plain, "no scores are kept"
  more = [parts.micro_batches(64, 512, MODEL, n * room(8)) for n in (1, 8, 64)]
  assert more == sorted(more, reverse=True) and more[0] > 8, "without remat it is more"


def test_memory_is_the_same_at_every_start_and_on_all_hosts(monkeypatch):
  assert parts.device_memory(None) is parts.device_memory(make_mesh(8, 1, 1)) is None

  def memory_of(kind, stats, others=()):
    one = types.SimpleNamespace(
      platform="gpu", device_kind=kind, memory_stats=lambda: stats
    )
    monkeypatch.setattr(jax, "devices", lambda: [one])
    monkeypatch.setattr(jax, "local_devices", lambda backend: [one])
    monkeypatch.setattr(parts.hosts, "everyone", lambda mine: [mine, *others])
    return parts.device_memory(None)

  gib = 2**30
  assert memory_of("TPU v5 lite", {"bytes_limit": 5}) == 15.75 * gib
  assert memory_of("H200", {"bytes_limit": int(7.3 * gib)}) == 7 * gib
  assert memory_of("H200", {"bytes_limit": int(7.9 * gib)}) == 7 * gib
  assert memory_of("H200", {"bytes_limit": 9 * gib}, [8.5 * gib]) == 8 * gib
  assert memory_of("H200", None) == 16 * gib


def test_what_is_chosen_is_what_would_be_set_and_changes_no_number():
  source = np.random.default_rng(0)
  batch = TrainBatch(
    source.integers(0, 32, (8, 256)).astype(np.int32),
    np.arange(256) < source.integers(2, 257, (8, 1)),
    np.ones((8, 256), np.float32),
  )
  params = init_params(MODEL, jax.random.key(0))
  found = {}
  for count in (0, 1, 2):
    step = sft.make_train_step(MODEL, OptimizerConfig(), count)
    found[count] = jax.device_get(step(init_state(params, OptimizerConfig(), 9), batch))
  assert parts.micro_batches(8, 256, MODEL, None) == 2
  for a, b in zip(jax.tree.leaves(found[0]), jax.tree.leaves(found[2])):
    np.testing.assert_array_equal(a, b)
  for a, b in zip(jax.tree.leaves(found[0][1]), jax.tree.leaves(found[1][1])):
    np.testing.assert_allclose(a, b, rtol=1e-6)
  with pytest.raises(sft.ConfigError, match="micro_batches=-1"):
    sft.SFTConfig(micro_batches=-1)

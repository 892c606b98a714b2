"""The TPU's attention kernel against plain products, interpreted on the CPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlft.core.mesh import make_mesh
from rlft.models import attention

B, T, N, G, H = 2, 256, 2, 2, 128


@pytest.fixture(scope="module")
def arrays():
  keys = jax.random.split(jax.random.key(0), 4)
  q = jax.random.normal(keys[0], (B, T, N, G, H))
  k, v = (jax.random.normal(key, (B, N, T, H)) for key in keys[1:3])
  mask = np.ones((B, T), bool)
  mask[0, :37] = False  # padding on the left, as prompts have it
  mask[1, 200:] = False  # and on the right
  # What stands under a pad means nothing: it gets no weight in the sum.
  weight = jax.random.normal(keys[3], q.shape) * mask[:, :, None, None, None]
  return (q, k, v), mask, weight


@pytest.mark.parametrize(("softcap", "sizes"), [(0.0, None), (30.0, (2, 1, 2))])
def test_kernel_and_plain_agree(arrays, softcap, sizes):
  qkv, mask, weight = arrays
  mesh = make_mesh(*sizes, jax.devices()[:4]) if sizes else None
  causal = jnp.asarray(mask[:, None, :] & np.tril(np.ones((T, T), bool)))
  settings = H**-0.5, softcap

  def both(*qkv):
    plain = attention.plain(*qkv, causal, *settings)
    kernel = attention.kernel(*qkv, jnp.asarray(mask), *settings, mesh, interpret=True)
    return plain, kernel

  def sums(*qkv):
    return [(out * weight).sum() for out in both(*qkv)]

  plain, kernel = jax.jit(both)(*qkv)
  real = mask[:, :, None, None, None]
  np.testing.assert_allclose(jnp.where(real, kernel - plain, 0), 0, atol=2e-6)
  grads = [
    jax.jit(jax.grad(lambda *qkv, i=i: sums(*qkv)[i], (0, 1, 2)))(*qkv) for i in (0, 1)
  ]
  for wanted, found in zip(*grads):
    np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_a_cpu_keeps_plain_products():
  assert not attention.kernel_fits(None, 8, 256, 8, 128)
  assert not attention.kernel_fits(make_mesh(8), 8, 256, 8, 128)


@pytest.mark.parametrize(
  ("sizes", "shape", "fits"),
  [
    ((4, 1, 2), (8, 256, 8, 128), True),
    ((4, 1, 2), (8, 192, 8, 128), False),  # tokens are no whole tiles
    ((4, 1, 2), (8, 256, 8, 64), False),  # a head is half a lane
    ((4, 1, 2), (6, 256, 8, 128), False),  # rows are not shared equally
    ((1, 1, 8), (8, 256, 4, 128), False),  # heads neither
  ],
)
def test_where_the_kernel_fits_on_a_tpu(sizes, shape, fits):
  from unittest import mock

  mesh = make_mesh(*sizes)
  chips = np.full(mesh.devices.shape, mock.Mock(platform="tpu"), object)
  tpu = mock.Mock(devices=chips, shape=mesh.shape)
  assert attention.kernel_fits(tpu, *shape) is fits

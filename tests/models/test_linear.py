"""The matrix product of the house: the usual gradients, in any shape and dtype."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlft.models.linear import matmul


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_are_those_of_the_plain_product(shape, dtype):
  source = np.random.default_rng(0)
  x = jnp.asarray(source.normal(size=shape), dtype)
  kernel = jnp.asarray(source.normal(size=(5, 7)), dtype)
  weight = jnp.asarray(source.normal(size=(*shape[:-1], 7)), dtype)

  def pull(product):
    y, back = jax.vjp(product, x, kernel)
    return y, *back(weight)

  for ours, plain in zip(pull(matmul), pull(jnp.matmul)):
    assert ours.dtype == plain.dtype == dtype and ours.shape == plain.shape
    tolerance = 1e-6 if dtype == jnp.float32 else 4e-2
    np.testing.assert_allclose(
      ours.astype(np.float32), plain.astype(np.float32), rtol=tolerance, atol=tolerance
    )


@pytest.mark.usefixtures("optimized")
def test_nothing_is_chosen_at_run_time():
  """The compiled program holds the product of its platform, and no branch."""
  loss = lambda kernel, x: jnp.sum(matmul(x, kernel) ** 2)
  args = jnp.ones((5, 7)), jnp.ones((3, 5))
  text = jax.jit(jax.grad(loss)).lower(*args).compile().as_text()
  assert "conditional" not in text and text.count(" dot(") == 2

"""C16: after the first, compiled step every transfer to a device is asked for.

On CPU jax's guard sees what goes to a device (numpy arrays and Python numbers that a
program takes in). What comes back is not seen there: it is read in place.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest

from rlft.algorithms import grpo, ppo, sft
from rlft.core.types import Example

PROMPT = [Example(0, "a", "", "")]


@pytest.fixture
def forbid():
  yield lambda *_: jax.config.update("jax_transfer_guard", "disallow")
  jax.config.update("jax_transfer_guard", "allow")


def test_the_guard_sees_what_it_is_for(forbid):
  double, x = jax.jit(lambda x: 2 * x), np.ones(3, np.float32)
  double(x)
  forbid()
  with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device"):
    double(x)
  with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device"):
    double(double(jax.device_put(x)) * np.float32(3))
  assert np.asarray(double(jax.device_put(x))).sum() == 6


@pytest.mark.parametrize(
  "where", ["tiny", pytest.param("spread", marks=pytest.mark.slow)]
)
def test_supervised_updates(where, request, forbid):
  policy, seen = request.getfixturevalue(where), []

  def on_step(update, of, metrics):
    seen.append(update)
    forbid()

  config = sft.SFTConfig(batch_size=8, epochs=4)
  sft.train(policy, [("a", "ab")] * 8, config, on_step)
  assert seen == [1, 2, 3, 4]


@pytest.mark.parametrize(
  "where", ["tiny", pytest.param("spread", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("module", [ppo, pytest.param(grpo, marks=pytest.mark.slow)])
def test_iterations(module, where, request, toy, forbid):
  kind = {ppo: ppo.PPOConfig, grpo: grpo.GRPOConfig}[module]
  settings = {"loss": grpo.GRPOLoss(kl_coef=0.1)} if module is grpo else {}
  config = kind(
    iterations=3, prompts_per_iteration=1, samples_per_prompt=16, max_new_tokens=3,
    epochs=1, minibatches=2, max_rows=16, old_logp="recompute", **settings,
  )  # fmt: skip
  seen = []

  def on_event(what, values):
    if what == "iteration":
      seen.append(values["update/skipped"])
      forbid()

  policy = request.getfixturevalue(where)
  module.run(policy, PROMPT, toy.paying(len), config, on_event=on_event)
  assert seen == [0, 0, 0]

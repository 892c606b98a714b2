"""The policy that is being trained: all its weights, or adapters over a frozen base."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from rlft.core import rng
from rlft.models.hub import Policy
from rlft.models.lora import LoRAConfig, init_lora, merge_lora
from rlft.training.optimizer import Optimizer
from rlft.training.step import TrainState, init_state


class Trainee:
  """Holds a policy's train state, and gives the policy in the forms that others need.

  `state.params` is {"policy": ...}, or {"lora": ...} over `base`; a value head on the
  same trunk lies beside it as "head".

  Attributes:
    start: the policy as it began, with the model that trains (dtype, remat, LoRA's
      scale). Its weights without adapters are the reference of a LoRA run.
    base: the frozen weights under adapters; None when all weights train.
    state: see `training.step`; updates donate it.
  """

  def __init__(
    self,
    policy: Policy,
    optimizer: Optimizer,
    horizon: int,
    *,
    lora: LoRAConfig | None = None,
    head: dict | None = None,
    dtype: Any = jnp.float32,
    remat: str = "none",
    seed: int = 0,
  ):
    """Args: what to train, for how many updates, and how; `seed` is of the adapters."""
    scale = lora.scale if lora else 1.0
    model = policy.model.clone(dtype=jnp.dtype(dtype), remat=remat, lora_scale=scale)
    self.start = dataclasses.replace(policy, model=model)
    self._given = policy.model
    self.base = None
    params: dict[str, Any] = {"policy": policy.params}
    if lora is not None:
      self.base = policy.params
      key = rng.key(seed, rng.Purpose.INIT)
      params = {"lora": init_lora(model, policy.params, lora, key)}
    if head is not None:
      params["head"] = head
    self.state: TrainState = init_state(params, optimizer, horizon)

  def adapted(self) -> tuple[Policy, dict | None]:
    """The policy's weights and its adapters, apart: what a log-probability takes."""
    params = self.state.params
    weights = params.get("policy", self.base)
    return dataclasses.replace(self.start, params=weights), params.get("lora")

  def merged(self) -> Policy:
    """The policy with its adapters merged in, for sampling; gone with the next update.

    Nothing is copied that has no adapter.
    """
    policy, lora = self.adapted()
    if lora is None:
      return policy
    params = merge_lora(policy.params, lora, policy.model.lora_scale)
    return dataclasses.replace(policy, params=params)

  def export(self) -> Policy:
    """The policy as it is now, to keep: with the model that was given, as its start."""
    policy = dataclasses.replace(self.merged(), model=self._given)
    if self.base is not None:
      return policy
    return dataclasses.replace(policy, params=jax.tree.map(jnp.copy, policy.params))

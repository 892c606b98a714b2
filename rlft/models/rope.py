"""Rotary positions: frequencies, how long contexts stretch them, and the rotation.

Letters: B rows, T tokens, R rotated pairs of a head.

"dynamic" and "longrope" rotate a long text otherwise than a short one, so what they
compute depends on the length of the whole text. Here that is the number of real tokens
of the row, in training and scoring, and of its prompt, in sampling. Both are the same
computation as long as no row is sampled across a border at which the rotation changes:
`longest_sample` says how far a prompt may go, and `generate` refuses the rest.
transformers takes the longest row of a batch instead, and each token's own length while
it generates, whose log-probs no forward pass can repeat.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How rotary frequencies are stretched.

  Attributes:
    kind: "linear" divides every frequency by `factor`; "llama3" divides those with a
      wavelength beyond the original context, leaves the short ones, and blends between;
      "yarn" blends between where a frequency turns `beta_fast` and `beta_slow` times
      within the original context; "dynamic" raises the base for rows beyond the
      original context; "longrope" divides each frequency by its own factor, of one
      list up to the original context and of another one beyond.
    factor: the stretch.
    low_freq_factor, high_freq_factor: of "llama3".
    original_positions: the original context, of all but "linear".
    attention_factor: on cosine and sine, of "yarn" and "longrope".
    beta_fast, beta_slow, truncate: of "yarn"; truncate rounds the borders outwards.
    short_factors, long_factors: of "longrope", one for each frequency.
  """

  kind: Literal["linear", "llama3", "yarn", "dynamic", "longrope"]
  factor: float
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_positions: int = 8192
  attention_factor: float = 1.0
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  truncate: bool = True
  short_factors: tuple[float, ...] = ()
  long_factors: tuple[float, ...] = ()


def rotary_size(head_dim: int, fraction: float) -> int:
  """d in theta^(-2i/d); an odd share rotates one feature more, as in transformers."""
  return int(head_dim * fraction)


def rope_frequencies(
  dim: int, theta: float, scaling: RopeScaling | None
) -> list[float]:
  """Rotary angular frequencies theta^(-2i/dim), stretched; half of `dim`, rounded up.

  Those of a row within the original context, where that makes a difference.

  Source: RoFormer (arXiv 2104.09864) eq. 15; the llama3 stretch is that of the
  Llama 3.1 release; YaRN (arXiv 2309.00071) section 3.2; LongRoPE (arXiv 2402.13753).
  """
  frequencies = [theta ** (-2 * i / dim) for i in range((dim + 1) // 2)]
  if scaling is None or scaling.kind == "dynamic":
    return frequencies
  if scaling.kind == "linear":
    return [f / scaling.factor for f in frequencies]
  if scaling.kind == "longrope":
    return [f / s for f, s in zip(frequencies, scaling.short_factors, strict=True)]
  if scaling.kind == "yarn":
    return _yarn(frequencies, dim, theta, scaling)
  low = scaling.original_positions / scaling.low_freq_factor
  high = scaling.original_positions / scaling.high_freq_factor
  out = []
  for f in frequencies:
    wavelength = 2 * math.pi / f
    if wavelength < high:
      out.append(f)
    elif wavelength > low:
      out.append(f / scaling.factor)
    else:
      blend = (scaling.original_positions / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
      )
      out.append((1 - blend) * f / scaling.factor + blend * f)
  return out


def _yarn(frequencies, dim: int, theta: float, scaling: RopeScaling) -> list[float]:
  def place(turns: float) -> float:
    # The index of the frequency that turns so many times in the original context.
    cycles = scaling.original_positions / (turns * 2 * math.pi)
    return dim * math.log(cycles) / (2 * math.log(theta))

  low, high = place(scaling.beta_fast), place(scaling.beta_slow)
  if scaling.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, dim - 1)
  if low == high:
    high += 0.001
  out = []
  for i, f in enumerate(frequencies):
    stretched = min(max((i - low) / (high - low), 0), 1)
    out.append(f * (stretched / scaling.factor + 1 - stretched))
  return out


def rope_table(
  dim: int,
  theta: float,
  scaling: RopeScaling | None,
  positions_BT: jax.Array,
  lengths_B: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Cosines and sines of each token's angles.

  Args:
    dim: see `rotary_size`.
    theta: the base.
    scaling: the stretch.
    positions_BT: int32.
    lengths_B: int32, tokens of each row; see the module.

  Returns:
    (cos, sin), float32 [B, T, R].
  """
  frequency = jnp.asarray(rope_frequencies(dim, theta, scaling), jnp.float32)
  factor = 1.0
  if scaling is not None:
    factor = scaling.attention_factor
    beyond_B11 = (lengths_B > scaling.original_positions)[:, None, None]
    if scaling.kind == "longrope":
      other = dataclasses.replace(scaling, short_factors=scaling.long_factors)
      long = jnp.asarray(rope_frequencies(dim, theta, other), jnp.float32)
      frequency = jnp.where(beyond_B11, long, frequency)
    elif scaling.kind == "dynamic" and dim > 2:
      # base * s^(dim / (dim - 2)), where s is 1 within the original context.
      ratio_B11 = lengths_B.astype(jnp.float32)[:, None, None]
      ratio_B11 /= scaling.original_positions
      s_B11 = jnp.where(beyond_B11, scaling.factor * (ratio_B11 - 1) + 1, 1.0)
      power_R = -2.0 / (dim - 2) * jnp.arange(frequency.size, dtype=jnp.float32)
      frequency = frequency * s_B11**power_R
  angle_BTR = positions_BT.astype(jnp.float32)[..., None] * frequency
  return jnp.cos(angle_BTR) * factor, jnp.sin(angle_BTR) * factor


def rotate(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Rotates the first 2R features of each head; x is [B, T, heads, H]."""
  cos, sin = (t[:, :, None] for t in table)
  half = cos.shape[-1]
  x32 = x.astype(jnp.float32)
  a, b, rest = x32[..., :half], x32[..., half : 2 * half], x32[..., 2 * half :]
  out = jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)
  return out.astype(x.dtype)


def longest_sample(prompt: int, max_positions: int, scaling: RopeScaling | None) -> int:
  """How many tokens a row may have in all that is sampled after a prompt.

  Args:
    prompt: its tokens.
    max_positions: the model's.
    scaling: the model's; rows of "dynamic" end with the original context, of
      "longrope" those whose prompt lies within it.
  """
  if scaling is None or scaling.kind not in ("dynamic", "longrope"):
    return max_positions
  if scaling.kind == "longrope" and prompt > scaling.original_positions:
    return max_positions
  return min(max_positions, scaling.original_positions)

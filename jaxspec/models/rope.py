"""Rotary positions: frequencies of channel pairs, plain or scaled to long contexts.

Frequencies are those of Hugging Face transformers. Sources: RoPE (arXiv 2104.09864), YaRN
(arXiv 2309.00071), the rule of Llama 3.1's configuration.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxspec.config import RopeScaling, TargetConfig

Angles = tuple[jax.Array, jax.Array]  # cosines and sines, [..., D / 2] each


def rotary_angles(
    positions: Int[Array, "*L"], head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> Angles:
    """Float32 cosines and sines [..., D / 2] at positions [...], times the attention factor.

    Both multiply queries and keys, so that scores are multiplied by the factor's square.
    """
    turn = frequencies(head_dim, theta, scaling)
    angle = positions[..., None].astype(jnp.float32) * jnp.asarray(turn, jnp.float32)
    factor = attention_factor(scaling)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return (cos, sin) if factor == 1 else (factor * cos, factor * sin)


def layer_angles(config: TargetConfig, positions: Int[Array, "*L"]) -> tuple[Angles, ...]:
    """Angles of every layer; layers with the same frequencies share them."""
    turning = config.rotary_dim or config.head_dim
    whole = rotary_angles(positions, turning, config.rope_theta, config.rope_scaling)
    local = whole
    if config.sliding_rope_theta is not None:
        local = rotary_angles(positions, turning, config.sliding_rope_theta)
    return tuple(whole if window is None else local for window in config.layer_windows)


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Radians per position of every pair of channels, float64 [D / 2].

    With b the base, D the head dimension and s the factor, pair i turns by t_i = b^(-2 i / D):

    - linear: t_i / s.
    - yarn: t_i where it turns often within the original L positions, t_i / s where it turns
      seldom, mixed linearly in i between the pairs that turn `beta_fast` and `beta_slow` times.
    - llama3: likewise, by wavelength, from L / high_freq_factor to L / low_freq_factor; mixed
      linearly in L over the wavelength.
    """
    plain = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    if scaling is None:
        return plain
    slow = plain / scaling.factor
    if scaling.kind == "linear":
        return slow
    if scaling.kind == "yarn":
        share = _yarn_share(head_dim, theta, scaling)
        return plain * (1 - share) + slow * share
    ratio = scaling.original_positions * plain / (2 * np.pi)  # of L to the wavelength
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    if low == high:
        return np.where(ratio > high, plain, slow)
    kept = np.clip((ratio - low) / (high - low), 0, 1)
    return (1 - kept) * slow + kept * plain


def _yarn_share(head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Share of interpolation of each pair, 0 … 1, [D / 2]."""

    def pair(turns: float) -> float:  # the one that turns so often within L positions
        ratio = scaling.original_positions / (2 * math.pi * turns)
        return head_dim * math.log(ratio) / (2 * math.log(theta))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    return np.clip((np.arange(head_dim // 2) - low) / (high - low), 0, 1)


def attention_factor(scaling: RopeScaling | None) -> float:
    """Factor of cosines and sines; 1 except for YaRN."""
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def magnitude(scale: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * scale * math.log(scaling.factor) + 1

    if scaling.mscale and scaling.mscale_all_dim:
        return magnitude(scaling.mscale) / magnitude(scaling.mscale_all_dim)
    return magnitude(1.0)

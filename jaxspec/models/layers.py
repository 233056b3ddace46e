"""The pieces every layer is made of. Activations are float32; matrix products take their
operands in the weights' dtype and accumulate in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def project(spec: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """einsum of activations and a weight: operands in the weight's dtype, float32 result."""
    return jnp.einsum(spec, x.astype(weight.dtype), weight, preferred_element_type=jnp.float32)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x²) + eps) · weight over the last axis, in float32."""
    x = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return x * scale * weight.astype(jnp.float32)


def rotary_angles(
    positions: jax.Array, head_dim: int, theta: float
) -> tuple[jax.Array, jax.Array]:
    """Float32 cosines and sines [..., D / 2] of rotary embedding at positions [...]."""
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions[..., None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding, half-split convention: pairs are (i, i + D / 2).

    Args:
      x: [..., heads, D].
      cos, sin: [..., D / 2], without the heads axis.
    """
    low, high = jnp.split(x, 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def swiglu(gate_up: jax.Array) -> jax.Array:
    """silu(gate) · up for [..., 2, F] -> [..., F]."""
    gate, up = gate_up[..., 0, :], gate_up[..., 1, :]
    return jax.nn.silu(gate) * up

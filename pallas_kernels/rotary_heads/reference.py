"""Norm, rotation and rounding of a fused projection, in plain XLA: the kernel's contract."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def rotary_heads_reference(
    qkv: Float[Array, "rows K columns D"],
    bias: Float[Array, "K columns D"] | None,
    q_gain: Float[Array, " D"] | None,
    k_gain: Float[Array, " D"] | None,
    cos: Float[Array, "R pairs"],
    sin: Float[Array, "R pairs"],
    *,
    eps: float,
    dtype,
    gated: bool = False,
) -> tuple[Float[Array, "R H D"], Float[Array, "R K D"], Float[Array, "R K D"]]:
    """Adds the bias, norms every query and key head, rotates, rounds.

    Rotation pairs element i with i + D / 2. Angles of fewer than D / 2 pairs rotate the first
    elements of a head (partial rotary embedding) and leave the rest.

    Args:
      qkv: [R', K, G + 2, D], R' >= R: for each key/value head its G queries, its key,
        its value. Rows past R are ignored.
      bias: [K, G + 2, D] or None.
      q_gain, k_gain: [D], of the RMS norm over a head, or None without one.
      cos, sin: [R, D'], D' <= D / 2.
      dtype: of the results.
      gated: qkv and bias are [., K, 2 G + 2, D]: every query is followed by its gate, which is
        not read.

    Returns:
      (queries [R, K * G, D], keys [R, K, D], values [R, K, D]).
    """
    x = qkv[: cos.shape[0]].astype(jnp.float32)
    if bias is not None:
        x = x + bias
    q, k, v = x[..., : -2 : 2 if gated else 1, :], x[..., -2, :], x[..., -1, :]
    q = q.reshape(q.shape[0], -1, q.shape[-1])
    if q_gain is not None:
        q, k = _norm(q, q_gain, eps), _norm(k, k_gain, eps)
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    return q.astype(dtype), k.astype(dtype), v.astype(dtype)


def _norm(x, gain, eps):
    scale = lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return x * scale * gain.astype(jnp.float32)


def _rotate(x, cos, sin):
    pairs = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    low, high, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin, rest], axis=-1)

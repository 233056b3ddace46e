"""What surrounds attention in a layer: norms, projections, rotary positions and gates."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxspec.config import TargetConfig
from jaxspec.models.layers import project, project_out, rms_norm
from jaxspec.models.params import AttentionParams
from jaxspec.models.rope import Angles
from pallas_kernels.rotary_heads import rotary_heads

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def attention(
    params: AttentionParams,
    config: TargetConfig,
    x: Float[Array, "B N M"],
    angles: Angles,
    attend: Attend,
    dtype=None,
    results=jnp.float32,
) -> Float[Array, "B N M"]:
    """The output of attention, which is added to x.

    Args:
      attend: attention proper, with masks: queries [B, N, H, D] and keys [B, N, K, D], both
        rotated, and values [B, N, K, D] -> [B, N, H, D].
      dtype: if given, a kernel for NVIDIA GPUs norms, rotates and rounds to it
        (`decoder.fuses`).
      results: dtype to which the product is rounded first.
    """
    q, k, v, gate = _qkv(params, config, x, angles, dtype, results)
    attended = attend(q, k, v).reshape(*x.shape[:2], -1)
    if gate is not None:
        attended = attended * jax.nn.sigmoid(gate)
    return project_out(attended, params.out)


def _qkv(params: AttentionParams, config: TargetConfig, x: jax.Array, angles, dtype, results):
    """Rotated queries [B, N, H, D], rotated keys and values [B, N, K, D]; gates [B, N, H D] of
    queries that have them, else None.

    With `dtype` one kernel does what follows the product, and rounds to it.
    """
    normed = rms_norm(x, params.norm, config.rms_norm_eps)
    qkv = project("bnm,mkgd->bnkgd", normed, params.qkv, results)
    options = dict(eps=config.rms_norm_eps, dtype=dtype or qkv.dtype, gated=params.gated)
    gains = (params.qkv_bias, params.q_norm, params.k_norm)
    angles = (x.reshape(-1, x.shape[-1]) for x in angles)
    q, k, v = rotary_heads(
        qkv.reshape(-1, *qkv.shape[2:]),
        *gains,
        *angles,
        **options,
        implementation="triton" if dtype else "xla",
    )
    shape = x.shape[:2] if dtype is None else (1, q.shape[0])
    return *(x.reshape(*shape, *x.shape[1:]) for x in (q, k, v)), _gates(params, qkv)


def _gates(params: AttentionParams, qkv: jax.Array) -> jax.Array | None:
    """The columns [B, N, H D] of a projection that follow its queries; None without gates."""
    if not params.gated:
        return None
    gates = qkv[..., 1:-2:2, :].astype(jnp.float32)
    if params.qkv_bias is not None:
        gates = gates + params.qkv_bias[:, 1:-2:2]
    return gates.reshape(*qkv.shape[:2], -1)

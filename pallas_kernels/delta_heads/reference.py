"""Heads of a gated delta net from its projection, in plain XLA: the kernel's contract.

Letters: J key heads, R value heads per key head, dk and dv dimensions of a key and a value,
C = 2 dk + R dv channels of the convolution, W = C + R dv + 2 R columns of the projection.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

NO_PARENT = -1  # of a root, as in `jaxspec.trees.tree`
NORM_EPS = 1e-6  # under the root in the norm of queries and keys


def delta_heads_reference(
    inputs: Float[Array, "rows J W"],
    kernel: Float[Array, "J C taps"],
    log_rate: Float[Array, "J R"],
    step_bias: Float[Array, "J R"],
    window: Float[Array, "B before J C"],
    parents: Int[Array, "B N"],
    begun: Bool[Array, " B"],
    *,
    key_dim: int,
) -> tuple[
    Float[Array, "B N J dk"],
    Float[Array, "B N J dk"],
    Float[Array, "B N J R dv"],
    Float[Array, "B N J R dv"],
    Float[Array, "B N J R"],
    Float[Array, "B N J R"],
]:
    """Convolves along the path to every node, norms queries and keys, computes rates.

    Args:
      inputs: [rows, J, W], rows >= B N: for each node of each sequence and for each key head
        the inputs of the convolution (query, key, values), the gates of its values, and per
        value head a rate and a step. Rows past B N are ignored.
      kernel: of the convolution, the last tap a node's own.
      window: [B, taps - 1, J, C], the last inputs before the root, oldest first.
      parents: [B, N], before their children; `NO_PARENT` for roots.
      begun: whether there is a prefix before the roots; if not, the window counts as zeros.
      key_dim: dk.

    Returns:
      queries of length dk^-1/2 and keys of length 1, [B, N, J, dk], values and gates
      [B, N, J, R, dv], decays g <= 0 and rates beta in (0, 1), [B, N, J, R]. All are float32
      but the gates, which are copied.

    Source: arXiv 2412.06464, as in Qwen3.5.
    """
    channels, group = kernel.shape[1], log_rate.shape[1]
    nodes = inputs[: parents.size].reshape(*parents.shape, *inputs.shape[1:])
    ends = (channels, nodes.shape[-1] - 2 * group, nodes.shape[-1] - group)
    mixed, gate, rate, step = jnp.split(nodes, ends, axis=-1)
    mixed, rate, step = (x.astype(jnp.float32) for x in (mixed, rate, step))
    convolved = jax.nn.silu(tree_convolution(kernel, mixed, window, parents, begun))
    q, k, v = jnp.split(convolved, (key_dim, 2 * key_dim), axis=-1)
    v, gate = (x.reshape(*rate.shape, -1) for x in (v, gate))
    decay = -jnp.exp(log_rate) * jax.nn.softplus(step + step_bias)
    return unit(q) * key_dim**-0.5, unit(k), v, gate, decay, jax.nn.sigmoid(rate)


def unit(x: jax.Array) -> jax.Array:
    """Vectors of the last axis, normalised to length 1."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + NORM_EPS)


def tree_convolution(
    kernel: jax.Array,
    inputs: jax.Array,
    window: jax.Array,
    parents: jax.Array,
    begun: jax.Array,
) -> jax.Array:
    """Depthwise causal convolution along the path to every node: [B, N, J, C].

    A node reads its own input, those of its nearest ancestors and, above the root, the last
    ones of the prefix.

    Args:
      inputs: [B, N, J, C].
      kernel, window, parents, begun: as in `delta_heads_reference`.
    """
    batch, n = inputs.shape[:2]
    before = window.shape[1]
    window = jnp.where(begun[:, None, None, None], window, 0.0)
    # Places in the line of the window's inputs and then the nodes', which is not made; and one
    # step up it from every place. The oldest is never left.
    roots = jnp.where(parents == NO_PARENT, before - 1, parents + before)
    window_up = jnp.broadcast_to(jnp.maximum(jnp.arange(before) - 1, 0), (batch, before))
    up = jnp.concatenate([window_up, roots], axis=1)
    at = jnp.broadcast_to(before + jnp.arange(n), (batch, n))
    total = kernel[..., -1].astype(jnp.float32) * inputs
    for tap in reversed(range(before)):
        at = jnp.take_along_axis(up, at, axis=1)
        place = at[..., None, None]
        of_nodes = jnp.take_along_axis(inputs, jnp.maximum(place - before, 0), axis=1)
        of_window = jnp.take_along_axis(window, jnp.minimum(place, before - 1), axis=1)
        read = jnp.where(place < before, of_window, of_nodes)
        total = total + kernel[..., tap].astype(jnp.float32) * read
    return total

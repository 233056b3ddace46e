"""The one call behind which implementations of tree attention live."""

from __future__ import annotations

import functools

import jax

from pallas_kernels.tree_attention.config import Shape, TileConfig, choose, unsupported
from pallas_kernels.tree_attention.reference import tree_attention_reference


def tree_attention(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    lengths: jax.Array,
    k_new: jax.Array,
    v_new: jax.Array,
    ancestors: jax.Array,
    *,
    scale: float,
    depths: jax.Array | None = None,
    window: int | None = None,
    implementation: str | None = None,
    tile: TileConfig | None = None,
) -> jax.Array:
    """See `tree_attention_reference` for shapes and meaning.

    Args:
      implementation: "xla" (the reference, any platform), "triton" (NVIDIA GPUs), or None:
        triton where the program is compiled for an NVIDIA GPU and the shape is supported,
        else xla.
      tile: how the Triton kernel cuts the work; chosen from the shapes if absent.

    Raises:
      ValueError: "triton" was asked for and does not take this shape, or `window` came
        without `depths`.
    """
    if implementation not in (None, "xla", "triton"):
        raise ValueError(
            f"implementation is {implementation!r}; expected 'xla', 'triton' or None"
        )
    if window is not None and depths is None:
        raise ValueError("window is set but depths is None; a window needs the nodes' depths")
    options = dict(scale=scale, window=window)
    arrays = (q, k_cache, v_cache, lengths, k_new, v_new, ancestors, depths)
    reference = functools.partial(_reference, **options)
    shape = _shape(q, k_cache)
    reason = unsupported(shape)
    if implementation == "xla" or (implementation is None and reason):
        return reference(*arrays)
    if reason:
        raise ValueError(f"implementation 'triton' does not take this: {reason}; use 'xla'")
    kernel = functools.partial(_triton, **options, tile=tile or choose(shape))
    if implementation == "triton":
        return kernel(*arrays)
    return jax.lax.platform_dependent(*arrays, cuda=kernel, default=reference)


def _shape(q: jax.Array, k_cache: jax.Array) -> Shape:
    batch, nodes, heads, dim = q.shape
    kv_heads, capacity = k_cache.shape[1:3]
    return Shape(batch, nodes, heads, kv_heads, dim, capacity, k_cache.dtype)


def _reference(*arrays, **options):
    return tree_attention_reference(*arrays[:-1], depths=arrays[-1], **options)


def _triton(*arrays, **options):
    # Pallas takes a fifth of a second to import: only where it is used.
    from pallas_kernels.tree_attention.triton import tree_attention_triton

    return tree_attention_triton(*arrays[:-1], depths=arrays[-1], **options)

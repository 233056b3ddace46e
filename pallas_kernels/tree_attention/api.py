"""Tree attention: dispatch to XLA, Triton or Mosaic."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, UInt32

from pallas_kernels.dispatch import dispatch
from pallas_kernels.mesh import MODEL, batch_axis, devices_along
from pallas_kernels.tree_attention.config import (
    MosaicTile,
    Shape,
    TileConfig,
    choose,
    unsupported,
    unsupported_by_mosaic,
)
from pallas_kernels.tree_attention.reference import tree_attention_reference
from pallas_kernels.tree_attention.xla import tree_attention_xla


def tree_attention(
    q: Float[Array, "B N H D"],
    k_cache: Float[Array, "B K S D"],
    v_cache: Float[Array, "B K S D"],
    lengths: Int[Array, " B"],
    k_new: Float[Array, "B N K D"],
    v_new: Float[Array, "B N K D"],
    ancestors: UInt32[Array, "B N W"],
    *,
    scale: float,
    depths: Int[Array, "B N"] | None = None,
    window: int | None = None,
    ordered: bool = False,
    implementation: str | None = None,
    tile: TileConfig | MosaicTile | None = None,
    rows: int | None = None,
) -> Float[Array, "*nodes H D"]:
    """See `tree_attention_reference` for shapes and meaning.

    Under a mesh with axes "data" or "model" (`jax.set_mesh`), sequences are sharded over the
    former, if it divides them, and key/value heads over the latter.

    Args:
      ordered: whether no node sees a later one, as where parents come before children. The
        kernels then skip later nodes; without this they compute with all and hide them.
      implementation: see `dispatch`.
      tile: a tile of the Triton or of the Mosaic kernel, which "triton" stands for together;
        chosen from the shapes by default.
      rows: at least B * N: the result is then [rows, H, D], nodes first and zeros after them,
        as input of a product of padded rows. Not supported under a mesh.

    Raises:
      ValueError: "triton" or a tile is given and does not support this shape, or `window` is
        given without `depths`.
    """
    if window is not None and depths is None:
        raise ValueError("window is set but depths is None; a window needs the nodes' depths")
    options = dict(
        scale=scale,
        window=window,
        ordered=ordered,
        implementation=implementation,
        tile=tile,
        rows=rows,
    )
    arrays = (q, k_cache, v_cache, lengths, k_new, v_new, ancestors, depths)
    return _over_mesh(functools.partial(_dispatch, **options), arrays)


def _over_mesh(attend, arrays) -> jax.Array:
    """Each device of the mesh attends for its own sequences and key/value heads.

    XLA cannot partition a Pallas call: it would gather the caches on every device.
    """
    batch, kv_heads = arrays[1].shape[:2]
    rows, devices = batch_axis(batch), devices_along(MODEL)
    if rows is None and devices == 1:
        return attend(*arrays)
    if kv_heads % devices:
        raise ValueError(
            f"{kv_heads} key/value heads cannot be sharded over {devices} devices; give the "
            f"mesh's axis {MODEL!r} a size that divides them"
        )
    heads = MODEL if devices > 1 else None
    cache, nodes, whole = (
        PartitionSpec(rows, heads),
        PartitionSpec(rows, None, heads),
        PartitionSpec(rows),
    )
    specs = (nodes, cache, cache, whole, nodes, nodes, whole, whole)
    return jax.shard_map(attend, in_specs=specs, out_specs=nodes, check_vma=False)(*arrays)


def _dispatch(*arrays, implementation, tile, rows, ordered, **options) -> jax.Array:
    plain = functools.partial(_xla, tree_attention_xla, rows=rows, **options)
    reference = functools.partial(_xla, tree_attention_reference, rows=rows, **options)

    def load():
        kernel = functools.partial(_kernel, rows=rows, tile=tile, ordered=ordered, **options)
        return kernel, unsupported(_shape(*arrays[:2]))

    return dispatch(reference, load, arrays, implementation, xla=plain)


def _shape(q: jax.Array, k_cache: jax.Array) -> Shape:
    batch, nodes, heads, dim = q.shape
    kv_heads, capacity = k_cache.shape[1:3]
    return Shape(batch, nodes, heads, kv_heads, dim, capacity, k_cache.dtype)


def _xla(attention, *arrays, rows, **options):
    result = attention(*arrays[:-1], depths=arrays[-1], **options)
    if rows is None:
        return result
    result = result.reshape(-1, *result.shape[2:])
    return jnp.pad(result, ((0, rows - result.shape[0]), (0, 0), (0, 0)))


def _kernel(*arrays, tile, **options):
    shape, window = _shape(*arrays[:2]), options["window"]
    tile = tile or choose(shape, window=window)
    # Pallas takes a fifth of a second to import: only where it is used.
    if isinstance(tile, MosaicTile):
        if reason := unsupported_by_mosaic(shape, window):
            raise ValueError(f"{tile} does not take this: {reason}; give a TileConfig")
        from pallas_kernels.tree_attention.mosaic import tree_attention_mosaic

        options.pop("window")
        return tree_attention_mosaic(*arrays[:-1], tile=tile, **options)
    from pallas_kernels.tree_attention.triton import tree_attention_triton

    return tree_attention_triton(*arrays[:-1], depths=arrays[-1], tile=tile, **options)

"""Key/value caches: allocated once, read-only in a forward, written when tokens commit."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.copy_rows import take_rows, write_rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Rotated keys, and values, of the committed prefix; one array per layer.

    Attributes:
      keys, values: tuples over layers of [B, K, S, D].
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]

    @property
    def capacity(self) -> int:
        """S: rows per sequence."""
        return self.keys[0].shape[2]

    def write(
        self,
        rows: KVRows,
        starts: Int[Array, " B"] | Int[Array, ""],
        *,
        after: jax.Array | None = None,
    ) -> KVCache:
        """Overwrites C rows of every sequence from its start on.

        Args:
          rows: C new rows per layer.
          starts: first row, or a scalar for all. All C rows must fit after it: a slice that
            does not fit would be shifted and overwrite committed rows.
          after: an array that depends on every read of this cache in the same program, where
            `starts` does not. Without an order between the two, XLA:CPU copies the whole cache
            before it writes (and it drops `optimization_barrier` too early to help). Its
            values do not matter, NaN included.
        """
        if after is not None:
            first = after.ravel()[0]
            if jnp.issubdtype(first.dtype, jnp.floating):
                first = jax.lax.bitcast_convert_type(first.astype(jnp.float32), jnp.int32)
            # An odd number is never 0, but XLA does not know and cannot fold this away.
            starts = jnp.where((first | 1) == 0, 0, starts)

        layers = len(self.keys)
        caches, news = self.keys + self.values, rows.keys + rows.values
        written = _put_rows(caches, news, starts) if starts.ndim else _put(caches, news, starts)
        return KVCache(written[:layers], written[layers:])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVRows:
    """Keys and values of a forward's nodes; tuples over layers of [B, C, K, D]."""

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]

    def take(self, index: Int[Array, "B C"]) -> KVRows:
        """The rows of chosen nodes, [B, C, K, D] per layer."""
        layers = len(self.keys)
        taken = take_rows(self.keys + self.values, index)
        return KVRows(taken[:layers], taken[layers:])


def init_cache(
    num_layers: int, batch: int, num_kv_heads: int, capacity: int, head_dim: int, dtype
) -> KVCache:
    """An empty cache; zeros, so that rows not yet written are finite."""
    shape = (batch, num_kv_heads, capacity, head_dim)
    return KVCache(
        tuple(jnp.zeros(shape, dtype) for _ in range(num_layers)),
        tuple(jnp.zeros(shape, dtype) for _ in range(num_layers)),
    )


def _put(caches: tuple, news: tuple, start: jax.Array) -> tuple:
    """Overwrites rows of [B, K, S, D] arrays, every sequence at the same start."""
    put = jax.lax.dynamic_update_slice_in_dim
    return tuple(
        put(cache, new.swapaxes(1, 2).astype(cache.dtype), start, 2)
        for cache, new in zip(caches, news, strict=True)
    )


def _put_rows(caches: tuple, news: tuple, starts: jax.Array) -> tuple:
    """Overwrites rows of [B, K, S, D] arrays, every sequence at its own start.

    Batched, this is a scatter, before which XLA:CPU copies the whole cache. One by one it is
    not, but then XLA:CPU converts a bfloat16 cache to float32 for every row.
    """
    if caches[0].dtype != jnp.float32:
        return write_rows(caches, news, starts)
    return jax.lax.platform_dependent(
        caches, news, starts, cpu=_put_one_by_one, default=write_rows
    )


def _put_one_by_one(caches: tuple, news: tuple, starts: jax.Array) -> tuple:
    news = tuple(new.swapaxes(1, 2).astype(caches[0].dtype) for new in news)

    def put(row, caches):
        def one(cache, new):
            new = jax.lax.dynamic_slice_in_dim(new, row, 1)
            return jax.lax.dynamic_update_slice(cache, new, (row, 0, starts[row], 0))

        return tuple(map(one, caches, news))

    return jax.lax.fori_loop(0, len(starts), put, caches)

"""Key/value caches: allocated once, read-only in a forward, written when tokens commit."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


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
        self, rows: KVRows, starts: jax.Array, *, after: jax.Array | None = None
    ) -> KVCache:
        """Overwrites C rows of every sequence from its start on.

        Args:
          rows: C new rows per layer.
          starts: first row, [B] or one scalar for all. A start must leave room for all C
            rows: a slice that does not fit would be shifted and overwrite committed rows.
          after: an array that depends on every read of this cache in the same program, where
            `starts` does not. Without an order between the two, XLA:CPU copies the whole cache
            before it writes (and it drops `optimization_barrier` too early to help).
        """
        if after is not None:  # a comparison that cannot be folded away
            starts = jnp.where(jnp.isnan(after.ravel()[0]), 0, starts)
        if starts.ndim == 0:
            put = lambda cache, new: jax.lax.dynamic_update_slice_in_dim(cache, new, starts, 2)  # noqa: E731
        else:
            put = lambda cache, new: _put_rows(cache, new, starts)  # noqa: E731

        def update(caches, news):
            return tuple(
                put(cache, new.swapaxes(1, 2).astype(cache.dtype))
                for cache, new in zip(caches, news, strict=True)
            )

        return KVCache(update(self.keys, rows.keys), update(self.values, rows.values))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVRows:
    """What a forward computed for its own nodes; tuples over layers of [B, C, K, D]."""

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]

    def take(self, index: jax.Array) -> KVRows:
        """The rows of chosen nodes: index [B, C'] -> [B, C', K, D] per layer."""
        pick = lambda x: jnp.take_along_axis(x, index[:, :, None, None], axis=1)  # noqa: E731
        return KVRows(tuple(map(pick, self.keys)), tuple(map(pick, self.values)))


def init_cache(
    num_layers: int, batch: int, num_kv_heads: int, capacity: int, head_dim: int, dtype
) -> KVCache:
    """An empty cache; zeros, so that rows not yet written are finite."""
    shape = (batch, num_kv_heads, capacity, head_dim)
    return KVCache(
        tuple(jnp.zeros(shape, dtype) for _ in range(num_layers)),
        tuple(jnp.zeros(shape, dtype) for _ in range(num_layers)),
    )


_put_rows = jax.vmap(
    lambda cache, new, start: jax.lax.dynamic_update_slice(cache, new, (0, start, 0))
)

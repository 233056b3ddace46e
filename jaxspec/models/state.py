"""What the target's layers keep between forwards, whatever kind of layer they are.

A forward only reads it and returns what it computed for its nodes; `write` takes in the
accepted ones. Attention keeps keys and values, a gated delta net its state.
"""

from __future__ import annotations

import dataclasses

import jax

from jaxspec.config import TargetConfig
from jaxspec.models.cache import KVCache, KVRows, init_cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerStates:
    """The committed prefix of every sequence, as the layers of a target keep it.

    Attributes:
      kv: of the attention layers, in their order.
    """

    kv: KVCache

    @property
    def capacity(self) -> int:
        """S: tokens per sequence."""
        return self.kv.capacity

    def write(
        self,
        rows: LayerRows,
        starts: jax.Array,
        counts: jax.Array,
        *,
        after: jax.Array | None = None,
    ) -> LayerStates:
        """Takes in the first `counts` of C consecutive tokens of every sequence.

        Args:
          rows: C rows per layer.
          starts: tokens committed before, [B] or one scalar for all; all C rows must fit. At 0
            a sequence begins, whatever was kept.
          counts: [B], 0 … C; at 0 a sequence stays as it is.
          after: see `KVCache.write`.
        """
        return LayerStates(self.kv.write(rows.kv, starts, after=after))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerRows:
    """What a forward computed for its own nodes, for `LayerStates.write`.

    Attributes:
      kv: of the attention layers.
    """

    kv: KVRows

    def take(self, index: jax.Array) -> LayerRows:
        """The rows of chosen nodes [B, C']."""
        return LayerRows(self.kv.take(index))


def init_states(config: TargetConfig, batch: int, capacity: int, dtype) -> LayerStates:
    """The states of empty sequences.

    Args:
      capacity: S, tokens per sequence.
      dtype: of keys and values.
    """
    c = config
    kv = init_cache(c.num_layers, batch, c.num_kv_heads, capacity, c.head_dim, dtype)
    return LayerStates(kv)

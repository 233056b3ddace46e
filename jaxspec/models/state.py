"""State of the target's layers between forwards, for every kind of layer.

A forward only reads it and returns rows for its nodes; `write` commits the accepted ones.
Attention keeps keys and values, a gated delta net its recurrent state.
"""

from __future__ import annotations

import dataclasses

import jax
from jaxtyping import Array, Int

from jaxspec.config import TargetConfig
from jaxspec.models.cache import KVCache, KVRows, init_cache
from jaxspec.models.delta_net import DeltaRows, DeltaState, init_delta_state


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerStates:
    """The committed prefix of every sequence, as the layers of a target keep it.

    Attributes:
      kv: keys and values of the attention layers, in their order.
      delta: state of every gated delta net, in their order; independent of the capacity.
    """

    kv: KVCache
    delta: tuple[DeltaState, ...] = ()

    @property
    def capacity(self) -> int:
        """S: tokens per sequence."""
        return self.kv.capacity

    def write(
        self,
        rows: LayerRows,
        starts: Int[Array, " B"] | Int[Array, ""],
        counts: Int[Array, " B"],
        *,
        after: jax.Array | None = None,
    ) -> LayerStates:
        """Commits the first `counts` of C consecutive tokens of every sequence.

        Args:
          rows: C rows per layer.
          starts: number of tokens committed before, or a scalar for all; all C rows must fit.
            At 0 a sequence begins anew, whatever was kept.
          counts: 0 … C; at 0 a sequence does not change.
          after: see `KVCache.write`.
        """
        delta = tuple(
            state.write(own, starts, counts)
            for state, own in zip(self.delta, rows.delta, strict=True)
        )
        return LayerStates(self.kv.write(rows.kv, starts, after=after), delta)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerRows:
    """Rows of a forward's nodes, for `LayerStates.write`.

    Attributes:
      kv: of the attention layers.
      delta: of every gated delta net.
    """

    kv: KVRows
    delta: tuple[DeltaRows, ...] = ()

    def take(self, index: Int[Array, "B C"]) -> LayerRows:
        """The rows of chosen nodes."""
        return LayerRows(self.kv.take(index), tuple(rows.take(index) for rows in self.delta))


def init_states(config: TargetConfig, batch: int, capacity: int, dtype) -> LayerStates:
    """The states of empty sequences.

    Args:
      capacity: S, tokens per sequence.
      dtype: of keys and values.
    """
    c, layers = config, len(config.attention_layers)
    kv = init_cache(layers, batch, c.num_kv_heads, capacity, c.head_dim, dtype)
    return LayerStates(kv, tuple(init_delta_state(c, batch) for _ in c.delta_layers))

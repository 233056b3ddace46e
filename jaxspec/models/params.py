"""Weights of the target, laid out as the step reads them: one array per layer and use.

The query, key and value projections are one matrix and so are gate and up, fused when a
checkpoint is loaded. Their middle axes keep key/value heads (K) and feed-forward channels (F)
separate, so that tensor parallelism shards one axis of one array.

Letters: M model width, K key/value heads, G query heads per key/value head, D head dim,
F feed-forward width, E experts, V vocabulary.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxspec.config import TargetConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionParams:
    norm: jax.Array  # [M]
    qkv: (
        jax.Array
    )  # [M, K, G + 2, D]: for each key/value head its G queries, its key, its value
    qkv_bias: jax.Array | None  # [K, G + 2, D]
    q_norm: jax.Array | None  # [D]
    k_norm: jax.Array | None  # [D]
    out: jax.Array  # [K, G, D, M]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MlpParams:
    norm: jax.Array  # [M]
    gate_up: jax.Array  # [M, 2, F]
    down: jax.Array  # [F, M]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MoeParams:
    norm: jax.Array  # [M]
    router: jax.Array  # [M, E]
    gate_up: jax.Array  # [E, M, 2, F]
    down: jax.Array  # [E, F, M]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerParams:
    attention: AttentionParams
    mlp: MlpParams | MoeParams


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TargetParams:
    embed: jax.Array  # [V, M]
    layers: tuple[LayerParams, ...]
    final_norm: jax.Array  # [M]
    lm_head: jax.Array | None  # [V, M]; None when tied to `embed`

    @property
    def unembed(self) -> jax.Array:
        """The LM head, [V, M]."""
        return self.embed if self.lm_head is None else self.lm_head


def abstract_params(config: TargetConfig, dtype=jnp.float32) -> TargetParams:
    """The shape of every weight as a `ShapeDtypeStruct`, nothing allocated."""
    c = config
    weight = lambda *shape: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    rows = c.group_size + 2
    head_norm = weight(c.head_dim) if c.qk_norm else None

    def layer(i: int) -> LayerParams:
        attention = AttentionParams(
            norm=weight(c.hidden_size),
            qkv=weight(c.hidden_size, c.num_kv_heads, rows, c.head_dim),
            qkv_bias=weight(c.num_kv_heads, rows, c.head_dim) if c.attention_bias else None,
            q_norm=head_norm,
            k_norm=head_norm,
            out=weight(c.num_kv_heads, c.group_size, c.head_dim, c.hidden_size),
        )
        if i in c.sparse_layers:
            experts, width = c.num_experts, c.moe_intermediate_size
            return LayerParams(
                attention,
                MoeParams(
                    norm=weight(c.hidden_size),
                    router=weight(c.hidden_size, experts),
                    gate_up=weight(experts, c.hidden_size, 2, width),
                    down=weight(experts, width, c.hidden_size),
                ),
            )
        return LayerParams(
            attention,
            MlpParams(
                norm=weight(c.hidden_size),
                gate_up=weight(c.hidden_size, 2, c.intermediate_size),
                down=weight(c.intermediate_size, c.hidden_size),
            ),
        )

    return TargetParams(
        embed=weight(c.vocab_size, c.hidden_size),
        layers=tuple(layer(i) for i in range(c.num_layers)),
        final_norm=weight(c.hidden_size),
        lm_head=None if c.tie_embeddings else weight(c.vocab_size, c.hidden_size),
    )


def random_params(
    config: TargetConfig, key: jax.Array, *, scale=0.1, dtype=jnp.float32
) -> TargetParams:
    """Gaussian weights with the given scale, norms at one; for tests and shape studies."""
    leaves, tree = jax.tree.flatten_with_path(abstract_params(config, dtype))
    keys = jax.random.split(key, len(leaves))

    def make(path, spec, key):
        if "norm" in path[-1].name:
            return jnp.ones(spec.shape, spec.dtype)
        return scale * jax.random.normal(key, spec.shape, spec.dtype)

    return jax.tree.unflatten(
        tree, [make(path, spec, k) for (path, spec), k in zip(leaves, keys, strict=True)]
    )

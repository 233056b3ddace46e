"""Gated delta nets (arXiv 2412.06464) over trees: exact, without a state per node.

A value head keeps a matrix S that decays with every token and adds what it did not predict:

    S <- exp(g_t) S,   u_t = beta_t (v_t - S^T k_t),   S <- S + k_t u_t^T,   o_t = S^T q_t

Unrolled along the ancestors of the nodes of a tree, this is a triangular system for the updates
u and a sum for the outputs o (`pallas_kernels.tree_delta_rule`), both from S0, the state before
the root. With G_i the sum of g over node i and its ancestors, the state after a path that ends
in node l is exp(G_l) S0 + the sum over its nodes j of exp(G_l - G_j) k_j u_j^T: rejected nodes
are left out of a sum, and nothing is rolled back.

Letters: J key heads, R value heads per key head, dk and dv dimensions of a key and a value,
C = 2 dk + R dv channels of the convolution.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxspec.config import TargetConfig
from jaxspec.models.layers import rms_norm
from jaxspec.models.params import DeltaNetParams
from jaxspec.trees.tree import NO_PARENT, unpack_bits
from pallas_kernels.delta_heads import delta_heads
from pallas_kernels.mesh import batch_axis, cut_axes, dividing
from pallas_kernels.tree_delta_rule import tree_delta_rule

FEW_ROWS = 32  # most rows of an accepted path; a prompt's chunk has more


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeltaState:
    """State of a layer after the committed prefix; its size is independent of the length.

    Attributes:
      memory: [B, J, dk, R dv] float32, S, the value heads of a key head concatenated.
      window: [B, taps - 1, J, C] float32, the last inputs of the convolution, oldest first.
    """

    memory: jax.Array
    window: jax.Array

    def write(self, rows: DeltaRows, starts: jax.Array, counts: jax.Array) -> DeltaState:
        """See `LayerStates.write`; rows past the first `counts` are ignored."""
        size = rows.keys.shape[1]
        inside = jnp.arange(size) < counts[:, None]  # [B, C']
        goes_on = (starts > 0) | (counts == 0)  # [B]: what was kept still counts

        def only(x):  # not a product with zero: garbage may be NaN
            return jnp.where(inside.reshape(*inside.shape, *[1] * (x.ndim - 2)), x, 0.0)

        decays = only(rows.decays)  # [B, C', J, R]
        below = jnp.pad(decays[:, 1:], [(0, 0), (0, 1), (0, 0), (0, 0)])
        after = jnp.cumsum(below[:, ::-1], axis=1)[:, ::-1]  # G_l - G_j as a sum of its own
        weighed = only(rows.updates) * jnp.exp(after)[..., None]
        weighed = weighed.reshape(*weighed.shape[:3], -1)  # [B, C', J, R dv]
        kept = jnp.where(goes_on[:, None, None], jnp.exp(decays.sum(axis=1)), 0.0)
        kept = jnp.repeat(kept, rows.updates.shape[-1], axis=-1)  # [B, J, R dv]
        memory = _absorb(kept[:, :, None] * self.memory, only(rows.keys), weighed)

        window = jnp.where(goes_on[:, None, None, None], self.window, 0.0)
        line = jnp.concatenate([window, rows.inputs], axis=1)
        last = counts[:, None] + jnp.arange(window.shape[1])
        return DeltaState(memory, jnp.take_along_axis(line, last[..., None, None], axis=1))


def _absorb(memory: jax.Array, keys: jax.Array, updates: jax.Array) -> jax.Array:
    """memory [B, J, dk, R dv] + the sum over n of keys [B, n, J, dk] times updates.

    Few rows are added one by one, in the same pass as the decay: a matrix product would read
    and write the memory once more.
    """
    if keys.shape[1] > FEW_ROWS:
        return memory + jnp.einsum("bnjd,bnje->bjde", keys, updates, precision="highest")
    for i in range(keys.shape[1]):
        memory = memory + keys[:, i, :, :, None] * updates[:, i, :, None]
    return memory


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeltaRows:
    """Rows of a forward's nodes, for `DeltaState.write`; all float32.

    Attributes:
      keys: [B, N, J, dk], k.
      updates: [B, N, J, R, dv], u.
      decays: [B, N, J, R], g.
      inputs: [B, N, J, C], of the convolution.
    """

    keys: jax.Array
    updates: jax.Array
    decays: jax.Array
    inputs: jax.Array

    def take(self, index: jax.Array) -> DeltaRows:
        """The rows of chosen nodes [B, C']."""

        def taken(x):
            return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), 1)

        return jax.tree.map(taken, self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kinship:
    """Ancestors and parents of the nodes of a forward.

    Attributes:
      ancestors: uint32 bits [B, N, ceil(N / 32)], ancestor-or-self (`trees.ancestors`).
      parents: [B, N] int32; `NO_PARENT` for roots.
      begun: [B] bool, whether there is a prefix before the roots.
    """

    ancestors: jax.Array
    parents: jax.Array
    begun: jax.Array


def kinship(bits: jax.Array, lengths: jax.Array) -> Kinship:
    """Ancestors and parents from ancestor bits.

    Args:
      bits: uint32 [B, N, ceil(N / 32)] (`trees.ancestors`).
      lengths: [B], tokens of the prefix.
    """
    n = bits.shape[1]
    node = jnp.arange(n)
    above = unpack_bits(bits, n) & (node[:, None] != node)
    # Parents come before children: of a node's ancestors the last is its parent.
    parents = jnp.max(jnp.where(above, node, NO_PARENT), axis=-1, initial=NO_PARENT)
    return Kinship(bits, parents, lengths > 0)


def init_delta_state(config: TargetConfig, batch: int) -> DeltaState:
    """The state of empty sequences."""
    d = config.delta_net
    heads, group = d.key_heads, d.group_size
    return DeltaState(
        jnp.zeros((batch, heads, d.key_dim, group * d.value_dim), jnp.float32),
        jnp.zeros((batch, d.taps - 1, heads, d.channels), jnp.float32),
    )


def delta_net(
    params: DeltaNetParams,
    config: TargetConfig,
    inputs: jax.Array,
    state: DeltaState,
    kin: Kinship,
    *,
    kernels: bool = False,
) -> tuple[jax.Array, DeltaRows]:
    """A gated delta net between its input and its output projection.

    Under a mesh that shards weights (`jax.set_mesh`), key heads with their value heads are
    sharded over it, as far as its axes divide their number; an axis "data" shards sequences.

    Args:
      inputs: [rows, J, C + R dv + 2 R], normed activations times `params.inputs`, nodes side
        by side; rows past B N, which only one device may have, are ignored.
      kernels: on an NVIDIA GPU, one computes the heads and one the delta rule
        (`decoder.fuses`).

    Returns:
      outputs [B, N, J, R dv], normed per head and gated, and the nodes' rows.
    """
    weights = (params.convolution, params.log_rate, params.step_bias)

    def of_these_heads(weights, head_norm, inputs, state, kin):
        return _delta_net(config, weights, head_norm, inputs, state, kin, kernels)

    arguments = (weights, params.head_norm, inputs, state, kin)
    heads = config.delta_net.key_heads
    axes = dividing(jax.sharding.get_abstract_mesh(), cut_axes(), heads)
    if not axes:
        return of_these_heads(*arguments)
    batch = batch_axis(len(kin.begun))
    whole, by_head, by_row = PartitionSpec(), PartitionSpec(axes), PartitionSpec(batch)
    by_node, memory = PartitionSpec(batch, None, axes), PartitionSpec(batch, axes)
    return jax.shard_map(
        of_these_heads,
        in_specs=(by_head, whole, memory, DeltaState(memory, by_node), by_row),
        out_specs=by_node,
        check_vma=False,
    )(*arguments)


def _delta_net(config, weights, head_norm, inputs, state, kin, kernels):
    d, (batch, n) = config.delta_net, kin.parents.shape
    implementation = None if kernels else "xla"
    q, k, v, gate, decay, rate = delta_heads(
        inputs,
        *weights,
        state.window,
        kin.parents,
        kin.begun,
        key_dim=d.key_dim,
        implementation=implementation,
    )
    out, updates = tree_delta_rule(
        q,
        k,
        v,
        decay,
        rate,
        state.memory,
        kin.ancestors,
        kin.begun,
        implementation=implementation,
    )
    out = rms_norm(out, head_norm, config.rms_norm_eps)
    out = out * jax.nn.silu(gate.astype(jnp.float32))
    mixed = inputs[: batch * n, :, : d.channels].reshape(batch, n, -1, d.channels)
    rows = DeltaRows(k, updates, decay, mixed.astype(jnp.float32))
    return out.reshape(*out.shape[:3], -1), rows

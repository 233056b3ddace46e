"""Sample, then match: the target chooses, the tree decides only how much is already computed.

At each node the target's own choice is taken; the child that equals it, if any, is accepted.
Every emitted token is the target's choice given the tokens before it, so the output is lossless
for any tree that was fixed before the choices were made.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxspec.trees.tree import DraftTree, pack_bits, unpack_bits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Acceptance:
    """The accepted path of every row.

    Attributes:
      path: [B, P + 1] int32, node at each depth of the accepted path, root first; 0 past it.
      count: [B] int32, nodes on the path, root included (1 … P + 1).
      tokens: [B, P + 1] int32, the tokens decided: those of nodes path[1:count], then the bonus
        at index count - 1; what follows is meaningless.
    """

    path: jax.Array
    count: jax.Array
    tokens: jax.Array


def accept(
    tree: DraftTree, ancestors: jax.Array, choices: jax.Array, max_depth: int
) -> Acceptance:
    """Follows the target's choices from the root.

    Args:
      tree: the drafted tree.
      ancestors: its ancestor bits, uint32 [B, N, ceil(N / 32)].
      choices: [B, N] int32, the target's choice after each node.
      max_depth: P, the deepest a node can be.
    """
    n = tree.size
    expected = jnp.take_along_axis(choices, jnp.maximum(tree.parents, 0), axis=1)
    matches = tree.valid & ((tree.tokens == expected) | (jnp.arange(n) == 0))
    # A node is reached iff it and all its ancestors match: no mismatch among its bits.
    mismatches = pack_bits(~matches)[:, None, :]
    reached = jnp.all((ancestors & mismatches) == 0, axis=-1)
    leaf = jnp.argmax(jnp.where(reached, tree.depths, -1), axis=-1)[:, None]  # [B, 1]

    count = jnp.take_along_axis(tree.depths, leaf, axis=1)[:, 0] + 1
    on_path = unpack_bits(jnp.take_along_axis(ancestors, leaf[..., None], axis=1)[:, 0], n)
    at_depth = tree.depths[:, None, :] == jnp.arange(max_depth + 1)[:, None]
    path = jnp.argmax(on_path[:, None, :] & at_depth, axis=-1).astype(jnp.int32)  # [B, P + 1]
    # The choice after path[d] is the token decided at depth d + 1: accepted while
    # d + 1 < count, the bonus at d + 1 = count.
    return Acceptance(path=path, count=count, tokens=jnp.take_along_axis(choices, path, axis=1))

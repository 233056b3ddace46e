"""Which tokens may follow each node of a draft, where something beside the target decides that,
as a grammar does.

The host says it once a draft is there (`AllowedTokens`): what may follow a node depends on the
tokens on the path to it. A round is then cut in two programs (`decoding.halves`), and the host
walks the trees between them. The target chooses among the allowed tokens after every node, so
the answer is that of plain decoding under the same masks, whatever was drafted.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxspec.decoding.state import Draft, Verified
from jaxspec.trees.pruning import pruned
from jaxspec.trees.tree import unpack_bits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AllowedTokens:
    """What the host says of the trees of a batch.

    Attributes:
      kept: [B, N] bool, nodes whose path is allowed; the others are not verified.
      after: [B, N, ceil(V / 32)] uint32, bits of the tokens that may follow each node, one at
        least.
    """

    kept: jax.Array
    after: jax.Array


def restricted(draft: Draft, allowed: AllowedTokens) -> Draft:
    """A draft without its forbidden nodes, and with the tokens allowed after the others."""
    tree, order = pruned(draft.tree, allowed.kept)
    after = jnp.take_along_axis(allowed.after, order[..., None], axis=1)
    return Draft(tree, allowed=after)


def only_allowed(verified: Verified, allowed: jax.Array | None) -> Verified:
    """The same, with logits of -inf for tokens that may not follow a node.

    Args: allowed: as `Draft.allowed`.
    """
    if allowed is None:
        return verified
    bits = allowed if verified.packing is None else verified.packing.gather(allowed)
    return dataclasses.replace(verified, logits=masked(verified.logits, bits))


def masked(logits: jax.Array, bits: jax.Array) -> jax.Array:
    """Logits [..., V], -inf where the bits [..., ceil(V / 32)] are 0."""
    return jnp.where(unpack_bits(bits, logits.shape[-1]), logits, -jnp.inf)

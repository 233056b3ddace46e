"""A draft tree: what the drafter proposes and the target checks in one forward."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

NO_PARENT = -1
WORD_BITS = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DraftTree:
    """Candidate continuations of the anchor, which is node 0 (the root).

    Parents come before children. A node that is not `valid` is padding: its parent is
    `NO_PARENT`, it sees the committed prefix and itself, and it is never accepted.

    Attributes:
      tokens: [B, N] int32, the token of each node; the anchor at node 0.
      parents: [B, N] int32, index of the parent; `NO_PARENT` for the root and for padding.
      depths: [B, N] int32, distance from the root (root: 0). A node stands at absolute
        position `position of the anchor + depth`.
      scores: [B, N] float32, log-probability of the path from the root under the drafter
        (root: 0, padding: -inf), never NaN (`known`) and never above the parent's. Scores
        never affect what is accepted, only what is drafted.
      valid: [B, N] bool.
    """

    tokens: jax.Array
    parents: jax.Array
    depths: jax.Array
    scores: jax.Array
    valid: jax.Array

    @property
    def size(self) -> int:
        """N: nodes, root and padding included."""
        return self.tokens.shape[-1]


def known(scores: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """Scores with -inf, no node, for NaN: ordered, and with NaN above a node none below it."""
    return jnp.where(jnp.isnan(scores), -jnp.inf, scores)


def ancestors(tree: DraftTree) -> UInt32[Array, "B N W"]:
    """Ancestor-or-self sets as bits, by pointer doubling: ceil(log2 N) steps of gathers.

    Returns:
      uint32 [B, N, ceil(N / 32)]: bit j of row i is set iff node j is node i or above it.
      For the chain 0 <- 1 <- 2 beside 0 <- 3::

          row 0: 1 . . .
          row 1: 1 1 . .
          row 2: 1 1 1 .
          row 3: 1 . . 1
    """
    n = tree.size
    own = jnp.arange(n)
    # Each row starts with itself; `jump` doubles the distance it looks up the tree. Roots and
    # padding jump to themselves, so further steps add nothing.
    rows = jnp.broadcast_to(pack_bits(own[:, None] == own), (*tree.parents.shape, num_words(n)))
    jump = jnp.where(tree.parents == NO_PARENT, own, tree.parents)
    for _ in range(max(1, (n - 1).bit_length())):
        rows = rows | jnp.take_along_axis(rows, jump[..., None], axis=-2)
        jump = jnp.take_along_axis(jump, jump, axis=-1)
    return rows


def num_words(n: int) -> int:
    """32-bit words that hold n bits."""
    return -(-n // WORD_BITS)


def pack_bits(mask: Bool[Array, "*L N"]) -> UInt32[Array, "*L W"]:
    """bool [..., N] -> uint32 [..., ceil(N / 32)]; bit j of word w is element 32 w + j."""
    n = mask.shape[-1]
    padded = jnp.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, num_words(n) * WORD_BITS - n)])
    words = padded.reshape(*mask.shape[:-1], num_words(n), WORD_BITS).astype(jnp.uint32)
    return jnp.sum(words << jnp.arange(WORD_BITS, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)


def unpack_bits(words: UInt32[Array, "*L W"], n: int) -> Bool[Array, "*L {n}"]:
    """uint32 [..., W] -> bool [..., n], the inverse of `pack_bits`."""
    bits = (words[..., None] >> jnp.arange(WORD_BITS, dtype=jnp.uint32)) & 1
    return bits.reshape(*words.shape[:-1], -1)[..., :n].astype(bool)


def root_only(anchor: Int[Array, " B"], *, size: int = 1) -> DraftTree:
    """The tree of plain decoding: the anchor ([B]) and padding up to `size` nodes."""
    node = jnp.arange(size)
    shape = (anchor.shape[0], size)
    return DraftTree(
        tokens=jnp.where(node == 0, anchor[:, None], 0).astype(jnp.int32),
        parents=jnp.full(shape, NO_PARENT, jnp.int32),
        depths=jnp.zeros(shape, jnp.int32),
        scores=jnp.broadcast_to(jnp.where(node == 0, 0.0, -jnp.inf), shape),
        valid=jnp.broadcast_to(node == 0, shape),
    )


def chain(
    anchor: Int[Array, " B"],
    tokens: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    log_probs: Float[Array, "B P"] | None = None,
    *,
    size: int | None = None,
) -> DraftTree:
    """A tree without branches: the anchor followed by the first `lengths` drafted tokens.

    Args:
      anchor: [B] int32.
      tokens: [B, P] int32, the drafted continuation.
      lengths: [B] int32, how many of them to keep (the rest is padding).
      log_probs: [B, P], log-probability of each token given those before it; 0 if absent.
        From a NaN on, scores are -inf.
      size: N; P + 1 by default. Tokens beyond it are dropped.
    """
    batch, depth = tokens.shape
    size = depth + 1 if size is None else size
    node = jnp.arange(size)
    if log_probs is None:
        log_probs = jnp.zeros(tokens.shape, jnp.float32)

    def fit(x, head):  # the root's value, then one per drafted token, cut or padded to N
        x = jnp.concatenate([head[:, None], x], axis=1)[:, :size]
        return jnp.pad(x, ((0, 0), (0, size - x.shape[1])))

    valid = node <= jnp.minimum(lengths, depth)[:, None]
    total = fit(jnp.cumsum(log_probs.astype(jnp.float32), axis=1), jnp.zeros(batch))
    return DraftTree(
        tokens=jnp.where(valid, fit(tokens, anchor), 0).astype(jnp.int32),
        parents=jnp.where(valid, node - 1, NO_PARENT).astype(jnp.int32),
        depths=jnp.where(valid, node, 0).astype(jnp.int32),
        scores=known(jnp.where(valid, total, -jnp.inf)),
        valid=valid,
    )


def chain_nodes(
    batch: int, n: int
) -> tuple[Int[Array, "{batch} {n}"], UInt32[Array, "{batch} {n} W"]]:
    """Depths and ancestor bits of chains of n nodes, such as the tokens of a prompt."""
    bits = pack_bits(jnp.tril(jnp.ones((n, n), bool)))
    depths = jnp.broadcast_to(jnp.arange(n), (batch, n))
    return depths, jnp.broadcast_to(bits, (batch, *bits.shape))

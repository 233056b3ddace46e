"""Your own drafter: after every token it drafts the token that followed it last.

Used by name, with nothing of jaxspec changed:

jaxspec generate --drafter python:examples.own_drafter:followers --prompt "Hi!"
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxspec.drafters.base import Committed, Drafter, LoadedDrafter
from jaxspec.noise import Noise
from jaxspec.trees.tree import DraftTree, chain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Seen:
    """The committed tokens so far.

    Attributes:
      tokens: [B, S] int32, by position.
      after: [B, V] int32, position of the token that last followed each token; 0 for none.
    """

    tokens: jax.Array
    after: jax.Array


@dataclasses.dataclass(frozen=True)
class Followers(Drafter):
    """Drafts chains of followers.

    Attributes:
      vocab: V.
      size: N, nodes of the chain, root included.
    """

    vocab: int
    size: int = 8

    @property
    def depth(self) -> int:
        return self.size - 1

    def init(self, params, batch: int, capacity: int) -> Seen:
        return Seen(
            jnp.zeros((batch, capacity), jnp.int32), jnp.zeros((batch, self.vocab), jnp.int32)
        )

    def observe(self, params, state: Seen, committed: Committed) -> Seen:
        batch, count = committed.tokens.shape
        rows, offsets = jnp.arange(batch)[:, None], jnp.arange(count)
        positions = committed.position[:, None] + offsets
        # Rows past the count are padding: they are written out of bounds, which drops them.
        inside = offsets < committed.count[:, None]
        to = jnp.where(inside, positions, state.tokens.shape[1])
        tokens = state.tokens.at[rows, to].set(committed.tokens, mode="drop")
        before = jnp.take_along_axis(tokens, jnp.maximum(positions - 1, 0), axis=1)
        after = state.after.at[rows, before].max(jnp.where(inside, positions, 0))
        return Seen(tokens, after)

    def draft(
        self,
        params,
        state: Seen,
        anchor: jax.Array,
        position: jax.Array,
        budget: jax.Array,
        noise: Noise | None = None,  # not read: this drafter scores nothing
    ) -> tuple[DraftTree, Seen]:
        def step(token, _):
            at = jnp.take_along_axis(state.after, token[:, None], axis=1)
            follower = jnp.take_along_axis(state.tokens, at, axis=1)[:, 0]
            return follower, (follower, at[:, 0] > 0)

        _, (tokens, known) = jax.lax.scan(step, anchor, length=self.depth)
        lengths = jnp.cumprod(known, axis=0).sum(axis=0)
        return chain(anchor, tokens.T, jnp.minimum(lengths, budget - 1), size=self.size), state

    def with_tree(self, tree):
        return dataclasses.replace(self, size=tree.size)


def followers(argument, target, *, tree, dtype) -> LoadedDrafter:
    """The factory (`jaxspec.drafters.registry.Factory`); this drafter has no weights."""
    return LoadedDrafter(Followers(target.config.vocab_size, tree.size))

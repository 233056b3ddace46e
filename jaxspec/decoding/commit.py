"""Commit: the accepted path, and nothing else, enters cache, drafter and tokens."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxspec.decoding.accept import Acceptance
from jaxspec.decoding.state import DecodeState
from jaxspec.drafters.base import Committed, Drafter
from jaxspec.models.cache import KVRows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the target made of a draft: the accepted path, and what it computed along it.

    Attributes:
      tokens: [B, P + 1] int32, the path's own tokens, root first.
      taps: [B, P + 1, len(taps) * M] float32.
      rows: keys and values of the path's P + 1 nodes.
      nodes: [B] int32, nodes of the tree, padding excluded.
    """

    acceptance: Acceptance
    tokens: jax.Array
    taps: jax.Array
    rows: KVRows
    nodes: jax.Array

    def padded(self, width: int) -> Verdict:
        """With zeros, so that its path has room for `width` nodes."""
        missing = width - self.acceptance.path.shape[1]

        def pad(x):
            return jnp.pad(x, [(0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)])

        return jax.tree.map(lambda x: pad(x) if x.ndim > 1 else x, self) if missing else self


def commit(
    state: DecodeState,
    drafter: Drafter,
    drafter_params,
    verdict: Verdict,
    stop_ids: jax.Array,
) -> DecodeState:
    """Writes the P + 1 rows of the path at the anchor's position and moves `length`.

    Rows past the accepted ones are garbage that no later forward sees: visibility ends at
    `length - 1`, and the next round writes over them. A row that is done stays as it is.
    """
    acceptance, running = verdict.acceptance, ~state.done
    anchor_position = state.length - 1
    stops = jnp.any(acceptance.tokens[..., None] == stop_ids[:, None, :], axis=-1)  # [B, P + 1]
    index = jnp.arange(acceptance.path.shape[1])
    stops = stops & (index < acceptance.count[:, None])
    stopped = jnp.any(stops, axis=1)
    decided = jnp.where(stopped, jnp.argmax(stops, axis=1) + 1, acceptance.count)
    decided = jnp.where(running, decided, 0)
    length = jnp.minimum(state.length + decided, state.limit)

    observed = Committed(
        tokens=verdict.tokens,
        features=verdict.taps,
        position=anchor_position,
        count=length - state.length,
    )
    batch = jnp.arange(running.shape[0])
    return dataclasses.replace(
        state,
        tokens=write_tokens(state.tokens, acceptance.tokens, state.length, length),
        length=length,
        done=state.done | stopped | (length >= state.limit),
        # Without a draft nothing else that is written depends on what was read.
        cache=state.cache.write(verdict.rows, anchor_position, after=acceptance.tokens),
        drafter=drafter.observe(drafter_params, state.drafter, observed),
        rounds=state.rounds + running,
        committed=state.committed.at[batch, state.rounds].add(decided),
        nodes=state.nodes + jnp.where(running, verdict.nodes, 0),
    )


def write_tokens(
    tokens: jax.Array, new: jax.Array, start: jax.Array, stop: jax.Array
) -> jax.Array:
    """tokens[b, start[b]:stop[b]] = new[b, :stop[b] - start[b]]; the rest stays.

    Args:
      tokens: [B, S].
      new: [B, C].
      start, stop: [B], at most C apart.
    """
    index = start[:, None] + jnp.arange(new.shape[1])
    index = jnp.where(index < stop[:, None], index, tokens.shape[1])  # past the end: dropped
    return tokens.at[jnp.arange(tokens.shape[0])[:, None], index].set(new, mode="drop")

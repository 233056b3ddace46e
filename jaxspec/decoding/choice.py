"""The target's choice at a node: argmax, or Gumbel-max with the noise of `jaxspec.noise`."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from jaxspec.decoding.filters import filtered
from jaxspec.decoding.penalties import Written, adjusted, changes_logits
from jaxspec.decoding.sampling import SamplingRows
from jaxspec.trees.candidates import likeliest
from jaxspec.trees.tree import unpack_bits

ROWS_AT_ONCE, NODES_AT_ONCE = 8, 16  # sampled at a time, to bound the memory of [., ., V]


def masked(logits: jax.Array, allowed: jax.Array | None) -> jax.Array:
    """Logits [..., V], -inf where the bits [..., ceil(V / 32)] of the allowed tokens are 0.

    So the output equals plain decoding's under the same masks, whatever was drafted.

    Args: allowed: None allows all.
    """
    if allowed is None:
        return logits
    return jnp.where(unpack_bits(allowed, logits.shape[-1]), logits, -jnp.inf)


# Traced once for all programs with these shapes, and part of each: the same program as without.
@functools.partial(jax.jit, static_argnames="max_depth", inline=True)
def choose(
    logits: jax.Array,
    depths: jax.Array,
    positions: jax.Array,
    rows: SamplingRows,
    max_depth: int,
    written: Written,
) -> jax.Array:
    """The token the target chooses after each node.

    Args:
      logits: [R, N, V] float32.
      depths: [R, N] int32, 0 … max_depth.
      positions: [R] int32, absolute position of the token chosen after depth 0.
      rows: [B], indexed by `written.row`; consumes `rows.key` folded with the absolute position
        of the chosen token.
      written: the text before each choice.

    Returns:
      [R, N] int32.
    """
    greedy = likeliest(logits)
    drawn = ((rows.temperature > 0) | changes_logits(rows))[written.row]

    def draw(together):
        order = jnp.argsort(~drawn)  # sampled rows first: only they cost something

        def some_rows(i, chosen):
            some = jax.lax.dynamic_slice_in_dim(order, i * together, together)
            tokens = _draw(logits, depths, positions, rows, some, max_depth, written)
            return chosen.at[some].set(jnp.where(drawn[some, None], tokens, chosen[some]))

        return jax.lax.fori_loop(0, -(-drawn.sum() // together), some_rows, greedy)

    def draw_in_parts():
        together = math.gcd(logits.shape[0], ROWS_AT_ONCE)
        if min(logits.shape[:2]) == 1:
            return draw(together)
        # A CPU's cache holds the logits of one tree, not those of several.
        one, several = functools.partial(draw, 1), functools.partial(draw, together)
        return jax.lax.platform_dependent(cpu=one, default=several)

    return jax.lax.cond(drawn.any(), draw_in_parts, lambda: greedy)


def _draw(logits, depths, positions, rows, some, max_depth: int, written: Written) -> jax.Array:
    """`choose` for `some` [R'] of the R, with noise or adjusted logits: [R', N] int32."""
    rows = jax.tree.map(lambda x: x[written.row[some]], rows)
    # Nodes of one depth choose for the same position, so they share its noise.
    hot, vocab = rows.temperature > 0, logits.shape[-1]
    noise = jax.lax.cond(  # without it XLA draws the noise again for every node
        jnp.any(hot),
        lambda: rows.noise.at(positions[some], max_depth + 1, vocab),
        lambda: jnp.zeros((some.shape[0], max_depth + 1, vocab)),
    )  # [R', P + 1, V]
    noise = jnp.where(hot[:, None, None], noise, 0.0)
    step = math.gcd(logits.shape[1], NODES_AT_ONCE)

    def some_nodes(i, chosen):
        part = lambda x: x[some[:, None], i * step + jnp.arange(step)]  # noqa: E731
        depth = part(depths)
        law = _law(
            part(logits), rows, written, some, part(written.node), positions[some], depth
        )
        drawn = jnp.take_along_axis(noise, depth[..., None], axis=1)
        drawn = likeliest(law + drawn)
        return jax.lax.dynamic_update_slice_in_dim(chosen, drawn, i * step, axis=1)

    start = jnp.zeros((some.shape[0], logits.shape[1]), jnp.int32)
    return jax.lax.fori_loop(0, logits.shape[1] // step, some_nodes, start)


def _law(logits, rows, written: Written, some, node, positions, depths) -> jax.Array:
    """Adjusted and filtered logits of the choices `some`: [R', N, V]."""

    def adjust(logits):
        position = positions[:, None] + depths
        return adjusted(logits, rows, written, written.row[some], node, position)

    logits = jax.lax.cond(jnp.any(changes_logits(rows)), adjust, lambda x: x, logits)
    scaled = logits / jnp.where(rows.temperature > 0, rows.temperature, 1.0)[:, None, None]
    return filtered(scaled, rows.top_k, rows.top_p, rows.min_p)


def log_law(
    logits: jax.Array, positions: jax.Array, rows: SamplingRows, written: Written
) -> jax.Array:
    """The log-probabilities [B, N, V] that `choose` samples from; one-hot in greedy rows.

    Args:
      logits: [B, N, V] float32, after the first N nodes of a chain.
      positions, rows, written: as in `choose`, for all nodes of every row in order.
    """
    every, depths = jnp.arange(logits.shape[0]), jnp.arange(logits.shape[1])
    depths = jnp.broadcast_to(depths, logits.shape[:2])
    laws = _law(logits, rows, written, every, depths, positions, depths)
    best = likeliest(laws)[..., None] == jnp.arange(logits.shape[-1])
    greedy = jnp.where(best, 0.0, -jnp.inf)
    sampled = jax.nn.log_softmax(laws, axis=-1)
    return jnp.where((rows.temperature > 0)[:, None, None], sampled, greedy)

"""Log-probabilities of tokens: the log-softmax of the target's logits, before temperature,
filters, biases and penalties."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxspec.models.decoder import unembed
from jaxspec.models.params import TargetParams
from jaxspec.trees.candidates import top_logits
from jaxspec.trees.packing import Packing

NONE, NEW, ALL = 0, 1, 2  # a row asks for none, those of new tokens, or the prompt's too
NODES_AT_ONCE = 32  # prompt tokens whose logits [., V] are in memory at a time


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogProbs:
    """Log-probabilities at every position of a row, given the tokens before it.

    Rows that did not ask for them, and each row's first position, hold meaningless values.

    Attributes:
      chosen: [B, S] float32, log-probability of the token there.
      tokens: [B, S, K] int32, the likeliest tokens, best first.
      top: [B, S, K] float32, their log-probabilities.
    """

    chosen: jax.Array
    tokens: jax.Array
    top: jax.Array


def empty_logprobs(rows: int, places: int, top: int) -> LogProbs | None:
    """Empty arrays for `top` alternatives at each of `places` positions; None if `top` is 0."""
    if not top:
        return None
    shape = (rows, places, top)
    return LogProbs(
        jnp.zeros(shape[:2], jnp.float32),
        jnp.zeros(shape, jnp.int32),
        jnp.zeros(shape, jnp.float32),
    )


def of_tokens(logits: jax.Array, tokens: jax.Array, top: int) -> LogProbs:
    """Log-probabilities of tokens [B, C], and of the likeliest ones, from logits [B, C, V]."""
    ids, best, total = top_logits(logits, top)
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return LogProbs(chosen - total, ids, best - total[..., None])


def of_path(
    logits: jax.Array,
    packing: Packing | None,
    path: jax.Array,
    tokens: jax.Array,
    asked: jax.Array,
    top: int,
) -> LogProbs | None:
    """Log-probabilities of the tokens chosen after the nodes of a path.

    Only rows that ask cost anything; they run one at a time, with [C, V] in memory.

    Args:
      logits: of a forward over trees, [B, N, V], or [1, T, V] with a packing.
      path, tokens: [B, C] int32, nodes, and the token after each.
      asked: [B] int32, `NONE`, `NEW` or `ALL`.
    """
    if not top:
        return None
    asks = asked > NONE
    order = jnp.argsort(~asks)

    def one_row(i, kept):
        row = order[i]
        at = path[row] if packing is None else packing.place[row, path[row]]
        node_logits = logits[row if packing is None else 0, at]
        new = of_tokens(node_logits[None], tokens[row][None], top)
        put = jax.lax.dynamic_update_slice_in_dim
        return jax.tree.map(lambda x, y: put(x, y, row, 0), kept, new)

    return _if_asked(asks, one_row, empty_logprobs(*path.shape, top))


def of_prompts(
    params: TargetParams,
    hidden: jax.Array,
    tokens: jax.Array,
    start: jax.Array,
    asked: jax.Array,
    kept: LogProbs,
) -> LogProbs:
    """Adds to `kept` the log-probabilities of the tokens that follow those of a chunk.

    Args:
      hidden: [B, C, M], of the chunk.
      tokens: [B, S] int32, the prompts.
      start: scalar, position of the chunk's first token.
    """
    asks = asked == ALL
    order = jnp.argsort(~asks)
    top = kept.top.shape[-1]

    def some_nodes(row, first, count, kept):
        at = start + 1 + first + jnp.arange(count)  # the last may be past the end of the row
        following = tokens.at[row, at].get(mode="fill", fill_value=0)
        part = jax.lax.dynamic_slice(hidden, (row, first, 0), (1, count, hidden.shape[-1]))
        new = of_tokens(unembed(params, part), following[None], top)
        return jax.tree.map(lambda x, y: x.at[row, at].set(y[0], mode="drop"), kept, new)

    def one_row(i, kept):
        for first in range(0, hidden.shape[1], NODES_AT_ONCE):
            count = min(NODES_AT_ONCE, hidden.shape[1] - first)
            kept = some_nodes(order[i], first, count, kept)
        return kept

    return _if_asked(asks, one_row, kept)


def _if_asked(asks: jax.Array, one_row: Callable, kept: LogProbs) -> LogProbs:
    """Applies `one_row(i, kept)` for the first i up to the number of rows that ask [B].

    XLA hoists loop-invariant work out of the loop and runs it even if no row asks; with one row
    that is all the work. So the loop is inside a conditional.
    """

    def every():
        return jax.lax.fori_loop(0, asks.sum(), one_row, kept)

    return jax.lax.cond(asks.any(), every, lambda: kept)

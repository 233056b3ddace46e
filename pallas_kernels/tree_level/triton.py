"""One level of a tree as two Triton kernels, written in Pallas.

`score` reads the head's matrix once: a program multiplies one tile of the vocabulary with all
parents and writes the logits, their maximum and their sum of exponentials. `select` has one
program per batch row: it joins the tiles' sums to each parent's normaliser, finds the F pairs
of parent and chunk with the best maxima, then the F best children in them, sorts and writes
these, and raises the floor. A level without a parent above the floor costs two launches, and
neither reads the matrix.

Scores are at most zero, so float32 bits without the sign order them: the k-th best of an array
is found by bisection over integers, and only the F kept ones are sorted.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.tree_level.reference import Levels

TILE = 128  # tokens of a program of `score`
DEPTH = 64  # contracted elements per step
MIN_ROWS = 16  # the smallest side of a Triton matrix product
MOST = 32_768  # most scores that one program holds
BLOCK = 4096  # scores per step when going block by block
INFINITE = 0x7F800000  # bits of infinity


def unsupported(
    levels: Levels, slot: jax.Array, base: jax.Array, latent: jax.Array, output: jax.Array
) -> str | None:
    """Why the Triton kernels do not support these shapes; None if they do."""
    children, parents, (vocab, rank) = levels.scores.shape[-1], latent.shape[1], output.shape
    if output.dtype != jnp.bfloat16:
        return f"the output matrix is {output.dtype}; expected bfloat16"
    if rank % DEPTH:
        return f"the rank is {rank}; expected a multiple of {DEPTH}"
    rows, chunks, width = _layout(vocab, parents, children)
    if max(rows * chunks, _power(children) * width) > MOST:
        return (
            f"{children} children of {parents} parents among {vocab} tokens are more than "
            f"{MOST} scores at a time"
        )
    if rows * chunks < children:
        return f"{children} children of {parents} parents among only {vocab} tokens"
    return None


def _layout(vocab: int, parents: int, children: int) -> tuple[int, int, int]:
    """Parents and chunks of the vocabulary, as powers of two, and the width of a chunk."""
    rows = max(MIN_ROWS, _power(parents))
    width = TILE if children > 64 else 2 * TILE
    return rows, _power(pl.cdiv(vocab, width)), width


def _power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


@functools.partial(jax.jit, static_argnames="interpret")
def grow_level_triton(
    levels: Levels,
    slot: jax.Array,
    base: jax.Array,
    latent: jax.Array,
    output: jax.Array,
    *,
    interpret: bool = False,
) -> Levels:
    """See `grow_level_reference`; `interpret` runs it on the CPU, to check numbers."""
    batch, parents, _ = latent.shape
    vocab, children = output.shape[0], levels.scores.shape[-1]
    rows, chunks, width = _layout(vocab, parents, children)
    tiles = pl.cdiv(vocab, TILE)
    slot = jnp.reshape(slot, 1).astype(jnp.int32)
    shape = jax.ShapeDtypeStruct
    logits, maxima, sums = pl.pallas_call(
        functools.partial(score, rows=rows),
        out_shape=(
            shape((batch, parents, vocab), jnp.float32),
            shape((batch, parents, tiles), jnp.float32),
            shape((batch, parents, tiles), jnp.float32),
        ),
        grid=(batch, tiles),  # a tile is still in the cache for the next row
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=4),
        interpret=interpret,
        name="tree_level_score",
    )(slot, levels.floor, levels.scores, base, latent, output)

    kept = (levels.scores, levels.parents, levels.tokens, levels.floor)
    scratch = (
        shape((batch, rows), jnp.float32),
        shape((batch, max(rows * chunks, _power(children) * width)), jnp.int32),
        shape((batch, _power(children)), jnp.int32),
        shape((batch, _power(children)), jnp.int32),
        shape((batch, _power(children)), jnp.int32),
    )
    found = pl.pallas_call(
        functools.partial(select, rows=rows, chunks=chunks, width=width, interpret=interpret),
        out_shape=tuple(shape(x.shape, x.dtype) for x in kept) + scratch,
        grid=(batch,),
        input_output_aliases={4: 0, 5: 1, 6: 2, 7: 3},
        compiler_params=plgpu.CompilerParams(num_warps=32),
        interpret=interpret,
        name="tree_level_select",
    )(slot, logits, maxima, sums, *kept)
    return Levels(*found[:4])


def score(
    slot_ref,
    floor_ref,
    scores_ref,
    base_ref,
    latent_ref,
    output_ref,
    logits_ref,
    maxima_ref,
    sums_ref,
    *,
    rows: int,
):
    """Logits of one tile of the vocabulary after all parents."""
    parents, rank = latent_ref.shape[1:]
    vocab = output_ref.shape[0]
    b, slot = pl.program_id(0), slot_ref[0]
    # Every other level goes backwards: the end of the matrix may still be in the cache.
    t = pl.program_id(1)
    t = t + slot % 2 * (pl.num_programs(1) - 1 - 2 * t)
    row = jnp.arange(rows)
    real = row < parents
    above = plgpu.load(scores_ref.at[b, slot, row], mask=real, other=-jnp.inf)

    @pl.when(jnp.max(above) > floor_ref[b])
    def _():
        token = t * TILE + jnp.arange(TILE)
        exists = token < vocab

        def step(i, total):
            lane = i * DEPTH + jnp.arange(DEPTH)
            x = plgpu.load(
                latent_ref.at[b, row[:, None], lane[None, :]],
                mask=jnp.broadcast_to(real[:, None], (rows, DEPTH)),
                other=0.0,
            )
            w = plgpu.load(
                output_ref.at[token[:, None], lane[None, :]],
                mask=jnp.broadcast_to(exists[:, None], (TILE, DEPTH)),
                other=0.0,
            )
            return total + plgpu.dot(x, w.T)

        zero = jnp.zeros((rows, TILE), jnp.float32)
        bias = lax.fori_loop(0, rank // DEPTH, step, zero)
        base = plgpu.load(base_ref.at[b, slot, token], mask=exists, other=-jnp.inf)
        logits = bias + base[None, :]
        mask = real[:, None] & exists[None, :]
        plgpu.store(logits_ref.at[b, row[:, None], token[None, :]], logits, mask=mask)
        peak = jnp.max(logits, axis=1)
        total = jnp.sum(jnp.exp(logits - _finite(peak)[:, None]), axis=1)
        plgpu.store(maxima_ref.at[b, row, t], peak, mask=real)
        plgpu.store(sums_ref.at[b, row, t], total, mask=real)


def select(
    slot_ref,
    logits_ref,
    maxima_ref,
    sums_ref,
    *refs,
    rows: int,
    chunks: int,
    width: int,
    interpret: bool,
):
    """The best children of one batch row, in order, and the floor after them."""
    scores_ref, parents_ref, tokens_ref, floor_ref, totals_ref, *scratch = refs[4:]
    costs_ref, first_ref, second_ref, bits_ref = scratch
    children = scores_ref.shape[-1]
    parents, vocab = logits_ref.shape[1:]
    places, last = _power(children), maxima_ref.shape[-1]
    block = min(rows, max(1, BLOCK // chunks))  # parents at a time
    ranked = min(places, BLOCK // places)  # children at a time
    b = pl.program_id(0)
    slot, floor = slot_ref[0], floor_ref[b]

    def synchronise():  # what one thread wrote others read
        if not interpret:
            plgpu.debug_barrier()

    def scores_above(parent, some):
        above = plgpu.load(scores_ref.at[b, slot, parent], mask=some, other=-jnp.inf)
        return above, some & (above > floor)

    def chunk_maxima(row):
        """Maxima of all tiles of each chunk, each [A, C], and where they are."""
        tile = jnp.arange(chunks) * (width // TILE)
        at = [
            ((b, row[:, None], tile[None, :] + i), _both(row < parents, tile + i < last))
            for i in range(width // TILE)
        ]
        return [plgpu.load(maxima_ref.at[p], mask=m, other=-jnp.inf) for p, m in at], at

    def normalise(i, _):
        row = i * block + jnp.arange(block)
        peaks, at = chunk_maxima(row)
        peak = _finite(jnp.max(functools.reduce(jnp.maximum, peaks), axis=1))
        total = jnp.zeros((block, chunks), jnp.float32)
        for p, (place, mask) in zip(peaks, at, strict=True):
            sums = plgpu.load(sums_ref.at[place], mask=mask, other=0.0)
            total = total + sums * jnp.exp(p - peak[:, None])
        plgpu.store(totals_ref.at[b, row], peak + jnp.log(jnp.sum(total, axis=1)))

    def pair_cost(row):
        above, live = scores_above(row, row < parents)
        best = functools.reduce(jnp.maximum, chunk_maxima(row)[0])
        log_total = totals_ref[b, row]
        return _cost(above[:, None], best, log_total[:, None], live[:, None])

    def write_pairs(row, chosen, place, _):
        pair = row[:, None] * chunks + jnp.arange(chunks)[None, :]
        plgpu.store(first_ref.at[b, place], pair, mask=chosen)

    def finalists(place):
        """Parents [A] and tokens [A, width] of some pairs."""
        pair = plgpu.load(first_ref.at[b, place], mask=place < children, other=0)
        token = (pair % chunks)[:, None] * width + jnp.arange(width)[None, :]
        return pair // chunks, token

    def child_cost(place):
        parent, token = finalists(place)
        above, live = scores_above(parent, (place < children) & (parent < parents))
        mask = live[:, None] & (token < vocab)
        at = b, jnp.broadcast_to(parent[:, None], token.shape), token
        logits = plgpu.load(logits_ref.at[at], mask=mask, other=-jnp.inf)
        log_total = totals_ref[b, jnp.minimum(parent, rows - 1)]
        return _cost(above[:, None], logits, log_total[:, None], mask)

    def write_children(place, chosen, order, cost):
        parent, token = finalists(place)
        child = jnp.broadcast_to(parent[:, None], token.shape) * vocab + token
        plgpu.store(second_ref.at[b, order], child, mask=chosen)
        plgpu.store(bits_ref.at[b, order], cost, mask=chosen)

    def sort(i, _):
        place, other = i * ranked + jnp.arange(ranked), jnp.arange(places)
        inside = place < children
        cost = plgpu.load(bits_ref.at[b, place], mask=inside, other=INFINITE)
        others = plgpu.load(bits_ref.at[b, other], mask=other < children, other=INFINITE)
        smaller = others[None, :] < cost[:, None]
        earlier = (others[None, :] == cost[:, None]) & (other[None, :] < place[:, None])
        rank = jnp.sum((smaller | earlier).astype(jnp.int32), axis=1)
        child = plgpu.load(second_ref.at[b, place], mask=inside, other=0)
        at = b, slot + 1, rank
        plgpu.store(scores_ref.at[at], _score_of(cost), mask=inside)
        plgpu.store(parents_ref.at[at], child // vocab, mask=inside)
        plgpu.store(tokens_ref.at[at], child % vocab, mask=inside)

    @pl.when(jnp.max(scores_above(jnp.arange(rows), jnp.arange(rows) < parents)[0]) > floor)
    def _():
        lax.fori_loop(0, rows // block, normalise, None)
        synchronise()
        choose = functools.partial(_choose, costs_ref, b, children, synchronise)
        choose(pair_cost, write_pairs, rows, chunks)
        choose(child_cost, write_children, places, width)
        lax.fori_loop(0, places // ranked, sort, None)
        synchronise()

        count = (scores_ref.shape[1] - 1) * children
        node = jnp.arange(_power(count))
        found = plgpu.load(
            scores_ref.at[b, 1 + node // children, node % children],
            mask=node < count,
            other=-jnp.inf,
        )
        floor_ref[b] = _score_of(_kth(_bits(found), children))


def _finite(peak: jax.Array) -> jax.Array:
    """A maximum to subtract: 0 where nothing is possible."""
    return jnp.where(peak > -jnp.inf, peak, 0.0)


def _bits(scores: jax.Array) -> jax.Array:
    """Scores <= 0 as integers >= 0, the better the smaller."""
    return lax.bitcast_convert_type(jnp.abs(scores), jnp.int32)


def _score_of(bits: jax.Array) -> jax.Array:
    return -lax.bitcast_convert_type(bits, jnp.float32)


def _cost(above, logits, log_total, live) -> jax.Array:
    """Bits of the children's scores; infinite if there is no child, or for NaN."""
    bits = _bits(above + jnp.minimum(logits - log_total, 0.0))
    return jnp.where(live, jnp.minimum(bits, INFINITE), INFINITE)


def _both(rows, columns) -> jax.Array:
    return rows[:, None] & columns[None, :]


def _kth(cost: jax.Array, k: int, *, exact: bool = True) -> jax.Array:
    """The smallest bound that k of the costs do not exceed; unless exact, any such bound."""

    def halve(bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        count = jnp.sum((cost <= middle).astype(jnp.int32))
        low = jnp.where(count >= k, low, middle + 1)
        high = jnp.where(count >= k, middle, high)
        return (low if exact else jnp.where(count == k, high, low)), high

    start = jnp.min(cost), jnp.int32(INFINITE)
    return lax.while_loop(lambda bounds: bounds[0] < bounds[1], halve, start)[1]


def _choose(costs_ref, b, k: int, synchronise, fill, write, rows: int, columns: int) -> None:
    """Finds the k smallest of [rows, columns] costs; ties with the last go to the first.

    Args:
      costs_ref: [B, rows * columns or more], scratch for the costs, in row b.
      fill: row indices [A] -> their costs [A, columns].
      write: (row indices, which are chosen, their places 0 … k - 1, costs) -> None.
    """
    block = min(rows, max(1, BLOCK // columns))

    def rows_of(i):
        row = i * block + jnp.arange(block)
        return row, row[:, None] * columns + jnp.arange(columns)[None, :]

    def keep(i, _):
        row, place = rows_of(i)
        plgpu.store(costs_ref.at[b, place], fill(row))

    lax.fori_loop(0, rows // block, keep, None)
    synchronise()
    cost = plgpu.load(costs_ref.at[b, jnp.arange(rows * columns)])
    bound = _kth(cost, k, exact=False)
    wanted = k - jnp.sum((cost < bound).astype(jnp.int32))

    def compact(i, carry):
        row, place = rows_of(i)
        cost = plgpu.load(costs_ref.at[b, place])
        below, equal = (cost < bound).astype(jnp.int32), (cost == bound).astype(jnp.int32)
        both = below + (equal << 15)  # counted at once: fewer than 2**15 are below
        per_row = jnp.sum(both, axis=1)
        start = carry + jnp.cumsum(per_row, axis=0) - per_row
        before = jnp.cumsum(both, axis=1) - both + start[:, None]
        below_before, equal_before = before & 0x7FFF, before >> 15
        chosen = (below > 0) | ((equal > 0) & (equal_before < wanted))
        write(row, chosen, below_before + jnp.minimum(equal_before, wanted), cost)
        return carry + jnp.sum(per_row)

    lax.fori_loop(0, rows // block, compact, jnp.int32(0))
    synchronise()

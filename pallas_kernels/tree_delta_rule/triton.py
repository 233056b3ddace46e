"""The gated delta rule over a tree as one Triton kernel, written in Pallas.

A program computes some columns of one value head, which are independent of the others, a block
of nodes at a time. For each block it reads the memory, subtracts the contributions of earlier
blocks, solves the block's own triangle, and writes its updates. So D and A stay inside the
program; updates and sums of decays are read back after a barrier. If there are several blocks,
XLA computes the products k . k and q . k, which all programs of a key head share.

A block's triangle is inverted in pieces of `PIECE` nodes, all pieces at once, row by row;
between pieces the solution is substituted, in as many steps as there are pieces. Neither uses
powers of A, which lose digits where keys repeat.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.tree_attention.triton import products_of
from pallas_kernels.tree_delta_rule.reference import LARGEST_DECAY, coarse_step

BLOCK = 32  # nodes of a step: one word of ancestors; with 64, registers spill
PIECE = 16  # nodes whose triangle is inverted row by row
STEP = 32  # elements of keys at a time
COLUMNS = 32  # columns of a value head per program
WARPS, STAGES = 4, 1


def unsupported(q: jax.Array, k: jax.Array, v: jax.Array, *_) -> str | None:
    """Why the kernel does not support these shapes; None if it does."""
    key_dim, value_dim = k.shape[-1], v.shape[-1]
    if key_dim & (key_dim - 1) or key_dim < 16 or value_dim % COLUMNS:
        return (
            f"keys have {key_dim} elements and values {value_dim}; expected a power of two "
            f"from 16, and a multiple of {COLUMNS}"
        )
    return None


@functools.partial(jax.jit, static_argnames="interpret")
def tree_delta_rule_triton(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    decay: jax.Array,
    rate: jax.Array,
    memory: jax.Array,
    ancestors: jax.Array,
    begun: jax.Array,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See `tree_delta_rule_reference`; `interpret` runs it on the CPU, to check numbers."""
    batch, n, key_heads, group, value_dim = v.shape
    products = ()
    if n > BLOCK:
        # Once for all value heads of a key head. Without the barrier XLA would join the
        # products, and queries and keys in memory before.
        against_keys = functools.partial(jnp.einsum, "bnjd,bkjd->bjnk", precision="highest")
        products = against_keys(q, lax.optimization_barrier(k)), against_keys(k, k)
    # The sums of decays are each program's own.
    programs = value_dim // COLUMNS, key_heads * group, batch
    shapes = (v.shape, v.shape, (*programs, 2, n))
    out, updates, _ = pl.pallas_call(
        functools.partial(run_nodes, interpret=interpret),
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
        grid=programs,
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        interpret=interpret,
        name="tree_delta_rule",
    )(
        *(q, k, v, decay, rate, memory),
        lax.bitcast_convert_type(ancestors, jnp.int32),
        begun.astype(jnp.int32),
        *products,
    )
    return out, updates


def run_nodes(
    q_ref,
    k_ref,
    v_ref,
    decay_ref,
    rate_ref,
    memory_ref,
    ancestors_ref,
    begun_ref,
    *refs,
    interpret: bool,
):
    """Outputs and updates of all nodes, of some columns of one value head of one sequence."""
    *products, out_ref, updates_ref, sums_ref = refs
    n, _, group, value_dim = v_ref.shape[1:]
    key_dim = k_ref.shape[-1]
    program = tuple(pl.program_id(axis) for axis in range(3))
    b, head, member = program[2], program[1] // group, program[1] % group
    column = program[0] * COLUMNS + jnp.arange(COLUMNS)
    dot = functools.partial(plgpu.dot, precision=products_of(jnp.float32, interpret))
    step, coarse_of = min(key_dim, STEP), coarse_step(n)

    def places(ref, *place, node, lanes):
        """Elements of nodes [BLOCK], and a mask of those that exist."""
        real = jnp.broadcast_to((node < n)[:, None], (BLOCK, lanes.size))
        return ref.at[(b, node[:, None], head, *place, lanes[None, :])], real

    def rows(*ref, node, lanes):
        at, real = places(*ref, node=node, lanes=lanes)
        return plgpu.load(at, mask=real, other=0.0)

    def recalled(ref, node):
        """S0^T of keys or queries."""

        def add(s, total):
            lanes = s * step + jnp.arange(step)
            at = lanes[:, None], (member * value_dim + column)[None, :]
            memory = plgpu.load(memory_ref.at[(b, head, *at)])
            return total + dot(rows(ref, node=node, lanes=lanes), memory)

        zeros = jnp.zeros((BLOCK, COLUMNS), jnp.float32)
        return lax.fori_loop(0, key_dim // step, add, zeros)

    def alike(ref, node, before):
        """Products of a block's keys or queries with the keys of that block or an earlier."""
        if products:
            real = (node < n)[:, None] & (before < n)[None, :]
            ref = products[0] if ref is q_ref else products[1]
            at = ref.at[b, head, node[:, None], before[None, :]]
            return plgpu.load(at, mask=real, other=0.0)

        def add(s, total):
            lanes = s * step + jnp.arange(step)
            keys = rows(k_ref, node=before, lanes=lanes)
            return total + dot(rows(ref, node=node, lanes=lanes), keys.T)

        zeros = jnp.zeros((BLOCK, BLOCK), jnp.float32)
        return lax.fori_loop(0, key_dim // step, add, zeros)

    def is_above(node, j):
        """Whether nodes of block j are those [BLOCK], or above them."""
        word = jnp.broadcast_to(j, node.shape)
        bits = plgpu.load(ancestors_ref.at[b, node, word], mask=node < n, other=0)
        return (bits[:, None] >> jnp.arange(BLOCK)[None, :]) & 1 == 1

    def sums_of(i, node):
        """G of a block in two parts, see `decay_sums`."""

        def add(j, totals):
            other, related = j * BLOCK + jnp.arange(BLOCK), is_above(node, j)
            at = decay_ref.at[b, other, head, member]
            decay = plgpu.load(at, mask=other < n, other=0.0)
            decay = jnp.maximum(decay, -LARGEST_DECAY)
            coarse = jnp.floor(decay / coarse_of + 0.5) * coarse_of  # rounded
            return tuple(
                total + jnp.where(related, part[None, :], 0.0).sum(1)
                for total, part in zip(totals, (coarse, decay - coarse), strict=True)
            )

        zeros = jnp.zeros(BLOCK, jnp.float32)
        return lax.fori_loop(0, i + 1, add, (zeros, zeros))

    def own_sums(part, node):
        return sums_ref.at[(*program, part, node)]

    def kept(node, sums, j, others):
        """D between nodes [BLOCK] and those of block j, from G of both."""
        coarse, rest = (a[:, None] - b[None, :] for a, b in zip(sums, others, strict=True))
        return jnp.where(is_above(node, j), jnp.exp(coarse + rest), 0.0)

    def run_block(i, carry):
        node = i * BLOCK + jnp.arange(BLOCK)
        sums = coarse, rest = sums_of(i, node)
        for part, x in enumerate(sums):
            plgpu.store(own_sums(part, node), x, mask=node < n)
        from_root = jnp.where(begun_ref[b] == 1, jnp.exp(coarse + rest), 0.0)[:, None]
        wanted = rows(v_ref, member, node=node, lanes=column)
        wanted = wanted - from_root * recalled(k_ref, node)
        out = from_root * recalled(q_ref, node)

        def earlier(j, carry):
            wanted, out = carry
            before = j * BLOCK + jnp.arange(BLOCK)
            others = tuple(
                plgpu.load(own_sums(part, before), mask=before < n, other=0.0)
                for part in range(2)
            )
            left = kept(node, sums, j, others)
            updates = rows(updates_ref, member, node=before, lanes=column)
            wanted = wanted - dot(left * alike(k_ref, node, before), updates)
            return wanted, out + dot(left * alike(q_ref, node, before), updates)

        wanted, out = lax.fori_loop(0, i, earlier, (wanted, out))
        rate = plgpu.load(rate_ref.at[b, node, head, member], mask=node < n, other=0.0)
        above = jnp.arange(BLOCK)[:, None] > jnp.arange(BLOCK)[None, :]
        own = kept(node, sums, i, sums)
        left = jnp.where(above, own, 0.0)
        below = rate[:, None] * left * alike(k_ref, node, node)  # A
        updates = solve_block(below, rate[:, None] * wanted, dot)
        at, real = places(updates_ref, member, node=node, lanes=column)
        plgpu.store(at, updates, mask=real)
        out = out + dot(own * alike(q_ref, node, node), updates)
        at, _ = places(out_ref, member, node=node, lanes=column)
        plgpu.store(at, out, mask=real)
        if not interpret:
            plgpu.debug_barrier()  # other threads of the program read these updates and sums
        return carry

    lax.fori_loop(0, pl.cdiv(n, BLOCK), run_block, 0)


def solve_block(below: jax.Array, wanted: jax.Array, dot) -> jax.Array:
    """X of (I + A) X = Y for A [BLOCK, BLOCK], strictly lower triangular."""
    piece = jnp.arange(BLOCK) // PIECE
    same = piece[:, None] == piece[None, :]
    inverse = invert_pieces(jnp.where(same, below, 0.0))
    between = dot(inverse, jnp.where(same, 0.0, below))
    found = start = dot(inverse, wanted)
    for _ in range(BLOCK // PIECE - 1):  # after step p the pieces up to p stay
        found = start - dot(between, found)
    return found


def invert_pieces(below: jax.Array) -> jax.Array:
    """(I + A)^-1 of A [BLOCK, BLOCK], strictly lower triangular within pieces, else 0."""
    node = jnp.arange(BLOCK)
    place = node % PIECE
    turned = below.T  # own rows of A lie along the axis that `inverse` is summed over

    def substitute(i, inverse):
        """Row i of every piece: the unit row minus the rows above, weighed by A."""
        own = jnp.where(place[None, :] == i, turned, 0.0).sum(1)
        taken = (own[:, None] * inverse).sum(0)
        same = node[:, None] // PIECE == node[None, :] // PIECE
        row = same & (place[:, None] == i)
        return inverse - jnp.where(row, taken[None, :], 0.0)

    identity = jnp.where(node[:, None] == node[None, :], 1.0, 0.0)
    return lax.fori_loop(1, PIECE, substitute, identity)

"""The gated delta rule over a tree as one Triton kernel, written in Pallas.

A program computes some columns of one value head, which are independent of the others, a block
of nodes at a time. For each block it reads the memory, subtracts the contributions of earlier
blocks, solves the block's own triangle, and writes its updates. So D and A stay inside the
program; updates are read back after a barrier. XLA computes the products k . k and q . k, which
all programs of a key head share.

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

from pallas_kernels.tree_attention.reference import related_nodes
from pallas_kernels.tree_delta_rule.reference import decay_sums

BLOCK = 32  # nodes of a step: one word of ancestors; with 64, registers spill
PIECE = 16  # nodes whose triangle is inverted row by row
STEP = 32  # elements of keys at a time
COLUMNS = 32  # columns of a value head per program
WARPS, STAGES = 4, 1


def unsupported(k: jax.Array, v: jax.Array) -> str | None:
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
    sums = decay_sums(decay, related_nodes(ancestors, n))
    # Once for all value heads of a key head. Without the barrier XLA would join the products,
    # and queries and keys in memory before.
    against_keys = functools.partial(jnp.einsum, "bnjd,bkjd->bjnk", precision="highest")
    overlap, seen = against_keys(k, k), against_keys(q, lax.optimization_barrier(k))
    shape = jax.ShapeDtypeStruct(v.shape, jnp.float32)
    return pl.pallas_call(
        functools.partial(run_nodes, interpret=interpret),
        out_shape=[shape, shape],
        grid=(value_dim // COLUMNS, key_heads * group, batch),
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        interpret=interpret,
        name="tree_delta_rule",
    )(
        *(q, k, v, overlap, seen, sums, rate, memory),
        lax.bitcast_convert_type(ancestors, jnp.int32),
        begun.astype(jnp.int32),
    )


def run_nodes(
    q_ref,
    k_ref,
    v_ref,
    overlap_ref,
    seen_ref,
    sums_ref,
    rate_ref,
    memory_ref,
    ancestors_ref,
    begun_ref,
    out_ref,
    updates_ref,
    *,
    interpret: bool,
):
    """Outputs and updates of all nodes, of some columns of one value head of one sequence."""
    n, _, group, value_dim = v_ref.shape[1:]
    key_dim = k_ref.shape[-1]
    b, head = pl.program_id(2), pl.program_id(1) // group
    member = pl.program_id(1) % group
    column = pl.program_id(0) * COLUMNS + jnp.arange(COLUMNS)
    dot = functools.partial(plgpu.dot, precision=_products(interpret))
    step = min(key_dim, STEP)

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
        """Products of a block's keys or queries with the keys of an earlier block."""
        real = (node < n)[:, None] & (before < n)[None, :]
        at = ref.at[b, head, node[:, None], before[None, :]]
        return plgpu.load(at, mask=real, other=0.0)

    def sums_of(node):
        real = node < n
        parts = (sums_ref.at[part, b, head, member, node] for part in range(2))
        return tuple(plgpu.load(at, mask=real, other=0.0) for at in parts)

    def kept(node, j):
        """D between nodes [BLOCK] and those of block j."""
        other = jnp.arange(BLOCK)
        word = jnp.broadcast_to(j, node.shape)
        bits = plgpu.load(ancestors_ref.at[b, node, word], mask=node < n, other=0)
        related = (bits[:, None] >> other[None, :]) & 1 == 1
        coarse, rest = (
            own[:, None] - above[None, :]
            for own, above in zip(sums_of(node), sums_of(j * BLOCK + other), strict=True)
        )
        return jnp.where(related, jnp.exp(coarse + rest), 0.0)

    def run_block(i, carry):
        node = i * BLOCK + jnp.arange(BLOCK)
        coarse, rest = sums_of(node)
        from_root = jnp.where(begun_ref[b] == 1, jnp.exp(coarse + rest), 0.0)[:, None]
        wanted = rows(v_ref, member, node=node, lanes=column)
        wanted = wanted - from_root * recalled(k_ref, node)
        out = from_root * recalled(q_ref, node)

        def earlier(j, carry):
            wanted, out = carry
            before = j * BLOCK + jnp.arange(BLOCK)
            left = kept(node, j)
            updates = rows(updates_ref, member, node=before, lanes=column)
            wanted = wanted - dot(left * alike(overlap_ref, node, before), updates)
            return wanted, out + dot(left * alike(seen_ref, node, before), updates)

        wanted, out = lax.fori_loop(0, i, earlier, (wanted, out))
        rate = plgpu.load(rate_ref.at[b, node, head, member], mask=node < n, other=0.0)
        above = jnp.arange(BLOCK)[:, None] > jnp.arange(BLOCK)[None, :]
        left = jnp.where(above, kept(node, i), 0.0)
        below = rate[:, None] * left * alike(overlap_ref, node, node)  # A
        updates = solve_block(below, rate[:, None] * wanted, dot)
        at, real = places(updates_ref, member, node=node, lanes=column)
        plgpu.store(at, updates, mask=real)
        out = out + dot(kept(node, i) * alike(seen_ref, node, node), updates)
        at, _ = places(out_ref, member, node=node, lanes=column)
        plgpu.store(at, out, mask=real)
        if not interpret:
            plgpu.debug_barrier()  # other threads of the program read these updates
        return carry

    lax.fori_loop(0, pl.cdiv(n, BLOCK), run_block, 0)


def _products(interpret: bool):
    """Precision of the matrix products: three TF32 terms keep 21 bits of float32's 24."""
    return lax.Precision.HIGHEST if interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3


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

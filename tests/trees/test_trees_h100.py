"""The builders compiled for an H100: one loop, nothing waits for the host, kernels counted."""

import functools

import jax
import jax.numpy as jnp
import pytest

from jaxspec.config import TreeConfig
from jaxspec.trees.build import build
from jaxspec.trees.path_conditioned import LowRank, path_conditioned
from jaxspec.trees.transitions import from_transitions
from jaxspec.trees.tree import ancestors

pytestmark = pytest.mark.h100

DEPTH, VOCAB, SIZE, WIDTH = 15, 151_936, 256, 7


@functools.partial(jax.jit, static_argnames="size")
def grown_best_first(logits, root, budget, size):
    tree = build(TreeConfig("best_first", size=size, width=WIDTH), logits, root, budget)
    return tree, ancestors(tree)


@functools.partial(jax.jit, static_argnames="size")
def grown_top_budget(logits, root, budget, size):
    tree = build(TreeConfig("top_budget", size=size), logits, root, budget)
    return tree, ancestors(tree)


@functools.partial(jax.jit, static_argnames="size")
def grown_path_conditioned(logits, root, budget, size):
    def step(slot, state, tokens):
        repeated = tokens[..., None] == jnp.arange(logits.shape[-1])
        return logits[:, slot, None] - 2.0 * repeated, state

    depth = logits.shape[1]
    tree = path_conditioned(root, step, (), depth=depth, parents=16, budget=budget, size=size)
    return tree, ancestors(tree)


@functools.partial(jax.jit, static_argnames="size")
def grown_from_transitions(logits, root, budget, size):
    table = logits[..., :256].reshape(*logits.shape[:2], 16, 16)
    children = jnp.broadcast_to(jnp.arange(16), table.shape)
    tree = from_transitions(
        children, jnp.minimum(table, 0), children, root, budget=budget, size=size
    )
    return tree, ancestors(tree)


# Launches per tree, ancestor sets included: about five per step of `best_first`, which takes
# (N - 1) / W of them, 15 per level of the others, and 20 where one scores the vocabulary.
@pytest.mark.parametrize(
    "build, most",
    [
        (grown_best_first, 200),
        (grown_top_budget, 200),
        (grown_from_transitions, 200),
        (grown_path_conditioned, 350),
    ],
)
def test_one_loop_and_no_host(build, most):
    from pallas_kernels.h100.compile import compile_for_h100
    from pallas_kernels.h100.target import mesh

    sharding = jax.sharding.NamedSharding(mesh(), jax.sharding.PartitionSpec())
    logits = jax.ShapeDtypeStruct((8, DEPTH, VOCAB), jnp.float32, sharding=sharding)
    ids = jax.ShapeDtypeStruct((8,), jnp.int32, sharding=sharding)
    module = compile_for_h100(build, logits, ids, ids, size=SIZE).module
    ops = [op for body in module.computations.values() for op in body.values()]
    assert sum(op.code == "while" for op in ops) == 1
    assert module.host_transfers() == []
    assert module.launches() <= most


RANK, PARENTS = 256, 16


@functools.partial(jax.jit, static_argnames="size")
def grown_low_rank(logits, previous, output, root, budget, size):
    step = LowRank(logits, output, lambda slot, state, tokens: (previous[tokens], state))
    return path_conditioned(
        root, step, (), depth=DEPTH, parents=PARENTS, budget=budget, size=size
    )


@pytest.mark.parametrize("size", [64, 256])
def test_a_level_of_a_low_rank_head_reads_its_matrix_once_and_launches_little(size):
    from pallas_kernels.h100.compile import compile_for_h100
    from pallas_kernels.h100.target import mesh

    sharding = jax.sharding.NamedSharding(mesh(), jax.sharding.PartitionSpec())

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    table = array(jnp.bfloat16, VOCAB, RANK)
    arguments = (array(jnp.float32, 1, DEPTH, VOCAB), table, table)
    ids = array(jnp.int32, 1)
    program = compile_for_h100(grown_low_rank, *arguments, ids, ids, size=size)
    module = program.module
    matrix = VOCAB * RANK * 2
    assert module.host_transfers() == []
    assert module.large_copies(matrix // 4) == []
    assert module.launches() <= 6 * DEPTH + 30
    assert module.moved_bytes() <= 1.3 * matrix * DEPTH
    for kernel in program.kernels:
        if kernel.name.startswith("tree_level"):
            assert kernel.faults() == []

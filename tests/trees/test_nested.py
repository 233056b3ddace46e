"""A larger budget's tree contains a smaller one's, whatever built it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxspec.config import TreeConfig
from jaxspec.trees.build import build
from jaxspec.trees.merge import merge
from jaxspec.trees.path_conditioned import path_conditioned
from jaxspec.trees.transitions import from_transitions
from jaxspec.trees.tree import chain
from tests.trees.oracles import check_layout, paths, row

BATCH, DEPTH, VOCAB = 4, 4, 12


@functools.partial(jax.jit, static_argnames="size")
def grown_best_first(logits, root, budget, size):
    return build(TreeConfig("best_first", size=size, width=3), logits, root, budget)


@functools.partial(jax.jit, static_argnames="size")
def grown_top_budget(logits, root, budget, size):
    return build(TreeConfig("top_budget", size=size), logits, root, budget)


@functools.partial(jax.jit, static_argnames="size")
def grown_path_conditioned(logits, root, budget, size):
    def step(slot, state, tokens):
        unlike = tokens[..., None] != jnp.arange(logits.shape[-1])
        return logits[:, slot, None] + 2.0 * unlike, state

    depth = logits.shape[1]
    return path_conditioned(root, step, (), depth=depth, parents=5, budget=budget, size=size)


@functools.partial(jax.jit, static_argnames="size")
def grown_from_transitions(logits, root, budget, size):
    table = jax.nn.log_softmax(logits.reshape(BATCH, DEPTH, 3, 4))
    tokens = jnp.broadcast_to(jnp.arange(4), table.shape)
    following = jnp.broadcast_to(jnp.array([2, -1, 0, 1]), table.shape)
    return from_transitions(tokens, table, following, root, budget=budget, size=size)


@functools.partial(jax.jit, static_argnames="size")
def grown_chain(logits, root, budget, size):
    return chain(root, jnp.argmax(logits, -1), budget - 1, size=size)


@functools.partial(jax.jit, static_argnames="size")
def grown_merge(logits, root, budget, size):
    drafts = jnp.argmax(logits.reshape(BATCH, 3, DEPTH, 4), -1) // 2
    scores = jnp.cumsum(-jnp.abs(logits[:, :3, :DEPTH]), axis=-1)
    return merge(root, drafts, scores, size=size, budget=budget)


BUILDERS = [
    grown_best_first,
    grown_top_budget,
    grown_path_conditioned,
    grown_from_transitions,
    grown_chain,
    grown_merge,
]


@pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_larger_tree_contains_the_smaller(build, seed):
    """Budgets differ between rows, and so does N between the two trees."""
    draw = np.random.default_rng(seed)
    logits = jnp.asarray(draw.normal(size=(BATCH, DEPTH, VOCAB)), jnp.float32)
    root = jnp.arange(BATCH)
    small = draw.integers(1, 9, BATCH)
    large = draw.integers(small, 25)
    smaller = build(logits, root, jnp.asarray(small), size=8)
    larger = build(logits, root, jnp.asarray(large), size=24)
    for b in range(BATCH):
        one, other = row(smaller, b), row(larger, b)
        check_layout(one, b, small[b])
        check_layout(other, b, large[b])
        assert paths(one).keys() <= paths(other).keys()

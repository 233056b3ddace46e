"""A drafter that scores NaN drafts less: trees stay trees, and other rows stay as they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.config import TreeConfig
from jaxspec.trees.build import build
from jaxspec.trees.copies import with_copies
from jaxspec.trees.merge import merge
from jaxspec.trees.path_conditioned import path_conditioned
from jaxspec.trees.transitions import from_transitions
from jaxspec.trees.tree import chain
from tests.trees.oracles import check_layout, row

SIZE, DEPTH, VOCAB = 8, 3, 6
ROOT, BUDGET = jnp.array([9, 9]), jnp.array([SIZE, SIZE])
GOOD = jax.random.normal(jax.random.key(0), (2, DEPTH, VOCAB))


def builder(kind):
    return lambda logits: build(TreeConfig(kind, size=SIZE, width=2), logits, ROOT, BUDGET)


def conditioned(logits):
    def step(slot, state, tokens):
        return jnp.broadcast_to(logits[:, slot, None], (*tokens.shape, VOCAB)), state

    return path_conditioned(ROOT, step, (), depth=DEPTH, parents=4, budget=BUDGET, size=SIZE)


def transitions(logits):
    table = jnp.broadcast_to(jax.nn.log_softmax(logits)[:, :, None, :3], (2, DEPTH, 3, 3))
    tokens = jnp.broadcast_to(jnp.arange(3), table.shape)
    return from_transitions(tokens, table, tokens, ROOT, budget=BUDGET, size=SIZE)


def looked_up(logits):
    scores = jnp.cumsum(jax.nn.log_softmax(logits)[..., :2].swapaxes(1, 2), axis=-1)
    continuations = jnp.broadcast_to(jnp.arange(6).reshape(2, DEPTH), scores.shape)
    return merge(ROOT, continuations, scores, size=SIZE, budget=BUDGET)


def joined(kind):
    """Copies of 8 7 6 and of what follows behind a tree."""
    text = jnp.array([[9, 8, 7, 6, 9], [5, 9, 8, 7, 9]])

    def build(logits):
        tree = builder(kind)(logits)
        options = dict(weights=jnp.array([0.4, 0.6]), depth=DEPTH, budget=BUDGET)
        return with_copies(tree, text, jnp.array([4, 4]), **options)

    return build


BUILDERS = {
    **{kind: builder(kind) for kind in ("chain", "best_first", "top_budget")},
    "path_conditioned": conditioned,
    "transitions": transitions,
    "lookup": looked_up,
    "chain and copies": joined("chain"),
    "tree and copies": joined("top_budget"),
}


@pytest.mark.parametrize("bad", [0, 1, 2])
@pytest.mark.parametrize("name", BUILDERS)
def test_a_tree_ends_before_what_is_not_a_number(name, bad):
    """Row 0's scores at one depth are NaN; row 1's are not."""
    build = jax.jit(BUILDERS[name])
    spoiled = GOOD.at[0, bad].set(jnp.nan)
    found, expected = build(spoiled), build(GOOD)
    check_layout(row(found, 0), root=9, budget=SIZE)
    depths = np.asarray(found.depths[0])[np.asarray(found.scores[0]) > -np.inf]
    assert depths.max() == (DEPTH if "copies" in name else bad)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one[1], other[1])


def test_one_bad_logit_spoils_its_depth_alone():
    build = jax.jit(builder("top_budget"))
    one, whole = (build(GOOD.at[0, 1, some].set(jnp.nan)) for some in (4, slice(None)))
    np.testing.assert_array_equal(one.tokens, whole.tokens)


def test_a_chain_keeps_the_scores_before():
    tree = jax.jit(chain)(
        jnp.array([9]), jnp.array([[1, 2, 3]]), jnp.array([3]), jnp.array([[-1, jnp.nan, -1]])
    )
    assert tree.scores.tolist() == [[0, -1, -np.inf, -np.inf]]
    assert tree.parents.tolist() == [[-1, 0, 1, 2]]

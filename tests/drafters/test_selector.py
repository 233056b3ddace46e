"""The selector's lattice: table, walk and trees are one law."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.config import TreeConfig
from jaxspec.drafters.block import BlockDrafter
from jaxspec.drafters.rollout import greedy, rollout
from jaxspec.drafters.selector import Lattice, lattice, pick, walk
from jaxspec.drafters.weights import bind
from tests.drafters import cases
from tests.drafters.test_trees import best_paths, draft

CONFIG = cases.KINDS["dflash2"]


@functools.cache
def pass_of_one_block():
    """(head, vocabulary, stream, base logits, anchor) after six committed tokens."""
    params = cases.params("dflash2")
    head, vocabulary = bind(CONFIG, params.head), params.vocabulary
    state = cases.observed("dflash2", cases.features("dflash2", 1, 6))
    drafter, anchor = BlockDrafter(CONFIG, TreeConfig()), jnp.array([4])

    @jax.jit
    def run():
        stream = drafter.stream(params, state, anchor, jnp.array([6]))
        return stream, head.logits(vocabulary, stream)

    return head, vocabulary, *run(), anchor


@functools.cache
def table_of_one_block() -> Lattice:
    return jax.jit(lambda: lattice(*pass_of_one_block()))()


def first(slot, scores):
    return jnp.argmax(scores, axis=-1).astype(jnp.int32), scores


def test_the_table_is_the_sum_over_the_rank():
    """Against scores of the whole vocabulary, restricted to the candidates."""
    head, _, stream, base, anchor = pass_of_one_block()
    table = table_of_one_block()
    hidden = head.normed(stream)[0] @ head.sequential.hidden[...]  # [P, R]
    book, successors = head.sequential.previous[...], head.sequential.output[...]
    everything = base[0][:, None] + jnp.einsum("ar,pr,br->pab", book, hidden, successors)
    likely = np.argsort(-np.asarray(base[0]), axis=-1)[:, :4]
    np.testing.assert_array_equal(table.tokens[0], likely)
    above = np.concatenate([np.full((1, 4), int(anchor[0])), likely[:-1]])
    for slot in range(CONFIG.depth):
        expected = everything[slot][above[slot]][:, likely[slot]]
        np.testing.assert_allclose(table.scores[0, slot], expected, atol=1e-4)


def test_what_is_added_changes_scores_but_no_candidate():
    """The noise of a sampled answer must not bring tokens that the selector never met."""
    base = pass_of_one_block()[3]
    added = 9 * jax.random.normal(jax.random.key(0), base.shape)
    table = jax.jit(lambda: lattice(*pass_of_one_block(), added))()
    plain = table_of_one_block()
    np.testing.assert_array_equal(table.tokens, plain.tokens)
    expected = plain.scores + np.take_along_axis(added, plain.tokens, axis=-1)[:, :, None]
    np.testing.assert_allclose(table.scores, expected, atol=1e-5)


def test_the_walk_is_the_slot_by_slot_rollout():
    table = table_of_one_block()
    chosen, scores = walk(table.scores, first)
    head, vocabulary, stream, base, anchor = pass_of_one_block()
    run = jax.jit(lambda: rollout(head, vocabulary, stream, base, anchor, greedy))
    tokens, laws = run()
    np.testing.assert_array_equal(pick(table.tokens, chosen), tokens)
    inside = jnp.take_along_axis(laws, table.tokens, axis=-1)
    np.testing.assert_allclose(scores, inside, atol=1e-5)
    assert (np.isfinite(laws).sum(axis=-1) == CONFIG.candidates).all()


def test_a_walk_by_hand():
    """The unary scores prefer 7, and after 7 token 2; what follows 7 is corrected to 5."""
    scores = jnp.array([[[[3.0, 1.0]] * 2, [[0.0, 2.0], [5.0, 0.0]]]])
    chosen, rows = walk(scores, first)
    assert chosen.tolist() == [[0, 1]]
    assert rows.tolist() == [[[3.0, 1.0], [0.0, 2.0]]]
    assert pick(jnp.array([[[7, 9], [2, 5]]]), chosen).tolist() == [[7, 5]]


def test_ties_go_to_the_likelier():
    equal = jnp.zeros((1, 1, 4, 4))
    assert walk(equal, first)[0].tolist() == [[0]]


@pytest.mark.parametrize("kind", ["path_conditioned", "transitions"])
def test_a_tree_is_the_best_paths_of_candidates(kind):
    size = 24
    found = draft("dflash2", TreeConfig(kind, size, width=4, candidates=4))
    best = best_paths("dflash2", size)
    assert set(found) == set(best)
    for path, score in found.items():
        assert score == pytest.approx(best[path], abs=2e-4)


def test_a_smaller_table_of_transitions():
    """Of two parents of each depth the likelier child alone: no more than two paths."""
    found = draft("dflash2", TreeConfig("transitions", 24, width=1, candidates=2), whole=False)
    assert 1 < len(found) <= CONFIG.depth + 1


@pytest.mark.parametrize("kind", ["best_first", "top_budget"])
def test_other_trees_score_along_the_greedy_walk(kind):
    chain = draft("dflash2", TreeConfig("chain", 5))
    found = draft("dflash2", TreeConfig(kind, 24, width=3))
    for path, score in chain.items():
        assert found[path] == pytest.approx(score, abs=1e-5)

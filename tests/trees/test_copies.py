"""Copies among a tree's nodes: found after every path, and mixed with the drafter's choices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.trees.copies import common_suffixes, matches
from jaxspec.trees.path_conditioned import LowRank, path_conditioned
from tests.trees.oracles import check_layout, log_softmax, paths, row

WEIGHTS = (0.1, 0.4, 0.7)  # after 1, 2, 3 and more equal tokens
VOCAB, RANK, BLOCK, DEPTH = 4, 3, 2, 4
EVERY_NODE = 1 + 4 + 16 + 16 + 16  # below the block's 16 nodes there is at most a copy of each
LENGTH = 40  # of the array that holds a text


def copy_after(tokens):
    """What followed the longest, then latest, earlier match; and its length, up to three."""
    best = max((sum(1 for _ in common(tokens, end)), end) for end in range(-1, len(tokens) - 1))
    return (tokens[best[1] + 1], best[0]) if best[0] else (None, 0)


def common(tokens, end):
    """The last tokens, as long as they equal those up to an index."""
    for back in range(min(len(WEIGHTS), end + 1)):
        if tokens[end - back] != tokens[len(tokens) - 1 - back]:
            return
        yield


def texts(count, tokens=3, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, tokens, size=rng.integers(1, 25)).tolist() for _ in range(count)]


def stacked(rows):
    """Texts [B, S], with other tokens past the anchors that must not be read; and `last`."""
    array = np.random.default_rng(1).integers(0, 3, (len(rows), LENGTH)).astype(np.int32)
    for i, tokens in enumerate(rows):
        array[i, : len(tokens)] = tokens
    return jnp.array(array), jnp.array([len(tokens) - 1 for tokens in rows])


@functools.partial(jax.jit, static_argnames="depth")
def found(text, last, depth=DEPTH):
    return matches(text, last, weights=jnp.array(WEIGHTS), depth=depth)


def test_the_longest_then_latest_match_is_copied_after_every_path():
    rows = texts(60)
    rng, depth = np.random.default_rng(2), 6
    at = found(*stacked(rows), depth=depth).broadcast(2)
    chains = [[list(tokens), list(tokens)] for tokens in rows]
    follow, copies = jax.jit(lambda m, *args: m.follow(*args)), jax.jit(lambda m: m.copies())
    for slot in range(depth):
        after = jax.device_get(copies(at))
        for b, pair in enumerate(chains):
            for node, tokens in enumerate(pair):
                token, length = copy_after(tokens)
                weight = WEIGHTS[length - 1] if length else 0
                assert after.weights[b, node] == np.float32(weight)
                assert not length or after.tokens[b, node] == token
        parents = rng.integers(0, 2, (len(rows), 2))
        tokens = rng.integers(0, 3, (len(rows), 2))
        chains = [
            [[*pair[parents[b, n]], int(tokens[b, n])] for n in range(2)]
            for b, pair in enumerate(chains)
        ]
        at = follow(at, slot, jnp.array(parents), jnp.array(tokens))


def test_common_suffixes():
    text = jnp.array([[5, 1, 2, 9, 1, 2, 7, 1, 2, 2]])
    lengths = common_suffixes(text, jnp.array([8]), 5)  # the last 2 is not decided yet
    assert lengths[0].tolist() == [0, 0, 2, 0, 0, 2, 0, 0, 0, 0]


@pytest.fixture(scope="module")
def head():
    rng = np.random.default_rng(3)
    return {
        "base": 1.5 * rng.normal(size=(BLOCK, VOCAB)),
        "latent": rng.normal(size=(9, RANK)),  # of every token id
        "output": rng.normal(size=(VOCAB, RANK)),
    }


def grown(
    head, rows, *, kept=None, low_rank=True, parents=EVERY_NODE, size=EVERY_NODE, mix=True
):
    """Trees with copies, of a Markov head."""
    text, last = stacked(rows)
    base = jnp.broadcast_to(jnp.float32(head["base"]), (len(rows), BLOCK, VOCAB))
    output, latent = jnp.float32(head["output"]), jnp.float32(head["latent"])
    step = LowRank(base, output, lambda slot, state, tokens: (latent[tokens], state))

    @jax.jit
    def grow(text, last):
        anchor = jnp.take_along_axis(text, last[:, None], axis=1)[:, 0]
        return path_conditioned(
            anchor,
            step if low_rank else lambda *args: step(*args),
            (),
            depth=BLOCK,
            parents=parents,
            budget=jnp.full(last.shape, size),
            size=size,
            kept=None if kept is None else jnp.array(kept),
            matches=found(text, last) if mix else None,
        )

    tree = grow(text, last)
    for b, tokens in enumerate(rows):
        check_layout(row(tree, b), tokens[-1], size)
    return [paths(row(tree, b)) for b in range(len(rows))]


def mixture(head, tokens, path, kept):
    """The score of a path as the formula of the module says."""
    score = 0.0
    for depth, child in enumerate(path):
        before = [*tokens, *path[:depth]]
        copied, length = copy_after(before)
        weight = WEIGHTS[length - 1] if length else 0
        share = weight * (copied == child)
        if depth < BLOCK and child in kept:
            logits = head["base"][depth] + head["output"] @ head["latent"][before[-1]]
            share += (1 - weight) * np.exp(log_softmax(logits))[kept.index(child)]
        score += np.log(share)
    return score


@pytest.mark.parametrize("low_rank", [True, False])
@pytest.mark.parametrize("kept", [[0, 1, 2, 3], [1, 2, 5, 8]])
def test_scores_are_those_of_the_mixture(head, low_rank, kept):
    rows = texts(12, seed=4)
    trees = grown(head, rows, kept=kept, low_rank=low_rank)
    for tokens, tree in zip(rows, trees, strict=True):
        assert {path for path in tree if len(path) == 1} >= {(token,) for token in kept}
        for path, score in tree.items():
            assert score == pytest.approx(mixture(head, tokens, path, kept), abs=1e-4)
    copied = {len(path) for tree in trees for path in tree if not {*path} <= {*kept}}
    assert max(len(path) for tree in trees for path in tree) == DEPTH  # beyond the block
    assert (kept == [0, 1, 2, 3]) != bool(copied)  # tokens that the drafter does not know


def test_a_small_tree_has_the_best_nodes_and_never_overrates_one(head):
    rows = texts(40, seed=5)
    whole = grown(head, rows)
    small = grown(head, rows, parents=3, size=6)
    for tokens, all_paths, tree in zip(rows, whole, small, strict=True):
        best = max(all_paths, key=all_paths.get)
        assert tree[best] == pytest.approx(all_paths[best], abs=1e-4)
        for path, score in tree.items():
            assert score <= mixture(head, tokens, path, [0, 1, 2, 3]) + 1e-4


@pytest.mark.parametrize("low_rank", [True, False])
def test_without_a_match_the_drafter_is_alone(head, low_rank):
    rows = [[5, 6, 7, 8], [8]]
    mixed = grown(head, rows, low_rank=low_rank)
    alone = grown(head, rows, low_rank=low_rank, mix=False)
    for a, b in zip(mixed, alone, strict=True):  # the second token may repeat the first
        first = [{p: s for p, s in tree.items() if len(p) == 1} for tree in (a, b)]
        assert first[0] == pytest.approx(first[1]) and len(first[0]) == VOCAB

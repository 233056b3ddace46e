"""TreeFlash's tree against its own traces and against best-first search."""

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxspec.trees.transitions import from_transitions
from tests.trees.oracles import assert_same_paths, best_paths, check_layout, paths, row

grow = jax.jit(from_transitions, static_argnames="size")


def search(tokens, log_probs, following, count):
    """Best-first search through one row's tables, [P, M, K]."""

    def children(path):
        parent = 0
        for slot, token in enumerate(path):
            (rank,) = np.flatnonzero(tokens[slot, parent] == token)
            parent = following[slot, parent, rank]
        if parent < 0:
            return ()
        return zip(tokens[len(path), parent], log_probs[len(path), parent], strict=True)

    return best_paths(children, len(tokens), count)


def test_equals_the_original_trees(golden):
    folder, trace = golden("treeflash_a")
    size = trace["config"]["tree_size"]
    arrays = np.load(folder / "arrays.npz")
    rounds = [key.removesuffix("_tree_tokens") for key in arrays if "tree_tokens" in key]
    assert rounds

    def stack(what):
        return np.stack([arrays[f"{r}_{what}"] for r in rounds])

    tree = grow(
        stack("transition_tokens").astype(np.int32),
        stack("transition_logp"),
        stack("transition_next").astype(np.int32),
        np.zeros(len(rounds), np.int32),
        budget=np.full(len(rounds), size, np.int32),
        size=size,
    )
    originals = stack("tree_tokens"), stack("tree_ancestors"), stack("tree_depths")
    for b, (tokens, above, depths) in enumerate(zip(*originals, strict=True)):
        expected = set()
        for node in range(1, size):
            if above[node].any():
                path = sorted(np.flatnonzero(above[node]), key=lambda i, d=depths: d[i])[1:]
                expected.add(tuple(tokens[path].tolist()))
        assert set(paths(row(tree, b))) == expected
        # Which nodes are kept does not hang on ties, which TreeFlash settles otherwise.
        assert tree.scores[b, size - 1] > best_left_out(arrays, rounds[b], size) + 1e-4


def best_left_out(arrays, name, size):
    tables = (arrays[f"{name}_transition_{part}"] for part in ("tokens", "logp", "next"))
    return min(search(*tables, size).values())


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(4, 3, 3, 16), (7, 5, 6, 40), (1, 2, 4, 8)]))
def test_equals_best_first_search(seed, shape):
    depth, parents, width, size = shape
    draw, batch, vocab = np.random.default_rng(seed), 10, 12
    table = (batch, depth, parents)
    tokens = draw.permuted(np.broadcast_to(np.arange(vocab), (*table, vocab)), axis=-1)
    tokens = tokens[..., :width].astype(np.int32)
    log_probs = np.sort(-draw.exponential(2.0, (*table, width)), -1)[..., ::-1]
    log_probs = log_probs.astype(np.float32)
    following = draw.integers(-1, parents, (*table, width)).astype(np.int32)
    budget = draw.integers(1, size + 1, batch).astype(np.int32)
    root = np.arange(batch, dtype=np.int32)
    tree = grow(tokens, log_probs, following, root, budget=budget, size=size)
    for b in range(batch):
        one = row(tree, b)
        check_layout(one, b, budget[b])
        expected = search(tokens[b], log_probs[b].astype(float), following[b], budget[b] - 1)
        assert_same_paths(paths(one), expected)


def test_a_leaf_ends_its_path():
    """Both children of the root are likely, only the second is a parent of depth 2."""
    tree = grow(
        np.array([[[[1, 2]], [[3, 4]]]], np.int32),
        np.log(np.array([[[[0.9, 0.1]], [[0.5, 0.5]]]], np.float32)),
        np.array([[[[-1, 0]], [[-1, -1]]]], np.int32),
        np.array([7], np.int32),
        budget=np.array([8], np.int32),
        size=8,
    )
    assert tree.tokens[0].tolist() == [7, 1, 2, 3, 4, 0, 0, 0]
    assert tree.parents[0].tolist() == [-1, 0, 0, 2, 2, -1, -1, -1]

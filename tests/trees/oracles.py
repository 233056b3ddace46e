"""Slow, obvious versions of the tree builders, one sequence at a time, on the host."""

from __future__ import annotations

import heapq
import itertools

import jax
import numpy as np

from jaxspec.trees.tree import NO_PARENT, DraftTree


def row(tree: DraftTree, b: int) -> DraftTree:
    """One row of a batch, as numpy."""
    return jax.tree.map(lambda x: np.asarray(x)[b], tree)


def paths(tree: DraftTree) -> dict[tuple[int, ...], float]:
    """The drafted tokens on the way to every valid node but the root, with its score."""
    found, path_of = {}, {0: ()}
    for node in np.flatnonzero(tree.valid)[1:]:
        path_of[node] = (*path_of[tree.parents[node]], int(tree.tokens[node]))
        assert path_of[node] not in found, "two nodes of one path"
        found[path_of[node]] = float(tree.scores[node])
    return found


def check_layout(tree: DraftTree, root: int, budget: int):
    """What every DraftTree promises."""
    count = int(tree.valid.sum())
    assert 1 <= count <= budget
    assert tree.valid[:count].all()
    assert tree.tokens[0] == root and tree.parents[0] == NO_PARENT
    assert tree.depths[0] == 0 and tree.scores[0] == 0
    parents = tree.parents[1:count]
    assert (parents >= 0).all() and (parents < np.arange(1, count)).all()
    assert (tree.depths[1:count] == tree.depths[parents] + 1).all()
    assert (tree.scores[1:count] <= tree.scores[parents]).all()
    assert (tree.parents[count:] == NO_PARENT).all()
    assert (tree.depths[count:] == 0).all() and (tree.tokens[count:] == 0).all()
    assert np.isneginf(tree.scores[count:]).all()


def accum_logp(tokens, log_probs, root, budget):
    """JetSpec's heap: nodes (token, parent, depth, score) in the order they are added.

    tokens, log_probs [P, W], likeliest first.
    """
    tokens, log_probs = np.asarray(tokens).tolist(), np.asarray(log_probs).tolist()
    nodes, heap = [(root, NO_PARENT, 0, 0.0)], [(0.0, 0)]
    while heap and len(nodes) < budget:
        _, best = heapq.heappop(heap)
        _, _, depth, score = nodes[best]
        if depth == len(tokens):
            continue
        for rank in range(min(len(tokens[depth]), budget - len(nodes))):
            child = score + log_probs[depth][rank]
            heapq.heappush(heap, (-child, len(nodes)))
            nodes.append((tokens[depth][rank], best, depth + 1, child))
    return nodes


def best_paths(children, depth: int, count: int) -> dict[tuple[int, ...], float]:
    """The `count` best paths by best-first search: children(path) -> [(token, log-prob)]."""
    found, heap = {}, [(0.0, ())]
    while heap and len(found) <= count:
        cost, path = heapq.heappop(heap)
        found[path] = -cost
        if len(path) < depth:
            for token, log_prob in children(path):
                heapq.heappush(heap, (cost - float(log_prob), (*path, int(token))))
    del found[()]
    return found


def all_paths(log_probs) -> dict[tuple[int, ...], float]:
    """Every path under independent depths, with its score: log_probs [P, V]."""
    depth, vocab = log_probs.shape
    return {
        path: float(sum(log_probs[d, token] for d, token in enumerate(path)))
        for length in range(1, depth + 1)
        for path in itertools.product(range(vocab), repeat=length)
    }


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def assert_same_paths(got, expected, atol=1e-4):
    """The same nodes with the same scores; at the rim, nodes of equal score may be swapped."""
    assert len(got) == len(expected)
    for path in set(got) ^ set(expected):
        rim = min(expected.values())
        score = got.get(path, expected.get(path))
        assert abs(score - rim) < atol, f"{path} scores {score}, the rim is {rim}"
    for path in set(got) & set(expected):
        assert abs(got[path] - expected[path]) < atol, path

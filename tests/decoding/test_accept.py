"""The accepted path against a walk from the root, node by node."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.decoding.round import accept_matches
from jaxspec.trees.tree import DraftTree, ancestors
from tests.tiny import random_tree

accepted = jax.jit(accept_matches, static_argnames="max_depth")


def test_a_literal_tree():
    #      0:7
    #     /   \
    #   1:5   2:3       the target chooses 3 after the root, 9 after node 2, 4 after node 3
    #    |     |
    #   4:1   3:9
    tree = DraftTree(
        tokens=jnp.array([[7, 5, 3, 9, 1]]),
        parents=jnp.array([[-1, 0, 0, 2, 1]]),
        depths=jnp.array([[0, 1, 1, 2, 2]]),
        scores=jnp.zeros((1, 5)),
        valid=jnp.ones((1, 5), bool),
    )
    out = accepted(tree, ancestors(tree), jnp.array([[3, 0, 9, 4, 0]]), max_depth=3)
    assert out.path[0, :3].tolist() == [0, 2, 3]
    assert out.count.tolist() == [3]
    assert out.tokens[0, :3].tolist() == [3, 9, 4]


def test_a_node_whose_parent_is_gone_is_not_accepted():
    """Node 2 stands at depth 2 but hangs from the root: 5 after 7 is not 5 after 7 and 5."""
    tree = DraftTree(
        tokens=jnp.array([[7, 9, 5]]),
        parents=jnp.array([[-1, 0, 0]]),
        depths=jnp.array([[0, 1, 2]]),
        scores=jnp.zeros((1, 3)),
        valid=jnp.ones((1, 3), bool),
    )
    out = accepted(tree, ancestors(tree), jnp.array([[5, 1, 2]]), max_depth=2)
    assert out.count.tolist() == [1]
    assert out.tokens[0, 0] == 5


def test_random_trees_equal_the_walk():
    size, depth, vocab, batch = 33, 4, 2, 100  # few tokens: paths match and siblings repeat
    key = jax.random.key(0)
    budget = jax.random.randint(key, (batch,), 1, size + 1)
    tree = jax.vmap(lambda k, b: random_tree(size, depth, vocab, k, jnp.int32(0), b))(
        jax.random.split(key, batch), budget
    )
    bits = ancestors(tree)
    tree = jax.tree.map(np.asarray, tree)
    choices = choices_by_path(tree, vocab)
    out = jax.device_get(accepted(tree, bits, choices, max_depth=depth))
    lengths = []
    for b in range(batch):
        n = int(out.count[b])
        path = np.asarray(out.path[b, :n])
        lengths.append(n)
        # Siblings may share a token; then any of the deepest walks will do.
        decided = longest(tree, b, choices[b])
        assert out.tokens[b, :n].tolist() == decided
        assert path[0] == 0
        for above, node in zip(path, path[1:], strict=False):
            assert tree.parents[b, node] == above and tree.valid[b, node]
            assert tree.tokens[b, node] == choices[b, above]
    assert max(lengths) == depth + 1 and min(lengths) == 1  # both ends occurred


def test_the_law_is_the_targets_for_any_tree():
    """All targets over two tokens and three positions: what is emitted is what each one says.

    A sampling target is a mixture of these 2 ** 7 choices, so its law is kept exactly; for
    trees whose siblings repeat tokens as well.
    """
    prefixes = [p for n in range(3) for p in itertools.product((0, 1), repeat=n)]
    targets = list(itertools.product((0, 1), repeat=len(prefixes)))
    assert len(targets) == 128
    for seed in range(6):
        tree = random_tree(9, 2, 2, jax.random.key(seed), jnp.int32(0), jnp.int32(9 - seed))
        paths = {0: ()}
        for node in np.flatnonzero(tree.valid)[1:]:
            paths[node] = (*paths[int(tree.parents[node])], int(tree.tokens[node]))
        rows = jax.tree.map(lambda x: jnp.broadcast_to(x, (128, *x.shape)), tree)
        said = [dict(zip(prefixes, target, strict=True)) for target in targets]
        choices = [[one[paths.get(node, ())] for node in range(9)] for one in said]
        out = jax.device_get(accepted(rows, ancestors(rows), jnp.array(choices), max_depth=2))
        for row, one in enumerate(said):
            emitted = out.tokens[row, : int(out.count[row])].tolist()
            assert emitted == [one[tuple(emitted[:i])] for i in range(len(emitted))]


def choices_by_path(tree, vocab):
    """A target: what it chooses after a node depends on the tokens of the node's path alone."""
    digest = np.zeros(tree.tokens.shape, np.int32)
    for b, node in np.ndindex(digest.shape):
        parent = int(tree.parents[b, node])
        above = digest[b, parent] if parent >= 0 else b
        digest[b, node] = (5 * above + int(tree.tokens[b, node]) + 1) % 97
    return digest % vocab


def longest(tree, b, choices):
    """Tokens decided along the deepest walk from the root."""
    tokens, parents, valid = tree.tokens[b], tree.parents[b], tree.valid[b]

    def down(node):
        matching = (
            i
            for i in range(len(tokens))
            if valid[i] and parents[i] == node and tokens[i] == choices[node]
        )
        return [int(choices[node]), *max(map(down, matching), key=len, default=[])]

    return down(0)

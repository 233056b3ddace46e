"""Trees without some nodes, by hand."""

import jax.numpy as jnp
import numpy as np

from jaxspec.trees.pruning import pruned
from jaxspec.trees.tree import DraftTree


def test_what_is_kept_closes_up():
    """root - a - b  and  root - c - d, e;  without a and b, and without e."""
    tree = DraftTree(
        tokens=jnp.array([[9, 1, 2, 3, 4, 5, 0]]),
        parents=jnp.array([[-1, 0, 1, 0, 3, 3, -1]]),
        depths=jnp.array([[0, 1, 2, 1, 2, 2, 0]]),
        scores=jnp.array([[0.0, -1, -2, -3, -4, -5, -np.inf]]),
        valid=jnp.array([[True] * 6 + [False]]),
    )
    kept = jnp.array([[True, False, False, True, True, False, True]])
    found, order = pruned(tree, kept)
    assert found.tokens[0].tolist() == [9, 3, 4, 0, 0, 0, 0]
    assert found.parents[0].tolist() == [-1, 0, 1, -1, -1, -1, -1]
    assert found.depths[0].tolist() == [0, 1, 2, 0, 0, 0, 0]
    assert found.scores[0].tolist() == [0, -3, -4] + [-np.inf] * 4
    assert found.valid[0].tolist() == [True] * 3 + [False] * 4
    assert order[0].tolist() == [0, 3, 4, 1, 2, 5, 6]
    whole, order = pruned(tree, jnp.ones((1, 7), bool))
    assert order[0].tolist() == list(range(7))
    assert all((getattr(whole, n) == getattr(tree, n)).all() for n in ("tokens", "parents"))

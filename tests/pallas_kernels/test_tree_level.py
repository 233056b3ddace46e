"""A level of a tree, every implementation, against a search of all children."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.h100.target import lowering_for_h100
from pallas_kernels.tree_level import empty_levels, grow_level
from pallas_kernels.tree_level.reference import grow_level_reference
from pallas_kernels.tree_level.triton import grow_level_triton, unsupported
from tests.slow import slow_but

DEPTH, RANK = 3, 64
REFERENCE = jax.jit(grow_level_reference)
IMPLEMENTATIONS = {
    "xla": jax.jit(functools.partial(grow_level, implementation="xla")),
    "triton": functools.partial(grow_level_triton, interpret=True),
}
# name: batch, vocabulary, parents, children
SHAPES = {
    "a vocabulary of whole tiles": (2, 1024, 16, 63),
    "a last tile in part, few parents": (1, 300, 5, 20),
    "children in more than two tiles": (1, 1000, 16, 100),
}


def inputs(batch, vocab, seed=0, sharpness=3.0):
    draw = np.random.default_rng(seed)
    base = jnp.asarray(sharpness * draw.standard_normal((batch, DEPTH, vocab)), jnp.float32)
    previous, output = (
        jnp.asarray(scale * draw.standard_normal((vocab, RANK)), jnp.bfloat16)
        for scale in (1.0, 0.3)
    )
    return base, previous, output


def grown(step, arrays, parents, children):
    base, previous, output = arrays
    root = jnp.arange(3, 3 + base.shape[0])
    levels = empty_levels(root, depth=DEPTH, width=children)
    for slot in range(DEPTH):
        latent = previous[levels.tokens[:, slot, :parents]]
        levels = step(levels, jnp.int32(slot), base, latent, output)
    return jax.device_get(levels)


def assert_same(actual, expected):
    np.testing.assert_allclose(actual.scores, expected.scores, atol=1e-5)
    np.testing.assert_allclose(actual.floor, expected.floor, atol=1e-5)
    real = expected.scores > -np.inf
    for name in ("tokens", "parents"):
        found, wanted = getattr(actual, name), getattr(expected, name)
        np.testing.assert_array_equal(found[real], wanted[real])


@pytest.mark.parametrize("shape", slow_but(["a last tile in part, few parents"], SHAPES))
@pytest.mark.parametrize("step", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_equals_a_search_of_all_children(step, shape):
    batch, vocab, parents, children = SHAPES[shape]
    arrays = inputs(batch, vocab)
    expected = grown(REFERENCE, arrays, parents, children)
    assert_same(grown(step, arrays, parents, children), expected)


@pytest.mark.parametrize("step", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_equal_children_come_lowest_parent_and_token_first(step):
    base, previous, output = inputs(1, 1024)
    flat = jnp.round(base / 3), jnp.zeros_like(previous), output
    levels = grown(step, flat, 16, 63)
    assert_same(levels, grown(REFERENCE, flat, 16, 63))
    assert len(np.unique(levels.scores[0, 2])) < 63


@pytest.mark.parametrize("step", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_no_node_at_or_below_the_floor_has_children(step):
    """All tokens are alike: the first level's are better than any of the second."""
    base, previous, output = inputs(1, 1024)
    alike = jnp.zeros_like(base), previous, jnp.zeros_like(output)
    levels = grown(step, alike, 16, 63)
    np.testing.assert_allclose(levels.scores[0, 1], -np.log(1024), atol=1e-5)
    np.testing.assert_allclose(levels.floor, -np.log(1024), atol=1e-5)
    assert (levels.scores[0, 2:] == -np.inf).all()


def test_the_kernels_lower_for_cuda():
    base, previous, output = inputs(1, 1024)
    levels = empty_levels(jnp.zeros(1, jnp.int32), depth=DEPTH, width=63)
    arguments = (levels, jnp.int32(0), base, previous[None, :16], output)
    with lowering_for_h100():
        lowered = jax.jit(grow_level).trace(*arguments).lower(lowering_platforms=("cuda",))
    for name in ("tree_level_score", "tree_level_select"):
        assert name in lowered.as_text()


def test_shapes_that_the_kernels_do_not_take_are_named():
    def reason(vocab, rank, parents, children, dtype=jnp.bfloat16):
        root = jax.ShapeDtypeStruct((1,), jnp.int32)
        grow = functools.partial(empty_levels, depth=DEPTH, width=children)
        latent = jax.ShapeDtypeStruct((1, parents, rank), dtype)
        output = jax.ShapeDtypeStruct((vocab, rank), dtype)
        return unsupported(jax.eval_shape(grow, root), 0, None, latent, output)

    assert reason(151_936, 256, 16, 63) is None
    assert reason(151_936, 256, 16, 255) is None
    assert "expected bfloat16" in reason(151_936, 256, 16, 63, jnp.float32)
    assert "multiple of 64" in reason(151_936, 200, 16, 63)
    assert "32768 scores at a time" in reason(151_936, 256, 64, 63)
    assert "only 100 tokens" in reason(100, 64, 16, 63)
    arrays = inputs(1, 100)
    levels = empty_levels(jnp.zeros(1, jnp.int32), depth=DEPTH, width=63)
    with pytest.raises(ValueError, match="only 100 tokens; use 'xla'"):
        grow_level(
            levels, 0, arrays[0], arrays[1][None, :16], arrays[2], implementation="triton"
        )

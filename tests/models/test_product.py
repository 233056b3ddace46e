"""`layers.product`: einsum whose gradient stays as narrow as its operands, and its result."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.models.layers import product, project, project_swiglu

SPECS = {  # of every kind that is differentiated: dense, turned, ellipsis, attention's
    "brm,vm->brv": ((2, 3, 8), (5, 8)),
    "...m,mkcd->...kcd": ((2, 3, 8), (8, 2, 2, 4)),
    "...h,hm->...m": ((2, 3, 8), (8, 5)),
    "baikgd,btkd->bakgit": ((2, 3, 4, 2, 2, 8), (2, 5, 2, 8)),
    "bakgit,btkd->baikgd": ((2, 3, 2, 2, 4, 5), (2, 5, 2, 8)),
}


def operands(spec, dtype):
    draw = np.random.default_rng(0)
    return [jnp.asarray(draw.standard_normal(shape), dtype) for shape in SPECS[spec]]


@functools.partial(jax.jit, static_argnames=("einsum", "spec"))
def gradients(einsum, spec, x, y):
    """Of a weighted sum of the result, by both operands."""
    shape = jax.eval_shape(lambda: einsum(spec, x, y)).shape
    weights = np.random.default_rng(1).standard_normal(shape)
    return jax.grad(lambda x, y: jnp.sum(weights * einsum(spec, x, y)), (0, 1))(x, y)


@pytest.mark.parametrize("spec", SPECS)
def test_gradient_is_einsums(spec):
    arrays = operands(spec, "float32")
    found, expected = (gradients(einsum, spec, *arrays) for einsum in (product, jnp.einsum))
    for own, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", SPECS)
def test_narrow_operands_meet_narrow_slopes(spec):
    """In bfloat16 every product, forward and backward, has bfloat16 operands and a float32
    sum, and the gradient is einsum's but for rounding."""
    arrays = operands(spec, "bfloat16")
    text = gradients.lower(product, spec, *arrays).as_text()
    products = re.findall(r"dot_general.*: \((.*)\) -> (.*)", text)
    assert len(products) >= 2  # the forward product is not needed for its own gradient
    for given, result in products:
        assert given.count("xbf16>") == 2 and result.endswith("xf32>")
    exact = gradients(jnp.einsum, spec, *operands(spec, "float32"))
    for found, expected in zip(gradients(product, spec, *arrays), exact, strict=True):
        assert found.dtype == jnp.bfloat16
        scale = np.abs(expected).max()
        np.testing.assert_allclose(np.float32(found), expected, atol=0.03 * scale)


def test_sums_are_rounded_once_to_the_result():
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (3, 64))
    gate_up = jax.random.normal(keys[1], (64, 2, 8)).astype(jnp.bfloat16)
    exact = project("nm,mcf->ncf", x, gate_up)
    rounded = project("nm,mcf->ncf", x, gate_up, jnp.bfloat16)
    assert exact.dtype == jnp.float32 and rounded.dtype == jnp.bfloat16
    np.testing.assert_allclose(rounded.astype(jnp.float32), exact, rtol=2**-8, atol=1e-6)
    gate, up = np.moveaxis(np.asarray(rounded, np.float64), 1, 0)
    hidden = project_swiglu(x, gate_up, jnp.bfloat16)
    assert hidden.dtype == jnp.float32  # SwiGLU itself rounds nothing
    np.testing.assert_allclose(hidden, gate / (1 + np.exp(-gate)) * up, rtol=1e-5, atol=1e-5)

"""`layers.product`: einsum whose gradient stays as narrow as its operands, and its result."""

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


def gradients(einsum, spec, dtype):
    """Of a weighted sum of the result, by both operands."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, y = (
        jax.random.normal(key, shape).astype(dtype)
        for key, shape in zip(keys[:2], SPECS[spec], strict=True)
    )
    weights = jax.random.normal(keys[2], jax.eval_shape(lambda: einsum(spec, x, y)).shape)
    return jax.grad(lambda x, y: jnp.sum(weights * einsum(spec, x, y)), (0, 1))(x, y)


@pytest.mark.parametrize("spec", SPECS)
def test_gradient_is_einsums(spec):
    for found, expected in zip(
        gradients(product, spec, jnp.float32),
        gradients(jnp.einsum, spec, jnp.float32),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", SPECS)
def test_narrow_operands_meet_narrow_slopes(spec):
    """In bfloat16 every product, forward and backward, has bfloat16 operands and a float32
    sum, and the gradient is einsum's but for rounding."""
    text = jax.jit(lambda: gradients(product, spec, jnp.bfloat16)).lower().as_text()
    products = re.findall(r"dot_general.*: \((.*)\) -> (.*)", text)
    assert len(products) >= 2  # the forward product is not needed for its own gradient
    for operands, result in products:
        assert operands.count("xbf16>") == 2 and result.endswith("xf32>")
    for found, exact in zip(
        gradients(product, spec, jnp.bfloat16),
        gradients(jnp.einsum, spec, jnp.float32),
        strict=True,
    ):
        assert found.dtype == jnp.bfloat16
        scale = np.abs(exact).max()
        np.testing.assert_allclose(found.astype(np.float32), exact, atol=0.03 * scale)


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

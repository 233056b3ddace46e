"""Products with weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.models.layers import project


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("spec", ["bnm,mkd->bnkd", "...m,vm->...v"])
def test_a_single_row_gives_what_it_gives_among_others(spec, dtype):
    shape = (16, 2, 3) if "k" in spec else (5, 16)
    weight = jax.random.normal(jax.random.key(0), shape, dtype)
    x = jax.random.normal(jax.random.key(1), (1, 4, 16))
    one, all_rows = project(spec, x[:, 1:2], weight), project(spec, x, weight)
    assert one.dtype == jnp.float32
    np.testing.assert_allclose(one, all_rows[:, 1:2], rtol=1e-6, atol=1e-6)


def test_a_row_that_the_weight_shares_is_not_doubled():
    x, weight = jnp.ones((1, 1, 3), jnp.bfloat16), jnp.ones((1, 1, 4), jnp.bfloat16)
    assert (project("brv,brl->vl", x, weight) == 1).all()


def test_a_compiled_row_of_narrow_weights_is_a_matrix_product():
    weight, x = jnp.ones((64, 64), jnp.bfloat16), jnp.ones((1, 64))
    step = jax.jit(lambda x, weight: project("tm,mn->tn", x, weight))
    assert "tensor<2x64xbf16>" in step.lower(x, weight).as_text()

"""Tree attention on a real GPU against its definition."""

import jax
import numpy as np
import pytest

from pallas_kernels.tree_attention.triton import tree_attention_triton
from tests.pallas_kernels.attention_cases import CASES, make_inputs, oracle, tolerance

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("fill", [0.0, 0.5, 1.0])
def test_the_compiled_kernels_compute_the_definition(name, fill):
    case = CASES[name]
    lengths = [int(fill * case.shape.capacity)] * case.shape.batch
    arrays = make_inputs(case, lengths, seed=int(2 * fill))
    options = dict(scale=0.125, window=case.window)
    first = tree_attention_triton(**arrays, **options, tile=case.tile)
    again = tree_attention_triton(**arrays, **options, tile=case.tile)
    error = np.abs(np.asarray(first, np.float64) - oracle(**arrays, **options)).max()
    # Three TF32 terms keep 21 bits or more of float32's 24, and exp2 is approximate.
    assert error < 10 * tolerance(case)
    assert (jax.device_get(first) == jax.device_get(again)).all()

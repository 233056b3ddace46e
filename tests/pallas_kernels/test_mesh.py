"""Tree attention cut over a mesh equals tree attention on one device."""

import os
import subprocess
import sys
from pathlib import Path

# A process of its own, because the number of devices is fixed when JAX starts.
SCRIPT = """
import functools
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from pallas_kernels.tree_attention import tree_attention
from tests.pallas_kernels.attention_cases import CASES, make_inputs

attend = jax.jit(functools.partial(tree_attention, scale=0.125))
arrays = make_inputs(CASES["decode"], (40, 96))
whole = attend(**arrays)

def mesh_of(size, axis="model"):
    return jax.make_mesh(
        (size,), (axis,), axis_types=(AxisType.Auto,), devices=jax.devices()[:size]
    )

mesh = mesh_of(2)
heads, copied = NamedSharding(mesh, P(None, "model")), NamedSharding(mesh, P())
cut = {
    name: jax.device_put(x, heads if name.endswith("cache") else copied)
    for name, x in arrays.items()
}
with jax.set_mesh(mesh):
    out = attend(**cut)
assert out.sharding.spec == P(None, None, "model"), out.sharding
np.testing.assert_allclose(out, whole, atol=2e-6)

with jax.set_mesh(mesh_of(2, "data")):
    out = attend(**arrays)
assert out.sharding.spec == P("data"), out.sharding
np.testing.assert_allclose(out, whole, atol=2e-6)

with jax.set_mesh(mesh_of(3, "data")):  # does not divide the batch
    np.testing.assert_allclose(attend(**arrays), whole, atol=2e-6)

with jax.set_mesh(mesh_of(3)):
    try:
        jax.eval_shape(attend, **arrays)
    except ValueError as error:
        print(error)
"""


def test_heads_are_cut_over_the_axis_model_and_sequences_over_data():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | dict(JAX_NUM_CPU_DEVICES="3", JAX_PLATFORMS="cpu"),
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 key/value heads cannot be sharded over 3 devices" in done.stdout

"""Many arrays over several processes with several devices each."""

import pytest

from tests.processes import run_script

SCRIPT = """
import json, sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxspec.checkpoints.checksums import checksums
from jaxspec.sharding import make_mesh
from jaxspec.training.sharding import gather

if len(sys.argv) > 2:
    jax.distributed.initialize(sys.argv[2], num_processes=2, process_id=int(sys.argv[3]))
mesh = make_mesh(data=8)
x = np.arange(64, dtype=np.float32)
sharding = NamedSharding(mesh, PartitionSpec("data"))
arrays = [
    jax.make_array_from_callback(x.shape, sharding, lambda index: x[index] + i)
    for i in range(int(sys.argv[1]))
]
sums = [list(checksums(arrays).values()) for _ in range(3)]
assert sums[0] == sums[1] == sums[2]
whole = [float(np.asarray(x).sum()) for x in gather(mesh, arrays)]
print(json.dumps([sums[0], whole]))
"""


@pytest.mark.slow
def test_many_arrays_over_two_processes():
    """More collectives than the CPU client keeps in flight (32 a device): it hung here."""
    (alone,) = run_script(SCRIPT, 100, 1)
    assert run_script(SCRIPT, 100, 2) == [alone, alone]
    assert len(set(alone[0])) == 100

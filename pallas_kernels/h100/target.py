"""An H100 described by its datasheet, sufficient to compile for it."""

from __future__ import annotations

import contextlib
import functools

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractMesh, Mesh, use_abstract_mesh

from pallas_kernels.dispatch import ASSUMED_CARD

MEMORY_BYTES = 84_942_979_072
BYTES_PER_SECOND = 3.35e12
FLOPS_PER_SECOND = 989e12  # dense bfloat16
SHARED_MEMORY_BYTES = 232_448  # most that one program may ask for

DESCRIPTION = {
    "gpu_device_info": {
        "cuda_compute_capability": {"major": 9, "minor": 0},
        "core_count": 132,
        "fpus_per_core": 128,
        "threads_per_warp": 32,
        "threads_per_block_limit": 1024,
        "threads_per_core_limit": 2048,
        "block_dim_limit_x": 2_147_483_647,
        "block_dim_limit_y": 65_535,
        "block_dim_limit_z": 65_535,
        "registers_per_core_limit": 65_536,
        "registers_per_block_limit": 65_536,
        "shared_memory_per_block": 49_152,
        "shared_memory_per_block_optin": SHARED_MEMORY_BYTES,
        "shared_memory_per_core": 233_472,
        "l2_cache_size": 52_428_800,
        "memory_bandwidth": int(BYTES_PER_SECOND),
        "device_memory_size": MEMORY_BYTES,
        "clock_rate_ghz": 1.98,
    },
    "platform_name": "CUDA",
    "dnn_version_info": {"major": 9, "minor": 12, "patch": 0},
    "runtime_version": {"major": 13, "minor": 0, "patch": 0},
    "device_description_str": ASSUMED_CARD,
}


@functools.cache  # arrays on two descriptions of one device would not mix
def mesh(devices: int = 1, heads: int = 1) -> Mesh:
    """A mesh of described H100s, with axes "model", of size `heads`, and "rest".

    Raises:
      RuntimeError: the compiler is not installed (`make h100`).
    """
    try:
        topology = topologies.get_topology_desc(
            "",
            platform="cuda",
            target_config=_text_proto(DESCRIPTION),
            topology=f"1x1x{devices}",
        )
    except Exception as error:
        raise RuntimeError(
            "JAX has no CUDA compiler here; `make h100` builds an environment that has one, "
            ".venv-h100: run this with its Python and JAX_PLATFORMS=cpu"
        ) from error
    return Mesh(np.array(topology.devices).reshape(heads, -1), ("model", "rest"))


def lowering_for_h100(mesh: Mesh | None = None):
    """A context in which Pallas lowers for an H100 without a GPU.

    Args:
      mesh: of `mesh`; without one, no compiler need be installed.
    """
    if mesh is not None:
        return use_abstract_mesh(mesh.abstract_mesh)
    if jax.__version_info__ < (0, 11):  # assumes compute capability 9.0 by itself
        return contextlib.nullcontext()
    from jax.sharding import AbstractDevice

    device = AbstractDevice(device_kind=ASSUMED_CARD, num_cores=None, platform="gpu")
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def _text_proto(message: dict) -> str:
    def field(name, value):
        if isinstance(value, dict):
            return f"{name} {{ {_text_proto(value)} }}"
        return f"{name}: " + (f'"{value}"' if isinstance(value, str) else str(value))

    return " ".join(field(name, value) for name, value in message.items())

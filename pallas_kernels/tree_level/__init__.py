"""Growing one level of a tree: the reference, with kernels, and faster XLA elsewhere."""

from pallas_kernels.dispatch import with_kernel
from pallas_kernels.tree_level.reference import Levels as Levels
from pallas_kernels.tree_level.reference import empty_levels as empty_levels
from pallas_kernels.tree_level.reference import grow_level_reference
from pallas_kernels.tree_level.xla import grow_level_xla


def _kernel():
    from pallas_kernels.tree_level.triton import grow_level_triton, unsupported

    return grow_level_triton, unsupported


grow_level = with_kernel(grow_level_reference, _kernel, xla=grow_level_xla)

"""Heads of a gated delta net from its projection: the reference, with a kernel for keys and
values whose size is a power of two."""

from pallas_kernels.delta_heads.reference import delta_heads_reference
from pallas_kernels.dispatch import with_kernel


def _kernel():
    from pallas_kernels.delta_heads.triton import delta_heads_triton, unsupported

    return delta_heads_triton, unsupported


delta_heads = with_kernel(delta_heads_reference, _kernel)

"""Norm, rotation and rounding of heads: the reference, with a kernel for heads whose size is a
power of two."""

from pallas_kernels.dispatch import with_kernel
from pallas_kernels.rotary_heads.reference import rotary_heads_reference


def _kernel():
    from pallas_kernels.rotary_heads.triton import rotary_heads_triton, unsupported

    return rotary_heads_triton, unsupported


rotary_heads = with_kernel(rotary_heads_reference, _kernel)

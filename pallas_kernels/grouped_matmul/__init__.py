"""Grouped matrix product: the reference, with a kernel."""

from pallas_kernels.dispatch import with_kernel
from pallas_kernels.grouped_matmul.reference import grouped_matmul_reference


def _kernel():
    from pallas_kernels.grouped_matmul.triton import grouped_matmul_triton, unsupported

    return grouped_matmul_triton, unsupported


grouped_matmul = with_kernel(grouped_matmul_reference, _kernel)

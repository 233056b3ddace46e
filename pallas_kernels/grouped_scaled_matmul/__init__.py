"""Grouped matrix product with 8-bit values: the reference, with a kernel for GPUs that convert
float8_e4m3fn, from compute capability 8.9."""

from pallas_kernels.dispatch import with_kernel
from pallas_kernels.grouped_scaled_matmul.reference import grouped_scaled_matmul_reference


def _kernel():
    from pallas_kernels.grouped_scaled_matmul.triton import (
        grouped_scaled_matmul_triton,
        unsupported,
    )

    return grouped_scaled_matmul_triton, unsupported


grouped_scaled_matmul = with_kernel(grouped_scaled_matmul_reference, _kernel)

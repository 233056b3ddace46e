"""Matrix product with 8-bit values and scales: the reference, with a kernel for GPUs that
convert float8_e4m3fn, from compute capability 8.9."""

from pallas_kernels.dispatch import with_kernel
from pallas_kernels.scaled_matmul.config import unsupported
from pallas_kernels.scaled_matmul.reference import (
    scaled_matmul_reference,
    scaled_swiglu_reference,
)


def _kernel():
    from pallas_kernels.scaled_matmul.triton import scaled_matmul_triton

    return scaled_matmul_triton, unsupported


def _swiglu_kernel():
    from pallas_kernels.scaled_matmul.triton import scaled_swiglu_triton

    return scaled_swiglu_triton, unsupported


scaled_matmul = with_kernel(scaled_matmul_reference, _kernel)
scaled_swiglu = with_kernel(scaled_swiglu_reference, _swiglu_kernel)

from pallas_kernels.grouped_scaled_matmul.api import (
    grouped_scaled_matmul as grouped_scaled_matmul,
)

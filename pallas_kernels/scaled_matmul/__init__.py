from pallas_kernels.scaled_matmul.api import scaled_matmul as scaled_matmul

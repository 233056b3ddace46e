from pallas_kernels.scaled_matmul.api import scaled_matmul as scaled_matmul
from pallas_kernels.scaled_matmul.api import scaled_swiglu as scaled_swiglu

from pallas_kernels.delta_heads.api import delta_heads as delta_heads

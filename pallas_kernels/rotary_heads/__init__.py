from pallas_kernels.rotary_heads.api import rotary_heads as rotary_heads

from pallas_kernels.skinny_matmul.api import skinny_matmul as skinny_matmul

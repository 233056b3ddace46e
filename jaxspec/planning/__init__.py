"""What a decoding setup needs on H100s and how fast it can be at best, from shapes alone.

The programs are the ones that run, compiled for an H100 without one (`pallas_kernels.h100`).
Floors are estimates from datasheet numbers, never timings.
"""

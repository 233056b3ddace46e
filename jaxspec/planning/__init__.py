"""Plans decoding setups for H100s from shapes alone: memory needed, and a lower bound on time.

The programs are the ones that run, compiled for an H100 without one (`pallas_kernels.h100`).
Floors are estimates from datasheet numbers, never timings.
"""

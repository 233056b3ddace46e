#!/bin/bash
# Two nodes of eight H100s decode with one model cut over all sixteen.
#SBATCH --job-name=jaxspec
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=01:00:00
set -euo pipefail

# Weights every node can read; each process reads only what its own devices hold.
TARGET=${TARGET:-/shared/qwen3-235b-a22b}
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}

# srun starts one process per node; JAX finds the others from SLURM's own variables.
srun --kill-on-bad-exit=1 python -m jaxspec generate --distributed --devices 16 \
    --target "$TARGET" --dtype bfloat16 --prompts prompts.jsonl --batch-size 8 --json

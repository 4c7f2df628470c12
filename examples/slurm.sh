#!/bin/bash
# Two nodes of eight GPUs, a torchrun on each: sbatch examples/slurm.sh [PROGRAM [ARGUMENTS]]
#SBATCH --job-name=qcomm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
set -euo pipefail

FIRST_HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export FIRST_HOST
if [ $# -eq 0 ]; then set -- examples/moe_layer.py; fi

# SLURM_NODEID is that of each node, so its expansion waits until srun has come there.
srun bash -c 'exec torchrun --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" --nproc-per-node 8 \
    --master-addr "$FIRST_HOST" --master-port 29500 "$@"' torchrun "$@"

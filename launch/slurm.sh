#!/bin/bash
# Trains on a Slurm cluster, one process per GPU, and requeues itself until all steps are done.
# Submit from the repository's root, into a workdir that all nodes see:
#
#   sbatch --nodes=4 launch/slurm.sh configs/siglip_l16.py:folder:/data/pairs /shared/run1 --config.mesh.fsdp=8
#
# Further arguments go to train.py. PRESET names another environment file,
# PYTHON another interpreter. Stop for good: scancel.
#
# Run here: on a one-node Slurm 22.05 with two CPU processes (time limit, requeue, resume, scancel).
# NOT run: on a GPU, on more than one node.
#SBATCH --job-name=flax_vlm
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
# not --gpus-per-task: that hides a node's other GPUs, but jax gives process i of a node its GPU i
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
# SIGTERM to every process (no "B:", which signals this script alone), 300 to 360 s ahead of the
# limit. Enough for the agreed stop, one checkpoint and an evaluation that may be running?
#SBATCH --signal=TERM@300
# after a node failure Slurm requeues by itself
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

[ $# -ge 2 ] || { echo "usage: sbatch launch/slurm.sh CONFIG WORKDIR [flags of train.py]" >&2; exit 1; }
config=$1 workdir=$2
shift 2
set -a
. "${PRESET:-launch/env/gpu.env}" || exit 1
set +a
# beside the workdir: jax lets only process 0 write it, so all nodes must see the folder
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$(dirname "$workdir")/compilation_cache}

# kill-on-bad-exit=0: the first process to exit with 75 must not take the others, still saving, down.
# A process that dies is found by jax's heartbeat. srun returns the highest exit code.
srun --kill-on-bad-exit=0 --gpu-bind=none --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
  "${PYTHON:-python}" train.py --distributed=auto --config="$config" --workdir="$workdir" "$@"
status=$?
# 75: told to stop, state saved. 69: a process was out of reach; had it been killed (out of memory),
# 128 + signal would be the highest code. No trap for TERM: scancel ends this script before it requeues.
case $status in 69 | 75) exec scontrol requeue "$SLURM_JOB_ID" ;; esac
exit $status

#!/usr/bin/env bash
# One run over all GPUs of a SLURM job:
#
#     sbatch scripts/launch/slurm.sh megabyte_132m --data books/ --batch-size 2048 --fsdp 8
#
# Change: nodes, GPUs of a node (twice), partition and account, time, and how your cluster makes
# `bytelm` available (below). RUN_DIR must be on a file system that all nodes share.
#
#SBATCH --job-name=bytelm
#SBATCH --nodes=4
#SBATCH --gpus-per-node=8
# One process per GPU: JAX gives the process with SLURM_LOCALID i the i-th GPU of its node, and would
# leave the others of a single process per node idle.
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
# Two minutes before the time is up every process gets SIGTERM; the run saves and ends with status 0.
#SBATCH --signal=TERM@120
# After a preemption or a lost node SLURM starts this script again; the run continues where it saved.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=bytelm-%j.log
##SBATCH --partition=gpu
##SBATCH --account=mine
set -euo pipefail

RUN_DIR=${RUN_DIR:-$PWD/runs/$SLURM_JOB_ID}
MOST_RESTARTS=20

# How `bytelm` gets onto the PATH of every node.
. "${VENV:-.venv}/bin/activate"

mkdir -p "$RUN_DIR"
log=$RUN_DIR/slurm-${SLURM_RESTART_COUNT:-0}.log

# Processes notice by themselves that one is gone, and end with 75; SLURM killing them would hide it.
start="srun --kill-on-bad-exit=0"

$start bytelm doctor --distributed --run-dir "$RUN_DIR"

status=0
$start bytelm train "$@" --distributed --run-dir "$RUN_DIR" 2>&1 | tee "$log" || status=$?

# 75: a process hung or lost another one; above 128: one was killed. 0 without "done": the time was
# up.
if [ "$status" = 75 ] || [ "$status" -gt 128 ] || { [ "$status" = 0 ] && ! grep -q '^done:' "$log"; }; then
    if [ "${SLURM_RESTART_COUNT:-0}" -lt "$MOST_RESTARTS" ]; then
        echo "unfinished (status $status): into the queue again"
        scontrol requeue "$SLURM_JOB_ID"
    fi
fi
exit "$status"

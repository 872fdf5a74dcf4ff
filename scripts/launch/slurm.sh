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
# After a preemption SLURM starts this script again; the run continues where it saved.
#SBATCH --requeue
# A node that fails ends the run and not the job: the run goes on with the nodes that are left, or
# with the most of them that divide the batch, which stays what it is. ELASTIC=0 waits for all nodes
# in the queue instead.
#SBATCH --no-kill
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
nodes=$SLURM_JOB_NUM_NODES tasks=$SLURM_NTASKS_PER_NODE parts=()

# Nodes of the job that work, separated by commas.
nodes_left() {
    sinfo --noheader --Node --nodes="$SLURM_JOB_NODELIST" --format="%N %t" | sort -u |
        awk '$2 !~ /[*]|^(down|fail|unk|drain$|boot|pow|not)/ && !seen[$1]++ { print $1 }' | paste -sd,
}

$start bytelm doctor --distributed --run-dir "$RUN_DIR"

for ((attempt = 0; ; attempt++)); do
    status=0
    $start bytelm train "$@" ${parts[@]+"${parts[@]}"} --distributed --run-dir "$RUN_DIR" 2>&1 |
        tee "$log" || status=$?
    if [ "$status" = 0 ] || [ "${ELASTIC:-1}" = 0 ] || [ "$attempt" = "$MOST_RESTARTS" ]; then
        break
    fi
    IFS=, read -ra left <<<"$(nodes_left)" || true
    if [ "${#left[@]}" = 0 ] || [ "${#left[@]}" -ge "$nodes" ]; then
        break # all nodes are there: it was not that
    fi
    # In nodes, of which each is as many devices as it has processes.
    read -r count micro < <(python -m bytelm.elastic layout "$RUN_DIR" --before "$nodes" \
        --left "${#left[@]}" --devices "$tasks") || break
    echo "${#left[@]} of $nodes nodes are left: starting again on $count, $micro micro-batches a step"
    nodes=$count parts=(--accumulation-steps "$micro")
    chosen=$(IFS=,; echo "${left[*]:0:count}")
    start="srun --kill-on-bad-exit=0 --nodes=$nodes --ntasks=$((nodes * tasks)) --nodelist=$chosen"
done

# 75: a process hung or lost another one; above 128: one was killed. 0 without "done": the time was
# up.
if [ "$status" = 75 ] || [ "$status" -gt 128 ] || { [ "$status" = 0 ] && ! grep -q '^done:' "$log"; }; then
    if [ "${SLURM_RESTART_COUNT:-0}" -lt "$MOST_RESTARTS" ]; then
        echo "unfinished (status $status): into the queue again"
        scontrol requeue "$SLURM_JOB_ID"
    fi
fi
exit "$status"

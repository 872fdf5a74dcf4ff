#!/usr/bin/env bash
# One run over all hosts of a TPU pod slice:
#
#     TPU=my-pod ZONE=us-central2-b scripts/launch/tpu_pod.sh megabyte_132m --batch-size 1024 --fsdp 4
#
# Change: TPU, ZONE, RUN_DIR (a folder on every host that is the same file system: Filestore, or a
# bucket mounted with gcsfuse), VENV on the hosts, where `pip install 'bytelm[tpu]'` was done once:
#
#     gcloud compute tpus tpu-vm ssh $TPU --zone=$ZONE --worker=all \
#         --command="python3 -m venv venv && venv/bin/pip install 'bytelm[tpu]'"
#
# The command runs on every host (--worker=all); JAX finds the others through the pod itself.
# Maintenance and preemption send SIGTERM: the run saves on all hosts and ends with status 0. The same
# command continues from there, on a new slice of any size, too.
#
# The chips of a slice compute together, so a slice that lost a host is lost. TPU="first second" names
# several: a run whose slice is no longer ready goes on with the first that is. The batch stays what it
# is, and a chip takes no more rows at once than before.
set -euo pipefail

: "${TPU:?name the TPU, or several}" "${ZONE:?name its zone}"
RUN_DIR=${RUN_DIR:-/mnt/shared/runs/${TPU%% *}}
VENV=${VENV:-venv}
MOST_RESTARTS=20

on_hosts() { # which, command
    gcloud compute tpus tpu-vm ssh "$slice" --zone="$ZONE" --worker="$1" --command="$2"
}

described() { # slice, field
    gcloud compute tpus tpu-vm describe "$1" --zone="$ZONE" --format="value($2)"
}

# The first slice that is ready, and how many devices it has.
find_slice() {
    local kind
    for slice in $TPU; do
        if [ "$(described "$slice" state)" = READY ]; then
            kind=$(described "$slice" acceleratorType)
            chips=${kind##*-}
            case $kind in v4-* | v5p-*) chips=$((chips / 2)) ;; esac # named by their cores
            return
        fi
    done
    echo "none of $TPU is ready" >&2
    return 1
}

# Quoted once more, for the shell on the hosts.
bin=$(printf '%q' "$VENV")/bin
run_dir=$(printf '%q' "$RUN_DIR")
options=$(printf ' %q' "$@")

find_slice
on_hosts all "$bin/bytelm doctor --distributed --run-dir $run_dir"

for ((attempt = 0; ; attempt++)); do
    status=0
    on_hosts all "$bin/bytelm train$options --distributed --run-dir $run_dir" || status=$?
    if [ "$status" = 0 ] || [ "$attempt" = "$MOST_RESTARTS" ]; then
        exit "$status"
    fi
    # 75: a process hung or lost another one; every other status is for you to look at, unless the
    # slice is gone.
    before=$chips old=$slice
    if [ "$(described "$slice" state)" != READY ]; then
        find_slice || exit "$status"
        echo "status $status: $old is not ready, going on with $slice" >&2
    elif [ "$status" != 75 ]; then
        exit "$status"
    else
        echo "status 75: starting again" >&2
    fi
    sleep 30 # until every host has noticed
    if [ "$chips" != "$before" ]; then
        layout=$(on_hosts 0 "$bin/python -m bytelm.elastic layout $run_dir --before $before --left $chips")
        if [ "${layout% *}" != "$chips" ]; then
            echo "the batch does not divide among the $chips chips of $slice" >&2
            exit "$status"
        fi
        options="$options --accumulation-steps ${layout#* }"
    fi
done

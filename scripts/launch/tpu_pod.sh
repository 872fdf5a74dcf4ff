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
set -euo pipefail

: "${TPU:?name the TPU}" "${ZONE:?name its zone}"
RUN_DIR=${RUN_DIR:-/mnt/shared/runs/$TPU}
VENV=${VENV:-venv}
MOST_RESTARTS=20

on_all_hosts() {
    gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"
}

# Quoted once more, for the shell on the hosts.
bytelm="$(printf '%q' "$VENV")/bin/bytelm"
run_dir=$(printf '%q' "$RUN_DIR")
options=$(printf ' %q' "$@")

on_all_hosts "$bytelm doctor --distributed --run-dir $run_dir"

for ((attempt = 0; ; attempt++)); do
    status=0
    on_all_hosts "$bytelm train$options --distributed --run-dir $run_dir" || status=$?
    # 75: a process hung or lost another one; every other status is for you to look at.
    if [ "$status" != 75 ] || [ "$attempt" = "$MOST_RESTARTS" ]; then
        exit "$status"
    fi
    echo "status 75: starting again" >&2
    sleep 30 # until every host has noticed
done

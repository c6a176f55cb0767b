#!/usr/bin/env bash
# A run on a Cloud TPU slice: gcloud executes the same command on every host of it.
#
#   bash launch/tpu_vm.sh setup NAME ZONE           copies this repository there and installs it
#   bash launch/tpu_vm.sh run NAME ZONE COMMAND ... runs it on all hosts, and shows their output
#   bash launch/tpu_vm.sh stop NAME ZONE            SIGTERM to one host: all of them save and end
#   bash launch/tpu_vm.sh logs NAME ZONE            the last lines of each host
#
# On the hosts the repository is in ~/starflow2_jax, with logs in its runs/logs. --workdir should be a
# gs:// path. Data must be on a disk that all hosts see, such as a bucket mounted with gcsfuse, since
# records are files. JAX_COMPILATION_CACHE_DIR=gs://... is passed on; without it each host has its own
# cache.
set -euo pipefail

usage() {
  sed -n 's/^#   bash/bash/p' "${BASH_SOURCE[0]}" >&2
  exit 2
}

[ $# -ge 3 ] || usage
verb=$1 name=$2 zone=$3
shift 3
tpu=(gcloud compute tpus tpu-vm)

on_all() { # COMMAND
  "${tpu[@]}" ssh "$name" --zone "$zone" --worker=all --command "$1"
}

case $verb in
  setup)
    cd "$(dirname "${BASH_SOURCE[0]}")/.."
    archive=$(mktemp)
    trap 'rm -f "$archive"' EXIT
    git archive --format=tar.gz -o "$archive" HEAD
    "${tpu[@]}" scp "$archive" "$name:starflow2_jax.tar.gz" --zone "$zone" --worker=all
    on_all 'rm -rf starflow2_jax && mkdir starflow2_jax && tar -xzf starflow2_jax.tar.gz -C starflow2_jax &&
      python3 -m venv venv && venv/bin/pip install --quiet -e "starflow2_jax[tpu,gcs]"'
    ;;
  run)
    [ $# -gt 0 ] || usage
    words=$(printf ' %q' "$@")
    # By this secret the processes know each other, whoever else connects to the port.
    token=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
    on_all "cd starflow2_jax && export PATH=\$HOME/venv/bin:\$PATH STARFLOW2_CLUSTER=auto \
      STARFLOW2_JOB_TOKEN=$token \
      JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-\$HOME/.cache/starflow2_jax} && \
      bash launch/one_process.sh$words"
    ;;
  stop)
    "${tpu[@]}" ssh "$name" --zone "$zone" --worker=0 \
      --command "pkill -TERM -f 'python[0-9.]* -m starflow2_jax'"
    ;;
  logs) on_all 'tail -n 20 starflow2_jax/runs/logs/process_*.log' ;;
  *) usage ;;
esac

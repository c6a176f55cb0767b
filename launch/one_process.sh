#!/usr/bin/env bash
# Runs one process of a run and, where it fails, says why in the last line.
#
#   bash launch/one_process.sh COMMAND ...
#
# Each launcher starts its processes through this. Output goes on and into LOGS/process_N.log (LOGS:
# $STARFLOW2_LOGS, default runs/logs). SIGTERM and SIGINT are passed on as SIGTERM, on which training
# saves; SIGUSR1 kills it. The exit status is the command's; where it died of signal S, 128 + S.
set -uo pipefail

[ $# -gt 0 ] || {
  echo "usage: bash launch/one_process.sh COMMAND ..." >&2
  exit 2
}
number=${JAX_PROCESS_ID:-${SLURM_PROCID:-${TPU_WORKER_ID:-0}}}
if [ -n "${MEGASCALE_SLICE_ID:-}" ]; then
  number=slice_${MEGASCALE_SLICE_ID}_$number
fi
folder=${STARFLOW2_LOGS:-runs/logs}
mkdir -p "$folder" || exit 1
log=$folder/process_$number.log
rm -f "$folder/process_$number.reason"

# The runtime's own words are longer than a screen: an `error:` line of ours says most, then the last
# line of a Python trace, then the status that jax gives before it aborts.
reason() { # STATUS
  local said
  said=$(grep -E '^error: ' "$log" | tail -n 1)
  [ -n "$said" ] || said=$(grep -E '^[A-Za-z_.]*(Error|Exception|Interrupt)(: |$)' "$log" | tail -n 1)
  if [ -z "$said" ]; then
    said=$(awk '/absl::Status: / { sub(/.*absl::Status: /, ""); found = $0; getline more
      if (found ~ /unhealthy/) found = found " process " more } END { print found }' "$log")
  fi
  [ -n "$said" ] || said=$(grep -Ev '^ *$|^\[Gloo\]' "$log" | tail -n 1)
  if [ "$1" -gt 128 ]; then
    printf 'ended by signal %d; its last words: ' $(($1 - 128))
  fi
  printf '%s\n' "${said#error: }" | cut -c1-600
}

PYTHONUNBUFFERED=1 "$@" > >(tee "$log") 2>&1 &
pid=$!
trap 'kill -TERM $pid 2> /dev/null' TERM INT
trap 'kill -KILL $pid 2> /dev/null' USR1
wait "$pid" 2> /dev/null
status=$?
# A trap interrupts the first wait; the second gives the status of the command itself.
while kill -0 "$pid" 2> /dev/null; do
  wait "$pid" 2> /dev/null
  status=$?
done
if [ "$status" -ne 0 ]; then
  sleep 0.3 # tee may have a line to write yet
  printf 'process %s: %s\n' "$number" "$(reason "$status")" > "$folder/process_$number.reason"
  printf 'error: %s\n' "$(cat "$folder/process_$number.reason")" >&2
fi
exit "$status"

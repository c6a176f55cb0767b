#!/usr/bin/env bash
# Runs one process of a run. If it fails, the last line says why.
#
#   bash launch/one_process.sh COMMAND ...
#
# Every launcher starts its processes with this script. Output is printed, and written to
# LOGS/process_N.log (LOGS: $STARFLOW2_LOGS, by default runs/logs). SIGTERM and SIGINT are passed on
# as SIGTERM, upon which training saves; SIGUSR1 kills the command. The exit status is that of the
# command, or 128 + S if signal S ended it.
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

# The runtime's messages fill more than a screen. The most useful line is, in this order: an `error:`
# line of this package, the last line of a traceback, the status that jax prints before it aborts.
reason() { # STATUS
  local message
  message=$(grep -E '^error: ' "$log" | tail -n 1)
  [ -n "$message" ] || message=$(grep -E '^[A-Za-z_.]*(Error|Exception|Interrupt)(: |$)' "$log" | tail -n 1)
  if [ -z "$message" ]; then
    message=$(awk '/absl::Status: / { sub(/.*absl::Status: /, ""); status = $0; getline more
      if (status ~ /unhealthy/) status = status " process " more } END { print status }' "$log")
  fi
  [ -n "$message" ] || message=$(grep -Ev '^ *$|^\[Gloo\]' "$log" | tail -n 1)
  if [ "$1" -gt 128 ]; then
    printf 'ended by signal %d; its last message: ' $(($1 - 128))
  fi
  printf '%s\n' "${message#error: }" | cut -c1-600
}

# With STARFLOW2_PARENT the command ends with this script, even if a kill -9 ends it.
STARFLOW2_PARENT=$$ PYTHONUNBUFFERED=1 "$@" > >(tee "$log") 2>&1 &
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
  sleep 0.3 # tee may still have a line to write
  printf 'process %s: %s\n' "$number" "$(reason "$status")" > "$folder/process_$number.reason"
  printf 'error: %s\n' "$(cat "$folder/process_$number.reason")" >&2
fi
exit "$status"

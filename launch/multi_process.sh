#!/usr/bin/env bash
# Starts N processes of one run on this machine.
#
#   bash launch/multi_process.sh N [--cpu DEVICES | --gpu DEVICES] [--port PORT] [--logs DIR] COMMAND ...
#   bash launch/multi_process.sh 2 --cpu 8 python -m starflow2_jax.train --config ... --workdir ...
#
#   --cpu DEVICES  virtual CPU devices of all processes together (8 and N = 2: four each)
#   --gpu DEVICES  GPUs, divided among the processes (8 and N = 2: 0-3 and 4-7)
#   --port PORT    port of the coordinator on the loopback interface; default: a free one
#   --logs DIR     folder of process_0.log, ...; default: runs/logs
#
# Every line of output begins with the number of its process. SIGTERM and Ctrl-C go to all processes.
# When one fails, the others have a minute to end by themselves. The last line then says why the first
# process failed, and the exit status is that of this process.
set -uo pipefail
here=$(dirname "${BASH_SOURCE[0]}")

die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

count=${1:-}
[[ $count =~ ^[1-9][0-9]*$ ]] || die "the first argument is the number of processes, not '$count'"
shift
kind='' devices='' port='' logs=${STARFLOW2_LOGS:-runs/logs}
while [ $# -gt 0 ]; do
  case $1 in
    --cpu | --gpu)
      kind=${1#--} devices=${2:-}
      [[ $devices =~ ^[1-9][0-9]*$ ]] || die "$1 needs a number of devices, not '$devices'"
      ;;
    --port) port=${2:-} ;;
    --logs) logs=${2:-} ;;
    --*) die "unknown argument $1" ;;
    *) break ;;
  esac
  shift 2 || die "$1 needs a value"
done
[ $# -gt 0 ] || die "no command was given"
[ -z "$devices" ] || [ $((devices % count)) -eq 0 ] \
  || die "$count processes do not divide --$kind $devices"
if [ -z "$port" ]; then
  port=$((20000 + RANDOM % 12000))
  while (exec 3<> "/dev/tcp/127.0.0.1/$port") 2> /dev/null; do
    port=$((20000 + RANDOM % 12000))
  done
fi

# By this secret the processes know each other, whoever else connects to the port.
STARFLOW2_JOB_TOKEN=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
export STARFLOW2_JOB_TOKEN

prefix() { # Not awk: some versions buffer lines.
  trap '' TERM INT
  local line
  while IFS= read -r line || [ -n "$line" ]; do
    printf '%s %s\n' "$1" "$line"
  done
}

# The processes end with this script, even if a kill -9 ends it.
follow=()
if setpriv --pdeathsig TERM true 2> /dev/null; then
  follow=(setpriv --pdeathsig TERM)
fi
pids=()
trap 'kill -TERM "${pids[@]}" 2> /dev/null' TERM INT
for ((i = 0; i < count; i++)); do
  (
    export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_NUM_PROCESSES=$count JAX_PROCESS_ID=$i
    export STARFLOW2_LOGS=$logs
    if [ -n "$devices" ]; then
      share=$((devices / count))
      export STARFLOW2_DEVICES_PER_PROCESS=$share
    fi
    case $kind in
      cpu) export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=$share ;;
      gpu)
        JAX_LOCAL_DEVICE_IDS=$(seq -s , $((i * share)) $(((i + 1) * share - 1)))
        export JAX_LOCAL_DEVICE_IDS
        ;;
    esac
    exec ${follow[@]+"${follow[@]}"} bash "$here/one_process.sh" "$@"
  ) > >(prefix "[$i]") 2>&1 &
  pids+=($!)
done

first='' status=0 deadline=0
left=("${!pids[@]}")
while [ ${#left[@]} -gt 0 ]; do
  still=()
  for i in "${left[@]}"; do
    if kill -0 "${pids[i]}" 2> /dev/null; then
      still+=("$i")
      continue
    fi
    wait "${pids[i]}"
    ended=$?
    if [ "$ended" -ne 0 ] && [ -z "$first" ]; then
      first=$i status=$ended deadline=$((SECONDS + 60))
    fi
  done
  left=(${still[@]+"${still[@]}"})
  if [ -n "$first" ] && [ "$SECONDS" -ge "$deadline" ]; then
    for i in ${left[@]+"${left[@]}"}; do
      kill -USR1 "${pids[i]}" # one_process.sh then kills its command
    done
    deadline=$((SECONDS + 60)) # time for them to report the reason
  fi
  sleep 0.2
done
sleep 0.3 # `prefix` may still have a line to write
if [ -n "$first" ]; then
  printf 'error: the first of %d processes to end: %s\n' "$count" \
    "$(cat "$logs/process_$first.reason" 2> /dev/null || echo "process $first, status $status")" >&2
fi
exit "$status"

#!/usr/bin/env bash
# One run over several processes of this machine, connected over loopback: the real thing in small, for trying and testing.
#
#   launch/local_cluster.sh N [--devices D] [--port P] [--dry-run] -- TRAIN ARGUMENTS…
#   launch/local_cluster.sh 2 --devices 4 -- --config configs/smoke.py --workdir runs/two
#
#   --devices D   D CPU devices in each process (default: what the machine has)
#   --port P      of process 0 (default: a free one)
#   --dry-run     print the commands and start nothing
#
# Lines are prefixed by [process]. SIGTERM and SIGINT go to every process; the state is saved and the status is 143. When
# one process fails, all end; the status is the first that is not 0. PYTHON names another interpreter than .venv's.
set -euo pipefail

usage() {
  sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2
  exit 2
}

processes='' devices='' port='' dry_run=''
while (($#)); do
  case $1 in
    --devices) devices=${2-} && shift ;;
    --port) port=${2-} && shift ;;
    --dry-run) dry_run=1 ;;
    --) shift && break ;;
    *[!0-9]* | '') usage ;;
    *) processes=$1 ;;
  esac
  shift || usage
done
[[ $processes =~ ^[1-9][0-9]*$ && $devices =~ ^[0-9]*$ && $port =~ ^[0-9]*$ && $# -gt 0 ]] || usage

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
command -v "$python" >/dev/null || python=python3
if [[ -z $port ]]; then
  port=$("$python" -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')
fi
if [[ -n $devices ]]; then
  export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=$devices
fi
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
command=("$python" -m mlm_jax train --coordinator "127.0.0.1:$port" --num-processes "$processes")

if [[ -n $dry_run ]]; then
  for ((process = 0; process < processes; process++)); do
    printf '%s' "${devices:+JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=$devices }"
    printf '%q ' "${command[@]}" --process-id "$process" "$@"
    echo
  done
  exit
fi

children=() signalled=''
# shellcheck disable=SC2329  # the traps call it
pass_on() {
  signalled=1
  kill -s "$1" "${children[@]}" 2>/dev/null || true
}
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT
trap 'pass_on KILL' EXIT
set -m # each process leads a group of its own, so that Ctrl-C comes from here alone, once
for ((process = 0; process < processes; process++)); do
  "${command[@]}" --process-id "$process" "$@" > >(sed -u "s/^/[$process] /") 2> >(sed -u "s/^/[$process] /" >&2) &
  children+=($!)
done
set +m

status=0
for child in "${children[@]}"; do
  ended=0 signalled=''
  wait "$child" || ended=$?
  while [[ -n $signalled ]]; do # the signal ended the wait, not the process
    ended=0 signalled=''
    wait "$child" || ended=$?
  done
  ((status)) || status=$ended
done
exit "$status"

#!/usr/bin/env bash
# One worker's end of launch/tpu_vm.sh, run there in the copied project. Its traces are in run/: log.txt, command, status.
#
#   bash launch/worker.sh start TRAIN ARGUMENTS     `mlm-jax train`, which outlives the connection that started it
#   bash launch/worker.sh state                     running | ended STATUS | lost (the machine restarted) | none, and of a run
#                                                   that has ended and that had continued: begun STEP
#   bash launch/worker.sh logs                      the log from its beginning, until the run ends
#   bash launch/worker.sh stop                      SIGTERM: the run saves and ends
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mkdir -p run
exec 9>>run/lock # held while the run lives: neither a crash nor a reboot leaves a false trace
if flock --nonblock 9 || [[ -f run/status ]]; then running=false; else running=true; fi

start() {
  if $running; then
    echo "a run is going on this worker: $(<run/command)" >&2
    exit 1
  fi
  rm -f run/status
  { printf 'mlm-jax train' && printf ' %q' "$@" && echo; } | tee run/command >>run/log.txt
  {
    trap '' HUP
    .venv/bin/python -m mlm_jax train "$@" --distributed &
    echo $! >run/pid
    status=0
    wait $! || status=$?
    echo "$status" >run/status
  } </dev/null >>run/log.txt 2>&1 &
}

state() {
  if $running; then
    echo "worker running"
  elif [[ -f run/status ]]; then
    echo "worker ended $(<run/status)"
    sed -n 's/.*continuing from the checkpoint of step \([0-9]*\)$/begun \1/p' run/log.txt | tail -n 1
  elif [[ -f run/command ]]; then
    echo "worker lost"
  else
    echo "worker none"
  fi
}

logs() {
  if $running; then
    exec tail --lines=+1 --follow --pid="$(<run/pid)" run/log.txt
  fi
  cat run/log.txt
}

stop() {
  if $running; then kill -TERM "$(<run/pid)"; fi
}

"$@"

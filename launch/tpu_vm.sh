#!/usr/bin/env bash
# Trains on a Cloud TPU slice, or several, through a queued resource: created, installed, run, followed, created again after
# a pre-emption, deleted. The same `mlm-jax train` runs on every worker, and the workers find each other. Needs gcloud, logged
# in, and its key in the agent: ssh-add ~/.ssh/google_compute_engine
#
#   bash launch/tpu_vm.sh VERB --name NAME --zone ZONE [OPTIONS] [-- TRAIN ARGUMENTS]
#
#   keep      all of it: create, install, start, follow, and the same again after a pre-emption, until the run has ended
#   create    queue for the slice and wait until it is active             (needs --type)
#   install   copy the commit that is checked out here to every worker and install it there
#   start     start `mlm-jax train` on every worker; it goes on when this terminal is closed
#   logs      follow the first worker's log
#   status    the state of the queued resource, and of the run on every worker
#   stop      SIGTERM: the run saves and ends; start continues it, and so does a keep that is still there
#   delete    delete the slice and its place in the queue
#
#   --type TYPE         the accelerator type: v4-16, v5litepod-16 (v5e), v5p-128, v6e-16, …
#   --slices N          several slices of that type (default 1); --config.sharding.slice=N lays the mesh over them
#   --spot              capacity that can be taken away, at a fraction of the price
#   --runtime VERSION   the VM's image; the default is the one for the type
#   --setup COMMAND     run in the project on every worker after the installation; for instance
#                       'gcloud storage cp --recursive gs://BUCKET/corpus .' to have a prepared corpus for --data corpus
#   --delete            for keep: delete the slice when the run has ended well
#   --cache URI         where compiled programs are kept for the next start; the default is jax-cache beside the workdir
#   --project PROJECT   the default is gcloud's
#   --dry-run           print every command and run none; `keep` then plays a run with one pre-emption
#
#   bash launch/tpu_vm.sh keep --name bert --zone us-west4-a --type v5litepod-16 --spot --delete \
#       --setup 'gcloud storage cp --recursive gs://BUCKET/corpus .' \
#       -- --config configs/bert_base.py --data corpus --workdir gs://BUCKET/runs/bert
#
# The VMs' disks go when they go, so the workdir is a bucket: a new slice, of another size if need be, continues there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

poll_seconds=${POLL_SECONDS:-30}
failure_limit=3 # in a row, of a run on a slice that is there; pre-emptions and stops by a signal are not counted
failures=0
reached=0 # the step that the run continued at when it last failed

die() {
  echo "tpu_vm.sh: $1" >&2
  exit "${2:-2}"
}

say() { if $dry_run; then echo "# $*"; else echo "tpu_vm.sh: $*" >&2; fi; }

usage() { sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }

# A command as one would type it: words are quoted where they have to be.
spell() {
  local word line=""
  for word in "$@"; do
    if [[ ! $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then word=${word@Q}; fi
    line+=" $word"
  done
  echo "${line:1}"
}

do_or_print() {
  if $dry_run; then spell "$@"; else "$@"; fi
}

gcloud_tpus() { # VERB [ARGUMENTS…], on the queued resource
  do_or_print gcloud compute tpus queued-resources "$1" "$name" "${@:2}" "${place[@]}"
}

on_workers() { # all | 0, COMMAND: a shell command in the home directory of all workers, or of the first one
  gcloud_tpus ssh --worker="$1" --node="$1" --command="$2"
}

pause() { $dry_run || sleep "$poll_seconds"; }

# What the cloud and the workers answer, in `state` and, of a run that has ended, `begun`: the step of the checkpoint that it
# continued from. A dry run takes the next of its supposed answers.
resource_state() {
  if $dry_run; then
    gcloud_tpus describe --format='value(state.state)'
    suppose
  elif ! state=$(gcloud_tpus describe --format='value(state.state)' 2>"$errors"); then
    state=UNKNOWN
    if grep --quiet NOT_FOUND "$errors"; then
      state=ABSENT
    elif [[ -z $answered ]]; then
      die "gcloud cannot tell the state of $name: $(<"$errors")" 1
    fi
  fi
  answered=yes # from here on, silence is the network's fault
}

run_state() {
  local answers ask='if [ -f mlm-jax/launch/worker.sh ]; then bash mlm-jax/launch/worker.sh state; else echo worker none; fi'
  if $dry_run; then
    on_workers all "$ask"
    suppose
    return
  fi
  state=unreachable begun=0
  if answers=$(on_workers all "$ask" 2>"$errors"); then
    begun=$(sed -n 's/^begun //p' <<<"$answers" | sort --numeric-sort | tail -n 1)
    answers=$(sed -n 's/^worker //p' <<<"$answers" | sort --unique)
    case $answers in
      *running*) state=running ;;
      *"ended 2"*) state="ended 2" ;;
      *none* | *lost*) state=none ;;
      *) # of several statuses a failure, else a stop by a signal, the last in order, else 0
        state=$(grep --invert-match --extended-regexp '^ended (0|130|143)$' <<<"$answers" | tail -n 1) || true
        state=${state:-${answers##*$'\n'}}
        ;;
    esac
  fi
}

suppose() {
  state=${supposed[0]:-}
  supposed=("${supposed[@]:1}")
  say "suppose: $state"
}

create() {
  local node=(--node-id="$name")
  if ((slices > 1)); then node=(--node-count="$slices" --node-prefix="$name"); fi
  gcloud_tpus create "${node[@]}" --accelerator-type="$type" --runtime-version="$runtime" ${spot:+--spot}
}

wait_until_active() {
  while resource_state && [[ $state != ACTIVE ]]; do
    case $state in FAILED | SUSPENDING | SUSPENDED | ABSENT) die "$name is $state; see: $describe" 1 ;; esac
    say "$name is $state; asking again in $poll_seconds s"
    pause
  done
}

install() {
  git diff --quiet HEAD || say "changes that are not committed stay here"
  do_or_print git archive --format=tar.gz --output="$archive" HEAD
  do_or_print gcloud compute tpus queued-resources scp "$archive" "$name:mlm-jax.tar.gz" --worker=all --node=all "${place[@]}"
  on_workers all "mkdir -p mlm-jax && tar -xzf mlm-jax.tar.gz -C mlm-jax && cd mlm-jax && bash launch/install.sh tpu,gcs${setup:+ && $setup}"
}

start() {
  local quoted
  printf -v quoted ' %q' "${arguments[@]}"
  on_workers all "JAX_COMPILATION_CACHE_DIR=${cache@Q} bash mlm-jax/launch/worker.sh start$quoted"
}

stop() { on_workers all "bash mlm-jax/launch/worker.sh stop"; }

logs() { on_workers 0 "bash mlm-jax/launch/worker.sh logs"; }

delete() { gcloud_tpus delete --force --quiet; }

status() {
  resource_state
  echo "$name: $state"
  if [[ $state == ACTIVE ]]; then
    run_state
    echo "run: $state"
  fi
}

keep() {
  while true; do
    resource_state
    case $state in
      ABSENT) create ;;
      ACTIVE) attend ;;
      SUSPENDED)
        say "$name was pre-empted"
        delete
        failures=0
        ;;
      FAILED) die "the request for $name failed; see: $describe" 1 ;;
      *)
        say "$name is $state"
        pause
        ;;
    esac
  done
}

# One look at the run on an active slice; leaves the script when the run has ended for good.
attend() {
  run_state
  case $state in
    running)
      logs || say "the connection has ended"
      pause
      ;;
    none) { install && start; } || failed "could not be started" ;;
    unreachable)
      say "no answer from the workers: $(tail -n 1 "$errors")"
      pause
      ;;
    "ended 0")
      say "the run has ended"
      if [[ -n $delete ]]; then
        delete
      else
        say "the slice is still there: $(spell bash launch/tpu_vm.sh delete --name "$name" "${place[@]}")"
      fi
      exit 0
      ;;
    "ended 2")
      logs || true
      die "the run was refused; its message is above"
      ;;
    "ended 130" | "ended 143")
      say "the run was stopped by a signal; it continues"
      pause
      start || failed "could not be started"
      ;;
    *)
      failed "$state"
      start || failed "could not be started"
      ;;
  esac
}

failed() {
  if ((${begun:-0} > reached)); then failures=0 reached=$begun; fi # it has saved since the failure before
  ((failures += 1))
  ((failures <= failure_limit)) || die "the run $1; that was failure $failures in a row, with nothing saved between them, so it is left alone; see: logs" 1
  say "the run $1; again, for the ${failures}. time of $failure_limit"
  pause
}

verb=${1:-}
case $verb in
  keep | create | install | start | logs | status | stop | delete) shift ;;
  -h | --help) usage && exit 0 ;;
  "") usage >&2 && exit 2 ;;
  *) die "no verb '$verb'; there are keep, create, install, start, logs, status, stop, delete" ;;
esac

name="" zone="" project="" type="" runtime="" spot="" delete="" setup="" cache="" slices=1 dry_run=false arguments=()
while (($#)); do
  if [[ $1 == --*=* ]]; then set -- "${1%%=*}" "${1#*=}" "${@:2}"; fi
  case $1 in
    --name | --zone | --project | --type | --runtime | --setup | --cache | --slices)
      (($# > 1)) && [[ $2 != --* ]] || die "$1 needs a value"
      printf -v "${1#--}" '%s' "$2"
      shift 2
      ;;
    --spot) spot=yes && shift ;;
    --delete) delete=yes && shift ;;
    --dry-run) dry_run=true && shift ;;
    --) shift && arguments=("$@") && break ;;
    *) die "unknown option '$1'; what follows -- goes to mlm-jax train (see --help)" ;;
  esac
done

[[ -n $name ]] || die "$verb needs --name NAME: what the slice is called"
[[ $name =~ ^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$ ]] || die "--name $name: lower-case letters, digits and -, a letter first, 63 at most"
[[ -n $zone ]] || die "$verb needs --zone ZONE, as us-west4-a"
[[ $slices =~ ^[1-9][0-9]*$ ]] || die "--slices $slices: a number of slices, 1 or more"
if [[ $verb == keep || $verb == create ]]; then
  [[ -n $type ]] || die "$verb needs --type TYPE, as v5litepod-16"
  [[ $type =~ ^v5e-([0-9]+)$ ]] && die "--type $type: the cloud calls that type v5litepod-${BASH_REMATCH[1]}"
  [[ $type =~ ^(v2|v3|v4|v5litepod|v5p|v6e)-[1-9][0-9]*$ ]] || die "--type $type: a generation and a size, as v4-16, v5litepod-16, v5p-128 or v6e-16"
  case ${type%-*} in # https://cloud.google.com/tpu/docs/runtimes
    v5litepod) runtime=${runtime:-v2-alpha-tpuv5-lite} ;;
    v5p) runtime=${runtime:-v2-alpha-tpuv5} ;;
    v6e) runtime=${runtime:-v2-alpha-tpuv6e} ;;
    *) runtime=${runtime:-tpu-ubuntu2204-base} ;;
  esac
fi
if [[ $verb == keep || $verb == start ]]; then
  workdir="" previous=""
  for word in "${arguments[@]}"; do
    if [[ $previous == --workdir ]]; then workdir=$word; fi
    if [[ $word == --workdir=* ]]; then workdir=${word#*=}; fi
    previous=$word
  done
  ((${#arguments[@]})) || die "$verb needs the arguments of mlm-jax train after --, as -- --config configs/bert_base.py --workdir gs://BUCKET/run"
  [[ $workdir == gs://* ]] || die "--workdir '$workdir': the VMs' disks go when they go; name a bucket, as gs://BUCKET/run"
  workdir=${workdir%/}
  beside=${workdir%/*}
  if [[ $beside == gs:/ ]]; then beside=$workdir; fi # the workdir is a bucket's root
  cache=${cache:-$beside/jax-cache}
elif ((${#arguments[@]})); then
  die "$verb takes no arguments of mlm-jax train"
fi
place=(--zone="$zone" ${project:+--project="$project"})
describe=$(spell gcloud compute tpus queued-resources describe "$name" "${place[@]}")
archive=${TMPDIR:-/tmp}/mlm-jax-$name.tar.gz
state="" answered="" begun=0
$dry_run || command -v gcloud >/dev/null || die "no gcloud here: https://cloud.google.com/sdk/docs/install"
errors=$(mktemp)
trap 'rm -f "$errors" "$archive"' EXIT

# What a dry run supposes to be answered.
case $verb in
  keep) supposed=(ABSENT WAITING_FOR_RESOURCES ACTIVE none ACTIVE running SUSPENDED ABSENT ACTIVE none ACTIVE "ended 0") ;;
  create) supposed=(WAITING_FOR_RESOURCES ACTIVE) ;;
  status) supposed=(ACTIVE running) ;;
esac

"$verb"
if [[ $verb == create ]]; then wait_until_active; fi

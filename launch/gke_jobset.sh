#!/usr/bin/env bash
# Trains on Kubernetes: a JobSet of TPU slices or GPU machines, one `mlm-jax train` a host, started again as a whole when a pod
# fails or is pre-empted. The cluster has the JobSet controller, 0.10 or later (https://jobset.sigs.k8s.io).
#
#   bash launch/gke_jobset.sh --name NAME --image IMAGE --claim CLAIM --tpu GENERATION:TOPOLOGY [OPTIONS] -- TRAIN ARGUMENTS
#   bash launch/gke_jobset.sh --name NAME --image IMAGE --claim CLAIM --gpu TYPE:COUNT          [OPTIONS] -- TRAIN ARGUMENTS
#
#   --image IMAGE           a container image whose `python` has mlm-jax with the extra tpu or cuda (and gcs for a bucket), and
#                           the configs
#   --claim CLAIM           a PersistentVolumeClaim that all pods can mount (Filestore, or a bucket through Cloud Storage FUSE);
#                           it is /shared in the pods, for --data and, unless that is a bucket, --workdir
#   --tpu v5e:4x4           generation (v4, v5e, v5p, v6e) and topology, as for `mlm-jax compile --topology`
#   --slices N              several such slices (default 1)
#   --chips-per-host N      default 4, or what the slice has; 8 for a 2x4 slice on one machine
#   --gpu nvidia-h200-141gb:8    the node label cloud.google.com/gke-accelerator, and the GPUs of a machine
#   --nodes N               several such machines (default 1)
#   --restarts N            after faults (default 20); pre-emptions are not counted, and a refused command is not restarted
#   --dry-run               print the manifest and apply nothing: … --dry-run -- … | kubectl apply -f - is the same as without
#
#   bash launch/gke_jobset.sh --name bert --image REGISTRY/mlm-jax:tpu --claim training --tpu v5e:4x4 \
#       -- --config configs/bert_base.py --data /shared/corpus --workdir /shared/runs/bert
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

die() {
  echo "gke_jobset.sh: $1" >&2
  exit 2
}

usage() { sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }

# Words as a YAML list of strings. Kubernetes would expand $(NAME) in them, and takes $$ for $.
yaml_list() {
  local word line=""
  for word in "$@"; do
    [[ $word != *[[:cntrl:]]* ]] || die "an argument with a line break or another control character: ${word@Q}"
    word=${word//\\/\\\\}
    word=${word//\"/\\\"}
    line+=", \"${word//\$/\$\$}\""
  done
  echo "[${line:2}]"
}

name="" image="" claim="" tpu="" gpu="" slices="" nodes="" restarts=20 chips_per_host="" dry_run=false arguments=()
while (($#)); do
  if [[ $1 == --*=* ]]; then set -- "${1%%=*}" "${1#*=}" "${@:2}"; fi
  case $1 in
    --name | --image | --claim | --tpu | --gpu | --slices | --nodes | --restarts | --chips-per-host)
      (($# > 1)) && [[ $2 != --* ]] || die "$1 needs a value"
      key=${1#--}
      printf -v "${key//-/_}" '%s' "$2"
      shift 2
      ;;
    --dry-run) dry_run=true && shift ;;
    -h | --help) usage && exit 0 ;;
    --) shift && arguments=("$@") && break ;;
    *) die "unknown option '$1'; what follows -- goes to mlm-jax train (see --help)" ;;
  esac
done

[[ -n $name ]] || die "--name NAME is missing: what the JobSet is called"
[[ $name =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] || die "--name $name: lower-case letters, digits and -, a letter first, 40 at most"
[[ -n $image ]] || die "--image IMAGE is missing: a container image with mlm-jax in it"
[[ -n $claim ]] || die "--claim CLAIM is missing: a PersistentVolumeClaim that all pods can mount"
[[ $image =~ ^[A-Za-z0-9][A-Za-z0-9._:/@-]*$ ]] || die "--image $image is not the name of an image"
[[ $claim =~ ^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$ ]] || die "--claim $claim is not the name of a claim"
for key in slices nodes chips_per_host; do
  [[ ${!key:-1} =~ ^[1-9][0-9]*$ ]] || die "--${key//_/-} ${!key}: a number, 1 or more"
done
[[ $restarts =~ ^[0-9]+$ ]] || die "--restarts $restarts: a number, 0 or more"

if [[ -n $tpu && -z $gpu ]]; then
  [[ $tpu =~ ^(v4|v5e|v5p|v6e):([1-9][0-9]*x[1-9][0-9]*(x[1-9][0-9]*)?)$ ]] || die "--tpu $tpu: a generation and a topology, as v4:2x2x2, v5e:4x4, v5p:4x4x4 or v6e:4x4"
  topology=${BASH_REMATCH[2]}
  case ${BASH_REMATCH[1]} in # https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus
    v4) accelerator=tpu-v4-podslice axes=3 ;;
    v5e) accelerator=tpu-v5-lite-podslice axes=2 ;;
    v5p) accelerator=tpu-v5p-slice axes=3 ;;
    v6e) accelerator=tpu-v6e-slice axes=2 ;;
  esac
  crosses=${topology//[^x]/}
  ((${#crosses} + 1 == axes)) || die "--tpu $tpu: the chips of ${tpu%:*} are wired in $axes dimensions"
  slice_chips=$((${topology//x/*}))
  chips=${chips_per_host:-$((slice_chips < 4 ? slice_chips : 4))}
  ((slice_chips % chips == 0)) || die "--chips-per-host $chips does not divide the $slice_chips chips of $topology"
  [[ -z $nodes ]] || die "--nodes is for --gpu; a topology has its own number of hosts"
  hosts=$((slice_chips / chips)) slices=${slices:-1} template=launch/jobset_tpu.yaml
elif [[ -n $gpu && -z $tpu ]]; then
  [[ $gpu =~ ^([a-z0-9-]+):([1-9][0-9]*)$ ]] || die "--gpu $gpu: a type and how many a machine has, as nvidia-h200-141gb:8"
  [[ -z $slices$chips_per_host ]] || die "--slices and --chips-per-host are for --tpu"
  accelerator=${BASH_REMATCH[1]} chips=${BASH_REMATCH[2]} topology=""
  hosts=${nodes:-1} slices=1 template=launch/jobset_gpu.yaml
else
  die "either --tpu GENERATION:TOPOLOGY or --gpu TYPE:COUNT"
fi

((${#arguments[@]})) || die "the arguments of mlm-jax train are missing, after --, as -- --config configs/bert_base.py --workdir /shared/run"
workdir="" previous=""
for word in "${arguments[@]}"; do
  if [[ $previous == --workdir ]]; then workdir=$word; fi
  if [[ $word == --workdir=* ]]; then workdir=${word#*=}; fi
  previous=$word
done
[[ $workdir == /shared/* || $workdir == *://* ]] || die "--workdir '$workdir': what is in a pod goes when it goes; put it under /shared or in a bucket"

manifest=$(<"$template")
words=$(yaml_list "${arguments[@]}" --distributed)
fill() { manifest=${manifest//"\${$1}"/"$2"}; }
fill NAME "$name"
fill IMAGE "$image"
fill CLAIM "$claim"
fill RESTARTS "$restarts"
fill ACCELERATOR "$accelerator"
fill TOPOLOGY "$topology"
fill SLICES "$slices"
fill HOSTS "$hosts"
fill CHIPS "$chips"
fill ARGUMENTS "$words" # last: what it holds is nobody's to fill

if $dry_run; then
  echo "$manifest"
else
  command -v kubectl >/dev/null || die "no kubectl here: https://kubernetes.io/docs/tasks/tools"
  kubectl apply -f - <<<"$manifest"
  echo "follow: kubectl logs --follow --prefix --selector=jobset.sigs.k8s.io/jobset-name=$name --max-log-requests=$((slices * hosts))"
  echo "delete: kubectl delete jobset $name"
fi

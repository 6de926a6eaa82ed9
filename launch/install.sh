#!/usr/bin/env bash
# Makes .venv with the extras that a machine of a cluster needs. Where python3 is older than 3.11, uv brings a newer one.
#
#   bash launch/install.sh tpu,gcs      a TPU VM whose workdir is a bucket
#   bash launch/install.sh cuda         a Slurm cluster with GPUs, once, on the file system that its nodes share
#   bash launch/install.sh              CPUs
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

if [[ -z ${PYTHON:-} ]] && ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  python3 -m pip install --quiet --user uv
  python3 -m uv python find 3.12 >/dev/null 2>&1 || python3 -m uv python install 3.12
  PYTHON=$(python3 -m uv python find 3.12)
fi
make_environment ".${1:+[$1]}"

#!/usr/bin/env bash
# The main job on the embedded corpus, from nothing to a filled-in [MASK]: no download of data, no account, minutes on two cores.
#
#   bash launch/smoke.sh [WORKDIR]      the default is runs/smoke; a second run continues a workdir, a finished one is evaluated
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

make_environment "."
workdir=${1:-runs/smoke}
mlm_jax() { "$VENV_PYTHON" -m mlm_jax "$@"; }

mlm_jax prepare --config configs/smoke.py --out "$workdir/data"
mlm_jax train --config configs/smoke.py --workdir "$workdir"
mlm_jax evaluate --workdir "$workdir"
mlm_jax fill-mask --workdir "$workdir" \
  "Return a [MASK] of the object." \
  "If the argument is [MASK], a TypeError is raised." \
  "Raised when a [MASK] is not found."
mlm_jax report --workdir "$workdir"

#!/usr/bin/env bash
# Everything that a change has to pass: format, lint, types, scripts, tests. Arguments go to pytest.
#
#   bash launch/test.sh                     all of it
#   bash launch/test.sh -m slow             only the long proofs, which the default run leaves out
#   JAX_PLATFORMS= bash launch/test.sh      the tests on the machine's accelerator instead of the CPU
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

make_environment ".[test]"
export JAX_PLATFORMS=${JAX_PLATFORMS-cpu}

"$VENV_PYTHON" -m ruff format --check .
"$VENV_PYTHON" -m ruff check .
"$VENV_PYTHON" -m mypy
.venv/bin/shellcheck --external-sources launch/*.sh launch/slurm.sbatch
# A module's tests stay in one process, because they share what they compile. The order is that of their names: by number of
# tests, as is the default, the longest module of all, which has one test, would come last and alone.
"$VENV_PYTHON" -m pytest -n auto --dist loadfile --no-loadscope-reorder "$@"

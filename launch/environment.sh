# Sourced by the other scripts here: one virtual environment in .venv, installed again only when its inputs change.
# shellcheck shell=bash
#
#   PYTHON=python3.12 bash launch/smoke.sh      another interpreter (3.11 or later); the default is python3

# make_environment "." or ".[EXTRA]": afterwards .venv holds this project with that extra, and VENV_PYTHON is its python.
make_environment() {
  local project=$1 python=${PYTHON:-python3}
  local stamp=.venv/installed${project//[^a-z]/-}.txt ask='import sys; print("%d.%d" % sys.version_info[:2])' inputs version
  VENV_PYTHON=.venv/bin/python
  export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/.cache/jax}

  command -v "$python" >/dev/null || {
    echo "no $python here: install Python 3.11 or later, or name one: PYTHON=/path/to/python3.12 $0" >&2
    return 2
  }
  version=$("$python" -c "$ask")
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "$python is Python $version, and 3.11 is the oldest that works: name another one: PYTHON=python3.12 $0" >&2
    return 2
  }
  inputs=$(printf '%s\n' "Python $version in $PWD"; cat setup.cfg pyproject.toml)
  if [[ -x $VENV_PYTHON && -f $stamp && $(<"$stamp") == "$inputs" ]]; then
    return
  fi

  # Another interpreter, or a checkout that has moved: what is installed cannot be used.
  if [[ $("$VENV_PYTHON" -c "$ask" 2>/dev/null) != "$version" ]] ||
    ! .venv/bin/pip --version >/dev/null 2>&1; then
    echo "making .venv with Python $version" >&2
    rm -rf .venv
    if "$python" -c 'import ensurepip' 2>/dev/null; then
      "$python" -m venv .venv
    else # Debian and Ubuntu without python3-venv: the system's pip installs one into the environment
      "$python" -m venv --without-pip .venv
      "$python" -m pip --python "$VENV_PYTHON" install --quiet pip
    fi
  fi
  echo "installing $project into .venv (minutes the first time)" >&2
  "$VENV_PYTHON" -m pip install --quiet --disable-pip-version-check --editable "$project"
  printf '%s\n' "$inputs" >"$stamp"
}

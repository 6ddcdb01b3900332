# shellcheck shell=bash
# Sourced by demo.sh, test.sh and .ci: makes .venv current with the given extras, or returns at once.
# Usage: install EXTRAS, such as: install '[report]'
install() {
  local extras="$1" tested stamp
  [ -d .venv/bin ] || python3 -m venv .venv
  tested="$(constraints_of .venv/bin/python)"
  stamp=".venv/installed-$(cat setup.cfg setup.py pyproject.toml "$tested" | sha256sum | cut -c1-16)$extras"
  [ -e "$stamp" ] && return
  .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --constraint "$tested" --editable ".$extras"
  touch "$stamp"
}

# The tested versions for a Python: jax left Python 3.11 behind after 0.10.
# Usage: constraints_of PYTHON
constraints_of() {
  if "$1" -c 'import sys; sys.exit(sys.version_info < (3, 12))'; then
    echo launch/constraints-newest.txt
  else
    echo launch/constraints.txt
  fi
}

# The interpreter of a version, on PATH or of pyenv, where it need not be the chosen one.
# Usage: python_of 3.13
python_of() {
  local candidate
  for candidate in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$1".*/bin/python; do
    "$candidate" -c '' 2>/dev/null && echo "$candidate" && return
  done
  echo "error: no Python $1 on PATH or of pyenv" >&2
  return 1
}

# shellcheck shell=bash
# Sourced by demo.sh and test.sh: makes .venv current with the given extras, or returns at once.
# Usage: install EXTRAS, such as: install '[report]'
install() {
  local extras="$1" stamp
  [ -d .venv ] || python3 -m venv .venv
  stamp=".venv/installed-$(cat setup.cfg setup.py pyproject.toml launch/constraints.txt | sha256sum | cut -c1-16)$extras"
  [ -e "$stamp" ] && return
  .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --constraint launch/constraints.txt --editable ".$extras"
  touch "$stamp"
}

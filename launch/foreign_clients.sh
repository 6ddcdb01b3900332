#!/usr/bin/env bash
# Loads exports in other installations: makes a venv for each version of transformers below FOLDER and
# runs tests/test_foreign_clients.py against it. The environment of the tests needs torch and peft.
# Usage: launch/foreign_clients.sh FOLDER [VERSION ...], such as: launch/foreign_clients.sh runs/foreign 4.57 5.23
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || { sed -n '4p' "$0" >&2; exit 2; }
folder="$(realpath --canonicalize-missing "$1")" # tests run the interpreter from elsewhere
shift
[ $# -gt 0 ] || set -- 4.57
python=${PYTHON:-.venv/bin/python}
for version in "$@"; do
  venv="$folder/transformers-$version"
  if [ ! -d "$venv" ]; then
    "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
      "transformers==$version.*" peft torch==2.13.0
  fi
  "$venv/bin/python" -c 'import transformers; print("transformers", transformers.__version__)'
  FOREIGN_PYTHON="$venv/bin/python" HF_HUB_OFFLINE=1 "$python" -m pytest -q tests/test_foreign_clients.py
done

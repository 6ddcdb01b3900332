#!/usr/bin/env bash
# Has garak and inspect_ai ask `fedsafe serve`: makes a venv for each below FOLDER and runs
# tests/test_foreign_harnesses.py with them. The environment of the tests needs the extra serve.
# Usage: launch/foreign_harnesses.sh FOLDER, such as: launch/foreign_harnesses.sh runs/foreign
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -eq 1 ] || { sed -n '4p' "$0" >&2; exit 2; }
folder="$(realpath --canonicalize-missing "$1")" # tests run the interpreters from elsewhere
python=${PYTHON:-.venv/bin/python}
install() {
  [ -d "$folder/$1" ] && return
  "$python" -m venv "$folder/$1"
  "$folder/$1/bin/python" -m pip install --quiet --disable-pip-version-check "${@:2}"
}
install garak garak==0.17.1 torch==2.13.0
install inspect inspect_ai==0.3.285 openai
GARAK_PYTHON="$folder/garak/bin/python" INSPECT_PYTHON="$folder/inspect/bin/python" HF_HUB_OFFLINE=1 \
  "$python" -m pytest -q tests/test_foreign_harnesses.py

#!/usr/bin/env bash
# Installs into .venv when needed, then runs configs/demo.py; arguments go to fedsafe run.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/install.sh
install '[report]'
# A --workdir among the arguments comes later and wins.
exec .venv/bin/fedsafe run --config=configs/demo.py --workdir=runs/demo "$@"

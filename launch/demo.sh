#!/usr/bin/env bash
# Installs into .venv when needed, then runs configs/demo.py; arguments go to fedsafe_jax.main.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/install.sh
install '[report]'
# A --workdir among the arguments comes later and wins.
exec .venv/bin/python -m fedsafe_jax.main --config=configs/demo.py --workdir=runs/demo "$@"

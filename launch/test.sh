#!/usr/bin/env bash
# Installs the test extra into .venv when needed, then runs the tests; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/install.sh
install '[test,report,dp,privacy,flower,judge,serve,docs]'
# Small programs too: the tests compile the same ones in many processes.
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.1
export HF_HUB_OFFLINE=1 JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$PWD/.venv/xla_cache}"
.venv/bin/ruff check .
# Two files at a time: much of the time is one process that starts, or one core that compiles.
exec .venv/bin/python -m pytest -q --numprocesses=2 --dist=loadfile --no-loadscope-reorder "$@"

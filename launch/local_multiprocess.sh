#!/usr/bin/env bash
# Runs `fedsafe run` in N processes on this machine, joined by jax.distributed; the other
# arguments are its flags. Ends when all have ended, and fails when one has failed.
#   bash launch/local_multiprocess.sh 2 --config=configs/demo.py --workdir=runs/two
#   bash launch/local_multiprocess.sh --dry-run 2 --config=...      prints the commands alone
# PYTHON names the interpreter (default: .venv/bin/python, or python3), PORT the coordinator's port.
set -euo pipefail

usage() {
  echo "usage: local_multiprocess.sh [--dry-run] N --config=FILE --workdir=DIR [--config.FIELD=VALUE ...]" >&2
  exit 2
}

dry_run=false
if [ "${1:-}" = --dry-run ]; then dry_run=true; shift; fi
count="${1:-}"
[[ "$count" =~ ^[1-9][0-9]*$ ]] || usage
shift
[ $# -gt 0 ] || usage

here="$(cd "$(dirname "$0")/.." && pwd)"
python="${PYTHON:-}"
if [ -z "$python" ]; then
  python=python3
  [ -x "$here/.venv/bin/python" ] && python="$here/.venv/bin/python"
fi
port="${PORT:-}"
if [ -z "$port" ] && ! $dry_run; then
  port="$("$python" -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')"
fi
port="${port:-PORT}"

# Each process gets its share of the cores as devices, at least one.
cores="$(getconf _NPROCESSORS_ONLN)"
devices=$((cores / count > 0 ? cores / count : 1))
flags="${XLA_FLAGS:-}"
case "$flags" in
  *xla_force_host_platform_device_count*) ;;
  *) flags="${flags:+$flags }--xla_force_host_platform_device_count=$devices" ;;
esac

pids=()
stop() { [ ${#pids[@]} -eq 0 ] || kill "${pids[@]}" 2>/dev/null || true; }
trap stop INT TERM

for ((i = 0; i < count; i++)); do
  run=(env "XLA_FLAGS=$flags" "JAX_COORDINATOR_ADDRESS=localhost:$port" "JAX_NUM_PROCESSES=$count"
    "JAX_PROCESS_ID=$i" "$python" -m fedsafe_jax run "$@")
  if $dry_run; then
    printf '%q ' "${run[@]}"
    echo
  else
    "${run[@]}" &
    pids+=($!)
  fi
done
$dry_run && exit 0

status=0
for ((left = count; left > 0; left--)); do
  # One that fails leaves the others waiting for it: they are ended.
  if ! wait -n; then
    [ $status -ne 0 ] || status=1
    stop
  fi
done
exit $status

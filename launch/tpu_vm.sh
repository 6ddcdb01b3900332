#!/usr/bin/env bash
# A run on a Cloud TPU VM slice, from creation to the end; again, it continues.
#   bash launch/tpu_vm.sh run --config=configs/paper.py --workdir=gs://BUCKET/run
#   bash launch/tpu_vm.sh [create|install|run|logs|status|delete] ...
#   bash launch/tpu_vm.sh --dry-run run ...        prints every command, calls nothing
# `run` creates the slice through a queued resource where there is none, installs this checkout on all
# hosts, starts the run there under a loop that resumes it, and follows the first host's log. After a
# preemption of a spot slice, `run` again creates a new one and the run continues from the bucket.
# Settings by environment, with their defaults:
#   PROJECT (gcloud's), ZONE (gcloud's), NAME=fedsafe, TYPE=v5litepod-16, VERSION=v2-alpha-tpuv5-lite,
#   SPOT=1 (0 for on demand), EXTRA=tpu,report (extras of the package that are installed),
#   FORWARD (none; names of variables here that the run gets there, such as "HF_TOKEN HF_HUB_OFFLINE")
set -euo pipefail

dry_run=false
if [ "${1:-}" = --dry-run ]; then dry_run=true; shift; fi
action="${1:-}"
[ $# -gt 0 ] && shift

fail() {
  echo "error: $*" >&2
  exit 1
}

case "$action" in
  create | install | run | logs | status | delete) ;;
  *)
    echo "usage: tpu_vm.sh [--dry-run] create|install|run|logs|status|delete [flags of fedsafe run]" >&2
    exit 2
    ;;
esac
if [ "$action" = run ]; then
  case " $* " in
    *" --workdir=gs://"*) ;;
    *) fail "run: give --workdir=gs://BUCKET/FOLDER: the hosts' disks are lost with a preempted slice." ;;
  esac
  case " $* " in
    *" --config="*) ;;
    *) fail "run: give --config=FILE." ;;
  esac
fi

here="$(cd "$(dirname "$0")/.." && pwd)"
if ! $dry_run; then
  command -v gcloud >/dev/null || fail "gcloud is not installed: https://cloud.google.com/sdk/docs/install"
fi
setting() { # of gcloud's configuration
  if $dry_run; then echo "$2"; else gcloud config get-value "$1" 2>/dev/null || true; fi
}
project="${PROJECT:-$(setting project PROJECT)}"
zone="${ZONE:-$(setting compute/zone ZONE)}"
[ -n "$project" ] || fail "no project: set PROJECT, or gcloud config set project ID."
[ -n "$zone" ] || fail "no zone: set ZONE to one where you have TPU quota, or gcloud config set compute/zone ZONE."
name="${NAME:-fedsafe}"
type="${TYPE:-v5litepod-16}"
version="${VERSION:-v2-alpha-tpuv5-lite}"
extra="${EXTRA:-tpu,report}"
# The hosts of a slice find each other only when they are told to join.
variables=(FEDSAFE_DISTRIBUTED=on)
for variable in ${FORWARD:-}; do
  [ -n "${!variable+set}" ] || fail "FORWARD: $variable is not set here; export it, or leave it out."
  variables+=("$variable=${!variable}")
done
where=(--project="$project" --zone="$zone")

call() {
  if $dry_run; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

state() { # of the slice; empty where there is none
  $dry_run && return
  gcloud compute tpus tpu-vm describe "$name" "${where[@]}" --format='value(state)' 2>/dev/null || true
}

everywhere() { # a command on all hosts
  call gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --command="$1"
}

create() {
  local found spot=()
  found="$(state)"
  if [ "$found" = READY ]; then return; fi
  if [ -n "$found" ]; then
    echo "slice $name is $found: it is deleted and created again" >&2
    remove
  fi
  if [ "${SPOT:-1}" = 1 ]; then spot=(--spot); fi
  call gcloud compute tpus queued-resources create "$name" "${where[@]}" --node-id="$name" \
    --accelerator-type="$type" --runtime-version="$version" "${spot[@]}" ||
    fail "the slice was not granted: check the quota for $type in $zone (IAM & Admin, Quotas)."
  $dry_run && return
  until [ "$(state)" = READY ]; do
    echo "waiting for slice $name ($type in $zone)" >&2
    sleep 30
  done
}

remove() {
  call gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
}

install() {
  local archive
  archive="$(mktemp -d)/fedsafe_jax.tar.gz"
  call git -C "$here" archive --format=tar.gz --output="$archive" HEAD
  call gcloud compute tpus tpu-vm scp "$archive" "$name:fedsafe_jax.tar.gz" "${where[@]}" --worker=all
  everywhere "mkdir -p fedsafe_jax && tar -xzf fedsafe_jax.tar.gz -C fedsafe_jax && cd fedsafe_jax && python3 -m venv .venv && .venv/bin/pip install --quiet '.[$extra]' gcsfs"
}

run() {
  local loop
  # A process that was preempted or crashed is started again, and continues. One that ended well is
  # not, nor one that would fail again: 2 is wrong input, 126 and 127 a program that is not there.
  loop="for try in 1 2 3 4 5; do env $(printf '%q ' "${variables[@]}").venv/bin/fedsafe run $(printf '%q ' "$@")"
  # shellcheck disable=SC2016  # the host's shell expands it
  loop+='; status=$?; case $status in 0 | 2 | 126 | 127) break ;; esac; sleep 30; done; echo "ended with status $status"'
  everywhere "cd fedsafe_jax && nohup bash -c $(printf '%q' "$loop") >> run.log 2>&1 < /dev/null &"
}

logs() {
  call gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=0 --command="tail -n +1 -F fedsafe_jax/run.log"
}

case "$action" in
  create) create ;;
  install) install ;;
  run)
    create
    install
    run "$@"
    logs
    ;;
  logs) logs ;;
  status) call gcloud compute tpus queued-resources describe "$name" "${where[@]}" ;;
  delete) remove ;;
esac

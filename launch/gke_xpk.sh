#!/usr/bin/env bash
# A run on a GKE cluster of TPUs through xpk (https://github.com/AI-Hypercomputer/xpk).
#   CLUSTER=mine bash launch/gke_xpk.sh --config=configs/paper.py --workdir=gs://BUCKET/run
#   CLUSTER=mine bash launch/gke_xpk.sh --dry-run --config=...   prints the command alone
# The workload is started again when a slice is preempted, and continues from the bucket. Settings by
# environment, with their defaults:
#   CLUSTER (none), PROJECT (gcloud's), ZONE (gcloud's), WORKLOAD=fedsafe, TYPE=v5litepod-16, SLICES=1,
#   IMAGE=python:3.12-slim, RESTARTS=10, EXTRA=tpu,report (extras of the package that are installed)
set -euo pipefail

dry_run=false
if [ "${1:-}" = --dry-run ]; then dry_run=true; shift; fi
fail() {
  echo "error: $*" >&2
  exit 1
}
case " $* " in
  *" --workdir=gs://"*) ;;
  *) fail "give --workdir=gs://BUCKET/FOLDER: the pods' disks are lost when they are." ;;
esac
case " $* " in
  *" --config="*) ;;
  *) fail "give --config=FILE." ;;
esac
[ -n "${CLUSTER:-}" ] || fail "no cluster: set CLUSTER to one that xpk cluster create made."
here="$(cd "$(dirname "$0")/.." && pwd)"
if ! $dry_run; then
  command -v xpk >/dev/null || fail "xpk is not installed: pip install xpk"
  command -v gcloud >/dev/null || fail "gcloud is not installed: https://cloud.google.com/sdk/docs/install"
fi
setting() {
  if $dry_run; then echo "$2"; else gcloud config get-value "$1" 2>/dev/null || true; fi
}
project="${PROJECT:-$(setting project PROJECT)}"
zone="${ZONE:-$(setting compute/zone ZONE)}"
[ -n "$project" ] || fail "no project: set PROJECT, or gcloud config set project ID."
[ -n "$zone" ] || fail "no zone: set ZONE, or gcloud config set compute/zone ZONE."

# xpk copies the script directory into the image.
command="pip install --quiet '.[${EXTRA:-tpu,report}]' gcsfs && FEDSAFE_DISTRIBUTED=on fedsafe run $(printf '%q ' "$@")"
run=(xpk workload create --cluster="$CLUSTER" --project="$project" --zone="$zone"
  --workload="${WORKLOAD:-fedsafe}" --tpu-type="${TYPE:-v5litepod-16}" --num-slices="${SLICES:-1}"
  --base-docker-image="${IMAGE:-python:3.12-slim}" --script-dir="$here"
  --max-restarts="${RESTARTS:-10}" --command="$command")
if $dry_run; then
  printf '%q ' "${run[@]}"
  echo
else
  "${run[@]}"
fi

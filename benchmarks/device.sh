#!/usr/bin/env bash
# Everything that is worth measuring where a GPU can be had, the most valuable first; five minutes in all.
#   bash benchmarks/device.sh [--tiny] [--output=DIR] [--peers=DIR] [PART ...]
# Parts: numerics, round_8b, cai, round_135m, generate, attention; all of them by default. Each runs in a process of
# its own under a time limit, and writes DIR/PART.json (default: device_results). --tiny runs small sizes, on a CPU
# too. --peers names a folder with the PyTorch loops peft_loop.py and hf_generate.py, which are then run beside.
set -uo pipefail
cd "$(dirname "$0")/.."
parts=(numerics round_8b cai round_135m generate attention)
limits=(60 80 45 40 45 30)
output=device_results options=() chosen=()
for argument in "$@"; do
  case "$argument" in
    --tiny) options+=(--tiny) ;;
    --peers=*) options+=("--peers=$(realpath "${argument#*=}")") ;;
    --output=*) output="${argument#*=}" ;;
    -*) echo "error: $argument is no option; see the head of $0." >&2; exit 2 ;;
    *) chosen+=("$argument") ;;
  esac
done
for name in "${chosen[@]}"; do
  case " ${parts[*]} " in
    *" $name "*) ;;
    *) echo "error: $name is no part; parts are ${parts[*]}." >&2; exit 2 ;;
  esac
done
mkdir -p "$output"
python="${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
failed=()
for i in "${!parts[@]}"; do
  part="${parts[$i]}"
  [ ${#chosen[@]} -eq 0 ] || [[ " ${chosen[*]} " == *" $part "* ]] || continue
  started=$SECONDS
  if ! timeout "${limits[$i]}" "$python" benchmarks/device.py "--part=$part" "${options[@]}" \
    "--output=$output/$part.json" 2>"$output/$part.log"; then
    failed+=("$part")
    echo "$part: failed or over ${limits[$i]} s; the end of $output/$part.log:" >&2
    tail -n 15 "$output/$part.log" >&2
  fi
  echo "$part: $((SECONDS - started)) s"
done
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}" >&2; exit 1; }

#!/usr/bin/env bash
# Start, kill -9, run again, compare: two copies of this repository, one undisturbed, one killed twice.
set -euo pipefail
cd "$(dirname "$0")/.."
python="$PWD/.venv/bin/python"
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
export DVC_SITE_CACHE_DIR="$place/site-cache"  # nothing is shared with your own runs

for copy in undisturbed killed; do
    git clone --quiet . "$place/$copy"
    rm -f "$place/$copy/dvc.lock"  # what is committed proves nothing
done

echo "== undisturbed"
(cd "$place/undisturbed" && "$python" -m stages repro) > "$place/undisturbed.log" 2>&1
grep -E "^run .* published" "$place/undisturbed.log"

cd "$place/killed"
for attempt in 1 2; do
    echo "== killed: attempt $attempt"
    set -m  # a process group of its own, so that all of it can be killed
    "$python" -m stages repro > "$place/killed.log" 2>&1 &
    set +m
    dvc=$!
    until grep -qE "^step [0-9]+/" "$place/killed.log"; do sleep 0.5; done  # it trains, and has saved
    sleep 5
    kill -9 -- "-$dvc"
    wait "$dvc" || true
    grep -E "^run |^step" "$place/killed.log" | tail -2
    echo "kill -9"
done
echo "== killed: run again"
"$python" -m stages repro > "$place/killed.log" 2>&1
grep -E "^run " "$place/killed.log"

cd "$place"
sha256sum {undisturbed,killed}/dvc.lock {undisturbed,killed}/models/best/model.safetensors
cmp undisturbed/dvc.lock killed/dvc.lock
cmp undisturbed/models/best/model.safetensors killed/models/best/model.safetensors
echo "equal"

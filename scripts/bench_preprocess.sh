#!/usr/bin/env bash
# Preprocessing on one core, beside Pillow and numpy: scripts/bench_preprocess.sh --help.
# Needs what scripts/fetch_test_data.sh fetches; makes the pictures and a Python environment beside it.
set -euo pipefail
cd "$(dirname "$0")/.."

fetched=tests/data/fetched
if [ ! -f "$fetched/photos/index.json" ]; then
    echo "no photographs: run scripts/fetch_test_data.sh first" >&2
    exit 2
fi
requirements=scripts/preprocess/requirements.txt
environment="$fetched/preprocess-venv"
if ! cmp -s "$requirements" "$environment/complete"; then
    "${PYTHON:-python3}" -m venv "$environment"
    "$environment/bin/pip" install --quiet --requirement "$requirements"
    cp "$requirements" "$environment/complete"
fi
if [ ! -d "$fetched/preprocess/web" ]; then
    "$environment/bin/python" scripts/preprocess/make_images.py "$fetched/photos" "$fetched/preprocess"
fi
exec "$environment/bin/python" scripts/preprocess/main.py "$@"

#!/usr/bin/env bash
# What demo.sh and test.sh need on a fresh machine with Rust and Python 3: the ONNX Runtime library.
set -euo pipefail
cd "$(dirname "$0")/.."

for tool in cargo python3; do
    if ! command -v "$tool" >/dev/null; then
        echo "$tool is not there" >&2
        echo "hint: install Rust (rustup) and Python 3 with pip, then run this again" >&2
        exit 2
    fi
done
scripts/fetch_onnxruntime.sh

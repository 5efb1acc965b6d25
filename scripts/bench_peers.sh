#!/usr/bin/env bash
# recaption beside OpenVINO GenAI, vLLM and transformers on this machine's CPU: scripts/bench_peers.sh --help.
# Needs Linux, Rust and Python 3.11 or later with pip; sets up the rest in its work folder.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "$0")/peers/main.py" "$@"

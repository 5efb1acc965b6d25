#!/usr/bin/env bash
# Everything there is to know about recaption on a machine with an NVIDIA GPU, in one report: scripts/gpu_check.sh --help.
# Stages of a few minutes; a second call goes on where the first ended.
set -euo pipefail
exec python3 "$(dirname "$0")/gpu/check.py" "$@"

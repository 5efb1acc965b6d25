#!/usr/bin/env bash
# All the set-up on a fresh machine with Rust and Python 3, then every test: what CI runs.
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/setup.sh
scripts/fetch_test_data.sh
scripts/check.sh

#!/usr/bin/env bash
# The whole gate: format, lints, tests, docs, Python style. Needs what scripts/test.sh sets up.
set -euo pipefail
cd "$(dirname "$0")/.."

echo "== fmt"
cargo fmt --all --check
echo "== clippy"
cargo clippy --workspace --all-targets --locked -- -D warnings
echo "== tests"
cargo test --workspace --locked
echo "== GPU check, dry"
RECAPTION="${CARGO_TARGET_DIR:-target}/debug/recaption" scripts/gpu_check.sh --dry-run >/dev/null
echo "== docs"
RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked
echo "== ruff"
tests/data/fetched/venv/bin/python -m ruff check scripts export/data
tests/data/fetched/venv/bin/python -m ruff format --check scripts export/data

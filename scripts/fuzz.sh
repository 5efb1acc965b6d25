#!/usr/bin/env bash
# Runs every fuzz target in turn and prints a table: how often each ran, what it reached, what it found.
#
#   scripts/fuzz.sh [SECONDS] [TARGET…]     (60 seconds for each target, all of them)
#
# Needs cargo-fuzz (`cargo install cargo-fuzz`), a C++ compiler and stable Rust. What is found lies in
# fuzz/artifacts/TARGET; the corpus grows in fuzz/corpus/TARGET. SANITIZER=none is faster, but sees panics only.
set -euo pipefail

cd "$(dirname "$0")/../fuzz"
seconds=${1:-60}
shift || true
targets=("$@")
if [ ${#targets[@]} = 0 ]; then
    targets=(kernels weights checkpoint bundle sidecar text tokenizer journal parquet tar image)
fi
sanitizer=${SANITIZER:-address}
# Most memory of a target, MB: the limits that the targets set, several times over.
max_rss=1500
# Sanitizers are for nightly compilers only, but for this.
export RUSTC_BOOTSTRAP=1

printf '%-12s %10s %10s %10s  %s\n' target runs runs/s coverage found
found_any=0
for target in "${targets[@]}"; do
    features=()
    case $target in
    kernels) features=(--no-default-features) ;;
    weights | checkpoint | bundle) features=(--no-default-features --features export) ;;
    esac
    mkdir -p "corpus/$target"
    log=$(mktemp)
    result=nothing
    cargo fuzz run "$target" "${features[@]}" --sanitizer "$sanitizer" "corpus/$target" "seeds/$target" -- \
        -max_total_time="$seconds" -rss_limit_mb=$max_rss -timeout=20 -print_final_stats=1 >"$log" 2>&1 || result=crash
    value() { grep -o "$1[^0-9]*[0-9]*" "$log" | tail -1 | grep -o '[0-9]*$' || echo '?'; }
    if [ $result = crash ]; then
        found_any=1
        result=$(grep -o 'artifacts/[^ ]*' "$log" | tail -1)
        result=${result:-"nothing run: $(grep -m1 '^error' "$log" || tail -1 "$log")"}
    fi
    printf '%-12s %10s %10s %10s  %s\n' "$target" "$(value stat::number_of_executed_units:)" \
        "$(value stat::average_exec_per_sec:)" "$(value 'cov:')" "$result"
    if [ $found_any = 1 ] && [ -n "${VERBOSE:-}" ]; then cat "$log" >&2; fi
    rm "$log"
done
exit $found_any

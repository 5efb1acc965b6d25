#!/usr/bin/env bash
# Exports a checkpoint of 8B size to fp16 and int4 beside a plain copy of it, and captions one image with the int4 bundle.
# Needs 40 GB of disk in FOLDER, an hour at most, and nothing else running. Prints one JSON object per step.
#
#     scripts/size/run.sh FOLDER [LAYERS]
set -euo pipefail
folder=$1 layers=${2:-32}
root=$(cd "$(dirname "$0")/../.." && pwd)
recaption=$root/target/release/recaption
tokenizer=$root/tests/data/fetched/llama3
python=${PYTHON:-python3}
mkdir -p "$folder"
[ -d "$folder/checkpoint" ] || "$python" "$root/scripts/size/make_checkpoint.py" "$folder/checkpoint" --layers "$layers"

# What, seconds, KB at most, bytes.
report() { printf '{"step": "%s", "seconds": %s, "max_rss_kb": %s, "bytes": %s}\n' "$@"; }
timed() { /usr/bin/time -f '%e %M' -o "$folder/time" "$@" >&2; }
size() { du -sb "$1" | cut -f1; }

for round in 1 2; do
    timed sh -c "cp --reflink=never -r '$folder/checkpoint' '$folder/copy' && sync -d '$folder'/copy/*"
    report "cp $round" $(cat "$folder/time") "$(size "$folder/copy")"
    rm -r "$folder/copy"
    timed "$recaption" export "$folder/checkpoint" --out "$folder/fp16" --precision fp16 --tokenizer "$tokenizer"
    report "fp16 $round" $(cat "$folder/time") "$(size "$folder/fp16")"
    rm -r "$folder/fp16"
done
rm -rf "$folder/int4"
timed "$recaption" export "$folder/checkpoint" --out "$folder/int4" --precision int4 --tokenizer "$tokenizer"
report int4 $(cat "$folder/time") "$(size "$folder/int4")"
image=$(find "$root/tests/data/images" -name '*.jpg' | sort | head -1)
timed "$recaption" run "$image" --model "$folder/int4" --out "$folder/captions" --max-new-tokens 64 --ignore-eos \
    --overwrite --provider cpu --json
report "one caption" $(cat "$folder/time") "$(size "$folder/captions")"

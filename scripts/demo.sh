#!/usr/bin/env bash
# The main job on the embedded demo model: set-up, export, recaption one webdataset shard, a look at the captions.
# Writes the bundle to models/demo-bundle/ and the captions to out/demo/.
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/setup.sh
echo "== build"
cargo build --release --locked
recaption="${CARGO_TARGET_DIR:-target}/release/recaption"

echo "== export models/demo, a LLaVA checkpoint, to ONNX"
"$recaption" export models/demo --out models/demo-bundle --overwrite

echo "== recaption the 64 images of models/demo/shard/00000.tar"
"$recaption" run models/demo/shard/00000.tar --model models/demo-bundle --out out/demo --overwrite

echo "== original and new captions"
"$recaption" run models/demo/shard/00000.tar --model models/demo-bundle --limit 5 --quiet |
    python3 -c '
import json
import sys

for row in map(json.loads, sys.stdin):
    print(row["key"], "was:", row["org_caption"])
    print(" " * len(row["key"]), "now:", row["re_caption"])
'
echo "== all of them: out/demo/captions-00000.parquet; the program: $recaption (--help)"

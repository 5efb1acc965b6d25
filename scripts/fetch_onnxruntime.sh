#!/usr/bin/env bash
# Fetches the ONNX Runtime library into .onnxruntime/ of this checkout, where the binary looks for it.
# It comes out of the pinned PyPI wheel, whose hash is checked; nothing is installed. Runs again in no time.
set -euo pipefail
cd "$(dirname "$0")/.."

version=1.31.1
case "$(uname -s)-$(uname -m)" in
    Linux-x86_64)
        platform=manylinux_2_28_x86_64
        sha256=1f3dea47f2f0e5117c2404cea7d21fd253ae7836a3bf167a501cdfbb2600d536
        library=libonnxruntime.so.$version ;;
    Linux-aarch64)
        platform=manylinux_2_28_aarch64
        sha256=0b9a492176886992e0e875f06bc0367e333f5fff11711a2d642e18b02f3009cc
        library=libonnxruntime.so.$version ;;
    Darwin-arm64)
        platform=macosx_14_0_arm64
        sha256=96dd2564b10ea7153ad9c207e7cd8e5917cb3ba521e0e0a62ac03486fdc8d56c
        library=libonnxruntime.$version.dylib ;;
    *)
        echo "no onnxruntime $version wheel is known for $(uname -s) on $(uname -m)" >&2
        echo "hint: build or install ONNX Runtime $version and point ORT_DYLIB_PATH at its library" >&2
        exit 2 ;;
esac

target=.onnxruntime/$library
if [ -f "$target" ]; then
    echo "ONNX Runtime $version: $target"
    exit 0
fi

download=$(mktemp -d)
trap 'rm -rf "$download"' EXIT
# One wheel for every Python: the library inside does not depend on it.
python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --python-version 3.12 --implementation cp --platform "$platform" \
    --dest "$download" "onnxruntime==$version"
python3 - "$download" "$sha256" "$library" <<'PYTHON'
import hashlib
import pathlib
import sys
import zipfile

download, expected, library = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
wheel = next(download.glob("*.whl"))
found = hashlib.sha256(wheel.read_bytes()).hexdigest()
if found != expected:
    sys.exit(f"{wheel.name}: expected sha256 {expected}, got {found}")
with zipfile.ZipFile(wheel) as archive:
    (download / library).write_bytes(archive.read(f"onnxruntime/capi/{library}"))
PYTHON
mkdir -p .onnxruntime
mv "$download/$library" "$target"
echo "ONNX Runtime $version: $target"

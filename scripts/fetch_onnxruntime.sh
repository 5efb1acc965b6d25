#!/usr/bin/env bash
# Fetches the ONNX Runtime library into .onnxruntime/ of this checkout, where the binary looks for it.
# It comes out of the pinned PyPI wheel, whose hash is checked; nothing is installed. Runs again in no time.
#
#     --gpu   the library with the CUDA and TensorRT providers, into .onnxruntime-gpu/ (0.3 GB)
#     --cuda  CUDA's and cuDNN's libraries as well, from Python wheels, into .onnxruntime-gpu/nvidia/ (2 to 3 GB): for
#             machines that have a driver and nothing else
set -euo pipefail
cd "$(dirname "$0")/.."

version=1.31.1
folder=.onnxruntime package=onnxruntime python_version=3.12 with_cuda=
for option in "$@"; do
    case "$option" in
        --gpu) folder=.onnxruntime-gpu package=onnxruntime-gpu python_version=3.11 ;;
        --cuda) with_cuda=yes ;;
        *)
            echo "unknown option $option" >&2
            echo "hint: there are --gpu and --cuda" >&2
            exit 2 ;;
    esac
done
if [ -n "$with_cuda" ] && [ "$package" != onnxruntime-gpu ]; then
    echo "--cuda goes with --gpu" >&2
    exit 2
fi

others=
case "$(uname -s)-$(uname -m)-$package" in
    Linux-x86_64-onnxruntime-gpu)
        platform=manylinux_2_28_x86_64
        sha256=e26c475fe361b2015f45b4b824bd13f0bb20204e59b62814e6f0acd5f3d491a6
        library=libonnxruntime.so.$version
        others="libonnxruntime_providers_shared.so libonnxruntime_providers_cuda.so libonnxruntime_providers_tensorrt.so" ;;
    Linux-x86_64-onnxruntime)
        platform=manylinux_2_28_x86_64
        sha256=1f3dea47f2f0e5117c2404cea7d21fd253ae7836a3bf167a501cdfbb2600d536
        library=libonnxruntime.so.$version ;;
    Linux-aarch64-onnxruntime)
        platform=manylinux_2_28_aarch64
        sha256=0b9a492176886992e0e875f06bc0367e333f5fff11711a2d642e18b02f3009cc
        library=libonnxruntime.so.$version ;;
    Darwin-arm64-onnxruntime)
        platform=macosx_14_0_arm64
        sha256=96dd2564b10ea7153ad9c207e7cd8e5917cb3ba521e0e0a62ac03486fdc8d56c
        library=libonnxruntime.$version.dylib ;;
    *)
        echo "no $package $version wheel is known for $(uname -s) on $(uname -m)" >&2
        echo "hint: build or install ONNX Runtime $version and point ORT_DYLIB_PATH at its library" >&2
        exit 2 ;;
esac

fetch_library() {
    if [ -f "$folder/$library" ]; then
        return
    fi
    download=$(mktemp -d)
    trap 'rm -rf "$download"' EXIT
    # One wheel for every Python: the library inside does not depend on it.
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
        --python-version "$python_version" --implementation cp --platform "$platform" \
        --dest "$download" "$package==$version"
    python3 - "$download" "$sha256" "$library" $others <<'PYTHON'
import hashlib
import pathlib
import shutil
import sys
import zipfile

download, expected, libraries = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
wheel = next(download.glob("*.whl"))
with wheel.open("rb") as file:
    found = hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else None
found = found or hashlib.sha256(wheel.read_bytes()).hexdigest()
if found != expected:
    sys.exit(f"{wheel.name}: expected sha256 {expected}, got {found}")
with zipfile.ZipFile(wheel) as archive:
    for library in libraries:
        with archive.open(f"onnxruntime/capi/{library}") as source, (download / library).open("wb") as target:
            shutil.copyfileobj(source, target)
PYTHON
    mkdir -p "$folder"
    # The main library last: where it is, all are.
    for file in $others $library; do
        mv "$download/$file" "$folder/$file"
    done
}

fetch_library
echo "ONNX Runtime $version: $folder/$library"
if [ -n "$with_cuda" ]; then
    # What libonnxruntime_providers_cuda.so links to, and cuDNN with what that loads.
    python3 -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --only-binary=:all: --target "$folder" \
        'nvidia-cuda-runtime>=13,<14' 'nvidia-cublas>=13,<14' 'nvidia-curand>=10.4,<11' 'nvidia-cuda-nvrtc>=13,<14' \
        'nvidia-cudnn-cu13>=9.12,<10'
    echo "CUDA 13 and cuDNN 9: $folder/nvidia"
fi

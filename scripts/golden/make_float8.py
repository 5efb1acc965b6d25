"""Writes what ml_dtypes makes of FLOAT8E4M3FN: the reference of the exporter's conversion.

`values` are the numbers of all 256 codes, by their f32 bits (the two NaN as null). `sha256` is that of one
code for each of the 65536 patterns of fp16, in order; those beyond 448 are brought to it first, infinities
too, as ONNX's QuantizeLinear does with `saturate`.

    python scripts/golden/make_float8.py
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import ml_dtypes
import numpy as np

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    """Writes one file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "export/tests/data/float8_e4m3.json")
    args = parser.parse_args()
    values = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    bits = [None if np.isnan(value) else int(value.view(np.uint32)) for value in values]
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    with np.errstate(invalid="ignore"):  # NaN stay NaN
        codes = np.clip(halves, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    digest = hashlib.sha256(codes.tobytes()).hexdigest()
    args.output.write_text(json.dumps({"values": bits, "sha256": digest}) + "\n")


if __name__ == "__main__":
    main()

"""Loads librecaption_operators.so into Python's onnxruntime and decodes with it, as other programs may.

    python scripts/golden/run_operators_library.py LIBRARY CPU_BUNDLE FP32_BUNDLE

Feeds the same ids to the decoder of a `--target cpu` bundle, through the library's operators, and to the
fp32 one of the same checkpoint, through ONNX Runtime's own. Prints JSON: how often the two agree on the next
token, and the mean absolute difference of their log-probabilities.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "quality"))

from bundle import Decoder, log_softmax

BATCH, STEPS = 3, 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", type=Path)
    parser.add_argument("cpu_bundle", type=Path)
    parser.add_argument("fp32_bundle", type=Path)
    args = parser.parse_args()
    decoders = [Decoder(args.cpu_bundle, 1, args.library), Decoder(args.fp32_bundle, 1)]
    vocab = decoders[0].manifest["decoder"]["vocab_size"]
    ids = np.random.default_rng(7).integers(0, vocab, (STEPS, BATCH))
    for decoder in decoders:
        decoder.start(BATCH, STEPS)
    same, differences = 0, []
    for step in ids:
        ours, expected = (decoder.step(step) for decoder in decoders)
        same += int((ours.argmax(axis=1) == expected.argmax(axis=1)).sum())
        differences.append(np.abs(log_softmax(ours) - log_softmax(expected)).mean())
    print(json.dumps({"same": same, "of": STEPS * BATCH, "difference": float(np.mean(differences))}))


if __name__ == "__main__":
    main()

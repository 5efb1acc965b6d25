"""Exports every golden checkpoint in every precision for every target; checks the graphs by others' means.

Each graph goes through onnx.checker with full_check (which infers all shapes) and loads in ONNX Runtime. bf16
has no kernels on the CPU: there a copy with every bf16 tensor as f32 is loaded, and its vision tower gives
what that of the fp32 bundle gives, within the precision of bf16.

    python scripts/golden/check_graphs.py --recaption target/release/recaption
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, numpy_helper

DATA = Path(__file__).resolve().parents[2] / "tests" / "data" / "checkpoints"
FORMATS = {
    "ort": ("fp32", "fp16", "bf16", "int8", "int8-block", "int4"),
    "tensorrt": ("fp32", "fp16", "bf16"),
}


def export(recaption: Path, checkpoint: Path, bundle: Path, target: str, precision: str) -> dict[str, Any]:
    """Exports one bundle and returns its manifest."""
    extra: list[str] = []
    settings = checkpoint / "export.json"
    if settings.exists():
        for flag, value in json.loads(settings.read_text()).items():
            extra += [f"--{flag.replace('_', '-')}", str(checkpoint / value)]
    command = [
        recaption,
        "export",
        checkpoint,
        "--out",
        bundle,
        "--target",
        target,
        "--precision",
        precision,
        *extra,
    ]
    subprocess.run(command, check=True, capture_output=True)
    return json.loads((bundle / "manifest.json").read_text())


def upcast(path: Path) -> onnx.ModelProto:
    """Returns the graph with f32 wherever it has bf16."""
    model = onnx.load(str(path))
    graph = model.graph
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.BFLOAT16:
            values = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    for value in [*graph.input, *graph.output, *graph.value_info]:
        if value.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i == TensorProto.BFLOAT16:
                attribute.i = TensorProto.FLOAT
    return model


def session(model: bytes | str) -> onnxruntime.InferenceSession:
    """Loads a graph quietly."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def features(tower: onnxruntime.InferenceSession) -> np.ndarray:
    """Runs a vision tower on seeded noise."""
    (spec,) = tower.get_inputs()
    shape = [1 if isinstance(dim, str) else dim for dim in spec.shape]
    pixels = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    return tower.run(None, {spec.name: pixels})[0]


def main() -> None:
    """Checks all combinations."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recaption", type=Path, required=True, help="the recaption binary")
    args = parser.parse_args()
    checkpoints = sorted(path for path in DATA.iterdir() if (path / "golden.json").exists())
    num_graphs = 0
    for checkpoint in checkpoints:
        exact = None
        for target, precisions in FORMATS.items():
            for precision in precisions:
                with tempfile.TemporaryDirectory() as folder:
                    bundle = Path(folder) / "bundle"
                    manifest = export(args.recaption, checkpoint, bundle, target, precision)
                    for name, graph in manifest["graphs"].items():
                        path = bundle / graph["file"]
                        onnx.checker.check_model(str(path), full_check=True)
                        is_bf16 = precision == "bf16"
                        loaded = session(upcast(path).SerializeToString() if is_bf16 else str(path))
                        num_graphs += 1
                        if name != "vision_tower" or precision not in ("fp32", "bf16"):
                            continue
                        found = features(loaded)
                        if exact is None:
                            exact = found
                        error = float(np.abs(found - exact).max() / np.abs(exact).max())
                        if error > (0.05 if is_bf16 else 1e-4):
                            raise SystemExit(f"{checkpoint.name} {target} {precision}: off by {error}")
        print(f"{checkpoint.name}: all graphs pass")
    print(f"{num_graphs} graphs of {len(checkpoints)} checkpoints pass onnx.checker and load in ONNX Runtime")


if __name__ == "__main__":
    main()

"""Exports the CLIPs of `tests/data/clip` in every precision, and compares embeddings with the goldens.

Every graph goes through onnx.checker with full_check, and through ONNX Runtime on the CPU where that has
kernels for it (not for bf16). Images are preprocessed by transformers and texts are those of the goldens, one
at a time and padded in a batch. fp32 must be within 1e-4 of the goldens, relative to the largest value; the
other precisions have a bound of their own each.

    python scripts/golden/check_clip.py --recaption target/debug/recaption
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

DATA = Path(__file__).resolve().parents[2] / "tests" / "data" / "clip"
# The precisions of each target, and how far embeddings may be off; None: no kernels on the CPU.
FORMATS = {
    "ort": {"fp32": 1e-4, "fp16": 1e-2, "bf16": None, "int8": 0.1, "int8-block": 0.1, "int4": 0.6},
    "tensorrt": {"fp32": 1e-4, "fp16": 1e-2, "bf16": None},
}


def load_graph(bundle: Path, spec: dict[str, Any], runs: bool) -> onnxruntime.InferenceSession | None:
    """Checks the graph's file and its inputs and outputs against the manifest; opens it if it is to run."""
    path = bundle / spec["file"]
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(str(path), load_external_data=False)
    types = {"f32": 1, "u8": 2, "i64": 7}
    for known, values in ((spec["inputs"], model.graph.input), (spec["outputs"], model.graph.output)):
        found = [
            (value.name, value.type.tensor_type.elem_type, [d.dim_param or d.dim_value for d in dims])
            for value in values
            for dims in [value.type.tensor_type.shape.dim]
        ]
        expected = [(tensor["name"], types[tensor["dtype"]], tensor["shape"]) for tensor in known]
        if found != expected:
            raise SystemExit(f"{path}: the manifest says {expected}, the graph {found}")
    if not runs:
        return None
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def pixel_values(manifest: dict[str, Any], images: list[Image.Image]) -> np.ndarray:
    """As the manifest wants them: normalised, or u8 patches behind a row of the zero point."""
    side, patch = manifest["image"]["image_size"], manifest["image"]["patch_size"]
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    layout = manifest["pixel_values"]["layout"]
    if layout == "nchw":
        return CLIPImageProcessorPil(**sizes)(images, return_tensors="np")["pixel_values"]
    processor = CLIPImageProcessorPil(**sizes, do_rescale=False, do_normalize=False)
    samples = np.asarray(processor(images, return_tensors="np")["pixel_values"], dtype=np.uint8)
    grid = side // patch
    patches = samples.reshape(len(samples), 3, grid, patch, grid, patch).transpose(0, 2, 4, 1, 3, 5)
    patches = patches.reshape(len(samples), grid * grid, 3 * patch * patch)
    class_row = np.full_like(patches[:, :1], layout["patches"]["zero_point"])
    return np.concatenate([class_row, patches], axis=1)


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    if found.dtype != np.float32 or found.shape != expected.shape or not np.isfinite(found).all():
        raise SystemExit(f"expected f32 {expected.shape}, got {found.dtype} {found.shape}")
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def compare(
    bundle: Path, manifest: dict[str, Any], checkpoint: Path, golden: dict[str, Any]
) -> Iterator[float]:
    """Differences of the images' and of the texts' embeddings, in batches and alone."""
    image_tower = load_graph(bundle, manifest["graphs"]["image_tower"], runs=True)
    text_tower = load_graph(bundle, manifest["graphs"]["text_tower"], runs=True)
    images = [Image.open(checkpoint / image["image"]).convert("RGB") for image in golden["images"]]
    expected = np.array([image["image_embeds"] for image in golden["images"]], dtype=np.float32)
    pixels = pixel_values(manifest, images)
    yield difference(image_tower.run(["image_embeds"], {"pixel_values": pixels})[0], expected)
    yield difference(image_tower.run(["image_embeds"], {"pixel_values": pixels[1:2]})[0], expected[1:2])

    ids = [text["input_ids"] for text in golden["texts"]]
    expected = np.array([text["text_embeds"] for text in golden["texts"]], dtype=np.float32)
    for sequence, row in zip(ids, expected, strict=True):
        found = text_tower.run(["text_embeds"], {"input_ids": np.array([sequence])})[0]
        yield difference(found, row[None])
    pad = manifest["text"]["pad_token_id"]
    for length in {max(map(len, ids)), manifest["text"]["context_length"]}:
        padded = np.array([sequence + [pad] * (length - len(sequence)) for sequence in ids])
        yield difference(text_tower.run(["text_embeds"], {"input_ids": padded})[0], expected)


def export(recaption: Path, checkpoint: Path, bundle: Path, target: str, precision: str) -> dict[str, Any]:
    command = [str(recaption), "export", str(checkpoint), "--out", str(bundle)]
    command += ["--target", target, "--precision", precision]
    if not (checkpoint / "tokenizer.json").is_file():
        command += ["--tokenizer", str(DATA / "legacy-eos-f32")]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(f"{' '.join(command)}: {result.stderr}")
    return json.loads((bundle / "manifest.json").read_text())


def check_torch_file(recaption: Path, checkpoint: Path) -> None:
    """A state dict in one file of `torch.save` gives the same bundle as the checkpoint's folder."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        torch.save(load_file(checkpoint / "model.safetensors"), path / "clip.pt")
        manifests = [
            export(recaption, source, path / name, "ort", "fp32")
            for source, name in ((checkpoint, "safetensors"), (path / "clip.pt", "torch"))
        ]
    if manifests[0]["files"] != manifests[1]["files"]:
        raise SystemExit(f"{checkpoint.name}: another bundle from the torch file")
    print(f"{checkpoint.name:<16} the same from a torch file")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recaption", type=Path, default=Path("target/debug/recaption"), help="the program")
    recaption = parser.parse_args().recaption
    onnxruntime.set_default_logger_severity(3)
    failed = False
    for checkpoint in sorted(DATA.iterdir()):
        golden = json.loads((checkpoint / "golden.json").read_text())
        if not (checkpoint / "config.json").is_file():
            check_torch_file(recaption, checkpoint)
        for target, precisions in FORMATS.items():
            for precision, bound in precisions.items():
                with tempfile.TemporaryDirectory() as folder:
                    bundle = Path(folder) / "bundle"
                    manifest = export(recaption, checkpoint, bundle, target, precision)
                    if abs(manifest["logit_scale"] / golden["logit_scale"] - 1) > 1e-6:
                        raise SystemExit(f"logit_scale: {manifest['logit_scale']}, {golden['logit_scale']}")
                    if bound is None:
                        for graph in manifest["graphs"].values():
                            load_graph(bundle, graph, runs=False)
                        print(f"{checkpoint.name:<16} {target:<8} {precision:<10} checked, not run")
                        continue
                    largest = max(compare(bundle, manifest, checkpoint, golden))
                verdict = "" if largest <= bound else f"  more than {bound}"
                failed |= bool(verdict)
                print(f"{checkpoint.name:<16} {target:<8} {precision:<10} {largest:.1e}{verdict}")
    sys.exit(failed)


if __name__ == "__main__":
    main()

"""A bundle's decoder in ONNX Runtime, fed one token per sequence and step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

DTYPES = {
    "f32": np.float32,
    "f16": np.float16,
    "i64": np.int64,
    "i32": np.int32,
    "i8": np.int8,
    "u8": np.uint8,
    "bool": np.bool_,
}
TEXT_TOKEN = -1


class Decoder:
    """`decoder.onnx` of a bundle with caches for a number of sequences, which all are at one position."""

    def __init__(self, bundle: Path, threads: int, custom_operators: Path | None = None) -> None:
        self.manifest: dict[str, Any] = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
        graph = self.manifest["graphs"]["decoder"]
        self.inputs: dict[str, dict[str, Any]] = {spec["name"]: spec for spec in graph["inputs"]}
        self.outputs: dict[str, dict[str, Any]] = {spec["name"]: spec for spec in graph["outputs"]}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if custom_operators is not None:
            options.register_custom_ops_library(str(custom_operators))
        providers = ["CPUExecutionProvider"]
        self.session = onnxruntime.InferenceSession(bundle / graph["file"], options, providers=providers)
        self.description = {name: self.manifest[name] for name in ("precision", "target", "producer")}
        self.caches: dict[str, onnxruntime.OrtValue] = {}
        self.position = 0

    def start(self, batch: int, max_length: int) -> None:
        """Empty caches for `batch` sequences of up to `max_length` tokens."""
        # The cache of target cpu holds whole panels of 16 keys.
        sizes = {"batch": batch, "max_length": -(-max_length // 16) * 16}
        self.position = 0
        self.caches = {}
        for name, spec in self.inputs.items():
            if name.startswith("past_key_values."):
                shape = [sizes[size] if isinstance(size, str) else size for size in spec["shape"]]
                zeros = np.zeros(shape, DTYPES[spec["dtype"]])
                self.caches[name] = onnxruntime.OrtValue.ortvalue_from_numpy(zeros)

    def step(self, ids: np.ndarray) -> np.ndarray:
        """Feeds one token to every sequence; the float32 logits `[batch, vocab]` of what follows."""
        batch = len(ids)
        hidden = self.inputs["image_features"]["shape"][-1]
        values = {
            "input_ids": ids.reshape(batch, 1),
            "image_index": np.full((batch, 1), TEXT_TOKEN),
            "image_features": np.zeros((1, hidden)),
            "seqlens_k": np.full(batch, self.position),
            "total_sequence_length": np.array(self.position + 1),
        }
        binding = self.session.io_binding()
        for name, spec in self.inputs.items():
            if name in self.caches:
                cache = self.caches[name]
                binding.bind_ortvalue_input(name, cache)
                binding.bind_ortvalue_output(name.replace("past_key_values.", "present."), cache)
            elif name in values:
                binding.bind_cpu_input(name, np.ascontiguousarray(values[name].astype(DTYPES[spec["dtype"]])))
            else:
                raise ValueError(f"the decoder has an input this script does not know: {name}")
        binding.bind_output("logits")
        self.session.run_with_iobinding(binding)
        self.position += 1
        return binding.get_outputs()[-1].numpy().astype(np.float32)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Natural logarithms of the probabilities, row by row, in place."""
    logits -= logits.max(axis=1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)
    return logits

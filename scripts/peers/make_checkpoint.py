"""Writes a LLaVA checkpoint with random weights, as transformers does: make_checkpoint.py MODEL FOLDER.

The spread of the weights is chosen so that greedy decoding wanders over the vocabulary instead of repeating
one token: a linear layer is 1/sqrt(inputs) wide, so that each block adds about as much to the residual stream
as is there, and the stream forgets the (tied) embedding of the last token. The tokenizer has LLaMA-3's frame
and a byte-level BPE of a few words; made-up words fill it up, so that every id is some text.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from specs import PROMPT, SPECS, Spec, Text, Vision, framed_prompt

BEGIN, END, TURN_END, PAD, IMAGE = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|finetune_right_pad_id|>",
    "<image>",
)
SPECIAL = [BEGIN, END, "<|start_header_id|>", "<|end_header_id|>", TURN_END, PAD, IMAGE]
SENTENCES = [
    PROMPT,
    "user",
    "assistant",
    "A small boat lies on the shore of a quiet lake, and behind it stand tall mountains under a grey sky.",
    "The image shows a red bicycle that leans on a brick wall beside a green door.",
    "Two people sit at a wooden table in a bright kitchen; one of them holds a white cup.",
]
NUM_LEARNED = 424  # ids of bytes and of pieces learned from the sentences: frame and prompt take 32 tokens
# The pre-tokenizer's pattern of LLaMA-3.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def made_up_words() -> Iterator[str]:
    """Words that the prompt does not hold, each with a space before it."""
    syllables = ["".join(pair) for pair in itertools.product("bdfgklmnprstvz", "aeiou")]
    for parts in itertools.product(syllables, repeat=3):
        yield "\u0120" + "".join(parts) + "q"


def make_tokenizer(vocab: int) -> Tokenizer:
    """A tokenizer of exactly `vocab` ids."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=NUM_LEARNED, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    description = json.loads(tokenizer.to_str())
    ids = description["model"]["vocab"]
    for word in itertools.islice(made_up_words(), vocab - len(SPECIAL) - len(ids)):
        ids[word] = len(ids)
    tokenizer = Tokenizer.from_str(json.dumps(description))
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    assert tokenizer.get_vocab_size() == vocab, tokenizer.get_vocab_size()
    return tokenizer


def shapes(vision: Vision, text: Text) -> Iterator[tuple[str, tuple[int, ...], float]]:
    """Name, shape and spread of every tensor; a spread of 0 is a norm's weight."""
    tower = "vision_tower.vision_model."
    width = vision.width
    fan_in = 3 * vision.patch_size**2
    yield tower + "embeddings.class_embedding", (width,), 0.02
    patch = (width, 3, vision.patch_size, vision.patch_size)
    yield tower + "embeddings.patch_embedding.weight", patch, 1 / math.sqrt(fan_in)
    yield tower + "embeddings.position_embedding.weight", (vision.num_image_tokens + 1, width), 0.02
    norms = ["pre_layrnorm", "post_layernorm"]
    for layer in range(vision.num_layers):
        prefix = f"encoder.layers.{layer}."
        norms += [prefix + "layer_norm1", prefix + "layer_norm2"]
        linears = [(f"self_attn.{name}_proj", width, width) for name in ("q", "k", "v", "out")]
        linears += [("mlp.fc1", vision.mlp, width), ("mlp.fc2", width, vision.mlp)]
        for name, rows, columns in linears:
            yield f"{tower}{prefix}{name}.weight", (rows, columns), 1 / math.sqrt(columns)
            yield f"{tower}{prefix}{name}.bias", (rows,), 0.01
    for norm in norms:
        yield f"{tower}{norm}.weight", (width,), 0.0
        yield f"{tower}{norm}.bias", (width,), 0.01
    for name, columns in (("linear_1", width), ("linear_2", text.width)):
        yield f"multi_modal_projector.{name}.weight", (text.width, columns), 1 / math.sqrt(columns)
        yield f"multi_modal_projector.{name}.bias", (text.width,), 0.01
    yield "language_model.model.embed_tokens.weight", (text.vocab, text.width), 0.25
    for layer in range(text.num_layers):
        prefix = f"language_model.model.layers.{layer}."
        # Sharper attention that adds less: else all positions grow alike.
        linears = [
            ("self_attn.q_proj", text.width, text.width, 2.0),
            ("self_attn.k_proj", text.kv_width, text.width, 2.0),
            ("self_attn.v_proj", text.kv_width, text.width, 1.0),
            ("self_attn.o_proj", text.width, text.width, 0.25),
            ("mlp.gate_proj", text.mlp, text.width, 1.0),
            ("mlp.up_proj", text.mlp, text.width, 1.0),
            ("mlp.down_proj", text.width, text.mlp, 1.0),
        ]
        for name, rows, columns, gain in linears:
            yield f"{prefix}{name}.weight", (rows, columns), gain / math.sqrt(columns)
        yield prefix + "input_layernorm.weight", (text.width,), 0.0
        yield prefix + "post_attention_layernorm.weight", (text.width,), 0.0
    yield "language_model.model.norm.weight", (text.width,), 0.0


def weights(spec: Spec) -> dict[str, torch.Tensor]:
    """All tensors; each depends on the seed and its name alone."""
    dtype = getattr(torch, spec.dtype)
    tensors = {}
    for name, shape, spread in shapes(spec.vision, spec.text):
        rng = np.random.default_rng([spec.seed, zlib.crc32(name.encode())])
        values = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
        tensors[name] = (values * spread if spread else 1 + 0.02 * values).to(dtype)
    return tensors


def config(spec: Spec, ids: dict[str, int]) -> dict[str, object]:
    """config.json."""
    vision, text = spec.vision, spec.text
    vision_config = {
        "model_type": "clip_vision_model",
        "hidden_size": vision.width,
        "intermediate_size": vision.mlp,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_heads,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "projection_dim": vision.width,
        "hidden_act": "quick_gelu",
    }
    text_config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": text.vocab,
        "hidden_size": text.width,
        "intermediate_size": text.mlp,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_kv_heads,
        "head_dim": text.width // text.num_heads,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": ids[BEGIN],
        "eos_token_id": ids[TURN_END],
        "pad_token_id": ids[PAD],
        "torch_dtype": spec.dtype,
    }
    return {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": ids[IMAGE],
        "image_seq_length": vision.num_image_tokens,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": True,
        "torch_dtype": spec.dtype,
        "vision_config": vision_config,
        "text_config": text_config,
    }


def write_settings(folder: Path, spec: Spec, tokenizer: Tokenizer) -> None:
    """Everything but the weights."""
    ids = {text: tokenizer.token_to_id(text) for text in SPECIAL}
    size = spec.vision.image_size
    processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": spec.vision.patch_size,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
        "image_token": IMAGE,
    }
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": TURN_END,
        "pad_token": PAD,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 8192,
        "processor_class": "LlavaProcessor",
        "chat_template": TEMPLATE,
    }
    generation = {
        "bos_token_id": ids[BEGIN],
        "eos_token_id": ids[TURN_END],
        "pad_token_id": ids[PAD],
    }
    files = {
        "config.json": config(spec, ids),
        "generation_config.json": generation,
        "preprocessor_config.json": preprocessor,
        "processor_config.json": processor,
        "tokenizer_config.json": tokenizer_config,
        "chat_template.json": {"chat_template": TEMPLATE},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=list(SPECS))
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    spec = SPECS[args.model]
    args.folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(spec.text.vocab)
    write_settings(args.folder, spec, tokenizer)
    num_text = len(tokenizer.encode(framed_prompt(IMAGE), add_special_tokens=False).ids) - 1
    tensors = weights(spec)
    save_file(tensors, args.folder / "model.safetensors", metadata={"format": "pt"})
    # Last: a folder with it is whole.
    facts = {"text_tokens": num_text, "prompt_tokens": num_text + spec.vision.num_image_tokens}
    (args.folder / "bench.json").write_text(json.dumps(facts) + "\n", encoding="utf-8")
    num_parameters = sum(tensor.numel() for tensor in tensors.values())
    print(f"{args.folder}: {num_parameters / 1e6:.1f} M parameters, {facts['prompt_tokens']} prompt tokens")


if __name__ == "__main__":
    main()

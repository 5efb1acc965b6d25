"""Makes tiny, randomly initialised LLaVA checkpoints and the outputs that transformers computes for them.

Each checkpoint goes to `<output>/checkpoints/<name>/` with a `golden.json`; together they cover the key
names, dtypes, configurations and architecture options found in published LLaVA-LLaMA3 checkpoints. The
pictures they are run on go to `<output>/images/<size>/`. The outputs are computed on the CPU in float32
from the weights as stored, with a loop over the model built in this script; the checkpoint on disk is then
loaded with transformers, which must give the same.

Everything is derived from fixed seeds; a seed whose outputs would make a poor test (see `defects`) is
passed over.

    python scripts/golden/make_checkpoints.py [--only NAME ...]
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.utils import logging

import layouts
import tiny_tokenizer
import tower_images

NEW_TOKENS = 48
MIN_MARGIN = 4e-3
MIN_DISTINCT = 6
MAX_SEEDS = 400
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
PROMPT = "Please describe the image in detail."

BOS_ID, END_ID, EOT_ID, PAD_ID, IMAGE_ID = (
    tiny_tokenizer.special_ids()[token]
    for token in (
        tiny_tokenizer.BOS,
        tiny_tokenizer.END_OF_TEXT,
        tiny_tokenizer.EOT,
        tiny_tokenizer.PAD,
        tiny_tokenizer.IMAGE,
    )
)

# A template of LLaMA-3's own kind: the content is one string that already holds `<image>`.
TEMPLATE_STRING = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
    "message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# A template of the llava-hf kind: the content is a list of parts.
TEMPLATE_PARTS = (
    "{% for message in messages %}{% if loop.first %}<|begin_of_text|>{% endif %}<|start_header_id|>"
    "{{ message['role'] }}<|end_header_id|>\n\n{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}"
    "{% endfor %}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# The same with a system turn in front when the messages have none.
TEMPLATE_SYSTEM = (
    "<|begin_of_text|>{% if messages[0]['role'] != 'system' %}<|start_header_id|>system<|end_header_id|>\n\n"
    "You describe images.<|eot_id|>{% endif %}{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


@dataclass(frozen=True)
class Spec:
    """What one checkpoint is made of."""

    name: str
    # published: 4.x files; v5: what save_pretrained of 5.x writes; memory: the modules' names in 5.x;
    # memory4: in 4.52+; original: those of the LLaVA repository
    naming: str
    text: dict[str, Any]
    vision: dict[str, Any]
    llava: dict[str, Any] = field(default_factory=dict)
    rope: dict[str, Any] = field(default_factory=lambda: {"rope_theta": 10000.0})
    # 4: rope_theta, rope_scaling, torch_dtype; 4-minimal: the same without keys at their default; 5: as 5.x
    # saves it
    config_style: str = "4"
    # The dtype of the parameters: one of f32, f16, bf16, or mixed or tower-f32 (see `stored_dtype`).
    dtype: str = "bf16"
    shards: int = 1
    weights: str = "safetensors"  # or bin: torch's own files
    # Where the original layout has its tower: embedded, or in a folder, as a clip or a clip-vision model
    tower: str = "embedded"
    original: dict[str, Any] = field(default_factory=dict)  # changes of the original layout's config.json
    tokenizer_inside: bool = True
    adapter: layouts.Adapter | None = None
    processor: str = "clip"  # clip, clip-ints, llava-pad, saved-clip or saved-llava-pad
    processor_config: bool = (
        True  # whether there is a processor_config.json, which 4.x before 4.45 did not write
    )
    mean: list[float] = field(default_factory=lambda: CLIP_MEAN)
    std: list[float] = field(default_factory=lambda: CLIP_STD)
    template: str = TEMPLATE_PARTS
    template_at: str = "chat_template.json"  # or chat_template.jinja or tokenizer_config.json
    parts: bool = True  # whether the user's content is a list of parts or one string
    # eos_token_id of generation_config.json; None: no such file
    generation_eos: int | list[int] | None = EOT_ID
    config_eos: int | list[int] = END_ID
    tied_head_stored: bool = False
    old_buffers: bool = False  # whether the file holds the buffers that transformers before 4.31 stored
    want_stop: bool = False  # look for a seed with which an answer contains a stop id
    prompt: str = PROMPT

    @property
    def tied(self) -> bool:
        return self.text.get("tie_word_embeddings", False)

    @property
    def is_original(self) -> bool:
        return self.naming == "original"

    @property
    def image_id(self) -> int:
        return IMAGE_ID

    @property
    def num_image_tokens(self) -> int:
        patches = (self.vision["image_size"] // self.vision["patch_size"]) ** 2
        return patches + (self.llava.get("vision_feature_select_strategy") == "full")

    @property
    def stop_ids(self) -> list[int]:
        eos = self.config_eos if self.generation_eos is None else self.generation_eos
        return eos if isinstance(eos, list) else [eos]


def text(**changes: Any) -> dict[str, Any]:
    """The text model's settings: by default GQA 4/2 with 64 channels."""
    settings = {
        "vocab_size": 299,
        "hidden_size": 64,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
    }
    return settings | changes


def vision(**changes: Any) -> dict[str, Any]:
    """The vision tower's settings."""
    settings = {
        "hidden_size": 40,
        "intermediate_size": 56,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 7,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": 32,
    }
    return settings | changes


LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

SPECS = [
    # The commonest published layout: 4.x names, GQA.
    Spec(
        name="published-f16",
        naming="published",
        text=text(vocab_size=304),
        vision=vision(),
        rope={"rope_theta": 500000.0},
        dtype="f16",
        processor_config=False,
        template=TEMPLATE_STRING,
        template_at="tokenizer_config.json",
        parts=False,
        want_stop=True,
    ),
    # The smallest 4.x config.json: everything at its default is left out (MHA, theta 10000, eps 1e-6,
    # quick_gelu…).
    Spec(
        name="minimal-config-f32",
        naming="published",
        text=text(
            hidden_size=48,
            intermediate_size=64,
            num_key_value_heads=4,
            rms_norm_eps=1e-6,
            tie_word_embeddings=True,
        ),
        vision=vision(hidden_size=24, intermediate_size=40),
        config_style="4-minimal",
        dtype="f32",
        old_buffers=True,
        processor="clip-ints",
        processor_config=False,
    ),
    # Exactly what save_pretrained of 5.x writes, with LLaMA-3.1's rope.
    Spec(
        name="saved-v5-bf16",
        naming="v5",
        text=text(),
        vision=vision(num_hidden_layers=4, hidden_size=32, hidden_act="gelu"),
        rope={"rope_theta": 500000.0} | LLAMA3_SCALING,
        config_style="5",
        processor="saved-clip",
        template=TEMPLATE_SYSTEM,
        template_at="chat_template.jinja",
        generation_eos=[END_ID, EOT_ID],
        want_stop=True,
    ),
    # 5.x, sharded, one feature layer counted from the front; no generation_config.json.
    Spec(
        name="sharded-v5-f32",
        naming="v5",
        text=text(hidden_size=48, intermediate_size=64, num_key_value_heads=1, tie_word_embeddings=True),
        vision=vision(hidden_size=24, intermediate_size=40, image_size=42, patch_size=14),
        llava={"vision_feature_layer": 2},
        config_style="5",
        dtype="f32",
        shards=3,
        processor="saved-llava-pad",
        template_at="chat_template.jinja",
        generation_eos=None,
        config_eos=[END_ID, EOT_ID],
    ),
    # The modules' own names, MHA, several concatenated feature layers, a projector without biases.
    Spec(
        name="memory-features-bf16",
        naming="memory",
        text=text(num_key_value_heads=4, rms_norm_eps=3e-3),
        vision=vision(num_hidden_layers=4, hidden_size=32),
        llava={
            "vision_feature_layer": [-2, -3],
            "projector_hidden_act": "silu",
            "multimodal_projector_bias": False,
        },
        rope={"rope_theta": 1000.0},
        config_style="5",
        processor="saved-llava-pad",
        template_at="chat_template.jinja",
    ),
    # The names of a 4.52 module (`model.vision_tower.vision_model.*`), MQA, heads wider than hidden / heads.
    Spec(
        name="memory4-wide-heads-f16",
        naming="memory4",
        text=text(
            hidden_size=48, intermediate_size=48, num_key_value_heads=1, head_dim=32, num_hidden_layers=3
        ),
        vision=vision(image_size=28, patch_size=14, hidden_size=32, layer_norm_eps=2e-2),
        rope={"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0},
        dtype="f16",
        processor="llava-pad",
    ),
    # 4.x in shards; the old key `type` of rope_scaling; the last feature layer.
    Spec(
        name="sharded-published-f16",
        naming="published",
        text=text(hidden_size=64),
        vision=vision(hidden_act="gelu", image_size=42, patch_size=14, hidden_size=32),
        llava={"vision_feature_layer": -1, "projector_hidden_act": "relu"},
        rope={"rope_theta": 10000.0, "type": "linear", "factor": 4.0},
        dtype="f16",
        shards=2,
        template=TEMPLATE_STRING,
        template_at="tokenizer_config.json",
        parts=False,
        generation_eos=EOT_ID,
    ),
    # LLaMA-3.1's rope in a 4.x config; heads of 24; a tied head that is stored all the same.
    Spec(
        name="head24-llama3-rope-bf16",
        naming="published",
        text=text(hidden_size=48, head_dim=24, tie_word_embeddings=True),
        vision=vision(),
        rope={"rope_theta": 10000.0} | LLAMA3_SCALING | {"factor": 32.0},
        tied_head_stored=True,
        processor="llava-pad",
    ),
    # Several dtypes in one file.
    Spec(
        name="mixed-dtypes",
        naming="v5",
        text=text(vocab_size=320, hidden_size=48, tie_word_embeddings=True, rms_norm_eps=1e-5),
        vision=vision(hidden_act="gelu", hidden_size=48, intermediate_size=64),
        llava={"projector_hidden_act": "gelu_pytorch_tanh"},
        rope={"rope_theta": 500000.0},
        config_style="5",
        dtype="mixed",
        processor="saved-clip",
        template_at="chat_template.jinja",
        prompt="Hi",
    ),
    # Biases wherever LLaMA can have them.
    Spec(
        name="biases-bf16",
        naming="published",
        text=text(attention_bias=True, mlp_bias=True, rms_norm_eps=2e-2),
        vision=vision(),
        rope={"rope_theta": 250000.0},
        mean=[0.5, 0.5, 0.5],
        std=[0.5, 0.5, 0.5],
        template=TEMPLATE_SYSTEM,
        generation_eos=[END_ID, EOT_ID],
    ),
    # All the tower's tokens (with the class token), and a picture that is not a whole number of patches.
    Spec(
        name="full-features-bf16",
        naming="memory",
        text=text(hidden_size=48, intermediate_size=80),
        vision=vision(image_size=30, num_hidden_layers=4),
        llava={"vision_feature_select_strategy": "full", "vision_feature_layer": -2},
        config_style="4",
        processor="clip",
        want_stop=True,
    ),
    # The image token's id lies just past the embedding table.
    Spec(
        name="image-token-outside-f16",
        naming="published",
        text=text(vocab_size=IMAGE_ID, num_key_value_heads=4),
        vision=vision(image_size=30, hidden_act="gelu", hidden_size=32),
        llava={"vision_feature_layer": [-2, -1], "vision_feature_select_strategy": "full"},
        rope={"rope_theta": 500000.0},
        dtype="f16",
        processor="llava-pad",
        generation_eos=[END_ID, EOT_ID, PAD_ID],
        want_stop=True,
        prompt="What is in the photograph?\nAnswer “briefly” – 謝謝 🙂",
    ),
    # The original layout with its tower inside, as the paper's checkpoint: decoder f16, tower f32, no
    # tokenizer. Nothing says how many heads the tower has.
    Spec(
        name="original-embedded",
        naming="original",
        text=text(vocab_size=IMAGE_ID, hidden_size=48, intermediate_size=64),
        vision=vision(hidden_size=64, num_attention_heads=1, num_hidden_layers=2),
        rope={"rope_theta": 500000.0},
        dtype="tower-f32",
        processor="llava-pad",
        template=TEMPLATE_STRING,
        parts=False,
        generation_eos=None,
        tokenizer_inside=False,
    ),
    # The original layout without a tower: a CLIPModel in torch's file has it, and the image processor.
    Spec(
        name="original-clip-folder-bf16",
        naming="original",
        text=text(num_key_value_heads=1, rms_norm_eps=2e-2),
        vision=vision(hidden_act="gelu", layer_norm_eps=2e-2, hidden_size=32),
        llava={"vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
        rope={"rope_theta": 10000.0} | LLAMA3_SCALING,
        shards=2,
        weights="bin",
        tower="clip",
        original={"mm_vision_select_feature": "cls_patch", "unfreeze_mm_vision_tower": "absent"},
        processor="clip-ints",
        mean=[0.5, 0.5, 0.5],
        std=[0.5, 0.5, 0.5],
        template=TEMPLATE_STRING,
        template_at="tokenizer_config.json",
        parts=False,
        generation_eos=[END_ID, EOT_ID],
    ),
    # transformers' layout in shards of torch's files; a tied head that shares the table's memory.
    Spec(
        name="sharded-bin-f16",
        naming="published",
        text=text(hidden_size=48, tie_word_embeddings=True),
        vision=vision(hidden_size=32),
        dtype="f16",
        shards=3,
        weights="bin",
        tied_head_stored=True,
        processor="llava-pad",
        template_at="tokenizer_config.json",
    ),
    # A LoRA on everything that peft can put one on, trained on modules of other names than the checkpoint's.
    Spec(
        name="lora-published-bf16",
        naming="published",
        text=text(hidden_size=48),
        vision=vision(hidden_size=32),
        adapter=layouts.Adapter(
            {
                "r": 4,
                "lora_alpha": 6,
                "use_rslora": True,
                "target_modules": [*LINEAR_LAYERS, "out_proj", "fc1", "linear_1", "embed_tokens"],
                "rank_pattern": {"mlp.down_proj": 2, "embed_tokens": 3},
                "alpha_pattern": {"^model.language_model.layers.1.self_attn.v_proj": 16, "linear_1": 3},
                "modules_to_save": ["lm_head"],
            }
        ),
    ),
    # A LoRA of the LLaVA repository on a bare LLaMA with heads of 24: the projector comes with the adapter.
    Spec(
        name="lora-original-f16",
        naming="original",
        text=text(hidden_size=48, head_dim=24, num_key_value_heads=1, tie_word_embeddings=True),
        vision=vision(),
        dtype="f16",
        weights="bin",
        tower="clip-vision",
        original={"model_type": "llava", "image_aspect_ratio": "absent"},
        adapter=layouts.Adapter(
            {
                "r": 3,
                "lora_alpha": 12,
                "target_modules": LINEAR_LAYERS,
                "task_type": "CAUSAL_LM",
            },
            dtype=torch.bfloat16,
            language_only=True,
        ),
        template=TEMPLATE_STRING,
        template_at="tokenizer_config.json",
        parts=False,
        want_stop=True,
    ),
]

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
DTYPE_NAMES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "mixed": "bfloat16"}


def llava_config(spec: Spec) -> LlavaConfig:
    """The configuration as transformers objects."""
    rope = {"rope_type": spec.rope.get("type", "default")} | {
        k: v for k, v in spec.rope.items() if k != "type"
    }
    config = LlavaConfig(
        text_config=LlamaConfig(
            **spec.text,
            rope_parameters=rope,
            bos_token_id=BOS_ID,
            eos_token_id=spec.config_eos,
            pad_token_id=PAD_ID,
        ),
        vision_config=CLIPVisionConfig(**spec.vision),
        image_token_index=spec.image_id,
        image_seq_length=spec.num_image_tokens,
        **spec.llava,
    )
    config._attn_implementation = "eager"
    return config


def config_4x(spec: Spec) -> dict[str, Any]:
    """config.json as transformers 4.x wrote it."""
    dtype = DTYPE_NAMES[spec.dtype]
    scaling = {key: value for key, value in spec.rope.items() if key != "rope_theta"}
    text_config = {
        "_name_or_path": "",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": BOS_ID,
        "eos_token_id": spec.config_eos,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "mlp_bias": False,
        "model_type": "llama",
        "pretraining_tp": 1,
        "rope_scaling": scaling or None,
        "rope_theta": spec.rope["rope_theta"],
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": True,
    } | spec.text
    vision_config = {"model_type": "clip_vision_model", "num_channels": 3, "torch_dtype": dtype} | spec.vision
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_seq_length": spec.num_image_tokens,
        "image_token_index": spec.image_id,
        "model_type": "llava",
        "multimodal_projector_bias": True,
        "pad_token_id": PAD_ID,
        "projector_hidden_act": "gelu",
        "text_config": text_config,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "transformers_version": "4.46.0",
        "vision_config": vision_config,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    } | spec.llava
    if spec.config_style == "4-minimal":
        for part in (config, text_config, vision_config):
            for key, default in DEFAULTS_4X.items():
                if key in part and part[key] == default:
                    del part[key]
        if text_config["num_key_value_heads"] == text_config["num_attention_heads"]:
            del text_config["num_key_value_heads"]
        del config["image_seq_length"], vision_config["torch_dtype"], text_config["torch_dtype"]
    return config


DEFAULTS_4X = {
    "_name_or_path": "",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "ignore_index": -100,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-5,
    "mlp_bias": False,
    "multimodal_projector_bias": True,
    "num_channels": 3,
    "pretraining_tp": 1,
    "projector_hidden_act": "gelu",
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "use_cache": True,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}


def randomise(model: LlavaForConditionalGeneration, seed: int) -> None:
    """Fills the parameters so that each matters: norm weights about 1, biases off 0, lively projections."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in sorted(model.named_parameters()):
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith("bias"):
            fresh = 0.15 * noise
        elif "norm" in name or "layrnorm" in name:
            fresh = 1 + 0.2 * noise
        elif "patch_embedding" in name:
            fresh = 0.08 * noise
        elif "position_embedding" in name or "class_embedding" in name:
            fresh = 0.5 * noise
        elif "embed_tokens" in name:
            fresh = 0.25 * noise
        elif "lm_head" in name:
            fresh = 0.2 * noise
        else:
            gain = 1.8 if "q_proj" in name or "k_proj" in name else 1.3
            fresh = gain / value.shape[1] ** 0.5 * noise
        value.copy_(fresh)


def stored_dtype(spec: Spec, name: str) -> torch.dtype:
    """The dtype in which a parameter (by its module's name) is stored."""
    if spec.dtype == "tower-f32":
        return torch.float32 if "vision_tower" in name else torch.float16
    if spec.dtype != "mixed":
        return DTYPES[spec.dtype]
    if "norm" in name or "embed_tokens" in name:
        return torch.float32
    return torch.float16 if "vision_tower" in name or "projector" in name else torch.bfloat16


def published_name(name: str) -> str:
    """The name of a 5.x module's parameter in a checkpoint written by transformers 4.x up to 4.51."""
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    name = name.removeprefix("model.")
    name = (
        name.replace("language_model.", "language_model.model.", 1)
        if name.startswith("language_model.")
        else name
    )
    return name.replace("vision_tower.", "vision_tower.vision_model.", 1)


def stored_name(spec: Spec, name: str) -> str:
    """The name under which a parameter is stored by the namings that this script writes itself."""
    if spec.naming == "published":
        return published_name(name)
    return name.replace("model.vision_tower.", "model.vision_tower.vision_model.", 1)


def module_name(name: str) -> str:
    """The 5.x module's name of a parameter stored under any of the namings."""
    name = name.replace("vision_tower.vision_model.", "vision_tower.", 1)
    name = name.replace("language_model.lm_head.", "lm_head.", 1).replace(
        "language_model.model.", "language_model.", 1
    )
    return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"


def write_weights(spec: Spec, model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Writes the weights (and, with 5.x's own writer, the configs) under the names and dtypes of the spec."""
    rounded = copy.deepcopy(model)
    for name, value in rounded.named_parameters():
        value.data = value.data.to(stored_dtype(spec, name))
    total = sum(value.numel() * value.element_size() for value in rounded.parameters())
    if spec.is_original:
        write_original(spec, rounded, folder)
        return
    if spec.naming in ("v5", "memory"):
        limit = "1GB" if spec.shards == 1 else f"{total // spec.shards // 1000 + 20}KB"
        rounded.save_pretrained(folder, max_shard_size=limit, save_original_format=spec.naming == "v5")
        return
    tensors = {
        stored_name(spec, name): value.detach().contiguous() for name, value in rounded.named_parameters()
    }
    if spec.tied and spec.tied_head_stored:
        head = rounded.lm_head.weight.detach()
        tensors[stored_name(spec, "lm_head.weight")] = head if spec.weights == "bin" else head.clone()
    if spec.old_buffers:
        positions = rounded.model.vision_tower.embeddings.position_ids
        tensors["vision_tower.vision_model.embeddings.position_ids"] = positions.contiguous()
        for layer in range(spec.text["num_hidden_layers"]):
            frequencies = rounded.model.language_model.rotary_emb.inv_freq
            tensors[f"language_model.model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = (
                frequencies.clone()
            )
    if spec.weights == "bin":
        layouts.save_shards(tensors, folder, spec.shards)
        return
    if spec.shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map, names = {}, list(tensors)
    for shard in range(spec.shards):
        file = f"model-{shard + 1:05}-of-{spec.shards:05}.safetensors"
        # Dealt out so that the tensors of one layer lie in different files.
        chosen = [name for index, name in enumerate(names) if index % spec.shards == shard]
        save_file({name: tensors[name] for name in chosen}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(chosen, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)


def write_original(spec: Spec, rounded: LlavaForConditionalGeneration, folder: Path) -> None:
    """Writes the weights in the original layout, and the tower's folder and the adapter's projector."""
    tensors = {name: value.detach().contiguous() for name, value in rounded.named_parameters()}
    elsewhere = []
    if spec.tower != "embedded":
        tower_folder = folder / "vision_tower"
        tower_folder.mkdir()
        tower = {
            name.removeprefix(layouts.TOWER): value
            for name, value in tensors.items()
            if name.startswith(layouts.TOWER)
        }
        write = layouts.write_clip_model if spec.tower == "clip" else layouts.write_clip_vision_model
        write(tower, spec.vision, tower_folder)
        elsewhere.append(layouts.TOWER)
    if spec.adapter:
        (folder / "lora").mkdir()
        projector = {name: value for name, value in tensors.items() if name.startswith(layouts.PROJECTOR)}
        layouts.write_projector(projector, folder / "lora")
        elsewhere.append(layouts.PROJECTOR)
    kept = {
        layouts.original_name(name): value
        for name, value in tensors.items()
        if not name.startswith(tuple(elsewhere))
    }
    if spec.weights == "bin":
        layouts.save_shards(kept, folder, spec.shards)
    else:
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    for file in sorted(folder.glob("*.bin")):
        tensors |= torch.load(file, weights_only=True)
    return tensors


def stored_model(spec: Spec, folder: Path) -> LlavaForConditionalGeneration:
    """The model with the stored weights in float32, mapped by this script's own rules, the adapter merged."""
    model = LlavaForConditionalGeneration(llava_config(spec)).eval()
    original = {layouts.original_name(name): name for name in model.state_dict()}
    tensors = {}
    for name, value in load_tensors(folder).items():
        if not name.endswith((".position_ids", ".rotary_emb.inv_freq")):
            tensors[original[name] if spec.is_original else module_name(name)] = value.float()
    for name, value in load_tensors(folder / "vision_tower").items():
        if name.startswith("vision_model.") and not name.endswith(".position_ids"):
            tensors[name.replace("vision_model.", layouts.TOWER, 1)] = value.float()
    if spec.is_original and spec.adapter:
        projector = torch.load(folder / "lora" / "non_lora_trainables.bin", weights_only=True)
        for name, value in projector.items():
            tensors[original[name.removeprefix("base_model.model.")]] = value.float()
    if spec.tied:
        tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"]
    model.load_state_dict(tensors, strict=True)
    return layouts.load_adapter(spec.adapter, model, folder / "lora") if spec.adapter else model


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_config(spec: Spec, model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Writes config.json and generation_config.json."""
    if spec.is_original:
        layer = spec.llava.get("vision_feature_layer", -2)
        ids = {"bos_token_id": BOS_ID, "eos_token_id": spec.config_eos, "pad_token_id": PAD_ID}
        config = layouts.original_config(spec.text, spec.rope, layer, spec.vision, ids, spec.original)
        write_json((folder / "lora" if spec.adapter else folder) / "config.json", config)
        if spec.adapter:  # The base is a bare LLaMA.
            text_config = config_4x(spec)["text_config"] | {"architectures": ["LlamaForCausalLM"]}
            write_json(folder / "config.json", text_config)
    elif spec.config_style == "5":
        config = copy.deepcopy(model.config)
        config.architectures = ["LlavaForConditionalGeneration"]
        config.dtype = DTYPE_NAMES[spec.dtype]
        config.save_pretrained(folder)
    else:
        write_json(folder / "config.json", config_4x(spec))
    generation = folder / "generation_config.json"
    generation.unlink(missing_ok=True)
    if spec.generation_eos is not None:
        version = "5.23.0" if spec.config_style == "5" else "4.46.0"
        eos = spec.generation_eos
        fields = {
            "_from_model_config": True,
            "bos_token_id": BOS_ID,
            "eos_token_id": eos,
            "pad_token_id": PAD_ID,
        }
        write_json(generation, fields | {"transformers_version": version})


def write_processor(spec: Spec, folder: Path) -> None:
    """Writes the tokenizer, the chat template and the image processor's settings."""
    tokenizer_file = folder / "tokenizer.json"
    tokenizer_file.write_text(
        json.dumps(tiny_tokenizer.tokenizer_json(), ensure_ascii=False) + "\n", encoding="utf-8"
    )
    size = spec.vision["image_size"]
    box = {"height": size, "width": size}
    additional = 1
    strategy = spec.llava.get("vision_feature_select_strategy", "default")
    if spec.processor.startswith("saved-"):
        pad = {"do_pad": True} if spec.processor.endswith("pad") else {}
        kind = LlavaImageProcessorPil if pad else CLIPImageProcessorPil
        images = kind(
            size={"shortest_edge": size}, crop_size=box, image_mean=spec.mean, image_std=spec.std, **pad
        )
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(tokenizer_file),
            bos_token=tiny_tokenizer.BOS,
            eos_token=tiny_tokenizer.EOT,
            pad_token=tiny_tokenizer.PAD,
        )
        LlavaProcessor(
            image_processor=images,
            tokenizer=tokenizer,
            patch_size=spec.vision["patch_size"],
            vision_feature_select_strategy=strategy,
            num_additional_image_tokens=additional,
            chat_template=spec.template,
        ).save_pretrained(folder)
        return
    ints = spec.processor == "clip-ints"
    preprocessor = {
        "crop_size": size if ints else box,
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": spec.mean,
        "image_processor_type": "CLIPImageProcessor",
        "image_std": spec.std,
        "processor_class": "LlavaProcessor",
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": size if ints else {"shortest_edge": size},
    }
    if ints:
        for key in ("do_convert_rgb", "do_rescale", "rescale_factor", "processor_class"):
            del preprocessor[key]
        preprocessor["feature_extractor_type"] = "CLIPFeatureExtractor"
    if spec.processor == "llava-pad":
        preprocessor |= {"do_pad": True, "image_processor_type": "LlavaImageProcessor"}
    write_json(folder / "preprocessor_config.json", preprocessor)
    if spec.processor_config:
        fields = {
            "image_token": tiny_tokenizer.IMAGE,
            "num_additional_image_tokens": additional,
            "patch_size": spec.vision["patch_size"],
            "processor_class": "LlavaProcessor",
            "vision_feature_select_strategy": strategy,
        }
        write_json(folder / "processor_config.json", fields)
    tokenizer_config = {
        "added_tokens_decoder": {
            str(index): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for token, index in tiny_tokenizer.special_ids().items()
        },
        "bos_token": tiny_tokenizer.BOS,
        "clean_up_tokenization_spaces": True,
        "eos_token": tiny_tokenizer.EOT,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 512,
        "pad_token": tiny_tokenizer.PAD,
        "processor_class": "LlavaProcessor",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if spec.template_at == "tokenizer_config.json":
        tokenizer_config["chat_template"] = spec.template
    elif spec.template_at == "chat_template.json":
        write_json(folder / "chat_template.json", {"chat_template": spec.template})
    else:
        (folder / "chat_template.jinja").write_text(spec.template, encoding="utf-8")
    write_json(folder / "tokenizer_config.json", tokenizer_config)


def write_original_files(spec: Spec, work: Path, folder: Path) -> None:
    """What the original layout has beside its weights, taken from a transformers checkpoint."""
    target = folder if spec.tokenizer_inside else folder / "tokenizer"
    target.mkdir(exist_ok=True)
    shutil.copy(work / "tokenizer.json", target)
    if spec.template_at == "tokenizer_config.json":
        shutil.copy(work / "tokenizer_config.json", target)
    if spec.tower != "embedded":
        shutil.copy(work / "preprocessor_config.json", folder / "vision_tower")


def export_flags(spec: Spec) -> dict[str, str]:
    """What `recaption export` has to be given besides the checkpoint."""
    flags = {}
    if spec.is_original and spec.tower != "embedded":
        flags["vision_tower"] = "vision_tower"
    if not spec.tokenizer_inside:
        flags["tokenizer"] = "tokenizer"
    if spec.adapter:
        flags["lora"] = "lora"
    return flags


def messages(spec: Spec) -> list[dict[str, Any]]:
    """The conversation that the chat template is applied to."""
    if not spec.parts:
        return [{"role": "user", "content": f"{tiny_tokenizer.IMAGE}\n{spec.prompt}"}]
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": spec.prompt}]}]


def render(spec: Spec, processor: LlavaProcessor) -> str:
    """The prompt by the chat template, which is the processor's or else the tokenizer's."""
    holder = processor if processor.chat_template else processor.tokenizer
    return holder.apply_chat_template(messages(spec), add_generation_prompt=True, tokenize=False)


def pixel_values(spec: Spec, picture: Path) -> torch.Tensor:
    """The tower's input for a picture that already has the tower's size."""
    values = np.asarray(Image.open(picture).convert("RGB"), dtype=np.float64) / 255
    values = (values - np.array(spec.mean)) / np.array(spec.std)
    return torch.from_numpy(values.transpose(2, 0, 1).astype(np.float32))[None]


@dataclass
class Answer:
    """What the model gives for one picture."""

    logits: torch.Tensor
    ids: list[int]
    min_margin: float
    steps: torch.Tensor  # the logits of each of the steps


def input_embeds(
    model: LlavaForConditionalGeneration, spec: Spec, ids: list[int], pixels: torch.Tensor
) -> torch.Tensor:
    """The prompt's embeddings with the picture's features in the image token's places."""
    tokens = torch.tensor([ids])
    at_image = tokens == spec.image_id
    embeds = model.get_input_embeddings()(tokens.masked_fill(at_image, 0))
    features = torch.cat(model.get_image_features(pixels, return_dict=True).pooler_output)
    if int(at_image.sum()) != len(features):
        raise ValueError(f"{int(at_image.sum())} image tokens, {len(features)} features")
    return embeds.masked_scatter(at_image[..., None], features)


def greedy(model: LlavaForConditionalGeneration, spec: Spec, ids: list[int], pixels: torch.Tensor) -> Answer:
    """Greedy decoding with a cache, without stopping."""
    embeds = input_embeds(model, spec, ids, pixels)
    cache = DynamicCache(config=model.config.get_text_config())
    steps, new_ids, margins = [], [], []
    while len(new_ids) < NEW_TOKENS:
        logits = model(inputs_embeds=embeds, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[
            0, -1
        ]
        best = logits.topk(2)
        steps.append(logits)
        margins.append(float(best.values[0] - best.values[1]))
        new_ids.append(int(best.indices[0]))
        embeds = model.get_input_embeddings()(torch.tensor([[new_ids[-1]]]))
    return Answer(steps[0], new_ids, min(margins), torch.stack(steps))


def without_cache(
    model: LlavaForConditionalGeneration, spec: Spec, ids: list[int], pixels: torch.Tensor, answer: Answer
) -> float:
    """How far the steps' logits are from those of one forward pass over the whole sequence."""
    tail = model.get_input_embeddings()(torch.tensor([answer.ids[:-1]]))
    embeds = torch.cat([input_embeds(model, spec, ids, pixels), tail], dim=1)
    logits = model(inputs_embeds=embeds, use_cache=False, logits_to_keep=NEW_TOKENS).logits[0]
    return float((logits - answer.steps).abs().max())


def defects(spec: Spec, answers: list[Answer]) -> Iterator[str]:
    """Why the answers would make a poor test."""
    if (margin := min(answer.min_margin for answer in answers)) < MIN_MARGIN:
        yield f"margin {margin:.1e}"
    if len({tuple(answer.ids) for answer in answers}) < len(answers):
        yield "the same ids for different images"
    if min(len(set(answer.ids)) for answer in answers) < MIN_DISTINCT:
        yield "few distinct ids"
    if any((a.logits - b.logits).abs().max() < 0.2 for a, b in itertools.pairwise(answers)):
        yield "the image hardly matters"
    firsts = [
        next((i for i, token in enumerate(answer.ids) if token in spec.stop_ids), None) for answer in answers
    ]
    if 0 in firsts:
        yield "stops at once"
    if spec.want_stop and not any(first is not None and first >= 4 for first in firsts):
        yield "no stop id"


def significant(values: torch.Tensor) -> list[float]:
    """Float32 values with 7 significant digits."""
    return [float(f"{value:.7g}") for value in values.tolist()]


def sensitivities(
    model: LlavaForConditionalGeneration,
    spec: Spec,
    ids: list[int],
    pixels: torch.Tensor,
    logits: torch.Tensor,
) -> dict[str, float]:
    """How far the logits move when a tensor or a setting is left out (norm weights set to 1, others to 0)."""

    def moved(changed: LlavaForConditionalGeneration) -> float:
        embeds = input_embeds(changed, spec, ids, pixels)
        return float((changed(inputs_embeds=embeds, logits_to_keep=1).logits[0, -1] - logits).abs().max())

    result = {}
    for name, value in model.named_parameters():
        kept = value.clone()
        value.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        result[name] = moved(model)
        value.copy_(kept)
    changes: list[tuple[str, str, Any]] = [
        ("text", "rms_norm_eps", 1e-6),
        ("vision", "layer_norm_eps", 1e-5),
        ("vision", "hidden_act", "quick_gelu"),
        ("llava", "projector_hidden_act", "gelu"),
        ("rope", "rope_theta", 10000.0),
    ]
    for part, key, value in changes:
        settings = getattr(spec, part)
        # The rope is replaced as a whole, so that its scaling goes too.
        changed_settings = {key: value} if part == "rope" else settings | {key: value}
        if changed_settings == settings or (part == "llava" and key not in settings):
            continue
        # Differences too small to show.
        if settings.get(key) == "gelu_pytorch_tanh" or (key.endswith("_eps") and settings[key] < 1e-3):
            continue
        other = replace(spec, **{part: changed_settings})
        changed = LlavaForConditionalGeneration(llava_config(other)).eval()
        changed.load_state_dict(model.state_dict())
        result[f"setting {key}"] = moved(changed)
    return result


def unused(spec: Spec, name: str) -> bool:
    """Whether a parameter has no influence: behind the last feature layer, or a key bias of the tower."""
    if "vision_tower" not in name:
        return False
    depth = spec.vision["num_hidden_layers"]
    chosen = spec.llava.get("vision_feature_layer", -2)
    last = max(layer % (depth + 1) for layer in (chosen if isinstance(chosen, list) else [chosen]))
    layer = int(name.split(".layers.")[1].split(".")[0]) if ".layers." in name else -1
    return layer >= last or "post_layernorm" in name or name.endswith("k_proj.bias")


def check_with_transformers(spec: Spec, folder: Path, pictures: list[Path], golden: dict[str, Any]) -> str:
    """Loads the checkpoint as a user would and compares its outputs with the golden; returns a remark."""
    model, info = LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    problems = {key: value for key, value in info.items() if value}
    if problems:
        raise ValueError(f"{spec.name}: loading reports {problems}")
    model.eval()
    eos = model.generation_config.eos_token_id
    if spec.adapter and not spec.is_original:
        model = PeftModel.from_pretrained(model, folder / "lora").merge_and_unload()
    if (eos if isinstance(eos, list) else [eos]) != golden["stop_ids"]:
        raise ValueError(f"{spec.name}: transformers stops at {eos}")
    outside = spec.image_id >= spec.text["vocab_size"]
    processor = AutoProcessor.from_pretrained(folder)
    if not spec.processor_config:  # the user had to set these
        processor.patch_size = spec.vision["patch_size"]
        processor.vision_feature_select_strategy = model.config.vision_feature_select_strategy
        processor.num_additional_image_tokens = 1
    for picture, expected in zip(pictures, golden["images"], strict=True):
        rendered = render(spec, processor)
        inputs = processor(
            images=Image.open(picture), text=rendered, add_special_tokens=False, return_tensors="pt"
        )
        if rendered != expected["rendered_prompt"] or inputs.input_ids[0].tolist() != expected["input_ids"]:
            raise ValueError(f"{spec.name}: the processor gives another prompt: {rendered!r}")
        if (inputs.pixel_values - pixel_values(spec, picture)).abs().max() > 2e-6:
            raise ValueError(f"{spec.name}: the processor gives other pixels")
        ids = expected["input_ids"]
        if outside:
            embeds = input_embeds(model, spec, ids, inputs.pixel_values)
            logits = model(inputs_embeds=embeds, logits_to_keep=1).logits[0, -1]
            new_ids = greedy(model, spec, ids, inputs.pixel_values).ids
        else:
            logits = model(**inputs, logits_to_keep=1).logits[0, -1]
            model.generation_config.eos_token_id = None
            new_ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[
                0, len(ids) :
            ].tolist()
        if (difference := float((logits - torch.tensor(expected["logits"])).abs().max())) > 2e-5:
            raise ValueError(f"{spec.name}: from_pretrained gives other logits, by {difference}")
        if new_ids != expected["token_ids"]:
            raise ValueError(f"{spec.name}: generate gives other ids")
    return "inputs_embeds" if outside else "generate"


def make(spec: Spec, folder: Path, pictures: list[Path]) -> dict[str, Any]:
    """Writes one checkpoint; returns the row of the table."""
    if not spec.is_original:
        return make_in(spec, folder, folder, pictures)
    with tempfile.TemporaryDirectory() as work:
        return make_in(spec, folder, Path(work), pictures)


def make_in(spec: Spec, folder: Path, work: Path, pictures: list[Path]) -> dict[str, Any]:
    """Writes one checkpoint; `work` is where the same lies in transformers' layout."""
    tokenizer = None
    for seed in range(MAX_SEEDS):
        if seed == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write_processor(spec, work)
            tokenizer = AutoProcessor.from_pretrained(work)
            rendered = render(spec, tokenizer)
            tokenizer = tokenizer.tokenizer
            expanded = rendered.replace(tiny_tokenizer.IMAGE, tiny_tokenizer.IMAGE * spec.num_image_tokens)
            ids = tokenizer.encode(expanded, add_special_tokens=False)
            pixels = [pixel_values(spec, picture) for picture in pictures]
        model = LlavaForConditionalGeneration(llava_config(spec)).eval()
        randomise(model, seed)
        for name, value in model.named_parameters():
            value.copy_(value.to(stored_dtype(spec, name)).float())
        whole = model
        if spec.adapter:
            whole = layouts.merged(layouts.attach(spec.adapter, model, seed), model)
        answers = []
        for each in pixels:
            answers.append(greedy(whole, spec, ids, each))
            if any(reason.startswith(("margin", "few")) for reason in defects(spec, answers[-1:])):
                break
        if len(answers) == len(pixels) and not list(defects(spec, answers)):
            break
    else:
        raise ValueError(f"{spec.name}: no seed below {MAX_SEEDS} is good enough")

    write_weights(spec, model, folder)
    if spec.adapter:
        layouts.write_adapter(spec.adapter, layouts.attach(spec.adapter, model, seed), folder / "lora")
    write_config(spec, model, folder)
    base, model = model, stored_model(spec, folder)
    if spec.is_original:
        write_original_files(spec, work, folder)
        converted = replace(spec, naming="v5", dtype="f32", config_style="5", shards=1)
        write_weights(converted, model, work)
        write_config(converted, model, work)
    if flags := export_flags(spec):
        write_json(folder / "export.json", flags)
    golden: dict[str, Any] = {
        "prompt": spec.prompt,
        "messages": messages(spec),
        "seed": seed,
        "num_image_tokens": spec.num_image_tokens,
        "stop_ids": spec.stop_ids,
        "images": [],
    }
    for picture, each, found in zip(pictures, pixels, answers, strict=True):
        answer = greedy(model, spec, ids, each)
        if answer.ids != found.ids or not torch.equal(answer.logits, found.logits):
            raise ValueError(f"{spec.name}: the stored weights give something else")
        if (drift := without_cache(model, spec, ids, each, answer)) > 1e-4:
            raise ValueError(f"{spec.name}: the cache changes the logits by {drift}")
        stop = next((i for i, token in enumerate(answer.ids) if token in spec.stop_ids), NEW_TOKENS)
        golden["images"].append(
            {
                "image": f"../../images/{spec.vision['image_size']}/{picture.name}",
                "rendered_prompt": rendered,
                "input_ids": ids,
                "logits": significant(answer.logits),
                "token_ids": answer.ids,
                "caption": tokenizer.decode(answer.ids[:stop], skip_special_tokens=True),
                "min_margin": significant(torch.tensor([answer.min_margin]))[0],
            }
        )
    if spec.adapter:
        for name, other in layouts.without_each(spec.adapter, base, seed):
            embeds = input_embeds(other, spec, ids, pixels[0])
            logits = other(inputs_embeds=embeds, logits_to_keep=1).logits[0, -1]
            value = float((logits - answers[0].logits).abs().max())
            if not (value < 1e-4 if unused(spec, name) else value > 2e-3):
                raise ValueError(f"{spec.name}: {name} moves the logits by {value}")
    for name, value in sensitivities(model, spec, ids, pixels[0], answers[0].logits).items():
        if not (value < 1e-4 if unused(spec, name) else value > 0.01):
            raise ValueError(f"{spec.name}: {name} moves the logits by {value}")
    write_golden(folder / "golden.json", golden)
    how = check_with_transformers(spec, work, pictures, golden)
    return {
        "name": spec.name,
        "seed": seed,
        "KB": round(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1000),
        "min margin": f"{min(answer.min_margin for answer in answers):.4f}",
        "distinct ids": "/".join(str(len(set(answer.ids))) for answer in answers),
        "stop at": "/".join(
            str(next((i for i, token in enumerate(answer.ids) if token in spec.stop_ids), "-"))
            for answer in answers
        ),
        "max |logit|": f"{max(float(answer.logits.abs().max()) for answer in answers):.1f}",
        "checked with": how,
    }


def write_golden(path: Path, golden: dict[str, Any]) -> None:
    """Writes the golden with each list of numbers on one line."""
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in golden.items() if key != "images"]
    entries = []
    for image in golden["images"]:
        fields = [
            f"      {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}"
            for key, value in image.items()
        ]
        entries.append("    {\n" + ",\n".join(fields) + "\n    }")
    lines.append('  "images": [\n' + ",\n".join(entries) + "\n  ]")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def main() -> None:
    root = Path(__file__).resolve().parents[2]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, default=root / "tests" / "data", help="the folder of the test data"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="make only these checkpoints")
    arguments = parser.parse_args()
    chosen = [spec for spec in SPECS if not arguments.only or spec.name in arguments.only]
    if not chosen:
        parser.error(f"no such checkpoint; there are {', '.join(spec.name for spec in SPECS)}")

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows = []
    for spec in chosen:
        pictures = tower_images.write(arguments.output / "images", spec.vision["image_size"])
        rows.append(make(spec, arguments.output / "checkpoints" / spec.name, pictures))
        print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    widths = {key: max(len(key), *(len(str(row[key])) for row in rows)) for key in rows[0]}
    for row in [{key: key for key in widths}, *rows]:
        print("  ".join(str(row[key]).ljust(width) for key, width in widths.items()).rstrip())


if __name__ == "__main__":
    main()

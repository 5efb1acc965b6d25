"""The ways of storing a LLaVA that transformers itself does not write: the original layout of the LLaVA
repository, vision towers in folders of their own, torch's files, and LoRA adapters (written and merged by
peft). `make_checkpoints.py` says what goes into each checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

TOWER, PROJECTOR, LANGUAGE = "model.vision_tower.", "model.multi_modal_projector.", "model.language_model."
ORIGINAL_TOWER = "model.vision_tower.vision_tower.vision_model."
PROJECTOR_LAYERS = {"linear_1": "0", "linear_2": "2"}

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: peft's settings, and whether it is trained on the LLaVA or, as LLaVA's own training
    does, on its language model, with the projector trained whole beside it."""

    settings: dict[str, Any]
    dtype: torch.dtype = torch.float16
    language_only: bool = False


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def original_name(name: str) -> str:
    """The name of a 5.x module's parameter in the original layout."""
    if name.startswith(TOWER):
        return ORIGINAL_TOWER + name.removeprefix(TOWER)
    if name.startswith(PROJECTOR):
        layer, rest = name.removeprefix(PROJECTOR).split(".", 1)
        return f"model.mm_projector.{PROJECTOR_LAYERS[layer]}.{rest}"
    return name.replace(LANGUAGE, "model.", 1)


def original_config(
    text: dict[str, Any],
    rope: dict[str, Any],
    feature_layer: int,
    tower: dict[str, Any],
    ids: dict[str, Any],
    changes: dict[str, Any],
) -> dict[str, Any]:
    """config.json as the LLaVA repository writes it."""
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    config = (
        {
            "architectures": ["LlavaLlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "freeze_mm_mlp_adapter": False,
            "hidden_act": "silu",
            "image_aspect_ratio": "pad",
            "image_crop_resolution": None,
            "image_grid_pinpoints": None,
            "image_split_resolution": None,
            "initializer_range": 0.02,
            "mm_hidden_size": tower["hidden_size"],
            "mm_patch_merge_type": "flat",
            "mm_projector_lr": None,
            "mm_projector_type": "mlp2x_gelu",
            "mm_resampler_type": None,
            "mm_use_im_patch_token": False,
            "mm_use_im_start_end": False,
            "mm_vision_select_feature": "patch",
            "mm_vision_select_layer": feature_layer,
            "mm_vision_tower": "openai/clip-vit-large-patch14-336",
            "model_type": "llava_llama",
            "pretraining_tp": 1,
            "rope_scaling": scaling or None,
            "rope_theta": rope["rope_theta"],
            "tie_word_embeddings": False,
            "tokenizer_model_max_length": 2048,
            "tokenizer_padding_side": "right",
            "torch_dtype": "float16",
            "transformers_version": "4.40.0",
            "tune_mm_mlp_adapter": False,
            "unfreeze_mm_vision_tower": True,
            "use_cache": True,
            "use_mm_proj": True,
        }
        | text
        | ids
        | changes
    )
    return {key: value for key, value in config.items() if value != "absent"}


def save_shards(tensors: Tensors, folder: Path, shards: int) -> None:
    """`pytorch_model.bin`, or shards of it with their index. Tensors that share memory stay in one file."""
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    files = [f"pytorch_model-{shard + 1:05}-of-{shards:05}.bin" for shard in range(shards)]
    places: dict[int, str] = {}
    weight_map = {
        name: places.setdefault(value.data_ptr(), files[index % shards])
        for index, (name, value) in enumerate(tensors.items())
    }
    for file in files:
        torch.save({name: tensors[name] for name, at in weight_map.items() if at == file}, folder / file)
    total = sum(value.numel() * value.element_size() for value in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "pytorch_model.bin.index.json", index)


def write_clip_model(tower: Tensors, config: dict[str, Any], folder: Path) -> None:
    """A `CLIPModel` as its first publishers stored it: torch's file, with a text side and old buffers."""
    width = 8
    text = {
        "text_model.embeddings.position_ids": torch.arange(4)[None],
        "text_model.embeddings.token_embedding.weight": torch.ones(6, width),
        "text_model.final_layer_norm.weight": torch.ones(width),
        "logit_scale": torch.tensor(4.6),
        "visual_projection.weight": torch.ones(width, config["hidden_size"]),
    }
    positions = (config["image_size"] // config["patch_size"]) ** 2 + 1
    buffers = {"vision_model.embeddings.position_ids": torch.arange(positions)[None]}
    vision = {f"vision_model.{name}": value for name, value in tower.items()}
    torch.save(text | buffers | vision, folder / "pytorch_model.bin")
    write_json(
        folder / "config.json",
        {
            "architectures": ["CLIPModel"],
            "logit_scale_init_value": 2.6592,
            "model_type": "clip",
            "projection_dim": width,
            "text_config": {"hidden_size": width, "model_type": "clip_text_model", "vocab_size": 6},
            "vision_config": {"model_type": "clip_vision_model", "num_channels": 3} | config,
        },
    )


def write_clip_vision_model(tower: Tensors, config: dict[str, Any], folder: Path) -> None:
    """A `CLIPVisionModel` as transformers 4.x saves it."""
    tensors = {f"vision_model.{name}": value for name, value in tower.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    fixed = {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", "num_channels": 3}
    write_json(folder / "config.json", fixed | config)


def language_model(model: LlavaForConditionalGeneration) -> LlamaForCausalLM:
    """The LLaVA's language model as a model of its own."""
    result = LlamaForCausalLM(model.config.text_config).eval()
    tensors = {
        name.replace(LANGUAGE, "model.", 1): value
        for name, value in model.state_dict().items()
        if name.startswith((LANGUAGE, "lm_head."))
    }
    result.load_state_dict(tensors, strict=True)
    return result


def attach(adapter: Adapter, model: LlavaForConditionalGeneration, seed: int) -> PeftModel:
    """A copy of the model (or of its language model) with a random adapter, rounded to its stored dtype."""
    base = language_model(model)
    if not adapter.language_only:
        base = LlavaForConditionalGeneration(model.config).eval()
        base.load_state_dict(model.state_dict())
    adapted = get_peft_model(base, LoraConfig(**adapter.settings))
    generator = torch.Generator().manual_seed(seed)
    for name, value in sorted(adapted.named_parameters()):
        if "lora_" in name or "modules_to_save" in name:
            gain = 0.2 if "modules_to_save" in name else 0.15
            noise = gain * torch.randn(value.shape, generator=generator)
            value.copy_(noise.to(adapter.dtype).float())
    return adapted.eval()


def without_each(
    adapter: Adapter, model: LlavaForConditionalGeneration, seed: int
) -> Iterator[tuple[str, LlavaForConditionalGeneration]]:
    """The merged model without one of the adapter's updates, for each of them, with the update's name."""
    names = [name for name, _ in attach(adapter, model, seed).named_parameters()]
    for chosen in (name for name in names if "lora_B" in name or "lora_embedding_B" in name):
        adapted = attach(adapter, model, seed)
        dict(adapted.named_parameters())[chosen].zero_()
        yield chosen, merged(adapted, model)


def merged(adapted: PeftModel, model: LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    """The LLaVA with the adapter merged by peft."""
    result = LlavaForConditionalGeneration(model.config).eval()
    tensors = model.state_dict()
    fresh = adapted.merge_and_unload().state_dict()
    if any(name.startswith("model.layers.") for name in fresh):
        fresh = {
            name if name.startswith("lm_head.") else name.replace("model.", LANGUAGE, 1): value
            for name, value in fresh.items()
        }
    result.load_state_dict(tensors | fresh, strict=True)
    return result


def write_adapter(adapter: Adapter, adapted: PeftModel, folder: Path) -> None:
    """Saves the adapter as peft does; that of a language model in torch's older format."""
    for module in adapted.modules():
        if isinstance(module, nn.ParameterDict | nn.ModuleDict):
            module.to(adapter.dtype)
    adapted.save_pretrained(folder, safe_serialization=not adapter.language_only)
    (folder / "README.md").unlink(missing_ok=True)
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    settings["target_modules"].sort()  # peft holds them as a set
    write_json(folder / "adapter_config.json", settings)
    if adapter.language_only:
        file = folder / "adapter_model.bin"
        torch.save(torch.load(file, weights_only=True), file, _use_new_zipfile_serialization=False)


def write_projector(tensors: Tensors, folder: Path) -> None:
    """What LLaVA's LoRA training stores beside the adapter."""
    names = {name: f"base_model.model.{original_name(name)}" for name in tensors}
    torch.save({names[name]: value for name, value in tensors.items()}, folder / "non_lora_trainables.bin")


def load_adapter(
    adapter: Adapter, model: LlavaForConditionalGeneration, folder: Path
) -> LlavaForConditionalGeneration:
    """The model with the stored adapter merged by peft."""
    base = language_model(model)
    if not adapter.language_only:
        base = LlavaForConditionalGeneration(model.config).eval()
        base.load_state_dict(model.state_dict())
    return merged(PeftModel.from_pretrained(base, folder), model)

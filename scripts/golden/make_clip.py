"""Makes tiny, randomly initialised CLIP checkpoints and the embeddings that the reference code computes.

Each checkpoint goes to `<output>/<name>/` with a `golden.json`. Those in transformers' layout are computed by
its `CLIPModel`; those under OpenAI's names (a plain CLIP and a Long-CLIP, stored as safetensors without a
config.json) by `OpenAiClip` below, which has the modules of OpenAI's own code, and must be given by a
`CLIPModel` with the same weights as well. All of it is in float32 on the CPU, from the weights as stored.

Everything is derived from fixed seeds. A checkpoint in which a wrong reading (another activation, another
end of the text, attention to both sides, the other table of positions) would hardly change the embeddings is
refused.

    python scripts/golden/make_clip.py [--output tests/data/clip]
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import string
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import nn
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

ROOT = Path(__file__).resolve().parents[2]
IMAGE_SIZE = 28
IMAGES = ["a.png", "b.png", "c.png"]
START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = [
    ("a", "t</w>"),
    ("t", "h"),
    ("th", "e</w>"),
    ("o", "n</w>"),
    ("i", "n"),
    ("in", "g</w>"),
    ("c", "at</w>"),
]
TEXTS = ["A cat on the mat.", "the dog", "Raining! 12 boats, resting in the harbour at noon"]
LONG_TEXT = "The boat rests on the water, and the cat sits in the sun. " * 5
LONG_CLIP_KEPT = 20
# The least relative change that a wrong reading must make; the exported graphs may differ by 1e-4.
MIN_EFFECT = 2e-3


def tokenizer_json(specials_first: bool) -> dict[str, Any]:
    """A tokenizer.json of CLIP's kind over a few characters."""
    characters = list(string.ascii_lowercase + string.digits + ".,!'-")
    tokens = characters + [f"{character}</w>" for character in characters]
    tokens += [left + right for left, right in MERGES]
    tokens = [START, END, *tokens] if specials_first else [*tokens, START, END]
    vocab = {token: index for index, token in enumerate(tokens)}
    split = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": vocab[token], "content": token, **special} for token in (START, END)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "NFC"},
                {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
                {"type": "Lowercase"},
            ],
        },
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": split}, "behavior": "Removed", "invert": True},
                byte_level,
            ],
        },
        "post_processor": {
            "type": "RobertaProcessing",
            "sep": [END, vocab[END]],
            "cls": [START, vocab[START]],
            "trim_offsets": False,
            "add_prefix_space": False,
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": END,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [list(pair) for pair in MERGES],
        },
    }


def randomise(model: nn.Module, seed: int) -> None:
    """Weights large enough that every layer, activation and position matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if name == "logit_scale":
            values = torch.tensor(math.log(100.0) if seed % 2 else 2.6592)
        elif "embedding" in name and "patch" not in name:
            values *= 0.6
        elif parameter.ndim >= 2:
            values *= 1.6 / math.sqrt(parameter[0].numel())
        elif name.endswith("bias"):
            values *= 0.1
        else:
            values = 1 + 0.2 * values
        parameter.data.copy_(values)


@dataclass(frozen=True)
class OpenAiSizes:
    """Shapes of a CLIP under OpenAI's names."""

    vision_width: int
    vision_mlp: int  # 4 * vision_width in OpenAI's, less here to save space
    patch_size: int
    text_width: int
    context_length: int
    is_long: bool
    embed_dim: int = 24
    vocab_size: int = 91
    layers: int = 1


class QuickGelu(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


class ResidualAttentionBlock(nn.Module):
    """One layer, as in OpenAI's `clip/model.py`."""

    def __init__(self, width: int, mlp: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, width // 64, batch_first=True)
        self.ln_1 = nn.LayerNorm(width)
        layers = [("c_fc", nn.Linear(width, mlp)), ("gelu", QuickGelu()), ("c_proj", nn.Linear(mlp, width))]
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, mlp: int, layers: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList([ResidualAttentionBlock(width, mlp) for _ in range(layers)])

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class VisionTransformer(nn.Module):
    def __init__(self, sizes: OpenAiSizes) -> None:
        super().__init__()
        width, patch = sizes.vision_width, sizes.patch_size
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty((IMAGE_SIZE // patch) ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, sizes.vision_mlp, sizes.layers)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.empty(width, sizes.embed_dim))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patches = self.conv1(pixel_values).flatten(2).transpose(1, 2)
        token = self.class_embedding.expand(len(patches), 1, -1)
        x = self.ln_pre(torch.cat([token, patches], dim=1) + self.positional_embedding)
        return self.ln_post(self.transformer(x)[:, 0]) @ self.proj


class OpenAiClip(nn.Module):
    """OpenAI's `CLIP`, or Long-CLIP's, which has two tables of positions."""

    def __init__(self, sizes: OpenAiSizes) -> None:
        super().__init__()
        width, context = sizes.text_width, sizes.context_length
        self.visual = VisionTransformer(sizes)
        self.transformer = Transformer(width, 4 * width, sizes.layers)
        self.token_embedding = nn.Embedding(sizes.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(context, width))
        if sizes.is_long:
            self.positional_embedding_res = nn.Parameter(torch.empty(context, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, sizes.embed_dim))
        self.logit_scale = nn.Parameter(torch.empty(()))

    def positions(self) -> torch.Tensor:
        if not hasattr(self, "positional_embedding_res"):
            return self.positional_embedding
        is_kept = (torch.arange(len(self.positional_embedding)) < LONG_CLIP_KEPT).float().unsqueeze(1)
        return self.positional_embedding * is_kept + self.positional_embedding_res * (1 - is_kept)

    def encode_text(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`input_ids` `[batch, context]`, padded with zeros."""
        length = input_ids.shape[1]
        mask = torch.full((length, length), -torch.inf).triu(1)
        x = self.token_embedding(input_ids) + self.positions()[:length]
        x = self.ln_final(self.transformer(x, mask))
        return x[torch.arange(len(x)), input_ids.argmax(dim=-1)] @ self.text_projection


def to_transformers(model: OpenAiClip, sizes: OpenAiSizes) -> CLIPModel:
    """A `CLIPModel` with the same weights: layer by layer, by hand."""
    text = {"hidden_size": sizes.text_width, "intermediate_size": 4 * sizes.text_width}
    vision = {"hidden_size": sizes.vision_width, "intermediate_size": sizes.vision_mlp}
    text |= {
        "vocab_size": sizes.vocab_size,
        "max_position_embeddings": sizes.context_length,
        "eos_token_id": 2,
    }
    vision |= {"image_size": IMAGE_SIZE, "patch_size": sizes.patch_size}
    for tower in (text, vision):
        tower |= {"num_hidden_layers": sizes.layers, "num_attention_heads": tower["hidden_size"] // 64}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=sizes.embed_dim)
    other = CLIPModel(config).eval()

    def copy_layers(blocks: nn.ModuleList, layers: nn.ModuleList) -> None:
        for block, layer in zip(blocks, layers, strict=True):
            attention = layer.self_attn
            weights = block.attn.in_proj_weight.chunk(3)
            biases = block.attn.in_proj_bias.chunk(3)
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            for projection, weight, bias in zip(projections, weights, biases, strict=True):
                projection.load_state_dict({"weight": weight, "bias": bias})
            attention.out_proj.load_state_dict(block.attn.out_proj.state_dict())
            layer.layer_norm1.load_state_dict(block.ln_1.state_dict())
            layer.layer_norm2.load_state_dict(block.ln_2.state_dict())
            layer.mlp.fc1.load_state_dict(block.mlp.c_fc.state_dict())
            layer.mlp.fc2.load_state_dict(block.mlp.c_proj.state_dict())

    visual, tower = model.visual, other.vision_model
    tower.embeddings.class_embedding.data = visual.class_embedding
    tower.embeddings.patch_embedding.load_state_dict(visual.conv1.state_dict())
    tower.embeddings.position_embedding.weight.data = visual.positional_embedding
    tower.pre_layrnorm.load_state_dict(visual.ln_pre.state_dict())
    tower.post_layernorm.load_state_dict(visual.ln_post.state_dict())
    copy_layers(visual.transformer.resblocks, tower.encoder.layers)
    other.visual_projection.weight.data = visual.proj.T
    tower = other.text_model
    tower.embeddings.token_embedding.load_state_dict(model.token_embedding.state_dict())
    tower.embeddings.position_embedding.weight.data = model.positions()
    tower.final_layer_norm.load_state_dict(model.ln_final.state_dict())
    copy_layers(model.transformer.resblocks, tower.encoder.layers)
    other.text_projection.weight.data = model.text_projection.T
    return other


def image_processor() -> CLIPImageProcessorPil:
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=size)


def pixel_values() -> torch.Tensor:
    images = [
        Image.open(ROOT / "tests/data/images" / str(IMAGE_SIZE) / name).convert("RGB") for name in IMAGES
    ]
    return image_processor()(images, return_tensors="pt")["pixel_values"]


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def text_features(model: CLIPModel, ids: list[int]) -> torch.Tensor:
    return model.get_text_features(input_ids=torch.tensor([ids])).pooler_output[0]


def image_features(model: CLIPModel, pixels: torch.Tensor) -> torch.Tensor:
    return model.get_image_features(pixel_values=pixels).pooler_output


def check_effects(model: CLIPModel, ids: list[list[int]], eos: int) -> None:
    """Fails when a wrong reading of the checkpoint would hardly show in the embeddings."""
    pixels = pixel_values()
    texts = [text_features(model, sequence) for sequence in ids]
    images = image_features(model, pixels)
    effects = {
        "another text": relative_difference(texts[0], texts[1]),
        "another image": relative_difference(images[0], images[1]),
        "another token": max(
            relative_difference(text_features(model, [*ids[0][:i], 7, *ids[0][i + 1 :]]), texts[0])
            for i in range(1, len(ids[0]) - 1)
        ),
        "another order": relative_difference(
            text_features(model, [ids[0][0], *ids[0][-2:0:-1], ids[0][-1]]), texts[0]
        ),
        "another end": relative_difference(text_features(model, [*ids[0][:-2], eos]), texts[0]),
    }
    for name, tower in (("text", model.text_model), ("vision", model.vision_model)):
        for layer in tower.encoder.layers:
            own = layer.mlp.activation_fn
            swapped = nn.GELU() if "Quick" in type(own).__name__ else QuickGelu()
            layer.mlp.activation_fn = swapped
            new, old = (text_features(model, ids[0]), texts[0])
            if name == "vision":
                new, old = image_features(model, pixels), images
            effects[f"another activation ({name})"] = relative_difference(new, old)
            layer.mlp.activation_fn = own
    # Behind the end nothing counts.
    behind = relative_difference(text_features(model, [*ids[0], *[ids[0][-1]] * 3]), texts[0])
    if behind > 1e-5:
        raise SystemExit(f"what stands behind the end changes the embedding by {behind:.1e}")
    weak = {name: effect for name, effect in effects.items() if not effect >= MIN_EFFECT}
    if weak:
        raise SystemExit(f"too small an effect: {weak}")


def write_json(path: Path, content: Any, indent: int | None = 1) -> None:
    path.write_text(json.dumps(content, indent=indent) + "\n")


def write_golden(
    folder: Path, ids: list[list[int]], texts: list[str], model: CLIPModel, embeds: tuple[torch.Tensor, list]
) -> None:
    images, text_embeds = embeds
    golden = {
        "logit_scale": float(model.logit_scale.exp()),
        "images": [
            {"image": f"../../images/{IMAGE_SIZE}/{name}", "image_embeds": row.tolist()}
            for name, row in zip(IMAGES, images, strict=True)
        ],
        "texts": [
            {"text": text, "input_ids": sequence, "text_embeds": row.tolist()}
            for text, sequence, row in zip(texts, ids, text_embeds, strict=True)
        ],
    }
    write_json(folder / "golden.json", golden, indent=None)


def make_transformers(
    folder: Path, seed: int, config: dict[str, Any], dtype: torch.dtype, specials_first: bool
) -> None:
    tokenizer = tokenizer_json(specials_first)
    vocab = tokenizer["model"]["vocab"]
    eos = vocab[END]
    config["text_config"] |= {"vocab_size": len(vocab), "bos_token_id": vocab[START]}
    config["text_config"] |= {"eos_token_id": eos if specials_first else 2, "pad_token_id": 1}
    config["vision_config"] |= {"image_size": IMAGE_SIZE}
    model = CLIPModel(CLIPConfig(**config))
    randomise(model, seed)
    model.to(dtype).save_pretrained(folder)
    write_json(folder / "tokenizer.json", tokenizer, indent=None)
    processor = image_processor().to_dict() | {"image_processor_type": "CLIPImageProcessor"}
    write_json(folder / "preprocessor_config.json", processor)
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    encode = Tokenizer.from_file(str(folder / "tokenizer.json")).encode
    ids = [encode(text).ids for text in TEXTS]
    check_effects(model, ids, eos)
    embeds = (image_features(model, pixel_values()), [text_features(model, sequence) for sequence in ids])
    write_golden(folder, ids, TEXTS, model, embeds)


def make_openai(folder: Path, seed: int, sizes: OpenAiSizes, tokenizer: Path) -> None:
    model = OpenAiClip(sizes)
    randomise(model, seed)
    folder.mkdir()
    stored = {name: tensor.to(torch.float16).contiguous() for name, tensor in model.state_dict().items()}
    save_file(stored, folder / "model.safetensors")
    loaded = load_file(folder / "model.safetensors")
    model.load_state_dict({name: tensor.float() for name, tensor in loaded.items()}, strict=True)
    model.eval()
    encoder = Tokenizer.from_file(str(tokenizer))
    texts = TEXTS + [LONG_TEXT] * sizes.is_long
    ids = [encoder.encode(text).ids for text in texts]
    ids[-1] = [*ids[-1][: sizes.context_length - 1], ids[-1][-1]]
    eos = encoder.token_to_id(END)
    padded = [torch.tensor([sequence + [0] * (sizes.context_length - len(sequence))]) for sequence in ids]
    text_embeds = [model.encode_text(sequence)[0] for sequence in padded]
    image_embeds = model.visual(pixel_values())

    other = to_transformers(model, sizes)
    other.logit_scale.data = model.logit_scale.data
    check_effects(other, ids, eos)
    difference = max(
        relative_difference(image_features(other, pixel_values()), image_embeds),
        *(relative_difference(text_features(other, i), e) for i, e in zip(ids, text_embeds, strict=True)),
    )
    print(f"{folder.name}: transformers differs by {difference:.1e}")
    if not difference < 2e-6:
        raise SystemExit("the two references differ")
    if sizes.is_long:
        kept, rest = model.positional_embedding.data, model.positional_embedding_res.data
        for wrong in (kept, rest, torch.cat([kept[: LONG_CLIP_KEPT + 1], rest[LONG_CLIP_KEPT + 1 :]])):
            other.text_model.embeddings.position_embedding.weight.data = wrong
            effect = relative_difference(text_features(other, ids[-1]), text_embeds[-1])
            effect = max(effect, relative_difference(text_features(other, ids[-2]), text_embeds[-2]))
            if not effect >= MIN_EFFECT:
                raise SystemExit(f"the tables of positions hardly matter: {effect:.1e}")
    write_golden(folder, ids, texts, other, (image_embeds, text_embeds))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "tests/data/clip")
    output = parser.parse_args().output
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    legacy = {
        "projection_dim": 20,
        "text_config": {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "max_position_embeddings": 77,
        },
        "vision_config": {
            "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3,
            "patch_size": 7,
        },
    }  # fmt: skip
    gelu = {
        "projection_dim": 16,
        "text_config": {
            "hidden_size": 24, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 3,
            "max_position_embeddings": 64, "hidden_act": "gelu", "layer_norm_eps": 1e-3,
        },
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
            "patch_size": 14, "hidden_act": "quick_gelu",
        },
    }  # fmt: skip
    with torch.no_grad():
        make_transformers(output / "legacy-eos-f32", 1, legacy, torch.float32, specials_first=False)
        make_transformers(output / "gelu-f16", 2, gelu, torch.float16, specials_first=True)
        # Under OpenAI's names there is no tokenizer.json: the bundle takes this one by --tokenizer.
        tokenizer = output / "legacy-eos-f32" / "tokenizer.json"
        plain = OpenAiSizes(
            vision_width=64, vision_mlp=128, patch_size=7, text_width=64, context_length=77, is_long=False
        )
        make_openai(output / "openai-f16", 3, plain, tokenizer)
        long = OpenAiSizes(
            vision_width=128, vision_mlp=128, patch_size=7, text_width=64, context_length=248, is_long=True
        )
        make_openai(output / "openai-long-f16", 4, long, tokenizer)


if __name__ == "__main__":
    main()

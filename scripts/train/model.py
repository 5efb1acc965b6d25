"""Configuration of the miniature LLaVA and the parts of its forward pass that the trainers share."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from preprocess import GRID, IMAGE_SIZE, PATCH_SIZE
from vocabulary import BOS, END_OF_TEXT, EOT, IMAGE, PAD

FEATURE_LAYER = -2  # as LLaVA-1.5: the last tower layer is never read


def vision_config() -> CLIPVisionConfig:
    """The CLIP vision tower."""
    return CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=6,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        hidden_act="quick_gelu",
        projection_dim=192,
    )


def llava_config(tokenizer: Tokenizer) -> LlavaConfig:
    """The whole model; the vocabulary comes from the tokenizer."""
    ids = {name: tokenizer.token_to_id(name) for name in (BOS, END_OF_TEXT, EOT, IMAGE, PAD)}
    text = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        hidden_act="silu",
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
        bos_token_id=ids[BOS],
        eos_token_id=[ids[EOT], ids[END_OF_TEXT]],
        pad_token_id=ids[PAD],
    )
    return LlavaConfig(
        vision_config=vision_config(),
        text_config=text,
        image_token_index=ids[IMAGE],
        projector_hidden_act="gelu",
        vision_feature_select_strategy="default",
        vision_feature_layer=FEATURE_LAYER,
        image_seq_length=GRID * GRID,
        tie_word_embeddings=False,
        pad_token_id=ids[PAD],
        bos_token_id=ids[BOS],
        eos_token_id=[ids[EOT], ids[END_OF_TEXT]],
    )


def tower_of(model: LlavaForConditionalGeneration) -> nn.Module:
    """The transformer proper inside the CLIP wrapper."""
    tower = model.model.vision_tower
    return getattr(tower, "vision_model", tower)


def tower_features(tower: nn.Module, pixels: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
    """Patch features at FEATURE_LAYER (no class token); `keep` (batch, n) drops all other patches.

    Same arithmetic as CLIPVisionModel, with the patch convolution as one matrix product.
    """
    emb = tower.embeddings
    batch = pixels.shape[0]
    patches = pixels.view(batch, 3, GRID, PATCH_SIZE, GRID, PATCH_SIZE)
    patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, GRID * GRID, -1)
    place = emb.position_embedding.weight
    spots = place[1:].expand(batch, -1, -1)
    if keep is not None:
        patches = patches.gather(1, keep[..., None].expand(-1, -1, patches.shape[-1]))
        spots = place[1:][keep]
    hidden = F.linear(patches, emb.patch_embedding.weight.flatten(1)) + spots
    first = (emb.class_embedding + place[0]).expand(batch, 1, -1)
    hidden = tower.pre_layrnorm(torch.cat([first, hidden], dim=1))
    for layer in tower.encoder.layers[: FEATURE_LAYER + 1]:
        out = layer(hidden, None)
        hidden = out[0] if isinstance(out, tuple) else out
    return hidden[:, 1:]


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


def decoder_hidden(llama: nn.Module, embeds: torch.Tensor, last: int) -> torch.Tensor:
    """Final hidden states of the last `last` positions of a causal LLaMA without padding.

    Same arithmetic as LlamaModel; the last layer skips the queries nobody asks for, and the grouped
    attention never copies keys or values.
    """
    config = llama.config
    batch, length, _ = embeds.shape
    groups, head = config.num_key_value_heads, config.head_dim
    per_group = config.num_attention_heads // groups
    cos, sin = llama.rotary_emb(embeds, torch.arange(length)[None])
    cos, sin = cos[:, None].to(torch.bfloat16), sin[:, None].to(torch.bfloat16)
    mask = torch.full((length, length), float("-inf"), dtype=torch.bfloat16).triu(1)
    hidden = embeds
    for index, layer in enumerate(llama.layers):
        first = length - last if index == len(llama.layers) - 1 else 0
        normed = rms_norm(layer.input_layernorm, hidden)
        attention = layer.self_attn
        count = length - first
        q = attention.q_proj(normed[:, first:]).view(batch, count, -1, head).transpose(1, 2)
        k = attention.k_proj(normed).view(batch, length, groups, head).transpose(1, 2)
        v = attention.v_proj(normed).view(batch, length, groups, head).transpose(1, 2)
        q = _rotate(q, cos[:, :, first:], sin[:, :, first:]) * head**-0.5
        k = _rotate(k, cos, sin)
        q = q.reshape(batch * groups, per_group * count, head)
        scores = torch.bmm(q, k.reshape(batch * groups, length, head).transpose(1, 2))
        scores = scores.view(-1, per_group, count, length) + mask[first:]
        weights = scores.softmax(-1, dtype=torch.float32).to(scores.dtype).view(-1, per_group * count, length)
        mixed = torch.bmm(weights, v.reshape(batch * groups, length, head))
        mixed = mixed.view(batch, -1, count, head).transpose(1, 2).reshape(batch, count, -1)
        hidden = hidden[:, first:] + attention.o_proj(mixed)
        normed = rms_norm(layer.post_attention_layernorm, hidden)
        hidden = hidden + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(normed)) * layer.mlp.up_proj(normed))
    return rms_norm(llama.norm, hidden)


def rms_norm(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """LlamaRMSNorm in float32."""
    return norm.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon))

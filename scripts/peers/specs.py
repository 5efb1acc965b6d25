"""The checkpoints of the benchmark, its prompt, and what the runners agree on. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

PROMPT = "Please generate a detailed caption of this image. Please be as descriptive as possible."


@dataclass(frozen=True)
class Vision:
    """A CLIP vision tower."""

    num_layers: int
    width: int
    mlp: int
    num_heads: int
    image_size: int
    patch_size: int

    @property
    def num_image_tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class Text:
    """A LLaMA decoder with tied embeddings."""

    num_layers: int
    width: int
    mlp: int
    num_heads: int
    num_kv_heads: int
    vocab: int

    @property
    def kv_width(self) -> int:
        return self.width // self.num_heads * self.num_kv_heads

    @property
    def num_step_weights(self) -> int:
        """Weights that a decode step reads: all but the embeddings, which are the head's too."""
        attention = 2 * self.width * (self.width + self.kv_width)
        return self.num_layers * (attention + 3 * self.width * self.mlp) + self.width * self.vocab


@dataclass(frozen=True)
class Spec:
    """A checkpoint: random weights from `seed`, stored as `dtype`."""

    vision: Vision
    text: Text
    dtype: str
    seed: int
    num_images: int  # per run, unless the user says


SPECS = {
    # For --quick: seconds for everything. vLLM has no smaller heads.
    "tiny": Spec(Vision(4, 64, 256, 4, 56, 14), Text(4, 128, 256, 2, 1, 1024), "float32", 1, 4),
    # ViT-B/16 and a decoder of the shape of SmolLM2-135M.
    "small": Spec(Vision(12, 768, 3072, 12, 224, 16), Text(30, 576, 1536, 9, 3, 49152), "float32", 2, 64),
    # ViT-L/14 at 336 pixels, as in LLaVA-1.5, and a decoder of the shape of Llama-3.2-1B.
    "1b": Spec(Vision(24, 1024, 4096, 16, 336, 14), Text(16, 2048, 8192, 32, 8, 128256), "bfloat16", 3, 8),
}

# Bytes that a weight and a cached key or value take, by what a case calls its precision or bundle.
WEIGHT_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "int8": 1.0, "int8-block": 1.03, "int4": 0.56}


def framed_prompt(image: str) -> str:
    """LLaMA-3's chat frame around `image` and the prompt, as the checkpoints' own template writes it."""
    return (
        f"<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{image}\n{PROMPT}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )

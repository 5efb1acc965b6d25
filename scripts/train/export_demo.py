"""Write the trained captioner as a transformers checkpoint with 16-bit weights, tokenizer and processor."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from transformers import GenerationConfig, LlavaForConditionalGeneration
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from preprocess import IMAGE_SIZE, MEAN, PATCH_SIZE, STD
from vocabulary import IMAGE

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def image_processor() -> LlavaImageProcessorPil:
    """LLaVA-1.5 preprocessing at the size of the demo tower."""
    return LlavaImageProcessorPil(
        do_pad=True,
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=list(MEAN),
        image_std=list(STD),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model = LlavaForConditionalGeneration.from_pretrained(args.checkpoint, dtype=torch.float32).half()
    text = model.config.text_config
    model.generation_config = GenerationConfig(
        bos_token_id=text.bos_token_id, eos_token_id=list(text.eos_token_id), pad_token_id=text.pad_token_id
    )
    if not all(torch.isfinite(p).all() for p in model.parameters()):
        raise ValueError("a weight does not fit into float16")
    model.save_pretrained(args.out)
    for name in TOKENIZER_FILES:
        shutil.copyfile(args.tokenizer / name, args.out / name)
    image_processor().save_pretrained(args.out)
    settings = json.loads((args.out / "preprocessor_config.json").read_text())
    settings["image_processor_type"] = "LlavaImageProcessor"
    settings["processor_class"] = "LlavaProcessor"
    (args.out / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    processor = {
        "image_processor": settings,
        "image_token": IMAGE,
        "num_additional_image_tokens": 1,
        "patch_size": PATCH_SIZE,
        "processor_class": "LlavaProcessor",
        "vision_feature_select_strategy": "default",
    }
    (args.out / "processor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    for path in args.out.iterdir():
        if path.is_file():
            path.chmod(0o644)
            print(f"{path.stat().st_size:>10} {path.name}")


if __name__ == "__main__":
    main()

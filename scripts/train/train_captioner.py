"""Stages 2 to 4: decoder on text alone, projector alone, then projector and decoder; the tower stays frozen.

--stage language   decoder on prompt and caption without the image
--stage projector  only the projector learns
--stage finetune   projector and decoder learn
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from model import decoder_hidden, llava_config, tower_features, tower_of
from parallel import add_arguments, averaged_step, join, launch, make_optimizer
from preprocess import normalise, to_square
from scenes import Painter, caption, sample_scene
from vocabulary import BOS, END_HEADER, EOT, PROMPT, START_HEADER

SHAPES = ((256, 256), (256, 256), (256, 192), (192, 256))
IGNORE = -100


class PromptIds:
    """Token ids around the image and after it, exactly as the chat template lays them out."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        before = f"{BOS}{START_HEADER}user{END_HEADER}\n\n"
        after = f"\n{PROMPT}{EOT}{START_HEADER}assistant{END_HEADER}\n\n"
        self.before = torch.tensor(tokenizer.encode(before).ids)
        self.after = torch.tensor(tokenizer.encode(after).ids)


def draw_batch(
    painter: Painter | None, rng: random.Random, tokenizer: Tokenizer, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 images and caption ids (end token included) padded with IGNORE."""
    images = np.zeros((count, 112, 112, 3), dtype=np.uint8)
    rows = []
    eot = tokenizer.token_to_id(EOT)
    for i in range(count):
        scene = sample_scene(rng, False, SHAPES)
        if painter is not None:
            images[i] = to_square(painter.paint(scene, rng)[0])
        rows.append([*tokenizer.encode(caption(scene)).ids, eot])
    ids = torch.full((count, max(map(len, rows))), IGNORE)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return torch.from_numpy(images), ids


def caption_loss(
    model: LlavaForConditionalGeneration, prompt: PromptIds, features: torch.Tensor | None, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross-entropy of the caption tokens and the share of captions right in every token."""
    llama = model.model.language_model
    embed = llama.get_input_embeddings()
    count = ids.shape[0]
    parts = [embed(prompt.before).expand(count, -1, -1)]
    if features is not None:
        parts.append(model.model.multi_modal_projector(features))
    parts.append(embed(prompt.after).expand(count, -1, -1))
    parts.append(embed(ids[:, :-1].clamp_min(0)))
    dtype = parts[-1].dtype
    sequence = torch.cat([p.to(dtype) for p in parts], dim=1)
    logits = model.lm_head(decoder_hidden(llama, sequence, ids.shape[1])).float()
    loss = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), ignore_index=IGNORE)
    right = ((logits.argmax(-1) == ids) | (ids == IGNORE)).all(dim=1).float().mean()
    return loss, right


def run(rank: int, args: argparse.Namespace) -> None:
    join(rank, args)
    torch.manual_seed(args.seed)
    tokenizer = Tokenizer.from_file(str(args.tokenizer / "tokenizer.json"))
    if args.init is None:
        config = llava_config(tokenizer)
        config._attn_implementation = "eager"
        model = LlavaForConditionalGeneration(config)
    else:
        model = LlavaForConditionalGeneration.from_pretrained(
            args.init, dtype=torch.float32, attn_implementation="eager"
        )
    tower = tower_of(model)
    if args.tower is not None:
        weights = {k.removeprefix("vision_model."): v for k, v in load_file(args.tower).items()}
        tower.load_state_dict(weights)
    for p in model.parameters():
        p.requires_grad_(False)
    learn = list(model.model.multi_modal_projector.parameters()) if args.stage != "language" else []
    if args.stage != "projector":
        learn += [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    for p in learn:
        p.requires_grad_(True)
    model.train()
    optimizer = make_optimizer(learn, args.lr, 0.02)
    prompt = PromptIds(tokenizer)
    painter = None if args.stage == "language" else Painter(args.font, cache=True)
    rng = random.Random(f"{args.stage} {args.seed} {rank}")
    start = time.monotonic()
    progress, step = 0.0, 0
    while progress < 1.0:
        lr = args.lr * min(1.0, (step + 1) / args.warmup) * max(0.02, min(1.0, (1.0 - progress) / 0.6))
        images, ids = draw_batch(painter, rng, tokenizer, args.batch)
        with torch.autocast("cpu", torch.bfloat16):
            features = None
            if painter is not None:
                with torch.no_grad():
                    features = tower_features(tower, normalise(images))
            loss, right = caption_loss(model, prompt, features, ids)
        loss.backward()
        step += 1
        now = step / args.steps
        if args.minutes:
            now = max(now, (time.monotonic() - start) / 60 / args.minutes)
        value, share, progress = averaged_step(optimizer, learn, lr, [loss.item(), right.item(), now])
        last = progress >= 1.0
        if rank == 0 and (step % 50 == 0 or last):
            minutes = (time.monotonic() - start) / 60
            rate = step * args.batch * args.workers / minutes / 60
            print(
                f"{args.stage} step {step} {progress:.3f} {minutes:.1f} min loss {value:.4f} "
                f"whole captions {share:.3f} lr {lr:.2e} {rate:.0f}/s",
                flush=True,
            )
        if rank == 0 and (step % 500 == 0 or last):
            model.save_pretrained(args.out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", choices=("language", "projector", "finetune"), required=True)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json")
    parser.add_argument("--font", type=Path, help="needed by the stages that see images")
    parser.add_argument("--init", type=Path, help="checkpoint of the stage before; default: fresh weights")
    parser.add_argument("--tower", type=Path, help="tower.safetensors to load into the vision tower")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=100)
    add_arguments(parser, 1000)
    args = parser.parse_args()
    launch(run, args, args.out)


if __name__ == "__main__":
    main()

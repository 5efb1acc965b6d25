"""Stage 1: train the CLIP tower with dense supervision (kind, size, place, background of every patch)."""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionModel

from model import tower_features, vision_config
from parallel import add_arguments, averaged_step, join, launch, make_optimizer
from preprocess import normalise, patch_coverage, to_square
from scenes import Painter, sample_scene
from vocabulary import BACKGROUNDS, KINDS, PLACES, SIZES

SHAPES = ((256, 256), (256, 256), (256, 192), (192, 256))
NOTHING = len(KINDS)
IGNORE = -100
MIN_COVER = 0.2


class Heads(nn.Module):
    """Throw-away linear heads on the patch features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.sections = (len(KINDS) + 1, len(SIZES), len(PLACES), len(BACKGROUNDS))
        self.out = nn.Linear(width, sum(self.sections))

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.out(self.norm(features)).float().split(self.sections, dim=-1)


def draw_batch(
    painter: Painter, rng: random.Random, count: int, held_out: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 images (n, H, W, 3) and labels (n, patches, 4): kind, size, place, background."""
    images = np.empty((count, 112, 112, 3), dtype=np.uint8)
    labels = np.full((count, 64, 4), IGNORE, dtype=np.int64)
    for i in range(count):
        scene = sample_scene(rng, held_out, SHAPES)
        image, masks = painter.paint(scene, rng)
        images[i] = to_square(image)
        cover = np.stack([patch_coverage(m) for m in masks])
        own = cover.argmax(axis=0)
        seen = cover.max(axis=0) >= MIN_COVER
        kind = np.array([t.kind for t in scene.things])[own]
        labels[i, :, 0] = np.where(seen, kind, np.where(cover.max(axis=0) > MIN_COVER / 2, IGNORE, NOTHING))
        labels[i, :, 1] = np.where(seen, np.array([t.size for t in scene.things])[own], IGNORE)
        labels[i, :, 2] = np.where(seen, np.array([t.place for t in scene.things])[own], IGNORE)
        labels[i, :, 3] = scene.background
    return torch.from_numpy(images), torch.from_numpy(labels)


def objective(outputs: tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
    """Sum of cross-entropies; object patches and empty patches weigh the same in total."""
    kind, size, place, background = (o.flatten(0, 1) for o in outputs)
    flat = labels.flatten(0, 1)
    busy = flat[:, 1] != IGNORE
    empty = flat[:, 0] == NOTHING
    loss = F.cross_entropy(kind[busy], flat[busy, 0]) + 0.5 * F.cross_entropy(kind[empty], flat[empty, 0])
    loss = loss + 0.4 * F.cross_entropy(size[busy], flat[busy, 1])
    loss = loss + 0.4 * F.cross_entropy(place[busy], flat[busy, 2])
    return loss + 0.2 * F.cross_entropy(background, flat[:, 3])


def choose_patches(labels: torch.Tensor, count: int) -> torch.Tensor:
    """Object patches first, filled up with random empty ones."""
    score = torch.rand(labels.shape[:2]) + (labels[..., 0] != NOTHING)
    return score.topk(count, dim=1).indices


@torch.no_grad()
def evaluate(tower: nn.Module, heads: Heads, painter: Painter, count: int) -> str:
    """Objects found among the n most probable kinds of a held-out scene with n objects."""
    images, labels = draw_batch(painter, random.Random(99), count, True)
    kind, size, place, background = heads(tower_features(tower, normalise(images)))
    best = kind.softmax(-1)[..., :NOTHING].amax(dim=1)
    hits = total = 0
    for i in range(count):
        truth = {int(k) for k in labels[i, :, 0] if 0 <= k < NOTHING}
        hits += len(truth & set(best[i].topk(len(truth)).indices.tolist()))
        total += len(truth)
    busy = labels[..., 1] != IGNORE
    patch = [
        (o.argmax(-1) == labels[..., j])[busy].float().mean().item()
        for j, o in enumerate((kind, size, place))
    ]
    colour = (background.mean(1).argmax(-1) == labels[:, 0, 3]).float().mean().item()
    return f"found {hits / total:.4f} patch kind/size/place {patch} background {colour:.4f}"


def run(rank: int, args: argparse.Namespace) -> None:
    join(rank, args)
    torch.manual_seed(args.seed)
    config = vision_config()
    config._attn_implementation = "eager"
    full = CLIPVisionModel(config)
    tower = getattr(full, "vision_model", full)
    heads = Heads(config.hidden_size)
    torch.manual_seed(args.seed * 1000 + rank)
    rng = random.Random(args.seed * 1000 + rank)
    painter = Painter(args.font, cache=True)
    # The last layer and the post-norm lie behind the features LLaVA reads: they keep their initial weights.
    frozen = [*tower.encoder.layers[-1].parameters(), *tower.post_layernorm.parameters()]
    for p in frozen:
        p.requires_grad_(False)
    params = [p for p in (*full.parameters(), *heads.parameters()) if p.requires_grad]
    optimizer = make_optimizer(params, args.lr, 0.05)
    start = time.monotonic()
    progress, step = 0.0, 0
    while progress < 1.0:
        lr = args.lr * min(1.0, (step + 1) / 200) * max(0.02, min(1.0, (1.0 - progress) / 0.75))
        images, labels = draw_batch(painter, rng, args.batch, False)
        keep = None
        if progress < args.sparse_share:
            keep = choose_patches(labels, args.sparse_patches)
            labels = labels.gather(1, keep[..., None].expand(-1, -1, labels.shape[-1]))
        with torch.autocast("cpu", torch.bfloat16):
            features = tower_features(tower, normalise(images), keep)
            outputs = heads(features)
        loss = objective(outputs, labels)
        loss.backward()
        step += 1
        now = step / args.steps
        if args.minutes:
            now = max(now, (time.monotonic() - start) / 60 / args.minutes)
        value, progress = averaged_step(optimizer, params, lr, [loss.item(), now])
        if rank == 0 and (step % 50 == 0 or progress >= 1.0):
            rate = step * args.batch * args.workers / (time.monotonic() - start)
            print(f"step {step} {progress:.3f} loss {value:.4f} lr {lr:.2e} {rate:.0f} img/s", flush=True)
        if rank == 0 and (step % 400 == 0 or progress >= 1.0):
            done = (time.monotonic() - start) / 60
            print(f"  {done:.1f} min {evaluate(tower, heads, painter, 256)}", flush=True)
            save_file({k: v.contiguous() for k, v in full.state_dict().items()}, args.out)
            save_file(heads.state_dict(), args.out.with_name("heads.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--font", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="tower.safetensors")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument(
        "--sparse-share", type=float, default=0.7, help="share of training on a subset of patches"
    )
    parser.add_argument("--sparse-patches", type=int, default=32)
    add_arguments(parser, 3200)
    args = parser.parse_args()
    launch(run, args, args.out.parent)


if __name__ == "__main__":
    main()

"""Writes the workload: seeded JPEGs that look enough like photographs to cost as much to decode and resize.

Soft colour gradients, noise of several scales, a few flat shapes with sharp edges, sensor grain. The longer
side has 500 to 640 pixels; one in three is upright. Image i depends on i alone. What is there is kept.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

QUALITY = 90


def photo(index: int) -> Image.Image:
    """Draws image `index`."""
    rng = np.random.default_rng([20_000, index])
    longer = int(rng.integers(500, 641))
    shorter = int(longer * rng.uniform(0.62, 0.8))
    width, height = (shorter, longer) if index % 3 == 2 else (longer, shorter)
    down, across = np.linspace(-1, 1, height)[:, None, None], np.linspace(-1, 1, width)[None, :, None]
    slopes = rng.uniform(-45, 45, (2, 3))
    values = rng.uniform(70, 180, 3) + slopes[0] * down + slopes[1] * across
    for cell, strength in ((128, 24.0), (40, 13.0), (11, 7.0), (3, 4.0)):
        grid = rng.normal(0, strength, (height // cell + 2, width // cell + 2, 3)).astype(np.float32)
        layers = [
            Image.fromarray(grid[..., c]).resize((width, height), Image.Resampling.BICUBIC) for c in range(3)
        ]
        values = values + np.stack([np.asarray(layer) for layer in layers], axis=-1)
    image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(3, 10))):
        left, top = int(rng.integers(-20, width)), int(rng.integers(-20, height))
        box = (left, top, left + int(rng.integers(15, width // 3)), top + int(rng.integers(15, height // 3)))
        colour = tuple(int(channel) for channel in rng.integers(0, 256, 3))
        shape = (draw.ellipse, draw.rectangle)[int(rng.integers(2))]
        shape(box, fill=colour)
    grain = rng.normal(0, 3.5, (height, width, 1))
    return Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=200)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for index in range(args.count):
        path = args.folder / f"{index:05}.jpg"
        if not path.exists():
            part = path.with_suffix(".part")
            photo(index).save(part, format="JPEG", quality=QUALITY)
            part.rename(path)


if __name__ == "__main__":
    main()

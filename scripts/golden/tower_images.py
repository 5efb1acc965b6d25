"""Small test pictures drawn exactly at a vision tower's input size, so that no resizing takes part."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ["a", "b", "c"]


def draw(name: str, size: int) -> Image.Image:
    """One picture: a smooth gradient with one or two shapes on it."""
    y, x = np.mgrid[0:size, 0:size] / (size - 1)
    if name == "a":  # a blue-to-orange slope with a red disc and a dark bar
        pixels = np.stack([40 + 180 * x, 60 + 80 * y, 220 - 180 * x], axis=-1)
        pixels[(x - 0.35) ** 2 + (y - 0.4) ** 2 < 0.05] = (220, 30, 40)
        pixels[(y > 0.78) & (y < 0.9)] = (20, 24, 30)
    elif name == "b":  # a bright radial glow with a green square
        glow = np.clip(1.2 - 1.6 * np.hypot(x - 0.6, y - 0.5), 0, 1)
        pixels = np.stack([250 * glow, 220 * glow**2, 90 + 60 * y], axis=-1)
        pixels[(x > 0.1) & (x < 0.4) & (y > 0.55) & (y < 0.85)] = (30, 190, 70)
    elif name == "c":  # a pale diagonal slope with a blue triangle and a yellow corner
        slope = (x + y) / 2
        pixels = np.stack([245 - 60 * slope, 235 - 120 * slope, 230 - 20 * slope], axis=-1)
        pixels[(y > 0.3) & (y < 0.8) & (np.abs(x - 0.5) < (y - 0.3) * 0.7)] = (25, 60, 200)
        pixels[(x > 0.75) & (y < 0.25)] = (240, 210, 20)
    else:
        raise ValueError(f"no picture named {name}")
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8), "RGB")


def write(folder: Path, size: int) -> list[Path]:
    """Writes the pictures as `<folder>/<size>/<name>.png`; returns their paths."""
    target = folder / str(size)
    target.mkdir(parents=True, exist_ok=True)
    paths = []
    for name in NAMES:
        path = target / f"{name}.png"
        draw(name, size).save(path, optimize=True)
        paths.append(path)
    return paths

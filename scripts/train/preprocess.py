"""The LLaVA-1.5 image path in miniature: pad to a square with the CLIP mean, bicubic resize, normalise."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

IMAGE_SIZE = 112
PATCH_SIZE = 14
GRID = IMAGE_SIZE // PATCH_SIZE
PAD_COLOUR = (122, 116, 104)
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def to_square(image: Image.Image) -> np.ndarray:
    """uint8 HWC array of IMAGE_SIZE x IMAGE_SIZE."""
    width, height = image.size
    if width != height:
        side = max(width, height)
        square = Image.new("RGB", (side, side), PAD_COLOUR)
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        image = square
    return np.asarray(image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))


def patch_coverage(mask: Image.Image) -> np.ndarray:
    """Share of each patch (row-major) that the object of this mask covers."""
    width, height = mask.size
    if width != height:
        side = max(width, height)
        square = Image.new("L", (side, side), 0)
        square.paste(mask, ((side - width) // 2, (side - height) // 2))
        mask = square
    return np.asarray(mask.resize((GRID, GRID), Image.Resampling.BOX), dtype=np.float32).reshape(-1) / 255.0


def normalise(batch: torch.Tensor) -> torch.Tensor:
    """uint8 NHWC -> normalised float NCHW."""
    pixels = batch.permute(0, 3, 1, 2).float().div_(255.0)
    return (pixels - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)

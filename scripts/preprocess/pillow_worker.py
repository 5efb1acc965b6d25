"""Pillow and numpy as LLaVA's code uses them, one thread: bytes to normalised [3, 336, 336].

Reads commands from standard input, a line each: `time` does all pictures once and prints the seconds, `save
FOLDER` writes their tensors, raw little-endian float32, under the pictures' names.

    python scripts/preprocess/pillow_worker.py FOLDER pad|crop
"""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

SIZE = 336
MEAN = np.array((0.48145466, 0.4578275, 0.40821073), dtype=np.float32)
STD = np.array((0.26862954, 0.26130258, 0.27577711), dtype=np.float32)
FILL = (122, 116, 104)  # int(255 * mean)


def pad(image: Image.Image) -> Image.Image:
    """LLaVA-1.5: the picture in the middle of a square, resized."""
    if image.width != image.height:
        side = max(image.size)
        square = Image.new("RGB", (side, side), FILL)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    return image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def crop(image: Image.Image) -> Image.Image:
    """CLIP: the shorter side resized to 336, the middle of the longer one kept."""
    short, long = sorted(image.size)
    new_long = int(SIZE * long / short)
    size = (SIZE, new_long) if image.width <= image.height else (new_long, SIZE)
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (image.width - SIZE) // 2, (image.height - SIZE) // 2
    return image.crop((left, top, left + SIZE, top + SIZE))


def tensor(content: bytes, mode: str) -> np.ndarray:
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    image = pad(image) if mode == "pad" else crop(image)
    values = np.asarray(image, dtype=np.float32)
    values = values * np.float32(1 / 255)
    values -= MEAN
    values /= STD
    return np.ascontiguousarray(values.transpose(2, 0, 1))


def main() -> None:
    folder, mode = Path(sys.argv[1]), sys.argv[2]
    files = sorted(folder.iterdir())
    contents = [file.read_bytes() for file in files]
    for command in sys.stdin:
        match command.split():
            case ["time"]:
                start = time.perf_counter()
                for content in contents:
                    tensor(content, mode)
                print(time.perf_counter() - start, flush=True)
            case ["save", output]:
                for file, content in zip(files, contents, strict=True):
                    (Path(output) / f"{file.name}.f32").write_bytes(tensor(content, mode).tobytes())
                print(0, flush=True)


if __name__ == "__main__":
    main()

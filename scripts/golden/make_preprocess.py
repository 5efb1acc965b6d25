"""Makes the reference tensors of the preprocessing tests; needs only Pillow.

    python scripts/golden/make_preprocess.py FOLDER

For each picture in FOLDER (by its `sources.json`) writes `<picture>.pad.f32` and `<picture>.crop.f32`: raw
little-endian float32 of shape [3, 336, 336]; and `index.json`. `pad` is LLaVA-1.5's preprocessing (a square
filled with the mean colour, then resized), `crop` is CLIP's (the shorter side resized, then cut at the
centre). That they equal transformers' processors is shown by check_preprocess.py.
"""

from __future__ import annotations

import argparse
import array
import hashlib
import json
import sys
from pathlib import Path

from PIL import Image, ImageOps, features

SIZE = 336
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
FILL = (122, 116, 104)  # int(255 * mean)


def load(path: Path) -> Image.Image:
    """The picture the right way up, as RGB."""
    return ImageOps.exif_transpose(Image.open(path)).convert("RGB")


def pad(image: Image.Image) -> Image.Image:
    """LLaVA-1.5: the picture in the middle of a square, resized."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), FILL)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def crop(image: Image.Image) -> Image.Image:
    """CLIP: the shorter side resized to 336, the middle of the longer one kept."""
    short, long = sorted(image.size)
    new_long = int(SIZE * long / short)
    size = (SIZE, new_long) if image.width <= image.height else (new_long, SIZE)
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (image.width - SIZE) // 2, (image.height - SIZE) // 2
    return image.crop((left, top, left + SIZE, top + SIZE))


def normalised(image: Image.Image) -> array.array:
    """The three planes one after the other, scaled to [0, 1] and normalised."""
    values = array.array("f")
    for channel, mean, std in zip(image.split(), MEAN, STD, strict=True):
        table = [(level / 255 - mean) / std for level in range(256)]
        values.extend(map(table.__getitem__, channel.tobytes()))
    if sys.byteorder == "big":
        values.byteswap()
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the folder with the pictures and sources.json")
    folder = parser.parse_args().folder
    photos = []
    for name, source in json.loads((folder / "sources.json").read_text(encoding="utf-8")).items():
        image = load(folder / name)
        entry = {
            "file": name,
            "source": source,
            "width": image.width,
            "height": image.height,
            "rgb_sha256": hashlib.sha256(image.tobytes()).hexdigest(),
        }
        for mode, process in (("pad", pad), ("crop", crop)):
            entry[mode] = f"{name}.{mode}.f32"
            (folder / entry[mode]).write_bytes(normalised(process(image)).tobytes())
        photos.append(entry)
    index = {
        "size": SIZE,
        "mean": MEAN,
        "std": STD,
        "fill": FILL,
        "pillow": Image.__version__,
        "libjpeg_turbo": features.version("libjpeg_turbo"),
        "photos": photos,
    }
    (folder / "index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    print(f"{len(photos)} pictures, {2 * len(photos)} tensors")


if __name__ == "__main__":
    main()

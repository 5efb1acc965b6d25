"""Makes the pictures that preprocessing is measured on; needs only Pillow.

    python scripts/preprocess/make_images.py PHOTOS OUTPUT

PHOTOS is the folder of scripts/fetch_test_data.sh. OUTPUT gets three folders:

web    long side 500, as img2dataset leaves images of the web: 4:2:0 mostly, qualities 75 to 95, one in ten
       progressive
large  long side 2000 to 6000, quality 85 to 92, 4:2:0 mostly
other  the web pictures as PNG and WebP
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from PIL import Image

WEB_SIDE = 500
NUM_WEB = 60
# In turn; of three of the web's pictures two are of high quality (img2dataset re-encodes at 95).
QUALITIES = (95, 85, 75, 90, 80, 95, 92)
SUBSAMPLINGS = ("4:2:0", "4:2:0", "4:2:0", "4:4:4", "4:2:0", "4:2:0", "4:2:2", "4:2:0")
LARGE_SIDES = (2000, 3000, 4000, 6000)
MIN_SHORT_SIDE = 250


def photographs(folder: Path) -> list[tuple[str, Image.Image]]:
    """The colour photographs that are large enough, upright as stored."""
    found = []
    for photo in json.loads((folder / "index.json").read_text(encoding="utf-8"))["photos"]:
        image = Image.open(folder / photo["file"])
        if image.mode == "RGB" and min(image.size) >= MIN_SHORT_SIDE and not image.getexif().get(0x0112):
            found.append((Path(photo["file"]).stem, image))
    return found


def resized(image: Image.Image, side: int) -> Image.Image:
    scale = side / max(image.size)
    size = round(image.width * scale), round(image.height * scale)
    return image.resize(size, Image.Resampling.LANCZOS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    photos = photographs(arguments.photos)
    folders = {name: arguments.output / name for name in ("web", "large", "other")}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    for index in range(NUM_WEB):
        name, image = photos[index % len(photos)]
        image = resized(image, WEB_SIDE)
        if index >= len(photos):  # a second helping, of other shapes
            cut = image.width // 8
            image = resized(image.crop((cut, 0, image.width - cut // 2, image.height)), WEB_SIDE)
        options = {
            "quality": QUALITIES[index % len(QUALITIES)],
            "subsampling": SUBSAMPLINGS[index % len(SUBSAMPLINGS)],
            "progressive": index % 10 == 9,
            "optimize": index % 4 == 3,
        }
        image.save(folders["web"] / f"{index:03}-{name}.jpg", **options)
        if index % 6 == 0:
            image.save(folders["other"] / f"{index:03}-{name}.png")
            image.save(folders["other"] / f"{index:03}-{name}.webp", quality=85)
    largest = sorted(photos, key=lambda photo: -photo[1].width * photo[1].height)[:3]
    for index, (name, image) in enumerate(largest):
        for turn, side in enumerate(LARGE_SIDES):
            subsampling = SUBSAMPLINGS[(3 * index + turn) % len(SUBSAMPLINGS)]
            target = folders["large"] / f"{side}-{name}.jpg"
            resized(image, side).save(target, quality=(92, 85)[turn % 2], subsampling=subsampling)
    for name, folder in folders.items():
        files = list(folder.iterdir())
        pixels = sum(width * height for width, height in (Image.open(file).size for file in files))
        size = sum(file.stat().st_size for file in files)
        print(f"{name}: {len(files)} pictures, {pixels / 1e6:.1f} megapixels, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()

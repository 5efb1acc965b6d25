"""Takes the images of Pillow's test suite out of its source distribution, and asks Pillow about each.

Writes to the output folder
  images/       the files of Tests/images, in their folders
  verdict.json  [{file, format?, width?, height?, error?}], by file: what Pillow says about it
  pixels/       {file}.z: the picture upright in RGB, [height, width, 3], zlib-compressed, where Pillow
                opens the file in a format that recaption reads

Usage: make_pillow.py pillow-13.0.0.tar.gz OUTPUT
"""

import argparse
import json
import tarfile
import warnings
import zlib
from pathlib import Path, PurePosixPath

from PIL import Image, ImageOps

# Formats that recaption reads, by Pillow's names: an MPO is a JPEG with more pictures behind it.
FORMATS = {"BMP", "GIF", "JPEG", "MPO", "PNG", "WEBP"}


def extract(source: Path, images: Path) -> list[str]:
    """Extracts the plain files below Tests/images; returns their names, in order."""
    names = []
    with tarfile.open(source) as archive:
        for member in archive:
            parts = PurePosixPath(member.name).parts
            if not member.isfile() or parts[1:3] != ("Tests", "images") or ".." in parts:
                continue
            name = "/".join(parts[3:])
            path = images / name
            path.parent.mkdir(parents=True, exist_ok=True)
            content = archive.extractfile(member)
            assert content is not None
            path.write_bytes(content.read())
            names.append(name)
    return sorted(names)


def verdict(path: Path) -> tuple[dict[str, object], bytes | None]:
    """What Pillow says about a file, and its pixels where it loads."""
    entry: dict[str, object] = {}
    try:
        with Image.open(path) as image:
            entry["format"] = image.format
            if image.format not in FORMATS:
                return entry, None
            upright = ImageOps.exif_transpose(image).convert("RGB")
            pixels = upright.tobytes()
    except Exception as error:
        # Whatever Pillow raises is its verdict.
        return entry | {"error": f"{type(error).__name__}: {error}".replace(str(path), path.name)}, None
    return entry | {"width": upright.width, "height": upright.height}, pixels


def main() -> None:
    """Extracts, asks, writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    verdicts = []
    for name in extract(arguments.source, arguments.output / "images"):
        entry, pixels = verdict(arguments.output / "images" / name)
        verdicts.append({"file": name} | entry)
        if pixels is not None:
            path = arguments.output / "pixels" / f"{name}.z"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(zlib.compress(pixels, 1))
    (arguments.output / "verdict.json").write_text(json.dumps(verdicts, indent=0) + "\n")


if __name__ == "__main__":
    main()

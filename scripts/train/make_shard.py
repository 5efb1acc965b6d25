"""Write a shard of held-out scenes as img2dataset does (jpg, json, noisy alt text), plus the ground truth."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import random
import tarfile
from pathlib import Path

from evaluate import EVAL_SHAPES
from scenes import Painter, Scene, describe, sample_scene
from vocabulary import KIND_NAMES

ALT_TEXTS = (
    "IMG_{n} {a} clipart free download",
    "cute {a} png",
    "{a} icon",
    "{a} and {b}",
    "{a} vector stock illustration",
    "DSC0{n}.jpg",
    "{a} sticker transparent background",
    "best price {a} online shop",
    "{b} emoji",
    "wallpaper {n} hd {a}",
    "untitled design ({d})",
    "{x} clip art",
    "{a}, {x} - royalty free image #{n}",
    "click to enlarge",
)


def alt_text(scene: Scene, rng: random.Random) -> str:
    """A short, partial and sometimes wrong web caption."""
    kinds = [KIND_NAMES[t.kind] for t in scene.things]
    rng.shuffle(kinds)
    return rng.choice(ALT_TEXTS).format(
        a=kinds[0], b=kinds[-1], x=rng.choice(KIND_NAMES), n=rng.randint(1000, 9999), d=rng.randint(1, 9)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--font", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for 00000.tar and truth.jsonl")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--quality", type=int, default=90)
    parser.add_argument("--seed", type=int, default=64)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(args.seed)
    painter = Painter(args.font, cache=False)
    truth = []
    with tarfile.open(args.out / "00000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:

        def put(name: str, blob: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(blob)
            info.mode = 0o644
            tar.addfile(info, io.BytesIO(blob))

        for i in range(args.count):
            key = f"{i:09d}"
            scene = sample_scene(rng, True, EVAL_SHAPES)
            buffer = io.BytesIO()
            painter.paint(scene, rng)[0].save(buffer, "JPEG", quality=args.quality)
            jpg = buffer.getvalue()
            alt = alt_text(scene, rng)
            record = {
                "caption": alt,
                "url": f"https://example.org/pictures/{hashlib.sha256(key.encode()).hexdigest()[:12]}.jpg",
                "key": key,
                "status": "success",
                "error_message": None,
                "width": scene.width,
                "height": scene.height,
                "original_width": scene.width,
                "original_height": scene.height,
                "exif": "{}",
                "sha256": hashlib.sha256(jpg).hexdigest(),
            }
            put(f"{key}.jpg", jpg)
            put(f"{key}.json", json.dumps(record, indent=4).encode())
            put(f"{key}.txt", alt.encode())
            truth.append(json.dumps({"key": key, **describe(scene)}))
    (args.out / "truth.jsonl").write_text("\n".join(truth) + "\n")


if __name__ == "__main__":
    main()

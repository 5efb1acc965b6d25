"""Shows that make_preprocess.py's tensors equal those of transformers' image processors.

The processors are those of the Pillow backend.

python scripts/golden/check_preprocess.py [FOLDER]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from transformers.image_utils import load_image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

TOLERANCE = 1e-6


def main() -> None:
    data = Path(__file__).resolve().parents[2] / "tests" / "data"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=data / "fetched" / "photos")
    folder = parser.parse_args().folder
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    size = index["size"]
    sizes = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    processors = {"pad": LlavaImageProcessorPil(do_pad=True, **sizes), "crop": CLIPImageProcessorPil(**sizes)}
    worst = dict.fromkeys(processors, 0.0)
    for photo in index["photos"]:
        image = load_image(str(folder / photo["file"]))  # turns it the right way up and converts it to RGB
        if image.size != (photo["width"], photo["height"]):
            raise SystemExit(f"{photo['file']}: transformers reads {image.size}")
        for mode, processor in processors.items():
            expected = processor(image, return_tensors="np").pixel_values[0]
            found = np.fromfile(folder / photo[mode], dtype="<f4").reshape(3, size, size)
            difference = float(np.abs(expected - found).max())
            worst[mode] = max(worst[mode], difference)
            if difference > TOLERANCE:
                print(f"{photo['file']} {mode}: {difference:.2e}")
    print(f"{len(index['photos'])} pictures; largest differences:", worst)
    if max(worst.values()) > TOLERANCE:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

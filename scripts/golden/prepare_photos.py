"""Collects photographs of odd sizes and kinds for the preprocessing tests; needs only Pillow.

The photographs come out of packages that scripts/fetch_test_data.sh has downloaded: the wheels of scikit-
image and scikit-learn and, where there is apt, Debian's lomiri-wallpapers-16.04. Each one is known by its
SHA-256. Most of the wallpapers are made smaller so that the tests stay quick. Further pictures are cut out
of the photographs and stored as JPEG of several kinds, PNG and WebP.

    python scripts/golden/prepare_photos.py --output FOLDER SOURCE...

SOURCE is a wheel or a folder. Writes the pictures and `sources.json`, which says where each one comes from.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

MIN_PHOTOS = 20

# By name: the SHA-256 of the file in its package.
PACKAGED = {
    "astronaut.png": "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5",
    "brick.png": "7966caf324f6ba843118d98f7a07746d22f6a343430add0233eca5f6eaaa8fcf",
    "camera.png": "b0793d2adda0fa6ae899c03989482bff9a42d3d5690fc7e3648f2795d730c23a",
    "chelsea.png": "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb",
    "china.jpg": "8378025ad2519d649d02e32bd98990db4ab572357d9f09841c2fbfbb4fefad29",
    "coffee.png": "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7",
    "coins.png": "f8d773fc9cfa6f4d8e5942dc34d0a0788fcaed2a4fefbbed0aef5398d7ef4cba",
    "flower.jpg": "a77f6ec41e353afdf8bdff2ea981b2955535d8d83294f8cfa49cf4e423dd5638",
    "grass.png": "b6b6022426b38936c43a4ac09635cd78af074e90f42ffa8227ac8b7452d39f89",
    "gravel.png": "c48615b451bf1e606fbd72c0aa9f8cc0f068ab7111ef7d93bb9b0f2586440c12",
    "hubble_deep_field.jpg": "3a19c5dd8a927a9334bb1229a6d63711b1c0c767fb27e2286e7c84a3e2c2f5f4",
    "ihc.png": "f8dd1aa387ddd1f49d8ad13b50921b237df8e9b262606d258770687b0ef93cef",
    "moon.png": "78739619d11f7eb9c165bb5d2efd4772cee557812ec847532dbb1d92ef71f577",
    "motorcycle_left.png": "db18e9c4157617403c3537a6ba355dfeafe9a7eabb6b9b94cb33f6525dd49179",
    "motorcycle_right.png": "5fc913ae870e42a4b662314bc904d1786bcad8e2f0b9b67dba5a229406357797",
    "retina.jpg": "38a07f36f27f095e818aea7b96d34202c05176d30253c66733f2e00379e9e0e6",
    "rocket.jpg": "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c",
}
WALLPAPERS = {
    "Bridge_by_Sander_Klootwijk.jpg": "bd86b081f9975e2b83527f71e49b9271a8ab40885428395969d9f7d834d7f050",
    "Dragonfly_by_Bolly.jpg": "af5af17841009732def24b09bb1e669a1b09d2b4bdeee7812c371101c30d2bb3",
    "Picture_0B_by_freespace.jpg": "c8c0ab18e48d9e0419fe42881112137f3afafc27dfddc29ec3a6d54c56d225ad",
    "Picture_1A_by_freespace.jpg": "89e86af38d04daaef975665dc2127e9fa76f0fd68f4eea105a2d0ae3390b010b",
    "Wine_by_Jakkub_Mede.jpg": "d2e96e6d4da40dd804b3d0ce295e94de04a2d7d9b6785d42cd9d92ba58bced74",
    "aitzgorri_by_Aitzol_Berasategi.jpg": "66268e7b48f8854d36a28765fac6e23ec1aee251daa6da1f64715f201020ad36",
    "free_by_Peter_Nerlich.jpg": "85a5453c2fed514c75973016f3d862aca62eb7ca087618822469274ac1092373",
    "friends_by_Aitzol_Berasategi.jpg": "cc40e313c74e421edffe3403def413c16878ce14661cce7ec5915baeab35538d",
    "greentock_by_Peter_Nerlich.jpg": "e7b20e2db9dcd6e2b278ca55873c2110b35d89cd38b04d0b18728726888e6889",
    "life_by_Aitzol_Berasategi.jpg": "4c119350ead80201fe256850c3d316309ddfb4bdf10b235ce982dcde0c667c05",
    "picosdeeuropa_by_Aitzol_Berasategi.jpg": (
        "414d0072b2f6f2c555deafeaef6e45c4fed6fa9ad26eba6560ca8803959cf97a"
    ),
    "seeding_by_Clements_Engelhardt.jpg": "a5634d1ab5e41a3568e92d4a894a500c92b891f9ff734e50bd224d6e185a605f",
    "sunset_by_Aitzol_Berasategi.jpg": "474dab6a4b9f94dc76c29dfe30e9f5db4af0fd2e33fe5d695f8152b371efca18",
    "umang_by_Abhishek_Mudgal.jpg": "bfb425545e77e9f0eb1b037b607fc9ed4a446f3b0f04aa2879be3556073c57ef",
}
# These wallpapers keep their full size; the others get the long sides below, in turn.
HUGE = ["Dragonfly_by_Bolly.jpg", "Wine_by_Jakkub_Mede.jpg", "seeding_by_Clements_Engelhardt.jpg"]
LONG_SIDES = [1279, 1001, 1537, 899, 773]


@dataclass(frozen=True)
class Derived:
    """A picture cut out of a photograph."""

    name: str
    source: str
    size: tuple[int, int]  # of the piece cut out of the middle
    save: dict[str, Any] = field(default_factory=dict)
    change: Callable[[Image.Image], Image.Image] | None = None


def orientation(value: int) -> bytes:
    """An Exif block that holds nothing but an orientation."""
    exif = Image.Exif()
    exif[0x0112] = value
    return exif.tobytes()


def enlarged(image: Image.Image) -> Image.Image:
    return image.resize((image.width * 3 + 1, image.height * 3 + 2), Image.Resampling.LANCZOS)


DERIVED = [
    Derived(
        "astronaut-337x501-q85-420.jpg", "astronaut.png", (337, 501), {"quality": 85, "subsampling": "4:2:0"}
    ),
    Derived(
        "chelsea-299x300-q95-444.jpg", "chelsea.png", (299, 300), {"quality": 95, "subsampling": "4:4:4"}
    ),
    Derived("coffee-600x97-q75-422.jpg", "coffee.png", (600, 97), {"quality": 75, "subsampling": "4:2:2"}),
    Derived("rocket-101x427.png", "rocket.jpg", (101, 427)),
    Derived("china-333x427-q80.webp", "china.jpg", (333, 427), {"quality": 80}),
    Derived("flower-641x337-lossless.webp", "flower.jpg", (641, 337), {"lossless": True}),
    Derived("hubble-1000x335-progressive.jpg", "hubble_deep_field.jpg", (1000, 335), {"progressive": True}),
    Derived("motorcycle-335x337.png", "motorcycle_left.png", (335, 337)),
    Derived(
        "retina-1409x701-q50-420.jpg", "retina.jpg", (1409, 701), {"quality": 50, "subsampling": "4:2:0"}
    ),
    Derived("coffee-336x336.png", "coffee.png", (336, 336)),
    Derived("astronaut-57x43.png", "astronaut.png", (57, 43)),
    Derived("camera-511x383-grey.jpg", "camera.png", (511, 383), {"quality": 90}),
    Derived("chelsea-450x299-turned.jpg", "chelsea.png", (450, 299), {"quality": 92, "exif": orientation(6)}),
    Derived("flower-639x401-mirrored.jpg", "flower.jpg", (639, 401), {"quality": 92, "exif": orientation(7)}),
    Derived("retina-4234x2996-q80.jpg", "retina.jpg", (1411, 998), {"quality": 80}, enlarged),
    Derived("coins-303x17.png", "coins.png", (303, 17)),
    Derived("moon-5x409.jpg", "moon.png", (5, 409), {"quality": 90}),
]


def packaged_files(source: Path) -> Iterator[tuple[str, bytes]]:
    """The names and contents of the wanted files in a wheel or below a folder."""
    wanted = PACKAGED | WALLPAPERS
    if source.is_dir():
        for path in sorted(source.rglob("*")):
            if path.name in wanted and path.is_file():
                yield path.name, path.read_bytes()
        return
    with zipfile.ZipFile(source) as archive:
        for member in archive.namelist():
            if (name := member.rsplit("/", 1)[-1]) in wanted:
                yield name, archive.read(member)


def collect(sources: list[Path]) -> dict[str, bytes]:
    """The photographs by name, checked by their SHA-256."""
    found = {}
    for source in sources:
        for name, content in packaged_files(source):
            if hashlib.sha256(content).hexdigest() == (PACKAGED | WALLPAPERS)[name]:
                found[name] = content
            elif name in PACKAGED:
                raise SystemExit(f"{name} in {source} is not the file expected")
    if missing := sorted(set(PACKAGED) - set(found)):
        raise SystemExit(f"not found: {', '.join(missing)}")
    return dict(sorted(found.items()))


def cut_out(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The middle of a picture."""
    left, top = (image.width - size[0]) // 2, (image.height - size[1]) // 2
    return image.crop((left, top, left + size[0], top + size[1]))


def write(found: dict[str, bytes], output: Path) -> dict[str, str]:
    """Writes the pictures; returns their sources."""
    sources, smaller = {}, 0
    for name, content in found.items():
        if name not in WALLPAPERS or name in HUGE:
            (output / name).write_bytes(content)
            sources[name] = name
            continue
        image = Image.open(io.BytesIO(content)).convert("RGB")
        scale = LONG_SIDES[smaller % len(LONG_SIDES)] / max(image.size)
        smaller += 1
        size = round(image.width * scale), round(image.height * scale)
        target = f"{name.split('_by_')[0].lower()}-{size[0]}x{size[1]}.jpg"
        image.resize(size, Image.Resampling.LANCZOS).save(output / target, quality=88 + smaller)
        sources[target] = name
    for derived in DERIVED:
        image = cut_out(Image.open(io.BytesIO(found[derived.source])), derived.size)
        if derived.change:
            image = derived.change(image)
        image.save(output / derived.name, **derived.save)
        sources[derived.name] = derived.source
    return sources


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="the folder to write to")
    parser.add_argument("sources", type=Path, nargs="+", help="wheels and folders that hold the photographs")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    sources = write(collect(arguments.sources), arguments.output)
    if len(sources) < MIN_PHOTOS:
        raise SystemExit(f"only {len(sources)} pictures")
    (arguments.output / "sources.json").write_text(json.dumps(sources, indent=1) + "\n", encoding="utf-8")
    print(f"{len(sources)} pictures from {len(set(sources.values()))} photographs")


if __name__ == "__main__":
    main()

"""Makes small image files of many kinds, sound and broken, with what Pillow reads from them.

    python scripts/golden/make_edge_images.py

Writes tests/data/images/edge/ with `expected.json`. For each file that can be decoded: `stored`, the size
as stored; `size`, the size after `ImageOps.exif_transpose`; `points`, a handful of `[x, y, r, g, b]` of
`exif_transpose(image).convert("RGB")` (alpha is dropped, not blended); and `tolerance`, how far another
decoder may be off. For the others `error` is true. Needs only Pillow.
"""

from __future__ import annotations

import argparse
import json
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageOps

WIDTH, HEIGHT = 64, 48
ORIENTATION = 0x0112
GREY_NOTE = "16-bit grey: the points are value >> 8 (Pillow's own conversion to RGB is another one)"
LOSSY = 4

Pixels = list[list[tuple[int, ...]]]


def picture() -> Image.Image:
    """A picture without any symmetry, of flat patches in steps of 8 pixels."""
    image = Image.new("RGB", (WIDTH, HEIGHT), (200, 210, 220))
    draw = ImageDraw.Draw(image)
    for box, colour in [
        ((0, 0, 31, 15), (220, 40, 30)),  # red at the top left
        ((32, 0, 63, 7), (250, 240, 60)),  # a yellow strip at the top right
        ((0, 32, 15, 47), (30, 60, 200)),  # blue at the bottom left
        ((40, 24, 63, 47), (20, 140, 60)),  # green at the bottom right
        ((24, 16, 31, 39), (10, 10, 12)),  # a black bar in the middle
        ((48, 32, 55, 39), (245, 130, 200)),  # pink within the green
    ]:
        draw.rectangle(box, colour)
    return image


def exif(orientation: int, endian: str = ">") -> bytes:
    """An Exif block that holds nothing but an orientation."""
    block = Image.Exif()
    block.endian = endian
    block[ORIENTATION] = orientation
    return block.tobytes()


def png_chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png(size: tuple[int, int], depth: int, colour_type: int, data: bytes, interlace: int = 0) -> bytes:
    """A PNG file from its scanlines (with their filter bytes), compressed here."""
    header = struct.pack(">IIBBBBB", *size, depth, colour_type, 0, 0, interlace)
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(data, 9)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def png16(pixels: Pixels, colour_type: int) -> bytes:
    """A PNG file with 16 bits per channel."""
    lines = [b"\0" + b"".join(struct.pack(f">{len(pixel)}H", *pixel) for pixel in row) for row in pixels]
    return png((len(pixels[0]), len(pixels)), 16, colour_type, b"".join(lines))


def deep(image: Image.Image) -> Pixels:
    """The pixels with 16 bits per channel, the lower byte unlike the upper one."""
    return [
        [
            tuple((value << 8) | (x * 7 + y * 13 + 31 * channel) % 256 for channel, value in enumerate(pixel))
            for x in range(image.width)
            for pixel in [image.getpixel((x, y)) if len(image.getbands()) > 1 else (image.getpixel((x, y)),)]
        ]
        for y in range(image.height)
    ]


def interlaced_png(image: Image.Image) -> bytes:
    """An Adam7-interlaced RGB PNG."""
    data = b""
    for left, top, across, down in [
        (0, 0, 8, 8),
        (4, 0, 8, 8),
        (0, 4, 4, 8),
        (2, 0, 4, 4),
        (0, 2, 2, 4),
        (1, 0, 2, 2),
        (0, 1, 1, 2),
    ]:
        for y in range(top, image.height, down):
            row = b"".join(bytes(image.getpixel((x, y))) for x in range(left, image.width, across))
            data += b"\0" + row if row else b""
    return png(image.size, 8, 2, data, interlace=1)


def ycck_jpeg(image: Image.Image, path: Path) -> None:
    """A JPEG in YCCK: written by Pillow as CMYK, with the channels and the Adobe marker made to say YCCK."""
    # Adobe stores C, M, Y, K inverted, and so does Pillow when it writes CMYK; YCbCr stands for 255 - C, 255
    # - M, 255 - Y as stored, that is for the inverted picture.
    luma, blue, red = (ImageOps.invert(band) for band in ImageOps.invert(image).convert("YCbCr").split())
    black = Image.new("L", image.size, 30)
    Image.merge("CMYK", (luma, blue, red, black)).save(path, quality=92)
    content = bytearray(path.read_bytes())
    marker = content.index(b"\xff\xee\x00\x0eAdobe")
    content[marker + 15] = 2  # the colour transform
    path.write_bytes(content)


def with_alpha(image: Image.Image) -> Image.Image:
    """The picture with an alpha channel from 0 (transparent) on the left to 255 on the right."""
    alpha = Image.new("L", image.size)
    alpha.putdata([x * 255 // (image.width - 1) for _ in range(image.height) for x in range(image.width)])
    result = image.copy()
    result.putalpha(alpha)
    return result


def write_sound(folder: Path) -> dict[str, dict[str, Any]]:
    """Writes the files that can be decoded; returns what is known of each one (tolerance, note)."""
    image = picture()
    small = image.resize((WIDTH // 2, HEIGHT // 2), Image.Resampling.NEAREST)
    palette = image.quantize(16, dither=Image.Dither.NONE)
    long_palette = palette.copy()
    long_palette.putpalette(palette.getpalette() + [value % 256 for value in range(3 * 240)])
    made: dict[str, dict[str, Any]] = {}

    def save(name: str, what: Image.Image, tolerance: int = 0, note: str = "", **options: Any) -> None:
        what.save(folder / name, **options)
        made[name] = {"tolerance": tolerance} | ({"note": note} if note else {})

    def put(name: str, content: bytes, note: str = "") -> None:
        (folder / name).write_bytes(content)
        made[name] = {"tolerance": 0} | ({"note": note} if note else {})

    sharp = {"quality": 92, "subsampling": 0}
    for orientation in range(1, 9):
        save(f"orientation-{orientation}.jpg", image, LOSSY, exif=exif(orientation), **sharp)
    save("orientation-6-little-endian.jpg", image, LOSSY, exif=exif(6, "<"), **sharp)
    save("orientation-9.jpg", image, LOSSY, "no such orientation: ignored", exif=exif(9), **sharp)
    save("orientation-6.png", image, exif=exif(6), optimize=True)
    save("orientation-6-lossless.webp", image, lossless=True, exif=exif(6))

    save("colour-420.jpg", image, 3 * LOSSY, quality=90, subsampling=2)
    save("progressive.jpg", image, LOSSY, progressive=True, **sharp)
    save("grey.jpg", image.convert("L"), LOSSY, quality=92)
    save("cmyk.jpg", image.convert("CMYK"), LOSSY, "inverted, as Adobe and Pillow write it", quality=92)
    ycck_jpeg(image, folder / "ycck.jpg")
    made["ycck.jpg"] = {"tolerance": LOSSY}
    save("rgb-restarts.jpg", image, LOSSY, restart_marker_rows=1, **sharp)

    save("rgb.png", image, optimize=True)
    save("grey.png", image.convert("L"), optimize=True)
    save("grey-alpha.png", with_alpha(image).convert("LA"), optimize=True)
    save("rgb-alpha.png", with_alpha(image), optimize=True)
    save("palette.png", long_palette)
    alphas = bytes(255 - 15 * index for index in range(16))
    save("palette-transparency.png", palette, transparency=alphas, optimize=True)
    save("palette-4-bit.png", palette, bits=4, optimize=True)
    save("rgb-transparent-colour.png", image, transparency=image.getpixel((0, 0)), optimize=True)
    save("1-bit.png", image.convert("1", dither=Image.Dither.NONE), optimize=True)
    put("interlaced.png", interlaced_png(image))
    put("grey-16-bit.png", png16(deep(small.convert("L")), 0), GREY_NOTE)
    put("rgb-16-bit.png", png16(deep(small), 2))
    put("rgb-alpha-16-bit.png", png16(deep(with_alpha(small)), 6))
    save("1x1.png", Image.new("RGB", (1, 1), (12, 200, 77)))
    stripes = Image.new("RGB", (20000, 1))
    stripes.putdata([(x // 79 % 256, x // 997 * 12 % 256, 255 - x // 79 % 256) for x in range(20000)])
    save("20000x1.png", stripes, optimize=True)
    save("1x20000.png", stripes.transpose(Image.Transpose.ROTATE_270), optimize=True)

    inverted = ImageOps.invert(image)
    save("still.gif", palette)
    save(
        "animated.gif",
        palette,
        0,
        "the first frame",
        save_all=True,
        append_images=[inverted.quantize(16)],
        loop=0,
    )
    save("animated.png", image, 0, "the first frame", save_all=True, append_images=[inverted], optimize=True)
    save("animated.webp", image, 0, "the first frame", save_all=True, append_images=[inverted], lossless=True)
    save("lossy.webp", image, 3 * LOSSY, quality=90)
    save("lossless.webp", image, lossless=True)
    save("lossless-alpha.webp", with_alpha(image), lossless=True, exact=True)
    save("lossy-alpha.webp", with_alpha(image), 3 * LOSSY, quality=90, exact=True)
    save("rgb.bmp", image)
    save("palette.bmp", long_palette)
    image.save(folder / "really-a-png.jpg", format="PNG", optimize=True)
    made["really-a-png.jpg"] = {"tolerance": 0, "note": "the content counts, not the name"}
    image.save(folder / "really-a-jpeg.png", format="JPEG", **sharp)
    made["really-a-jpeg.png"] = {"tolerance": LOSSY, "note": "the content counts, not the name"}
    return made


def write_broken(folder: Path) -> dict[str, str]:
    """Writes the files that cannot be decoded; returns what is wrong with each one."""
    jpeg = (folder / "rgb-restarts.jpg").read_bytes()
    plain = (folder / "rgb.png").read_bytes()
    scanline = b"\0" * (1 + (30000 + 7) // 8)
    files = {
        "empty.jpg": (b"", "no bytes at all"),
        "text.jpg": (b"This is not a picture.\n" * 20, "text"),
        "truncated.jpg": (jpeg[: len(jpeg) * 2 // 3], "cut off within the picture's data"),
        "header-only.jpg": (jpeg[:100], "cut off within the header"),
        "truncated.png": (plain[: len(plain) * 2 // 3], "cut off within the picture's data"),
        "html.png": (b"<!DOCTYPE html><html><title>404 Not Found</title></html>\n", "an error page"),
        "signature-only.png": (plain[:8], "nothing behind the signature"),
        "bomb.png": (
            png((30000, 30000), 1, 0, scanline * 30000),
            "a decompression bomb: 30000 x 30000 pixels in few bytes",
        ),
        "bomb-claimed.png": (
            png((30000, 30000), 8, 2, scanline),
            "claims 30000 x 30000 pixels and holds a few of them",
        ),
        "zero-width.png": (png((0, 10), 8, 2, b"\0" * 10), "a width of 0"),
    }
    for name, (content, _) in files.items():
        (folder / name).write_bytes(content)
    return {name: note for name, (_, note) in files.items()}


def points(image: Image.Image) -> list[list[int]]:
    """A handful of pixels, as far apart as the picture allows."""
    places = [(1, 1), (14, 1), (1, 14), (14, 14), (7, 8), (9, 11), (12, 9), (4, 7), (11, 2)]
    found = {(x * image.width // 16, y * image.height // 16) for x, y in places}
    return [[x, y, *image.getpixel((x, y))] for x, y in sorted(found)]


def expectation(path: Path, known: dict[str, Any]) -> dict[str, Any]:
    """What Pillow reads from a file."""
    image = Image.open(path)
    stored = image.size
    upright = ImageOps.exif_transpose(image)
    if known.get("note") == GREY_NOTE:
        upright = upright.convert("I")
        upright = Image.frombytes(
            "L", upright.size, bytes(value >> 8 for value in upright.get_flattened_data())
        )
    rgb = upright.convert("RGB")
    return {"file": path.name, "stored": stored, "size": rgb.size, "points": points(rgb)} | known


def check_error(path: Path) -> None:
    """Makes sure that Pillow cannot decode a file."""
    try:
        Image.open(path).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return
    raise SystemExit(f"Pillow decodes {path.name}")


def main() -> None:
    data = Path(__file__).resolve().parents[2] / "tests" / "data"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=data / "images" / "edge")
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    warnings.filterwarnings("ignore", "Palette images with Transparency")

    entries = [expectation(folder / name, known) for name, known in write_sound(folder).items()]
    for name, note in write_broken(folder).items():
        check_error(folder / name)
        entries.append({"file": name, "error": True, "note": note})
    lines = ",\n ".join(json.dumps(entry) for entry in sorted(entries, key=lambda entry: entry["file"]))
    (folder / "expected.json").write_text(f"[\n {lines}\n]\n", encoding="utf-8")
    total = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{len(entries)} files, {total / 1000:.0f} kB")


if __name__ == "__main__":
    main()

"""Makes the seeds of the fuzz targets: small, whole examples of everything that they read.

Writes fuzz/seeds/{target}/*; run it in the checkout with the Python of tests/data/fetched/venv. `--bundle` is
an exported bundle, whose manifest and projector become the seed of target `bundle`.

Usage: make_fuzz_seeds.py [--bundle BUNDLE_DIR]
"""

import argparse
import gzip
import io
import json
import pickle
import random
import struct
import sys
import tarfile
import types
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
SEEDS = ROOT / "fuzz" / "seeds"
CHECKPOINTS = ROOT / "tests" / "data" / "checkpoints"


def write(target: str, name: str, content: bytes) -> None:
    """Writes one seed."""
    path = SEEDS / target / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def picture(mode: str, side: int = 20) -> Image.Image:
    """A gradient, so that every decoder has something to do."""
    image = Image.new("RGB", (side, side - 3))
    image.putdata([(13 * x % 256, 7 * x % 256, 255 - x % 256) for x in range(side * (side - 3))])
    return image.convert(mode)


def encoded(mode: str, kind: str, **options: object) -> bytes:
    """The picture as a file."""
    buffer = io.BytesIO()
    picture(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def images() -> dict[str, bytes]:
    """Each format in each of its forms."""
    exif = Image.Exif()
    exif[274] = 6
    seeds = {
        "baseline.jpg": encoded("RGB", "JPEG", quality=80),
        "exif-444.jpg": encoded("RGB", "JPEG", exif=exif, subsampling=0),
        "progressive.jpg": encoded("RGB", "JPEG", progressive=True),
        "restarts.jpg": encoded("RGB", "JPEG", restart_marker_blocks=2),
        "grey.jpg": encoded("L", "JPEG"),
        "cmyk.jpg": encoded("CMYK", "JPEG"),
        "rgb.png": encoded("RGB", "PNG", exif=exif),
        "alpha.png": encoded("RGBA", "PNG"),
        "palette.png": encoded("P", "PNG", transparency=0),
        "one-bit.png": encoded("1", "PNG"),
        "wide.png": encoded("I;16", "PNG"),
        "lossy.webp": encoded("RGB", "WEBP", quality=50, exif=exif),
        "lossless.webp": encoded("RGBA", "WEBP", lossless=True),
        "still.gif": encoded("P", "GIF"),
        "plain.bmp": encoded("RGB", "BMP"),
        "palette.bmp": encoded("P", "BMP"),
        "one-bit.bmp": encoded("1", "BMP"),
    }
    frames = [picture("P"), picture("P").rotate(90)]
    for kind, name in [("GIF", "moving.gif"), ("WEBP", "moving.webp"), ("PNG", "moving.png")]:
        buffer = io.BytesIO()
        frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
        seeds[name] = buffer.getvalue()
    for name in ["rletopdown", "pal8rle", "pal4rle", "pal8os2v2", "rgb16-565"]:
        for path in (ROOT / "tests/data/fetched/pillow/images/bmp").glob(f"*/{name}.bmp"):
            seeds[path.name] = path.read_bytes()
    return seeds


def tar(members: dict[str, bytes], kind: int) -> bytes:
    """A tar in one of Python's formats."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "0000.jpg"
        archive.addfile(link)
    return buffer.getvalue().rstrip(b"\0") + bytes(1024)


def tars() -> dict[str, bytes]:
    """Webdataset shards."""
    jpeg = encoded("L", "JPEG")
    sidecar = json.dumps({"url": "u", "caption": "c", "score": float("nan"), "deep": [[{}]]}).encode()
    members = {
        "0000.jpg": jpeg,
        "0000.txt": b"a caption",
        "0000.json": sidecar,
        "./x.y/0001.seg.png": b"\x89PNG",
    }
    long = {f"{'folder/' * 30}0002.jpg": jpeg, "0003.bin": b"not read"}
    plain = tar(members, tarfile.USTAR_FORMAT)
    return {
        "plain.tar": plain,
        "gnu.tar": tar(long, tarfile.GNU_FORMAT),
        "pax.tar": tar(long, tarfile.PAX_FORMAT),
        "plain.tar.gz": gzip.compress(plain, mtime=0),
    }


def parquet() -> bytes:
    """Two images and a null, as `datasets` has them, in two pages."""
    rows = [
        {"bytes": encoded("L", "JPEG"), "path": "a.jpg"},
        {"bytes": encoded("L", "PNG"), "path": "b"},
        None,
    ]
    table = pa.table({"image": pa.array(rows), "caption": ["a", "b", "c"], "score": [0.5, None, 1.0]})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="snappy", data_page_size=1, store_schema=False)
    return buffer.getvalue()


def journal() -> bytes:
    """A header and two rows: length, CRC-32 and payload of each (src/pipeline/write/journal.rs)."""
    header = {"recaption_journal": 1, "shard": "s", "settings": "x", "identity": None, "replaces": None}
    payloads = [json.dumps(header).encode()]
    for index in range(2):
        row = {"key": f"k{index}", "status": "ok", "re_caption": "a caption", "source": "s.tar"}
        entry = json.dumps({"index": index, "row": row, "token_ids": [1, 2]}).encode()
        payloads.append(struct.pack("<I", len(entry)) + entry)
    return b"".join(struct.pack("<II", len(p), zlib.crc32(p)) + p for p in payloads)


def torch_files() -> dict[str, bytes]:
    """What torch.save writes, without torch: its classes are stand-ins of the same names."""

    class FloatStorage:
        pass

    def rebuild_tensor(*_: object) -> None:
        pass

    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    FloatStorage.__module__, FloatStorage.__qualname__ = "torch", "FloatStorage"
    rebuild_tensor.__module__, rebuild_tensor.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    rebuild_tensor.__name__ = "_rebuild_tensor_v2"
    torch.FloatStorage, utils._rebuild_tensor_v2 = FloatStorage, rebuild_tensor  # type: ignore[attr-defined]
    sys.modules |= {"torch": torch, "torch._utils": utils}

    class Tensor:
        def __reduce__(self) -> tuple[Callable[..., None], tuple[object, ...]]:
            return rebuild_tensor, (Storage(), 0, (2, 2), (2, 1), False, OrderedDict())

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: object) -> object:
            return ("storage", FloatStorage, "0", "cpu", 4) if isinstance(obj, Storage) else None

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump({"model.weight": Tensor()})
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for name, content in [("data.pkl", buffer.getvalue()), ("data/0", bytes(16)), ("version", b"3\n")]:
            file.writestr(zipfile.ZipInfo(f"archive/{name}"), content)
    return {"zip.bin": b"\x01" + archive.getvalue()}


def safetensors() -> bytes:
    """One tensor."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}).encode()
    return b"\0" + struct.pack("<Q", len(header)) + header + bytes(16)


def checkpoints() -> dict[str, bytes]:
    """The small files of the committed checkpoints, each ended by a byte of 0."""
    names = ["config.json", "generation_config.json", "tokenizer_config.json", "preprocessor_config.json"]
    names += ["processor_config.json", "tokenizer.json", "chat_template.jinja"]
    seeds = {}
    for name in ["minimal-config-f32", "saved-v5-bf16", "original-embedded"]:
        files = [CHECKPOINTS / name / file for file in names]
        seeds[name] = b"\0".join(file.read_bytes() if file.exists() else b"" for file in files)
    return seeds


def main() -> None:
    """Writes all seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path)
    arguments = parser.parse_args()
    for target, seeds in [("image", images()), ("tar", tars()), ("checkpoint", checkpoints())]:
        for name, content in seeds.items():
            write(target, name, content)
    for name, content in torch_files().items():
        write("weights", name, content)
    write("weights", "one.safetensors", safetensors())
    generator = random.Random(1)
    for index in range(12):
        write("kernels", f"{index:02}", bytes([index]) + generator.randbytes(60))
    write("parquet", "small.parquet", parquet())
    write("journal", "two-rows", journal())
    sidecars = [
        b'{"url": "u", "a": [1, {"b": null}], "c": "\\u00e9\\n"}',
        b'{"score": NaN, "low": -Infinity}',
        b"[[[",
    ]
    for index, content in enumerate(sidecars):
        write("sidecar", f"{index}.json", content)
    template = (CHECKPOINTS / "minimal-config-f32" / "chat_template.json").read_text()
    write("text", "chat.jinja", json.loads(template)["chat_template"].encode())
    loop = "{% for m in messages %}{{ m['content'] | trim }}{% if loop.last %}<image>{% endif %}{% endfor %}"
    write("text", "loop.jinja", loop.encode())
    write("text", "range", b"a{00..11}")
    write("tokenizer", "tiny.json", (CHECKPOINTS / "minimal-config-f32" / "tokenizer.json").read_bytes())
    if arguments.bundle:
        manifest = (arguments.bundle / "manifest.json").read_bytes()
        write("bundle", "llava", manifest + b"\0" + (arguments.bundle / "projector.onnx").read_bytes())


if __name__ == "__main__":
    main()

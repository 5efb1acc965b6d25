"""Makes small inputs with the programs that users make theirs with, and what those programs read from them.

    pip install img2dataset==1.47.0 webdataset==0.2.111 pyarrow==26.0.1 datasets==5.2.0 pillow==13.0.0
    python scripts/golden/make_shards.py

Writes tests/data/shards/: `img2dataset.tar` with its `.parquet` and `_stats.json`, downloaded by img2dataset
from a web server on loopback that lacks one of the pictures; `webdataset.tar` by webdataset's TarWriter;
`pax.tar` and `gnu.tar` with long names by Python's tarfile; `datasets.parquet` by Hugging Face datasets;
`plain.parquet` by pyarrow, with bytes, types of all kinds, nulls and several row groups; and `expected.json`,
the rows as webdataset, tarfile and pyarrow read them again.
"""

from __future__ import annotations

import argparse
import datetime
import decimal
import functools
import hashlib
import io
import json
import shutil
import tarfile
import tempfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import webdataset as wds
from img2dataset import download
from PIL import Image, ImageDraw

COLOURS = ["crimson", "seagreen", "royalblue", "gold", "orchid", "sienna"]


def picture(index: int, file_format: str = "JPEG", size: tuple[int, int] = (56, 40)) -> bytes:
    """A picture that differs from its neighbours."""
    image = Image.new("RGB", size, COLOURS[index % len(COLOURS)])
    ImageDraw.Draw(image).ellipse((8, 4, 12 + 4 * index, 34), fill="white")
    buffer = io.BytesIO()
    image.save(buffer, file_format, quality=90)
    return buffer.getvalue()


def sha256(contents: bytes) -> str:
    return hashlib.sha256(contents).hexdigest()


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves a folder and says nothing."""

    def log_message(self, format: str, *args: Any) -> None:
        pass


def img2dataset_shard(out: Path) -> None:
    """Six pictures asked for, five there."""
    with tempfile.TemporaryDirectory() as scratch:
        site = Path(scratch, "site")
        site.mkdir()
        for index in range(6):
            if index != 2:
                Path(site, f"{index}.jpg").write_bytes(picture(index))
        server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(QuietHandler, directory=str(site)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        rows = {
            "url": [f"{base}/{index}.jpg" for index in range(6)],
            "caption": [f"picture {index}, “the {COLOURS[index]} one”" for index in range(6)],
            "uid": [f"{index:032x}" for index in range(6)],
            "score": [0.25, float("nan"), 0.5, None, 0.75, 1.0],
        }
        pq.write_table(pa.table(rows), Path(scratch, "list.parquet"))
        download(
            url_list=str(Path(scratch, "list.parquet")),
            input_format="parquet",
            url_col="url",
            caption_col="caption",
            save_additional_columns=["uid", "score"],
            output_folder=str(Path(scratch, "out")),
            output_format="webdataset",
            image_size=48,
            resize_mode="keep_ratio",
            processes_count=1,
            thread_count=4,
            number_sample_per_shard=100,
            disallowed_header_directives=[],
        )
        server.shutdown()
        for name in ["00000.tar", "00000.parquet", "00000_stats.json"]:
            shutil.copy(Path(scratch, "out", name), Path(out, name.replace("00000", "img2dataset")))


def webdataset_shard(path: Path) -> None:
    with wds.TarWriter(str(path)) as sink:
        for index in range(4):
            sink.write(
                {
                    "__key__": f"folder.v1/{index:06d}",
                    "png" if index % 2 else "jpg": picture(index, "PNG" if index % 2 else "JPEG"),
                    "txt": f"caption {index} ünïcode",
                    "json": {"url": f"https://example.org/{index}", "nested": {"list": [1, None, "x"]}},
                }
            )


def long_names(path: Path, tar_format: int) -> None:
    """Names beyond a header's 100 bytes and beyond ASCII, in members that lie apart, and a link."""
    long = "very/" + "long-" * 40 + "näme"
    members = [
        (f"{long}-0.jpg", picture(0)),
        (f"{long}-1.jpg", picture(1)),
        (f"{long}-1.txt", b"one"),
        (f"{long}-0.json", b'{"caption": "zero"}'),
        ("../../outside.jpg", picture(2)),
    ]
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, contents in members:
            info = tarfile.TarInfo(name)
            info.size = len(contents)
            tar.addfile(info, io.BytesIO(contents))
        link = tarfile.TarInfo("link.jpg")
        link.type = tarfile.SYMTYPE
        link.linkname = "/etc/passwd"
        tar.addfile(link)


def datasets_table(path: Path) -> None:
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["a", "b"]),
        }
    )
    images = [{"bytes": picture(index), "path": f"{index}.jpg"} for index in range(5)]
    images.append({"bytes": None, "path": "elsewhere.jpg"})
    images.append(None)
    rows = {
        "image": images,
        "text": [f"text {index}" for index in range(6)] + [None],
        "label": [0, 1, 0, 1, 0, 1, 0],
    }
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path), batch_size=3)


def plain_table(path: Path) -> None:
    count = 7
    day = datetime.datetime(2024, 2, 29, 12, 34, 56, 789000)
    table = pa.table(
        {
            "weight": pa.array([0.1, float("nan"), None, 1.5, -2.0, 3.25, 1e30], pa.float32()),
            "thumbnail": pa.array([b"not the image"] * count, pa.binary()),
            "jpg": pa.array([picture(index) for index in range(count)], pa.large_binary()),
            "key": pa.array([f"k{index}" for index in range(count)], pa.large_string()),
            "url": [f"https://example.org/{index}?a=b#c" for index in range(count)],
            "TEXT": pa.array(
                ["same", "same", None, "same", "other", "other", "\N{CAT FACE}"]
            ).dictionary_encode(),
            "sha256": [sha256(picture(index)) for index in range(count)],
            "tags": pa.array([["a"], [], None, ["b", None], ["c"], ["d"], ["e"]], pa.list_(pa.string())),
            "box": [{"x": index, "y": None, "raw": b"bytes"} for index in range(count)],
            "seen": pa.array([day] * count, pa.timestamp("us", tz="UTC")),
            "day": pa.array([day.date()] * count),
            "price": pa.array([decimal.Decimal("12.50")] * count, pa.decimal128(9, 2)),
            "big": pa.array([2**64 - 1 - index for index in range(count)], pa.uint64()),
            "ok": [True, False, None, True, False, True, False],
            "counts": pa.array([[("one", 1)]] * count, pa.map_(pa.string(), pa.int32())),
        }
    )
    pq.write_table(table, path, row_group_size=3, compression="zstd")


def tar_rows(path: Path) -> list[dict[str, Any]]:
    """The samples of a tar by key, in the order of their images, as tarfile reads the members."""
    rows: dict[str, dict[str, Any]] = {}
    with tarfile.open(path) as tar:
        for info in tar:
            if not info.isreg():
                continue
            contents = tar.extractfile(info).read()
            folder, _, name = info.name.rpartition("/")
            stem, _, extension = name.partition(".")
            row = rows.setdefault(f"{folder}/{stem}" if folder else stem, {})
            if extension == "txt":
                row["txt"] = contents.decode()
            elif extension == "json":
                row["json"] = contents.decode()
            else:
                row["image_sha256"] = sha256(contents)
    return [{"key": key, **row} for key, row in rows.items() if "image_sha256" in row]


def webdataset_rows(path: Path) -> list[dict[str, Any]]:
    """The same, as webdataset's own reader groups them."""
    rows = []
    for sample in wds.WebDataset(str(path), shardshuffle=False):
        image = sample.get("jpg") or sample.get("png")
        row = {"key": sample["__key__"], "image_sha256": sha256(image)}
        row |= {name: sample[name].decode() for name in ("txt", "json") if name in sample}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("tests/data/shards"))
    out: Path = parser.parse_args().output
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    img2dataset_shard(out)
    webdataset_shard(out / "webdataset.tar")
    long_names(out / "pax.tar", tarfile.PAX_FORMAT)
    long_names(out / "gnu.tar", tarfile.GNU_FORMAT)
    datasets_table(out / "datasets.parquet")
    plain_table(out / "plain.parquet")
    expected: dict[str, Any] = {
        "img2dataset.tar": webdataset_rows(out / "img2dataset.tar"),
        "webdataset.tar": webdataset_rows(out / "webdataset.tar"),
        "pax.tar": tar_rows(out / "pax.tar"),
        "gnu.tar": tar_rows(out / "gnu.tar"),
    }
    table = pq.read_table(out / "datasets.parquet")
    expected["datasets.parquet"] = [
        {
            "image_sha256": sha256(row["image"]["bytes"]) if row["image"] and row["image"]["bytes"] else None,
            "text": row["text"],
        }
        for row in table.to_pylist()
    ]
    table = pq.read_table(out / "plain.parquet", columns=["key", "url", "TEXT", "sha256", "jpg"])
    expected["plain.parquet"] = [
        {**{name: row[name] for name in ("key", "url", "TEXT", "sha256")}, "image_sha256": sha256(row["jpg"])}
        for row in table.to_pylist()
    ]
    (out / "expected.json").write_text(json.dumps(expected, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()

"""Reads what `recaption run` wrote with the libraries that its users read it with, and compares.

    check_outputs.py parquet FOLDER
        pyarrow, and `datasets` beside a table with Recap-DataComp-1B's columns
    check_outputs.py webdataset FOLDER INPUT.tar...
        the `webdataset` library; images byte for byte those of the input

Prints one JSON object with what was found.
"""

import argparse
import json
import tempfile
from pathlib import Path

# As the dataset's viewer shows them.
RECAP_COLUMNS = {
    "url": "string",
    "re_caption": "string",
    "org_caption": "string",
    "sha256": "string",
    "key": "string",
    "re_clip_score": "double",
    "org_clip_score": "double",
    "re_length": "int64",
    "org_length": "int64",
    "re_gpt4v_score": "int64",
    "org_gpt4v_score": "int64",
}


def check_parquet(folder: Path) -> dict[str, object]:
    """The rows of all files, through pyarrow and through `datasets` behind rows of the original dataset."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    datasets.disable_progress_bars()
    files = sorted(str(path) for path in folder.glob("captions-*.parquet"))
    tables = [pq.read_table(file) for file in files]
    for table in tables:
        table.validate(full=True)
        for name, kind in RECAP_COLUMNS.items():
            found = str(table.schema.field(name).type)
            assert found == kind, f"{name}: {found}, not {kind}"
    schema = pa.schema([pa.field(name, pa.type_for_alias(kind)) for name, kind in RECAP_COLUMNS.items()])
    original = {name: ["x"] if kind == "string" else [1] for name, kind in RECAP_COLUMNS.items()}
    with tempfile.TemporaryDirectory() as cache:
        pq.write_table(pa.table(original, schema=schema), f"{cache}/original.parquet")
        load = {"split": "train", "cache_dir": cache}
        ours = datasets.load_dataset("parquet", data_files=files, **load)
        theirs = datasets.load_dataset("parquet", data_files=f"{cache}/original.parquet", **load)
        both = datasets.concatenate_datasets([theirs, ours.select_columns(list(RECAP_COLUMNS))])
        assert both.features == theirs.features, both.features
        assert both.num_rows == ours.num_rows + 1
        keys = ours["key"][:]
        captions = ours["re_caption"][:]
    assert keys == [key for table in tables for key in table["key"].to_pylist()]
    return {"rows": len(keys), "keys": keys, "captions": captions}


def check_webdataset(folder: Path, inputs: list[Path]) -> dict[str, object]:
    """The samples of all tars, the images compared with those of the input tars."""
    import webdataset

    def samples(paths: list[Path]) -> list[dict[str, object]]:
        # One shard a worker and no shuffling: in order.
        return list(
            webdataset.WebDataset([str(path) for path in paths], shardshuffle=False, empty_check=False)
        )

    written = samples(sorted(folder.glob("captions-*.tar")))
    originals = {sample["__key__"]: sample for sample in samples(inputs)} if inputs else {}
    images = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
    found = []
    for sample in written:
        columns = json.loads(sample["json"])
        image = next((sample[name] for name in images if name in sample), None)
        if columns["status"] == "ok":
            assert sample["txt"].decode() == columns["re_caption"], sample["__key__"]
            original = originals.get(columns["key"])
            if original is not None:
                assert image in [original[name] for name in images if name in original], sample["__key__"]
        else:
            assert "txt" not in sample and image is None, sample["__key__"]
        found.append({"member": sample["__key__"], **columns})
    return {"rows": len(found), "samples": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("format", choices=["parquet", "webdataset"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("inputs", type=Path, nargs="*")
    arguments = parser.parse_args()
    if arguments.format == "parquet":
        result = check_parquet(arguments.folder)
    else:
        result = check_webdataset(arguments.folder, arguments.inputs)
    print(json.dumps(result))


if __name__ == "__main__":
    main()

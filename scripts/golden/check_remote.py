"""Compares what `recaption run` wrote to an S3 store with a local run, through pyarrow's own S3 client.

    check_remote.py HOST:PORT BUCKET/PREFIX FOLDER_OF_THE_LOCAL_RUN

Prints one JSON object with what was found.
"""

import argparse
import json
import tempfile
from pathlib import Path


def main() -> None:
    import datasets
    import pyarrow.dataset as ds
    import pyarrow.parquet as pq
    from pyarrow import fs

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("endpoint")
    parser.add_argument("prefix")
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    store = fs.S3FileSystem(
        access_key="testing",
        secret_key="testing",
        region="us-east-1",
        scheme="http",
        endpoint_override=arguments.endpoint,
    )
    found = store.get_file_info(fs.FileSelector(arguments.prefix))
    files = sorted(info.path for info in found if info.path.endswith(".parquet"))
    remote = ds.dataset(files, filesystem=store, format="parquet").to_table()
    remote.validate(full=True)
    names = [file.rsplit("/", 1)[1] for file in files]
    local = ds.dataset([str(arguments.folder / name) for name in names], format="parquet").to_table()
    assert remote.equals(local), "other rows than the local run's"

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as cache:
        copies = []
        for file, name in zip(files, names, strict=True):
            copies.append(f"{cache}/{name}")
            pq.write_table(pq.read_table(file, filesystem=store), copies[-1])
        loaded = datasets.load_dataset("parquet", data_files=copies, split="train", cache_dir=cache)
        assert loaded["re_caption"][:] == local["re_caption"].to_pylist()
    print(json.dumps({"files": names, "rows": remote.num_rows}))


if __name__ == "__main__":
    main()

"""Makes the small torch files that the reader in `export/src/torch_file` is tested with.

`torch.save` writes them, or they are such a file with one thing changed. `expected.json` lists what
torch itself loads from the good files: name, type, shape and bytes of every tensor. The storages' keys in
legacy files are addresses and differ from run to run, nothing else does.

    python scripts/golden/make_torch_files.py --out export/tests/data/torch_file
"""

import argparse
import collections
import io
import json
import operator
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

DTYPE_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}

Tensors = dict[str, torch.Tensor]


class Call:
    """An object whose pickle calls `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return self.call


def module_weights() -> Tensors:
    """A state dict as a module gives it, with its `_metadata`."""
    torch.manual_seed(0)
    weights: Tensors = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2)).state_dict()
    return weights


def all_dtypes() -> Tensors:
    """One tensor of each type that the reader knows by name."""
    return {str(dtype).removeprefix("torch."): torch.arange(5).to(dtype) for dtype in DTYPE_NAMES}


def views() -> Tensors:
    """Contiguous parts of one storage, and strides that are odd but never used."""
    whole = torch.arange(24.0).reshape(4, 6)
    return {
        "middle": whole[1:3],
        "last_row": whole[3],
        "element": whole[2, 3],
        "column_of_a_row": whole[1:2, 2:4],
        "one_row_transposed": torch.arange(3.0).reshape(1, 3).t(),
    }


def tied() -> Tensors:
    """Two names on one storage."""
    embedding = torch.nn.Parameter(torch.arange(6.0).reshape(3, 2))
    return {"embed_tokens.weight": embedding, "lm_head.weight": embedding}


def empty() -> Tensors:
    """Tensors without elements beside one that has some."""
    return {
        "none": torch.empty(0),
        "no_columns": torch.empty(3, 0, 2),
        "end": torch.arange(4.0)[4:],
        "some": torch.ones(1),
    }


def parameters() -> Tensors:
    """What `mm_projector.bin` holds: parameters in half precision."""
    return {
        "model.mm_projector.0.weight": torch.nn.Parameter(torch.arange(6.0).reshape(2, 3).bfloat16()),
        "model.mm_projector.0.bias": torch.nn.Parameter(
            torch.tensor([0.5, -2.0]).half(), requires_grad=False
        ),
    }


def saved(content: object, **options: Any) -> bytes:
    """The bytes that `torch.save` writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def legacy(content: object, protocol: int = 2) -> bytes:
    """The bytes that `torch.save` of torch before 1.6 writes."""
    return saved(content, _use_new_zipfile_serialization=False, pickle_protocol=protocol)


def repacked(archive: bytes, method: int = zipfile.ZIP_STORED, **records: bytes | None) -> bytes:
    """The archive with some records replaced, or dropped where None; named without folder, `/` as `__`."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as source, zipfile.ZipFile(buffer, "w", method) as target:
        for entry in source.infolist():
            key = entry.filename.partition("/")[2].replace(".", "_").replace("/", "__")
            content = records.get(key, source.read(entry))
            if content is not None:
                target.writestr(zipfile.ZipInfo(entry.filename), content, method)
    return buffer.getvalue()


def good_files() -> dict[str, tuple[Tensors, bytes]]:
    """Tensors by the name of the file that holds them, and that file."""
    weights = module_weights()
    with mock.patch.multiple(zipfile, ZIP64_LIMIT=1, ZIP_FILECOUNT_LIMIT=1):
        zip64 = repacked(saved(weights))
    training = {"epoch": 3, "lr": 1e-4, "name": "run\n1", "done": None, "big": 1 << 80, "args": [1, (2, "x")]}
    optimizer = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
    files = {
        "zip_protocol_2.pt": (weights, saved(weights)),
        "zip_protocol_5.pt": (weights, saved(weights, pickle_protocol=5)),
        "zip64.pt": (weights, zip64),
        "without_byteorder.pt": (weights, repacked(saved(weights), byteorder=None)),
        "legacy.pt": (weights, legacy(weights)),
        "extras.pt": (weights, legacy({**weights, **training, "seed": b"\0"}, 3)),
        "state_dict.pt": (weights, saved({**training, "state_dict": weights, "optimizer": optimizer})),
        "model.pt": (weights, legacy({"model": weights, "optimizer": optimizer, "module": {}})),
        "module_in_model.pt": (weights, legacy({"model": {"module": weights, "step": 7}})),
    }
    for make in (all_dtypes, views, tied, empty, parameters):
        files[f"{make.__name__}.pt"] = (make(), saved(make()))
        files[f"{make.__name__}_legacy.pt"] = (make(), legacy(make(), 4))
    return files


def refused_files() -> dict[str, bytes]:
    """Files that must be refused; the test that names one says why."""
    weight = torch.arange(6.0).reshape(2, 3)
    archive = saved({"weight": weight})
    scripted = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), scripted)
    hooked = collections.OrderedDict(weight=weight)
    hooked.hook = Call(os.system, "true")  # type: ignore[attr-defined]
    return {
        "os_system.pt": saved({"weight": weight, "x": Call(os.system, "true")}),
        "os_system_protocol_4.pt": legacy({"x": Call(os.system, "true")}, 4),
        "os_system_legacy.pt": legacy({"x": Call(os.system, "true")}),
        "os_system_attribute.pt": legacy(hooked),
        "getattr.pt": legacy({"x": Call(getattr, "", "format")}),
        "attrgetter.pt": legacy({"x": operator.attrgetter("system")}),
        "whole_module.pt": saved(torch.nn.ReLU()),
        "set.pt": legacy({"weight": weight, "x": {1, 2}}, 4),
        "float8.pt": legacy({"weight": weight.to(torch.float8_e4m3fn)}),
        "sparse.pt": legacy({"weight": weight.to_sparse()}),
        "negated.pt": legacy({"weight": torch.view_as_complex(torch.ones(2, 2)).conj().imag}),
        "transposed.pt": saved({"weight": weight.t()}),
        "transposed_legacy.pt": legacy({"weight": weight.t()}),
        "expanded.pt": legacy({"weight": torch.ones(1).expand(3)}),
        "single_tensor.pt": legacy(weight),
        "no_tensors.pt": legacy({"epoch": 3, "state_dict": {"x": 1}}),
        "two_models.pt": legacy({"model": {"weight": weight}, "state_dict": {"weight": weight}}),
        "tensors_beside_dict.pt": legacy({"weight": weight, "other": {"weight": weight}}),
        "numbered.pt": legacy({0: weight}),
        "compressed.pt": repacked(archive, zipfile.ZIP_DEFLATED),
        "big_endian.pt": repacked(archive, byteorder=b"big"),
        "missing_storage.pt": repacked(archive, data__0=None),
        "short_storage.pt": repacked(archive, data__0=b"\0" * 20),
        "not_a_pickle.pt": repacked(archive, data_pkl=b"import os"),
        "two_pickles.pt": repacked(archive, data_pkl=pickle.dumps({}, 2) * 2),
        "no_pickle.pt": repacked(archive, data_pkl=None),
        "torchscript.pt": scripted.getvalue(),
        "plain_pickle.pt": pickle.dumps({"weight": [1.0]}, 2),
    }


def described(tensors: Tensors) -> list[dict[str, object]]:
    """What the reader should find, in order."""
    return [
        {
            "name": name,
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "bytes": bytes(tensor.detach().contiguous().flatten().view(torch.uint8).tolist()).hex(),
        }
        for name, tensor in tensors.items()
    ]


def main() -> None:
    """Writes all files, and what the good ones hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the files; made if missing")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    expected: list[dict[str, Any]] = []
    for name, (tensors, content) in good_files().items():
        # This script wrote it a moment ago, so it may be loaded; `weights_only` knows no protocol past 3.
        loaded = torch.load(io.BytesIO(content), weights_only=False)
        while not any(isinstance(value, torch.Tensor) for value in loaded.values()):
            loaded = next(loaded[key] for key in ("state_dict", "model", "module") if key in loaded)
        loaded = {key: value for key, value in loaded.items() if isinstance(value, torch.Tensor)}
        assert list(loaded) == list(tensors), name
        (out / name).write_bytes(content)
        known = next((group for group in expected if group["tensors"] == described(loaded)), None)
        if known:
            known["files"].append(name)
        else:
            expected.append({"files": [name], "tensors": described(loaded)})
    for name, content in refused_files().items():
        (out / name).write_bytes(content)
    (out / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()

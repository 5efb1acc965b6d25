"""Writes cuda_kernels.json: CUDA's kernels in an onnxruntime-gpu wheel for the operators that graphs use.

The kernels are those of `get_all_opkernel_def`, which onnxruntime's docs/OperatorKernels.md is generated
with; operator versions and parameters are the schemas of `onnx` and of the wheel. Nothing runs on a GPU, but
the libraries that the CUDA and TensorRT providers link must load. Usage: python make_cuda_kernels.py OUT
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import onnx
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as state

OPSETS = range(20, 24)
"""Versions of the standard operators that exported graphs import (20 and 23), and those between."""

NAMES = """Abs Add And ArgMax Cast Concat Conv DequantizeLinear Div Equal Expand Gather GatherND Gelu Gemm
GreaterOrEqual Identity LayerNormalization Less LessOrEqual MatMul MatMulInteger Max Min Mul QuantizeLinear
RMSNormalization Range ReduceMax ReduceMean ReduceSum Relu Reshape Shape Sigmoid Slice Softmax Sqrt Sub
Transpose Unsqueeze Where""".split()

MICROSOFT_NAMES = """FusedMatMul GroupQueryAttention MatMulNBits QGemm QuickGelu
SkipSimplifiedLayerNormalization""".split()

HOST_INPUTS = {
    "Expand": [1], "Range": [0, 1, 2], "ReduceMax": [1], "ReduceMean": [1], "ReduceSum": [1], "Reshape": [1],
    "Slice": [1, 2, 3, 4], "Unsqueeze": [1], "com.microsoft.GroupQueryAttention": [6],
}  # fmt: skip
"""`InputMemoryType(OrtMemTypeCPUInput, …)` of the kernels' registrations in onnxruntime/core/providers/cuda
and onnxruntime/contrib_ops/cuda: `get_all_opkernel_def` does not tell."""

HOST_OUTPUTS = {"Shape": [0]}
"""`OutputMemoryType` likewise."""

NO_END = 2**31 - 1


def plain(type_name: str) -> str | None:
    """`tensor(float)` -> `float`; None for what is no tensor."""
    return type_name[len("tensor(") : -1] if type_name.startswith("tensor(") else None


def parameter(name: str, type_name: str) -> dict[str, str]:
    fixed = plain(type_name)
    return {"name": name, "type": fixed} if fixed else {"name": name, "variable": type_name}


def kernels_of(definitions: list, domain: str, name: str, since: int) -> list[dict[str, list[str]]]:
    """By KernelRegistry's rule: the version is the kernel's first, or within its range if that ends."""
    found = []
    for kernel in definitions:
        if (kernel.provider, kernel.domain, kernel.op_name) != ("CUDAExecutionProvider", domain, name):
            continue
        first, last = kernel.version_range
        if first == since or (last != NO_END and first <= since <= last):
            constraints = kernel.type_constraints.items()
            types = {key: [plain(t) for t in value if plain(t)] for key, value in constraints}
            if types not in found:
                found.append(types)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    definitions = state.get_all_opkernel_def()
    operators = []
    for name in NAMES:
        schemas = {}
        for opset in OPSETS:
            if onnx.defs.has(name, opset):
                schema = onnx.defs.get_schema(name, opset)
                schemas[schema.since_version] = (schema, opset)
        for since, (schema, last) in sorted(schemas.items()):
            inputs = [parameter(i.name, i.type_str) for i in schema.inputs]
            outputs = [parameter(o.name, o.type_str) for o in schema.outputs]
            is_variadic = schema.inputs[-1].option == onnx.defs.OpSchema.FormalParameterOption.Variadic
            entry = {"op": name, "since": since, "until": None if last == OPSETS[-1] else last}
            operators.append(entry | {"inputs": inputs, "outputs": outputs, "variadic": is_variadic})
    for schema in sorted(state.get_all_operator_schema(), key=lambda schema: schema.name):
        if schema.domain == "com.microsoft" and schema.name in MICROSOFT_NAMES:
            inputs = [parameter(i.name, i.typeStr) for i in schema.inputs]
            outputs = [parameter(o.name, o.typeStr) for o in schema.outputs]
            entry = {"op": f"com.microsoft.{schema.name}", "since": schema.since_version, "until": None}
            operators.append(entry | {"inputs": inputs, "outputs": outputs, "variadic": False})
    lines = []
    for entry in operators:
        domain, _, name = entry["op"].rpartition(".")
        entry["host_inputs"] = HOST_INPUTS.get(entry["op"], [])
        entry["host_outputs"] = HOST_OUTPUTS.get(entry["op"], [])
        entry["kernels"] = kernels_of(definitions, domain, name, entry["since"])
        lines.append("  " + json.dumps(entry))
    head = {
        "version": f"onnxruntime-gpu {onnxruntime.__version__}",
        "source": "kernel definitions of the CUDA provider as get_all_opkernel_def lists them, from which "
        "onnxruntime's docs/OperatorKernels.md is generated; schemas of onnx " + onnx.__version__ + "; "
        "memory types from the kernels' registrations in onnxruntime/core/providers/cuda and "
        "onnxruntime/contrib_ops/cuda; see make_cuda_kernels.py",
    }
    text = json.dumps(head)[:-1] + ', "operators": [\n' + ",\n".join(lines) + "\n]}\n"
    json.loads(text)
    out.write_text(text)


if __name__ == "__main__":
    main()

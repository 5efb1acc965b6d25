"""What scripts/gpu_check.sh can check of itself without a GPU: its command lines against the program's own
parser, its inputs, the 8B checkpoint's maker, the table of GPUs, nvidia-smi's readings and the report."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import types
from collections.abc import Callable

from peaks import peak_of
from program import CHECKPOINT_MAKER, CHECKPOINTS, DEMO, IMAGES, ROOT, SHARD, Program, Result
from report import render
from sampler import parse, summarize
from stages import STAGES, TENSORRT_CHECKPOINTS, agreement

CANNED: dict[str, Result] = {
    "parity-demo": {
        "status": "ok",
        "seconds": 1.5,
        "rows": [{"precision": "fp16", "ids alike": 0.99, "ran on": "cuda", "result": "ok"}],
    },
    "graphs": {"status": "skipped", "reason": "error: libcudart.so.13 | missing", "seconds": 0.0},
    "export-fp16": {
        "status": "failed",
        "reason": "error: two\nlines",
        "seconds": 200.0,
        "failures": [{"command": "recaption export x", "code": 2, "output": "error: ```no```\nhint: b"}],
    },
    "throughput-fp16": {
        "status": "ok",
        "rows": [{"images/s": 12.345, "result": "ok"}, {"slots": 2, "result": "skipped: a|b"}],
        "failures": [{"command": "recaption run", "code": None, "output": ""}],
    },
}


def gather(program: Program, run_stage: Callable[[Program, str], Result]) -> list[str]:
    """Goes through every stage as on a machine with two GPUs; the commands are in `program` afterwards."""
    problems = []
    for name in STAGES:
        result = run_stage(program, name)
        skipped = [row["result"] for row in result.get("rows", []) if row.get("result", "ok") != "ok"]
        skipped = [reason for reason in skipped if "knows no --gpu" not in reason]
        allowed = name == "parity-tensorrt" and not program.uses_gpu
        if (result["status"] != "ok" and not allowed) or skipped:
            problems.append(f"{name}: {result.get('reason') or skipped}")
    return problems


def check_commands(program: Program) -> tuple[list[str], list[str]]:
    """Problems and notes: each distinct command line goes to the program's parser, with --help behind it."""
    lines = {tuple(shape(words)): words for words in program.commands if words[0] == str(program.recaption)}
    problems, notes = [], []
    helped = subprocess.run([program.recaption, "--help"], capture_output=True, text=True)
    known = set(re.findall(r"^  (\w+) ", helped.stdout, re.MULTILINE))
    for words in lines.values():
        if words[1] not in known and words[1] == "doctor":
            notes.append("this build has no `recaption doctor`: its flags are not checked")
            continue
        command = [*words, *([] if "--help" in words else ["--help"])]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if result.returncode:
            problems.append(f"`{' '.join(words[1:])}`: {(result.stderr.strip().splitlines() or ['?'])[0]}")
    refused = subprocess.run(
        [program.recaption, "run", "x", "--model", "y", "--no-such-flag", "--help"], capture_output=True
    )
    if not refused.returncode:
        problems.append("the program's parser takes any flag: nothing was checked")
    return problems, sorted(set(notes))


def shape(words: list[str]) -> list[str]:
    """A command without its paths: many differ in nothing else."""
    return [words[1], *(word for word in words[2:] if "/" not in word)]


def check_inputs() -> list[str]:
    wanted = [CHECKPOINTS, DEMO, SHARD, IMAGES / "28", IMAGES / "42", CHECKPOINTS / "published-f16"]
    wanted += [CHECKPOINTS / name / "config.json" for name in TENSORRT_CHECKPOINTS]
    wanted += [ROOT / "scripts" / name for name in ("fetch_onnxruntime.sh", "fetch_test_data.sh")]
    return [f"missing: {path.relative_to(ROOT)}" for path in wanted if not path.exists()]


def check_maker() -> tuple[list[str], list[str]]:
    """Imports the maker; where numpy is missing, with an empty one in its place."""
    notes = []
    has_numpy = importlib.util.find_spec("numpy") is not None
    if not has_numpy:
        notes.append(
            "no numpy (the stage `setup` installs it): the 8B checkpoint's maker was imported without it"
        )
        sys.modules["numpy"] = types.ModuleType("numpy")
    try:
        spec = importlib.util.spec_from_file_location("make_checkpoint", CHECKPOINT_MAKER)
        assert spec is not None and spec.loader is not None
        maker = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(maker)
        shapes = maker.shapes(32)
        num_parameters = sum(product(shape) for shape in shapes.values())
    except Exception as error:
        return [f"{CHECKPOINT_MAKER.relative_to(ROOT)}: {type(error).__name__}: {error}"], notes
    finally:
        if not has_numpy:
            del sys.modules["numpy"]
    is_8b = 8.2e9 < num_parameters < 8.5e9
    return [] if is_8b else [f"the maker's shapes have {num_parameters / 1e9:.1f} G parameters"], notes


def product(shape: tuple[int, ...]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


def check_parts() -> list[str]:
    problems = []

    def expect(what: str, is_so: bool) -> None:
        if not is_so:
            problems.append(what)

    rates = {
        "NVIDIA H100 80GB HBM3": 989.4,
        "NVIDIA H100 PCIe": 756.0,
        "NVIDIA L40": 181.05,
        "NVIDIA L4": 121.0,
    }
    rates |= {
        "NVIDIA A100-SXM4-80GB": 312.0,
        "NVIDIA H200": 989.4,
        "NVIDIA GeForce RTX 4090": 165.2,
        "Tesla T4": 65.0,
    }
    for name, tflops in rates.items():
        peak = peak_of(name)
        expect(f"the peak of {name}", peak is not None and peak.tflops == tflops)
    for name in ("NVIDIA GH200 480GB", "NVIDIA A10G", "NVIDIA GeForce RTX 4090 D", ""):
        expect(f"{name} is not in the table, but is found", peak_of(name) is None)

    lines = [
        "0, 90, 400.5, 1000",
        "1, 0, 50.0, 10",
        "0, 100, [N/A], 3000",
        "Failed to initialize",
        "0, 10, 1.0, 1",
    ]
    readings = [reading for i, line in enumerate(lines) if (reading := parse(line, float(i)))]
    found = summarize(readings, {0}, 0.0, 3.0)
    expect("means of nvidia-smi", found == {"GPU %": 95.0, "W": 400.5, "GB used": 3000 * (1 << 20) / 1e9})
    expect("no readings", summarize([], {0}, 0.0, 1.0) == {})

    expect("agreement", agreement({"a": [1, 2], "b": [3, 4]}, {"a": [1, 2], "b": [3, 5]}) == (0.5, 0.75))
    expect("agreement of lengths", agreement({"a": [1]}, {"a": [1, 2]}) == (0.0, 0.5))
    return problems


def check_report() -> list[str]:
    text = render({"GPUs": "none"}, CANNED, "cuda")
    wanted = [
        "Stages: 2 ok, 1 failed, 1 skipped.",
        "| parity-demo | ok |",
        "error: libcudart.so.13 \\| missing |",
    ]
    wanted += [
        "| fp16 | 0.99 | cuda | ok |",
        "(exit code 2)",
        "(time limit)",
        "error: '''no'''",
        "error: two lines",
    ]
    problems = [f"the report lacks {part!r}" for part in wanted if part not in text]
    problems += ["a report of a GPU says that there was none"] if "Nothing ran" in text else []
    skipped: dict[str, Result] = {"graphs": CANNED["graphs"]}
    problems += (
        []
        if "Nothing ran on a GPU" in render({}, skipped, "cuda")
        else ["a report of nothing doesn't say so"]
    )
    problems += [] if "stood in" in render({}, CANNED, "cpu") else ["a report of the CPU doesn't say so"]
    return problems + malformed(text)


def malformed(text: str) -> list[str]:
    """Tables whose rows have other numbers of cells than their heads, and fences without an end."""
    problems, is_fenced, cells = [], False, 0
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("```"):
            is_fenced = not is_fenced
        if is_fenced or not line.startswith("|"):
            cells = 0
            continue
        count = len(re.findall(r"(?<!\\)\|", line))
        if cells and count != cells:
            problems.append(f"line {number} of the report has {count - 1} cells, not {cells - 1}")
        cells = cells or count
    return problems + (["a fence of the report has no end"] if is_fenced else [])


def dry_run(program: Program, run_stage: Callable[[Program, str], Result]) -> int:
    """Everything; prints the commands, then what is wrong. The exit code: 1 when something is."""
    problems = gather(program, run_stage)
    for words in program.commands:
        print(" ".join(words))
    found, notes = check_commands(program)
    made, more_notes = check_maker()
    problems += [*found, *check_inputs(), *made, *check_parts(), *check_report()]
    if "--gpu" not in (ROOT / "scripts" / "fetch_onnxruntime.sh").read_text():
        notes.append("scripts/fetch_onnxruntime.sh knows no --gpu: `setup` will ask for ORT_DYLIB_PATH")
    for note in [*notes, *more_notes]:
        print(f"note: {note}", file=sys.stderr)
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    distinct = {tuple(shape(words)) for words in program.commands if words[0] == str(program.recaption)}
    count = {
        "commands": len(program.commands),
        "parsed": len(distinct),
        "stages": len(STAGES),
        "problems": len(problems),
    }
    print(json.dumps(count), file=sys.stderr)
    return 1 if problems else 0

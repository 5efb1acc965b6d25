"""The stages of scripts/gpu_check.sh, in their order. Each takes the program and gives what the report shows
of it: `rows` of a table, `text`, `status` and `reason` where something failed."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from peaks import peak_of
from program import (
    CHECKPOINT_MAKER,
    CHECKPOINTS,
    DEMO,
    IMAGES,
    PHOTOS,
    ROOT,
    SHARD,
    TOKENIZER,
    Captions,
    Failed,
    Program,
    Result,
    Skipped,
)
from sampler import Sampler, summarize

# Share of token ids, up to a caption's first difference, that a provider must have in common with the CPU in
# the same precision (bf16: with fp32, since the CPU has no bf16). Greedy ids of random weights part at the
# first near-tie, so that only fp32 is held to all. The floors are set by judgement: no GPU has been measured.
FLOORS = {"fp32": 1.0, "fp16": 0.7, "bf16": 0.5, "fp8": 0.5, "int8-block": 0.7, "int4": 0.7}
FLOATS = ("fp32", "fp16", "bf16")
# What TensorRT builds engines for: each takes it a minute or so.
TENSORRT_CHECKPOINTS = ("published-f16", "saved-v5-bf16")
GRAPH_ROUNDS = 3
# Photographs of the size that web images have: larger ones would measure the decoding of JPEGs.
WEB_IMAGE_BYTES = range(10_000, 200_000)
GIB = 1 << 30
# What recaption says of a GPU that is no fault of anybody's.
TOO_SMALL = ("does not fit into the GPU's memory", "fp8 needs a GPU of compute capability")
# Checkpoint 17 GB, fp16 bundle 17 GB, fp8 bundle 10 GB, int4 bundle 6 GB, engines: of the fp8 decoder two.
FREE_BYTES = 80 * GIB
BIG_FORMATS = {
    "fp16": ("--precision", "fp16"),
    # Random weights have nothing to be calibrated for; fp8 must know a range all the same.
    "fp8": ("--precision", "fp8", "--target", "tensorrt", "--calibration", "random"),
    "int4": ("--precision", "int4", "--activations", "fp16", "--calibration", "none"),
}


@dataclass(frozen=True)
class Stage:
    """One stage: what it does, and the minutes after which it has failed."""

    run: Callable[[Program], Result]
    minutes: int
    about: str


def outcome(rows: list[Result], what: str) -> Result:
    """`rows`, failed when one of them is; skipped when none of them ran."""
    bad = [row for row in rows if row["result"].startswith(("failed", "below"))]
    if bad:
        return {"rows": rows, "status": "failed", "reason": f"{len(bad)} of {len(rows)} {what}"}
    if rows and all(row["result"].startswith("skipped") for row in rows):
        return {"rows": rows, "status": "skipped", "reason": rows[0]["result"].removeprefix("skipped: ")}
    return {"rows": rows}


@contextlib.contextmanager
def attempt(row: Result, rows: list[Result]) -> Iterator[None]:
    """Puts `row` into `rows` with how the body went; one that fails doesn't end the stage."""
    try:
        yield
        row.setdefault("result", "ok")
    except Skipped as reason:
        row["result"] = f"skipped: {reason}"
    except Failed as error:
        is_too_small = any(text in str(error) for text in TOO_SMALL)
        row["result"] = f"skipped: {error}" if is_too_small else f"failed: {error}"
    rows.append(row)


# setup


def setup(program: Program) -> Result:
    rows: list[Result] = []

    def step(name: str, run: Callable[[], str]) -> None:
        row: Result = {"step": name}
        started = time.monotonic()
        with attempt(row, rows):
            row["what"] = run()
        row["seconds"] = time.monotonic() - started

    step("recaption", lambda: build(program))
    step("ONNX Runtime", lambda: fetch_library(program))
    if not program.is_small:
        step("numpy", lambda: install_numpy(program))
        step("tokenizer and photographs", lambda: fetch_data(program))
    bad = [row["step"] for row in rows if row["result"].startswith("failed")]
    return {"rows": rows} | ({"status": "failed", "reason": ", ".join(bad)} if bad else {})


def build(program: Program) -> str:
    if "RECAPTION" in os.environ and not program.is_dry:
        return f"given: {program.recaption.name}"
    if not program.is_dry and not shutil.which("cargo"):
        if program.recaption.is_file():
            return "found; no cargo to build it anew"
        raise Failed("no cargo and no binary: install Rust, or set RECAPTION to a binary")
    program.call(["cargo", "build", "--release", "--locked"])
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    program.recaption = program.recaption if program.is_dry else target / "release" / "recaption"
    return "built"


def fetch_library(program: Program) -> str:
    if "ORT_DYLIB_PATH" in os.environ and not program.is_dry:
        return "given by ORT_DYLIB_PATH"
    options = ["--gpu"] if program.uses_gpu else []
    if program.uses_gpu and program.install_cuda_libraries:
        options.append("--cuda")
    finished = program.call([ROOT / "scripts" / "fetch_onnxruntime.sh", *options])
    return finished.stdout.strip().splitlines()[-1] if finished.stdout.strip() else "fetched"


def venv_python(program: Program) -> Path:
    """The Python of a virtual environment beside the results."""
    python = program.out / "venv" / "bin" / "python"
    if program.is_dry or not python.exists():
        program.call([sys.executable, "-m", "venv", program.out / "venv"])
    return python


def use_venv(program: Program) -> None:
    """What a setup, this one or an earlier, has put into the virtual environment."""
    folders = [*program.out.glob("venv/lib/python*/site-packages")]
    if any((folder / "numpy").is_dir() for folder in folders):
        program.python = str(program.out / "venv" / "bin" / "python")


def install_numpy(program: Program) -> str:
    if not program.is_dry and importlib.util.find_spec("numpy"):
        return "there"
    requirements = (ROOT / "scripts" / "golden" / "requirements.txt").read_text().splitlines()
    pinned = next(line for line in requirements if line.startswith("numpy=="))
    pip = [venv_python(program), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # A Python that the pinned version is not made for takes the newest that is.
    if program.call([*pip, pinned], may_fail=True).code:
        program.call([*pip, "numpy"])
    use_venv(program)
    return "installed"


def fetch_data(program: Program) -> str:
    script = ROOT / "scripts" / "fetch_test_data.sh"
    if program.is_dry or not (TOKENIZER / "tokenizer.json").is_file():
        program.call([script, "tokenizer"])
    # Without photographs the tiny pictures do, and the report says so.
    has_photos = any(PHOTOS.glob("*.jpg")) or not program.call([script, "photos"], may_fail=True).code
    return "there" if has_photos else "there; no photographs"


# doctor


def doctor(program: Program) -> Result:
    if program.run("doctor", "--help", may_fail=True).code:
        raise Skipped("this build has no `recaption doctor`")
    # What is wrong with the machine is an answer, not a failure of this stage.
    text = program.run("doctor", may_fail=True)
    found = program.run("doctor", "--json", may_fail=True)
    if text.code < 0 or found.code < 0:
        raise Failed(f"ended by signal {-min(text.code, found.code)}")
    try:
        parsed = json.loads(found.stdout)
    except ValueError as error:
        raise Failed(f"doctor --json printed no JSON: {error}") from error
    return {"text": text.stdout + text.stderr, "json": parsed, "exit code": text.code}


# parity


def agreement(found: dict[str, list[int]], expected: dict[str, list[int]]) -> tuple[float, float]:
    """Share of captions with the same ids, and of ids before the first difference."""
    if found.keys() != expected.keys():
        raise Failed(f"other rows: {len(found)}, not the same {len(expected)}")
    num_same, num_alike, num_ids = 0, 0, 0
    for key, theirs in expected.items():
        ours = found[key]
        pairs = enumerate(zip(ours, theirs, strict=False))
        num_same += ours == theirs
        num_alike += next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
        num_ids += max(len(ours), len(theirs))
    if not num_ids:
        raise Failed("no ids to compare")
    return num_same / len(expected), num_alike / num_ids


def is_plain(checkpoint: Path) -> bool:
    """Whether it exports without a base model or a vision tower beside it."""
    config = checkpoint / "config.json"
    return config.is_file() and not checkpoint.name.startswith(("lora-", "original-"))


def inputs_of(checkpoint: Path) -> list[Path]:
    """Pictures of the size that a checkpoint is made for, or any."""
    if checkpoint == DEMO:
        return [SHARD]
    vision = json.loads((checkpoint / "config.json").read_text()).get("vision_config", {})
    own = IMAGES / str(vision.get("image_size"))
    return [own if own.is_dir() else IMAGES / "28"]


def formats_of(provider: str) -> list[tuple[str, str]]:
    """Target and precision of the bundles that `provider` takes."""
    formats = [(target, precision) for target in ("ort", "tensorrt") for precision in FLOATS]
    if provider == "tensorrt":
        return [*formats, ("tensorrt", "fp8")]
    return [*formats, ("ort", "int8-block"), ("ort", "int4")]


def compare(program: Program, checkpoints: list[Path], provider: str) -> Result:
    program.needs(provider)
    rows: list[Result] = []
    for checkpoint in checkpoints:
        inputs = inputs_of(checkpoint)
        for target, precision in formats_of(provider):
            if precision == "bf16" and provider == "cpu":
                continue
            row: Result = {"checkpoint": checkpoint.name, "target": target, "precision": precision}
            row["provider"] = provider
            with attempt(row, rows):
                row |= compare_one(program, checkpoint, inputs, (target, precision, provider))
    return outcome(rows, "comparisons")


def compare_one(program: Program, checkpoint: Path, inputs: list[Path], case: tuple[str, str, str]) -> Result:
    target, precision, provider = case
    limits = ["--limit", "8", "--max-new-tokens", "24"]
    options = ["--target", target, "--precision", precision]
    if precision in ("int8-block", "int4"):
        options += ["--activations", "fp16", "--calibration", "none"]
    bundle = program.bundle(checkpoint, *options)
    # The CPU has no bf16 kernels.
    exact = program.bundle(checkpoint, "--target", target, "--precision", "fp32")
    reference = exact if precision == "bf16" else bundle
    expected = program.captions(reference, inputs, "--provider", "cpu", *limits)
    # The CPU takes the GPU's place in the GPU's shapes.
    shapes = ["--fixed-shapes"] if provider == "cpu" else []
    found = program.captions(bundle, inputs, "--provider", provider, *limits, *shapes)
    captions, ids = agreement(found.ids, expected.ids)
    row: Result = {"captions alike": captions, "ids alike": ids, "ran on": ran_on(found)}
    if ids < FLOORS[precision]:
        row["result"] = f"below its floor of {FLOORS[precision]}"
    return row


def ran_on(captions: Captions) -> str:
    """`cuda, decoder: cpu`: what the first line of the run says."""
    lines = [line for line in captions.said if line.startswith("provider:")]
    return lines[0].removeprefix("provider: ") if lines else ""


def parity_demo(program: Program) -> Result:
    return compare(program, [DEMO], program.provider)


def parity_tiny(program: Program) -> Result:
    checkpoints = [path for path in sorted(CHECKPOINTS.iterdir()) if is_plain(path)]
    return compare(program, checkpoints[:2] if program.is_small else checkpoints, program.provider)


def parity_tensorrt(program: Program) -> Result:
    if not program.uses_gpu:
        raise Skipped("the CPU stands in for CUDA only")
    names = TENSORRT_CHECKPOINTS[:1] if program.is_small else TENSORRT_CHECKPOINTS
    return compare(program, [DEMO, *(CHECKPOINTS / name for name in names)], "tensorrt")


# graphs


def graphs(program: Program) -> Result:
    """Decode with CUDA graphs and without, turn by turn: ids must be the same, speeds are told."""
    program.needs(program.provider)
    bundle = program.bundle(DEMO, "--precision", "fp16")
    rows: list[Result] = []
    differing = []
    for slots, limit in (("1", "8"), ("16", "64")):
        options = [
            "--provider",
            program.provider,
            "--slots",
            slots,
            "--limit",
            limit,
            "--max-new-tokens",
            "64",
        ]
        runs: dict[str, list[Captions]] = {"on": [], "off": []}
        # The CPU captures none, and takes no such flag.
        without = ["--no-cuda-graphs"] if program.uses_gpu else []
        for _ in range(1 if program.is_small else GRAPH_ROUNDS):
            for name, flags in (("on", []), ("off", without)):
                runs[name].append(program.captions(bundle, [SHARD], *options, *flags))
        ids = [run.ids for of_one in runs.values() for run in of_one]
        is_same = all(other == ids[0] for other in ids)
        differing += [] if is_same else [slots]
        for name, of_one in runs.items():
            rates = [run.decode_rate or run.new_tokens_per_second() for run in of_one]
            row: Result = {"slots": slots, "CUDA graphs": name, "decode tok/s": statistics.median(rates)}
            row |= {"least": min(rates), "most": max(rates)}
            row["load s"] = statistics.median(run.summary["load_seconds"] for run in of_one)
            rows.append({**row, "ids": "the same" if is_same else "differ", "ran on": ran_on(of_one[0])})
    if differing:
        return {"status": "failed", "reason": f"ids differ with {', '.join(differing)} slots", "rows": rows}
    return {"rows": rows}


# at the true size


def big_checkpoint(program: Program) -> Path:
    return CHECKPOINTS / "published-f16" if program.is_small else program.out / "checkpoint-8b"


def weights(program: Program) -> Result:
    folder = big_checkpoint(program)
    if program.is_small:
        return {"rows": [{"checkpoint": f"{folder.name}, in the place of the 8B"}]}
    # The maker writes config.json last.
    if not (folder / "config.json").is_file():
        program.out.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(program.out).free
        if not program.is_dry and free < FREE_BYTES:
            raise Skipped(
                f"{free / GIB:.0f} GiB of disk are free, {FREE_BYTES // GIB} are needed: use another --out"
            )
        if folder.is_dir():
            shutil.rmtree(folder)
        program.call([program.python, CHECKPOINT_MAKER, folder])
    return {"rows": [{"checkpoint": folder.name, "GB": size_of(folder)}]}


def size_of(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e9


def big_options(program: Program, precision: str) -> list[object]:
    return [*BIG_FORMATS[precision], *([] if program.is_small else ["--tokenizer", TOKENIZER])]


def export(program: Program, precision: str) -> Result:
    checkpoint = big_checkpoint(program)
    if not program.is_dry and not (checkpoint / "config.json").is_file():
        raise Skipped("no checkpoint: the stage `weights` makes it")
    folder, finished = program.export(checkpoint, f"8b-{precision}", *big_options(program, precision))
    row: Result = {"precision": precision, "seconds": finished.seconds}
    row |= {"peak RSS in GB, mapped pages too": finished.peak_rss_bytes / 1e9, "bundle GB": size_of(folder)}
    return {"rows": [row]}


def throughput(program: Program, precision: str) -> Result:
    if not program.has_bundle(f"8b-{precision}", *big_options(program, precision)):
        raise Skipped(f"no bundle of this program: the stage `export-{precision}` makes it")
    program.needs(provider_of(program, precision))
    bundle = program.out / "bundles" / f"8b-{precision}"
    images = repeated_images(program, 6 if program.is_small else program.num_images)
    rows: list[Result] = []
    for provider, devices, slots, tokens in cases(program, precision):
        row: Result = {"precision": precision, "provider": provider, "GPUs": len(devices) or None}
        row |= {"slots": slots or "planned", "new tokens": tokens}
        with attempt(row, rows):
            if provider == "tensorrt":
                program.needs(provider)
            options = ["--provider", provider, "--max-new-tokens", tokens]
            options += ["--slots", slots] if slots else []
            options += ["--device", ",".join(map(str, devices))] if devices else []
            with Sampler() as sampler:
                captions = program.captions(bundle, [images], *options)
            row |= rates(program, bundle, captions, (devices, tokens))
            started = captions.ended - captions.summary["run_seconds"]
            row |= summarize(sampler.readings, set(devices), started, captions.ended)
            row["pictures"] = images.name
            row["plan"] = "; ".join(line for line in captions.said if "memory:" in line)
    return outcome(rows, "runs")


def provider_of(program: Program, precision: str) -> str:
    """Who runs an 8B of this precision first of all: fp8 is for TensorRT alone."""
    return "tensorrt" if program.uses_gpu and precision == "fp8" else program.provider


def cases(program: Program, precision: str) -> list[tuple[str, list[int], int | None, int]]:
    """Provider, GPUs, slots and new tokens of each run."""
    provider = provider_of(program, precision)
    if program.is_small:
        devices = [0] if program.uses_gpu else []
        return [(provider, devices, slots, tokens) for slots, tokens in ((2, 8), (None, 8), (None, 4))]
    one = [0] if program.uses_gpu else []
    found: list[tuple[str, list[int], int | None, int]] = []
    if provider == "tensorrt":
        # Each number of slots takes an engine of its own, minutes to build.
        return [(provider, one, 64, tokens) for tokens in (128, 64)]
    found += [(provider, one, slots, 128) for slots in (32, 128, None)]
    found.append((provider, one, None, 64))
    if program.uses_gpu and len(program.gpus) > 1:
        found.append((provider, list(range(len(program.gpus))), None, 128))
    # Vision through TensorRT, which takes no blocks of int8.
    if program.uses_gpu and precision == "fp16":
        found.append(("tensorrt", one, None, 128))
    return found


def rates(program: Program, bundle: Path, captions: Captions, case: tuple[list[int], int]) -> Result:
    """Speeds, and the share of the GPUs' peak that the model's arithmetic, as `inspect` counts it, takes."""
    devices, tokens = case
    summary = captions.summary
    report = json.loads(program.run("inspect", bundle, "--json").stdout)
    num_text = round(summary["prompt_tokens"] / summary["rows"]) - report["vision"]["num_image_tokens"]
    lengths = ["--prompt-tokens", num_text, "--new-tokens", tokens]
    report = json.loads(program.run("inspect", bundle, "--json", *lengths).stdout)
    flops = summary["images_per_second"] * report["flops_per_image"]["total"]
    row: Result = {"images/s": summary["images_per_second"], "new tokens/s": captions.new_tokens_per_second()}
    row |= {"load s": summary["load_seconds"], "run s": summary["run_seconds"], "TFLOP/s": flops / 1e12}
    peaks = [peak_of(program.gpus[device]) for device in devices if device < len(program.gpus)]
    known = [peak.tflops * 1e12 for peak in peaks if peak is not None]
    if known and len(known) == len(devices):
        row["% of fp16 peak"] = 100 * flops / sum(known)
    return row


def repeated_images(program: Program, count: int) -> Path:
    """A folder of `count` pictures, the same again and again: photographs where fetched, else tiny ones."""
    photos = [path for path in sorted(PHOTOS.glob("*.jpg")) if path.stat().st_size in WEB_IMAGE_BYTES]
    sources = photos or sorted((IMAGES / "42").glob("*.png"))
    if not sources:
        raise Failed(f"no pictures in `{IMAGES.relative_to(ROOT)}`")
    folder = program.out / f"images-{count}-of-{len(sources)}"
    if not program.is_dry:
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            target = folder / f"{i:05}{sources[i % len(sources)].suffix}"
            if not target.exists():
                shutil.copyfile(sources[i % len(sources)], target)
    return folder


# devices


def devices(program: Program) -> Result:
    """Several engines, and one of them failing: no caption is lost or other than from one alone."""
    program.needs(program.provider)
    if program.uses_gpu:
        count = len(program.gpus)
        if not program.is_dry and count < 2:
            raise Skipped(f"{count} GPU")
        several = ["--device", ",".join(map(str, range(max(count, 2))))]
    else:
        several = ["--engines", "2"]
    bundle = program.bundle(DEMO, "--precision", "fp16")
    options = ["--provider", program.provider, "--slots", "8", "--max-new-tokens", "24"]
    alone = program.captions(bundle, [SHARD], *options)
    rows: list[Result] = []
    for extra in ([], ["--inject-failure", "1:5"]):
        row: Result = {"engines": " ".join(several), "one fails": bool(extra)}
        with attempt(row, rows):
            found = program.captions(bundle, [SHARD], *options, *several, *extra)
            row["captions alike"], row["ids alike"] = agreement(found.ids, alone.ids)
            row["images/s"] = found.summary["images_per_second"]
            if row["ids alike"] < FLOORS["fp16"]:
                row["result"] = f"below its floor of {FLOORS['fp16']}"
    return outcome(rows, "runs")


STAGES: dict[str, Stage] = {
    "setup": Stage(setup, 30, "builds recaption, fetches ONNX Runtime, numpy and the tokenizer"),
    "doctor": Stage(doctor, 2, "what `recaption doctor` says"),
    "parity-demo": Stage(parity_demo, 10, "ids of the demo, CUDA and CPU"),
    "parity-tiny": Stage(parity_tiny, 30, "ids of the tiny checkpoints, CUDA and CPU"),
    "parity-tensorrt": Stage(parity_tensorrt, 40, "ids of three models, TensorRT and CPU; it builds engines"),
    "graphs": Stage(graphs, 8, "CUDA graphs on and off"),
    "weights": Stage(weights, 15, "makes a random checkpoint of 8B size, 17 GB"),
    "export-fp16": Stage(lambda program: export(program, "fp16"), 15, "time and memory of the 8B export"),
    "export-fp8": Stage(lambda program: export(program, "fp8"), 15, "the same in fp8, for TensorRT"),
    "export-int4": Stage(lambda program: export(program, "int4"), 20, "the same in int4"),
    "throughput-fp16": Stage(
        lambda program: throughput(program, "fp16"), 30, "images/s and utilisation at 8B"
    ),
    "throughput-fp8": Stage(
        lambda program: throughput(program, "fp8"), 60, "the same in fp8 through TensorRT; it builds engines"
    ),
    "throughput-int4": Stage(lambda program: throughput(program, "int4"), 30, "the same in int4"),
    "devices": Stage(devices, 8, "several GPUs, and one of them failing"),
}

"""Checks recaption on a machine with an NVIDIA GPU and writes one report.

    scripts/gpu_check.sh                        every stage, into out/gpu_check/; call it again to go on
    scripts/gpu_check.sh --dry-run              what can be checked without a GPU: flags, inputs, the report
    scripts/gpu_check.sh --provider cpu --small the same stages with the CPU in the GPU's place, small models
    scripts/gpu_check.sh --only parity,graphs   some stages; --redo repeats those that are done

Stages: doctor, parity (ids of CPU, CUDA and TensorRT), graphs (CUDA graphs on and off), weights (a checkpoint
of 8B size, 17 GB, random), export (fp16 and int4), throughput (images/s and utilisation), devices (several
GPUs). A stage whose provider does not work here is skipped, with the reason. Exit code 0: no stage failed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from peaks import peak_of
from report import Result, render

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINTS = ROOT / "tests" / "data" / "checkpoints"
IMAGES = ROOT / "tests" / "data" / "images"
DEMO = ROOT / "models" / "demo"
PAPER_TOKENS = 128
# Share of ids, up to the first difference, that a provider must have in common with the CPU in the same
# precision. Greedy ids of random weights part at the first near-tie: only fp32 is held to all of them.
FLOORS = {"fp32": 1.0, "fp16": 0.7, "bf16": 0.5, "int8-block": 0.7, "int4": 0.7}
GIB = 1 << 30


class Skipped(Exception):
    """A stage that can't run here."""


@dataclass
class Context:
    """What the stages share."""

    recaption: Path
    out: Path
    provider: str
    is_small: bool
    is_dry: bool
    commands: list[list[str]] = field(default_factory=list)
    failures: list[Result] = field(default_factory=list)

    def run(self, *args: object, may_fail: bool = False) -> subprocess.CompletedProcess[str]:
        """Runs recaption; a failure is noted, and raised unless it may be."""
        return self.call([str(self.recaption), *map(str, args)], may_fail)

    def call(self, command: list[str], may_fail: bool = False) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        if self.is_dry:
            return subprocess.CompletedProcess(command, 0, "", "")
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if result.returncode not in (0, 1) and not may_fail:
            shown = " ".join(command)
            tail = result.stderr[-3000:]
            self.failures.append({"command": shown, "code": result.returncode, "output": tail})
            raise RuntimeError(f"`{shown}`: {tail.splitlines()[0] if tail else result.returncode}")
        return result

    def bundle(self, checkpoint: Path, *options: str) -> Path:
        """Exports once."""
        name = "-".join([checkpoint.name, *(option.strip("-") for option in options)])
        folder = self.out / "bundles" / name
        if not (folder / "manifest.json").is_file():
            self.run("export", checkpoint, "--out", folder, *options)
        return folder

    def rows(self, bundle: Path, inputs: list[Path], *options: object) -> tuple[dict[str, Any], Result]:
        """Captions `inputs`: ids by key, and the summary."""
        with tempfile.TemporaryDirectory(dir=self.out) as folder:
            captions = Path(folder) / "captions"
            args = [
                "run",
                *inputs,
                "--model",
                bundle,
                "--out",
                captions,
                "--format",
                "jsonl",
                "--with-token-ids",
            ]
            result = self.run(*args, "--ignore-eos", "--json", *options)
            if self.is_dry:
                return {}, {}
            lines = [
                line for file in sorted(captions.glob("*.jsonl")) for line in file.read_text().splitlines()
            ]
            rows = {row["key"]: row for row in map(json.loads, lines)}
            return rows, json.loads(result.stdout)

    def needs(self, provider: str) -> None:
        """Skips the stage when `provider` does not work here."""
        if self.is_dry or provider == "cpu":
            return
        bundle = self.bundle(DEMO, "--precision", "fp16")
        image = next(iter(sorted(IMAGES.rglob("*.jpg"))))
        result = self.run(
            "run", image, "--model", bundle, "--provider", provider, "--limit", "1", may_fail=True
        )
        if result.returncode not in (0, 1):
            raise Skipped(
                f"{provider}: {result.stderr.strip().splitlines()[0] if result.stderr else 'no message'}"
            )


def gpu_providers(context: Context) -> list[str]:
    return ["cpu"] if context.provider == "cpu" else ["cuda", "tensorrt"]


def doctor(context: Context) -> Result:
    text = context.run("doctor", may_fail=True)
    found = context.run("doctor", "--json", may_fail=True)
    return {"text": text.stdout + text.stderr, "json": json.loads(found.stdout) if found.stdout else None}


def agreement(found: Result, expected: Result) -> tuple[float, float]:
    """Share of rows with the same ids, and of ids before the first difference."""
    if found.keys() != expected.keys() or not found:
        raise RuntimeError(f"rows differ: {len(found)} and {len(expected)}")
    same, ids_alike, ids_all = 0, 0, 0
    for key, row in expected.items():
        ours, theirs = found[key]["token_ids"] or [], row["token_ids"] or []
        pairs = enumerate(zip(ours, theirs, strict=False))
        alike = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
        same += ours == theirs
        ids_alike += alike
        ids_all += max(len(ours), len(theirs))
    return same / len(expected), ids_alike / max(ids_all, 1)


def parity(context: Context) -> Result:
    checkpoints = [path for path in sorted(CHECKPOINTS.iterdir()) if is_plain(path)]
    checkpoints = checkpoints[:2] if context.is_small else checkpoints
    shard = DEMO / "shard" / "00000.tar"
    providers = gpu_providers(context)
    for provider in providers[:1]:
        context.needs(provider)
    formats = [("ort", name) for name in ("fp32", "fp16", "bf16", "int8-block", "int4")]
    formats += [("tensorrt", name) for name in ("fp32", "fp16", "bf16")]
    rows: list[Result] = []
    for checkpoint in [DEMO, *checkpoints]:
        inputs = [shard] if checkpoint == DEMO else [IMAGES / "28"] if (IMAGES / "28").is_dir() else [IMAGES]
        limit = ["--limit", "8", "--max-new-tokens", "24"]
        for target, precision in formats:
            floats = ["--activations", "fp16"] if precision in ("int8-block", "int4") else []
            calibration = ["--calibration", "none"] if precision == "int4" else []
            options = ["--target", target, "--precision", precision, *floats, *calibration]
            bundle = context.bundle(checkpoint, *options)
            # bf16 has no kernels on the CPU: it is compared with fp32.
            reference = context.bundle(checkpoint, "--precision", "fp32") if precision == "bf16" else bundle
            expected, _ = context.rows(reference, inputs, "--provider", "cpu", *limit)
            for provider in providers:
                if precision == "bf16" and provider == "cpu":
                    continue
                row = {
                    "checkpoint": checkpoint.name,
                    "target": target,
                    "precision": precision,
                    "provider": provider,
                }
                # The CPU takes the GPU's place in the GPU's shapes.
                shapes = ["--fixed-shapes"] if provider == "cpu" else []
                try:
                    found, _ = context.rows(bundle, inputs, "--provider", provider, *limit, *shapes)
                except RuntimeError as error:
                    rows.append({**row, "result": f"failed: {error}"})
                    continue
                if context.is_dry:
                    continue
                captions, ids = agreement(found, expected)
                is_good = ids >= FLOORS[precision]
                rows.append(
                    {
                        **row,
                        "captions": captions,
                        "ids": ids,
                        "result": "ok" if is_good else "below its floor",
                    }
                )
    bad = [row for row in rows if row["result"] != "ok"]
    result: Result = {"rows": rows}
    if bad:
        result |= {"status": "failed", "reason": f"{len(bad)} of {len(rows)} comparisons"}
    return result


def is_plain(checkpoint: Path) -> bool:
    """Whether it exports without a base model or a vision tower beside it."""
    config = checkpoint / "config.json"
    return config.is_file() and not checkpoint.name.startswith(("lora-", "original-"))


def graphs(context: Context) -> Result:
    provider = gpu_providers(context)[0]
    context.needs(provider)
    bundle = context.bundle(DEMO, "--precision", "fp16")
    inputs = [DEMO / "shard" / "00000.tar"]
    rows, ids = [], []
    for flags in ([], ["--no-cuda-graphs"]):
        found, summary = context.rows(
            bundle, inputs, "--provider", provider, "--max-new-tokens", "64", *flags
        )
        ids.append({key: row["token_ids"] for key, row in found.items()})
        if summary:
            rate = summary["new_tokens"] / summary["run_seconds"]
            images = summary["images_per_second"]
            rows.append({"CUDA graphs": "off" if flags else "on", "images/s": images, "new tokens/s": rate})
    if ids[0] != ids[1]:
        return {"status": "failed", "reason": "ids differ with and without graphs", "rows": rows}
    return {"rows": rows}


def big_checkpoint(context: Context) -> Path:
    return CHECKPOINTS / "published-f16" if context.is_small else context.out / "checkpoint-8b"


def weights(context: Context) -> Result:
    folder = big_checkpoint(context)
    maker = [sys.executable, str(ROOT / "scripts" / "size" / "make_checkpoint.py"), str(folder)]
    if context.is_small or (folder / "config.json").is_file():
        return {}
    if not context.is_dry and shutil.disk_usage(context.out).free < 60 * GIB:
        raise Skipped("needs 60 GiB of free disk: choose another --out")
    context.call(maker)
    return {}


BIG_FORMATS = {
    "fp16": ["--precision", "fp16"],
    "int4": ["--precision", "int4", "--activations", "fp16", "--calibration", "none"],
}


def big_bundle(context: Context, precision: str) -> Path:
    tokenizer = (
        [] if context.is_small else ["--tokenizer", str(ROOT / "tests" / "data" / "fetched" / "llama3")]
    )
    return context.bundle(big_checkpoint(context), *BIG_FORMATS[precision], *tokenizer)


def export(context: Context) -> Result:
    rows = []
    if not context.is_dry and not (big_checkpoint(context) / "config.json").is_file():
        raise Skipped("no checkpoint: the stage `weights` comes first")
    for precision in BIG_FORMATS:
        started = time.monotonic()
        bundle = big_bundle(context, precision)
        if not context.is_dry:
            size = sum(file.stat().st_size for file in bundle.iterdir())
            rows.append({"precision": precision, "seconds": time.monotonic() - started, "GB": size / 1e9})
    return {"rows": rows}


class Sampler:
    """Readings of nvidia-smi while a run goes on."""

    QUERY = [
        "--query-gpu=utilization.gpu,power.draw,memory.used",
        "--format=csv,noheader,nounits",
        "-lms",
        "500",
    ]

    def __enter__(self) -> Sampler:
        self.lines: list[list[float]] = []
        self.process = None
        if shutil.which("nvidia-smi"):
            command = ["nvidia-smi", *self.QUERY]
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            self.thread = threading.Thread(target=self.read, daemon=True)
            self.thread.start()
        return self

    def read(self) -> None:
        assert self.process is not None and self.process.stdout is not None
        for line in self.process.stdout:
            try:
                self.lines.append([float(value) for value in line.split(",")])
            except ValueError:
                continue

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
            self.thread.join()

    def summary(self) -> Result:
        """The median over the busy half of the readings: loading is not what is asked about."""
        busy = sorted(self.lines)[len(self.lines) // 2 :]
        if not busy:
            return {}
        utilization, power, memory = busy[len(busy) // 2]
        return {"GPU %": utilization, "W": power, "GB used": memory * (1 << 20) / 1e9}


def throughput(context: Context) -> Result:
    provider = gpu_providers(context)[0]
    context.needs(provider)
    peak = peak_of(gpu_names()[0]) if gpu_names() else None
    images, tokens = (4, 8) if context.is_small else (512, PAPER_TOKENS)
    inputs = repeated_images(context, images)
    slot_counts = [["--slots", "2"]] if context.is_small else [["--slots", "32"], ["--slots", "128"], []]
    cases = [(provider, slots) for slots in slot_counts]
    if provider == "cuda":
        cases.append(("tensorrt", []))
    rows = []
    for precision in BIG_FORMATS:
        bundle = big_bundle(context, precision)
        count = context.run("inspect", bundle, "--json", "--new-tokens", tokens)
        flops = json.loads(count.stdout)["flops_per_image"]["total"] if count.stdout else 0
        for name, slots in cases:
            row: Result = {
                "precision": precision,
                "provider": name,
                "slots": slots[1] if slots else "planned",
            }
            options = ["--provider", name, *slots, "--max-new-tokens", tokens]
            try:
                with Sampler() as sampler:
                    _, summary = context.rows(bundle, [inputs], *options)
            except RuntimeError as error:
                rows.append({**row, "result": f"failed: {error}"})
                continue
            if context.is_dry:
                continue
            rate = summary["images_per_second"]
            row |= {"images/s": rate, "new tokens/s": summary["new_tokens"] / summary["run_seconds"]}
            row |= {"load s": summary["load_seconds"], "TFLOP/s": rate * flops / 1e12}
            if peak is not None:
                row["% of fp16 peak"] = 100 * rate * flops / (peak.tflops * 1e12)
            rows.append({**row, **sampler.summary(), "result": "ok"})
    bad = sum(row["result"] != "ok" for row in rows)
    result: Result = {"rows": rows}
    if bad:
        result |= {"status": "failed", "reason": f"{bad} of {len(rows)} runs"}
    return result


def repeated_images(context: Context, count: int) -> Path:
    """A folder of `count` pictures of the tests, under other names."""
    folder = context.out / f"images-{count}"
    sources = sorted(IMAGES.rglob("*.jpg"))
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        target = folder / f"{i:05}.jpg"
        if not target.exists():
            shutil.copyfile(sources[i % len(sources)], target)
    return folder


def devices(context: Context) -> Result:
    count = len(gpu_names())
    if not context.is_dry and count < 2:
        raise Skipped(f"{count} GPUs")
    bundle = context.bundle(DEMO, "--precision", "fp16")
    inputs = [DEMO / "shard" / "00000.tar"]
    every = ",".join(map(str, range(max(count, 2))))
    alone, _ = context.rows(bundle, inputs, "--provider", "cuda", "--device", "0")
    rows: list[Result] = []
    for extra in ([], ["--inject-failure", "1:5"]):
        found, summary = context.rows(bundle, inputs, "--provider", "cuda", "--device", every, *extra)
        if not context.is_dry:
            captions, ids = agreement(found, alone)
            row = {"devices": every, "failing": bool(extra), "captions as with one": captions, "ids": ids}
            rows.append({**row, "images/s": summary["images_per_second"]})
    return {"rows": rows}


STAGES: dict[str, Callable[[Context], Result]] = {
    "doctor": doctor,
    "parity": parity,
    "graphs": graphs,
    "weights": weights,
    "export": export,
    "throughput": throughput,
    "devices": devices,
}


def gpu_names() -> list[str]:
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    result = subprocess.run(query, capture_output=True, text=True)
    return result.stdout.split("\n")[:-1] if result.returncode == 0 else []


def machine(context: Context) -> Result:
    version = subprocess.run(
        [str(context.recaption), "--version"], capture_output=True, text=True
    ).stdout.strip()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
    ).stdout
    return {
        "GPUs": ", ".join(gpu_names()) or "none",
        "processor": f"{platform.machine()}, {os.cpu_count()} cores",
        "system": platform.platform(),
        "program": f"{version}, commit {commit.strip()}",
    }


def run_stage(context: Context, name: str) -> Result:
    started = time.monotonic()
    context.failures = []
    try:
        result = {"status": "ok", **STAGES[name](context)}
    except Skipped as reason:
        result = {"status": "skipped", "reason": str(reason)}
    except (RuntimeError, OSError, KeyError, ValueError) as error:
        result = {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
    return {**result, "seconds": time.monotonic() - started, "failures": context.failures}


def check_flags(context: Context) -> list[str]:
    """Flags of the commands that the program's help does not know."""
    helps: dict[str, str] = {}
    unknown = []
    for command in context.commands:
        if command[0] != str(context.recaption):
            continue
        subcommand = command[1]
        if subcommand not in helps:
            shown = subprocess.run([command[0], subcommand, "--help"], capture_output=True, text=True)
            helps[subcommand] = shown.stdout if shown.returncode == 0 else ""
        hidden = {"--inject-failure", "--fixed-shapes"}
        flags = [arg for arg in command[2:] if arg.startswith("--") and arg not in hidden]
        known = helps[subcommand].split()
        unknown += [f"{subcommand} {flag}" for flag in flags if flag not in known]
        if not helps[subcommand]:
            unknown.append(subcommand)
    return sorted(set(unknown))


def dry_run(context: Context) -> int:
    """Everything that can be checked without a GPU."""
    problems = []
    for name in STAGES:
        result = run_stage(context, name)
        if result["status"] == "failed":
            problems.append(f"{name}: {result['reason']}")
    for command in context.commands:
        print(" ".join(command))
    problems += [f"unknown: {flag}" for flag in check_flags(context)]
    problems += [f"missing: {path}" for path in (CHECKPOINTS, DEMO, IMAGES) if not path.is_dir()]
    help_of_maker = [sys.executable, str(ROOT / "scripts" / "size" / "make_checkpoint.py"), "--help"]
    text = (ROOT / "scripts" / "size" / "make_checkpoint.py").read_text()
    compile(text, help_of_maker[1], "exec")
    canned: dict[str, Result] = {
        "parity": {"status": "ok", "seconds": 1.5, "rows": [{"precision": "fp16", "ids": 0.99}]},
        "graphs": {"status": "skipped", "reason": "cuda: libcudart.so.13 | missing", "seconds": 0.0},
        "export": {
            "status": "failed",
            "seconds": 2.0,
            "failures": [{"command": "recaption export x", "code": 2, "output": "error: ```no```"}],
        },
    }
    text = render({"GPUs": "none"}, canned)
    wanted = ["| parity | ok |", "missing |", "exit code 2", "error: '''no'''", "| fp16 | 0.99 |"]
    problems += [f"the report lacks {part!r}" for part in wanted if part not in text]
    if text.count("```") % 2:
        problems.append("the report's fences do not match")
    if peak_of("NVIDIA H100 80GB HBM3") is None or peak_of("NVIDIA L4") == peak_of("NVIDIA L40S"):
        problems.append("the table of peaks does not find its GPUs")
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    print(f"{len(context.commands)} commands, {len(problems)} problems", file=sys.stderr)
    return 1 if problems else 0


def find_binary() -> Path:
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    found = [Path(os.environ["RECAPTION"])] if "RECAPTION" in os.environ else []
    found += [target / "release" / "recaption", target / "debug" / "recaption"]
    for path in found:
        if path.is_file():
            return path.resolve()
    sys.exit("error: no recaption\nhint: cargo build --release, or set RECAPTION to the binary")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "out" / "gpu_check", help="results, bundles and the report"
    )
    parser.add_argument("--only", default=",".join(STAGES), help="stages, separated by commas")
    parser.add_argument("--redo", action="store_true", help="also those that are done")
    parser.add_argument(
        "--provider", choices=["cuda", "cpu"], default="cuda", help="cpu: the CPU in the GPU's place"
    )
    parser.add_argument("--small", action="store_true", help="a tiny model in the place of the 8B")
    parser.add_argument(
        "--dry-run", action="store_true", help="run nothing; check all that can be without a GPU"
    )
    args = parser.parse_args()
    stages = args.only.split(",")
    if unknown := [name for name in stages if name not in STAGES]:
        parser.error(f"no stage {', '.join(unknown)}; there are {', '.join(STAGES)}")
    if args.dry_run:
        with tempfile.TemporaryDirectory() as out:
            return dry_run(Context(find_binary(), Path(out), args.provider, args.small, is_dry=True))
    args.out.mkdir(parents=True, exist_ok=True)
    context = Context(find_binary(), args.out.resolve(), args.provider, args.small, is_dry=False)
    results: dict[str, Result] = {}
    for name in STAGES:
        file = args.out / f"{name}.json"
        earlier: Result = json.loads(file.read_text()) if file.is_file() else {}
        if name not in stages or (earlier.get("status") == "ok" and not args.redo):
            if earlier:
                results[name] = earlier
            continue
        print(f"{name} …", file=sys.stderr, flush=True)
        results[name] = run_stage(context, name)
        reason = results[name].get("reason", "")
        print(f"{name}: {results[name]['status']} {reason}", file=sys.stderr, flush=True)
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(results[name], indent=1))
        temporary.replace(file)
        (args.out / "report.md").write_text(render(machine(context), results))
    print(args.out / "report.md")
    return 1 if any(result["status"] == "failed" for result in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())

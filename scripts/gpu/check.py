"""Checks recaption on a machine with an NVIDIA GPU and writes one report.

    scripts/gpu_check.sh                        every stage; call it again to go on after the last whole one
    scripts/gpu_check.sh --budget 25            as many stages as fit into 25 minutes
    scripts/gpu_check.sh --only parity,graphs   some stages, by name or its beginning; --redo: also those done
    scripts/gpu_check.sh --dry-run              what can be checked without a GPU: flags, inputs, the report
    scripts/gpu_check.sh --provider cpu --small the same stages with the CPU in the GPU's place, tiny models

The report is OUT/gpu_report.md, the results it is made of are OUT/gpu_check/STAGE.json. A stage that is whole
is not done again by the same program on the same GPUs with the same settings. One whose provider is not there
is skipped, with the reason. RECAPTION names the binary, instead of building one; ORT_DYLIB_PATH the ONNX
Runtime library. Exit code 0: no stage failed; 1: one did; 2: usage; 3: the budget ended first.
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
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from dry_run import dry_run
from peaks import peak_of
from program import ROOT, Failed, OutOfTime, Program, Result, Skipped, fingerprint
from report import render
from stages import STAGES, use_venv


def gpu_query(fields: str) -> list[str]:
    """A line of nvidia-smi for each GPU; none where there is none."""
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    result = subprocess.run(query, capture_output=True, text=True)
    return result.stdout.splitlines() if result.returncode == 0 else []


def output_of(*command: object) -> str:
    try:
        return subprocess.run(
            [str(word) for word in command], capture_output=True, text=True, cwd=ROOT
        ).stdout.strip()
    except OSError:
        return ""


def machine(program: Program) -> Result:
    """What the report says about where it was made."""
    changed = " with changes" if output_of("git", "status", "--porcelain", "--untracked-files=no") else ""
    found: Result = {"GPUs": "; ".join(gpu_query("name,memory.total,driver_version")) or "none"}
    for name in dict.fromkeys(program.gpus):
        peak = peak_of(name)
        known = (
            f"{peak.tflops:g} TFLOP/s dense fp16, {peak.terabytes_per_second:g} TB/s ({peak.source})"
            if peak
            else ""
        )
        found[f"peak of {name}"] = known or "not in scripts/gpu/peaks.py: no utilisation is computed"
    found["processor"] = f"{platform.machine()}, {os.cpu_count()} cores"
    found["system"] = platform.platform()
    found["program"] = output_of(program.recaption, "--version") or "none"
    found["commit"] = output_of("git", "rev-parse", "--short", "HEAD") + changed
    given = os.environ.get("ORT_DYLIB_PATH")
    found["ONNX Runtime"] = Path(given).name if given else "where recaption looks for it"
    return found


def key_of(program: Program, name: str) -> Result:
    """What a result is good for: another program, GPU or setting asks anew."""
    key: Result = {"provider": program.provider, "small": program.is_small, "gpus": program.gpus}
    if name == "setup":
        return key | {"binary": os.environ.get("RECAPTION"), "cuda libraries": program.install_cuda_libraries}
    key["program"] = fingerprint(program.recaption) if program.recaption.is_file() else None
    key["library"] = os.environ.get("ORT_DYLIB_PATH")
    return key | ({"images": program.num_images} if name.startswith("throughput") else {})


def run_stage(program: Program, name: str) -> Result:
    """A stage's result, whatever becomes of it."""
    started = time.monotonic()
    program.failures = []
    program.stage_deadline = started + 60 * STAGES[name].minutes
    try:
        result = {"status": "ok", **STAGES[name].run(program)}
    except Skipped as reason:
        result = {"status": "skipped", "reason": str(reason)}
    except OutOfTime:
        result = {"status": "unfinished", "reason": "the budget ended; call again to go on"}
    except (Failed, OSError, KeyError, ValueError, TypeError, IndexError) as error:
        kind = "" if isinstance(error, Failed) else f"{type(error).__name__}: "
        result = {"status": "failed", "reason": f"{kind}{error}"}
    return {**result, "seconds": time.monotonic() - started, "failures": program.failures}


def write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def earlier_result(path: Path) -> Result:
    """What an earlier call left; nothing, when it can't be read."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and "status" in found else {}


def check(program: Program, stages: list[str], redo: bool, report: Path) -> dict[str, Result]:
    """Runs what is to be run; the report is whole after every stage."""
    results: dict[str, Result] = {}
    for name in STAGES:
        path = program.out / f"{name}.json"
        earlier = earlier_result(path)
        is_good = earlier.get("key") == key_of(program, name)
        is_wanted = name in stages and (redo or not is_good or earlier.get("status") != "ok")
        if not is_wanted:
            results[name] = earlier if is_good else {"status": "not run", "reason": "not asked for"}
        elif time.monotonic() >= program.budget_deadline:
            results[name] = {"status": "unfinished", "reason": "the budget ended; call again to go on"}
        else:
            print(
                f"{name}: {STAGES[name].about} (at most {STAGES[name].minutes} min)",
                file=sys.stderr,
                flush=True,
            )
            result = run_stage(program, name)
            results[name] = {**result, "key": key_of(program, name)}
            print(
                f"{name}: {result['status']} {result.get('reason', '')}".rstrip(), file=sys.stderr, flush=True
            )
            write_whole(path, json.dumps(results[name], indent=1))
        write_whole(report, program.without_paths(render(machine(program), results, program.provider)))
    return results


def find_binary() -> Path:
    """The program to check, whether or not it is there yet."""
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    if given := os.environ.get("RECAPTION"):
        if not Path(given).is_file():
            sys.exit(f"error: RECAPTION names `{given}`, which is not a file")
        return Path(given).resolve()
    found = [target / kind / "recaption" for kind in ("release", "debug")]
    return next((path for path in found if path.is_file()), found[0])


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    about = "; ".join(f"{name}: {stage.about}" for name, stage in STAGES.items())
    parser.add_argument(
        "--out", type=Path, default=ROOT / "out", help="folder of the report and all else (default: out)"
    )
    parser.add_argument("--only", metavar="STAGE[,STAGE…]", help=about)
    parser.add_argument("--redo", action="store_true", help="also stages that are done")
    parser.add_argument("--budget", type=float, metavar="MINUTES", help="begin and run nothing after so long")
    parser.add_argument(
        "--provider", choices=["cuda", "cpu"], default="cuda", help="cpu: the CPU in the GPU's place"
    )
    parser.add_argument(
        "--small", action="store_true", help="a tiny model in the place of the 8B, and fewer of them"
    )
    parser.add_argument("--images", type=int, default=1024, help="images of a throughput run (default: 1024)")
    text = "let `setup` install CUDA 13 and cuDNN 9 by pip, into a virtual environment of OUT (3 GB)"
    parser.add_argument("--install-cuda-libraries", action="store_true", help=text)
    parser.add_argument(
        "--dry-run", action="store_true", help="run nothing; check all that can be without a GPU"
    )
    args = parser.parse_args()
    wanted = args.only.split(",") if args.only else list(STAGES)
    args.stages = [
        name for name in STAGES if any(name == want or name.startswith(f"{want}-") for want in wanted)
    ]
    for want in wanted:
        if not any(name == want or name.startswith(f"{want}-") for name in STAGES):
            parser.error(f"no stage `{want}`; there are {', '.join(STAGES)}")
    return args


def main() -> int:
    args = parse_args()
    gpus = ["NVIDIA H100 80GB HBM3"] * 2 if args.dry_run else gpu_query("name")
    program = Program(
        find_binary(),
        args.out.resolve() / "gpu_check",
        provider=args.provider,
        is_small=args.small,
        is_dry=args.dry_run,
        num_images=args.images,
        gpus=gpus if args.provider != "cpu" else [],
        python=sys.executable,
        install_cuda_libraries=args.install_cuda_libraries or args.dry_run,
    )
    if args.dry_run:
        if not program.recaption.is_file():
            sys.exit("error: no recaption\nhint: cargo build, or set RECAPTION to the binary")
        with tempfile.TemporaryDirectory() as folder:
            program.out = Path(folder)
            return dry_run(program, run_stage)
    program.out.mkdir(parents=True, exist_ok=True)
    use_venv(program)
    if args.budget is not None:
        program.budget_deadline = time.monotonic() + 60 * args.budget
    report = args.out / "gpu_report.md"
    results = check(program, args.stages, args.redo, report)
    print(report)
    statuses = {result["status"] for result in results.values()}
    return 1 if "failed" in statuses else 3 if "unfinished" in statuses else 0


if __name__ == "__main__":
    sys.exit(main())

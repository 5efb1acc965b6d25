"""Preprocessing on one core: recaption beside Pillow and numpy, in alternation, on the same pictures.

    scripts/bench_preprocess.sh [--rounds 7] [--write FILE]

Both do the same work, from a file's bytes in memory to the normalised tensor of 336 x 336, in one thread
that is pinned to one core. A round is one pass of either over all pictures; the figures are medians of the
rounds, and the ratio is the median of the rounds' ratios. The tensors are compared as well.
"""

from __future__ import annotations

import argparse
import array
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SETS = (("web", "pad"), ("web", "crop"), ("large", "pad"), ("large", "crop"), ("other", "pad"))


class Worker:
    """A process that does all pictures of a folder when it is told to."""

    def __init__(self, command: list[str], core: int) -> None:
        pinned = ["taskset", "-c", str(core), *command] if sys.platform == "linux" else command
        self.process = subprocess.Popen(pinned, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def tell(self, command: str) -> float:
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def build() -> Path:
    """Path of the benchmark program, which is our worker."""
    command = ["cargo", "bench", "--locked", "--bench", "pixels", "--no-run", "--message-format", "json"]
    output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    for line in output.splitlines():
        message = json.loads(line)
        if message.get("executable") and message["target"]["name"] == "pixels":
            return Path(message["executable"])
    raise SystemExit("cargo built no benchmark")


def differences(ours: Path, theirs: Path) -> tuple[float, float]:
    """Largest mean and largest single difference of the tensors."""
    worst_mean, worst = 0.0, 0.0
    for file in sorted(theirs.iterdir()):
        pair = []
        for folder in (ours, theirs):
            values = array.array("f")
            values.frombytes((folder / file.name).read_bytes())
            pair.append(values)
        absolute = [abs(a - b) for a, b in zip(*pair, strict=True)]
        worst_mean, worst = max(worst_mean, sum(absolute) / len(absolute)), max(worst, max(absolute))
    return worst_mean, worst


def processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def sizes(folder: Path) -> tuple[int, float]:
    from PIL import Image

    files = list(folder.iterdir())
    return len(files), sum(width * height for width, height in (Image.open(file).size for file in files))


def compare(program: Path, images: Path, name: str, mode: str, rounds: int, core: int) -> str:
    folder = images / name
    ours = Worker([str(program), "--serve", str(folder), mode], core)
    theirs = Worker(
        [sys.executable, str(Path(__file__).with_name("pillow_worker.py")), str(folder), mode], core
    )
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        ours.tell(f"save {first}")
        theirs.tell(f"save {second}")
        mean, worst = differences(Path(first), Path(second))
    for worker in (ours, theirs):
        worker.tell("time")
    pairs = [(ours.tell("time"), theirs.tell("time")) for _ in range(rounds)]
    ours.close()
    theirs.close()
    count, pixels = sizes(folder)
    seconds = [statistics.median(column) for column in zip(*pairs, strict=True)]
    ratios = sorted(theirs / ours for ours, theirs in pairs)
    cells = [f"{name} {mode}", str(count), f"{pixels / count / 1e6:.2f}"]
    for value in seconds:
        cells += [f"{count / value:.0f}", f"{pixels / value / 1e6:.0f}"]
    cells += [
        f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
        f"{mean:.4f}, {worst:.3f}",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=Path, default=ROOT / "tests" / "data" / "fetched" / "preprocess")
    parser.add_argument("--core", type=int, default=(os.cpu_count() or 1) - 1, help="the core to run on")
    parser.add_argument("--write", type=Path, help="also write the table here")
    arguments = parser.parse_args()
    import numpy
    from PIL import Image, features

    revision = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    turbo = features.version("libjpeg_turbo")
    lines = [
        f"{processor()}, one core; commit {revision.stdout.strip()}; {arguments.rounds} alternating rounds",
        f"Pillow {Image.__version__} (libjpeg-turbo {turbo}, no `draft`), numpy {numpy.__version__}",
        "",
        "| pictures | number | megapixels each | recaption img/s | Mpx/s | Pillow img/s | Mpx/s "
        "| ratio (range) | tensors differ by: mean, most |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    program = build()
    for name, mode in SETS:
        lines.append(compare(program, arguments.images, name, mode, arguments.rounds, arguments.core))
        print(lines[-1], flush=True)
    if arguments.write:
        arguments.write.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

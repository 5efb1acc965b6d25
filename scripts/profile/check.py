"""Holds `recaption profile` against a clock outside of it, and measures what recording costs.

    scripts/profile/check.py BUNDLE INPUT... [flags of `recaption profile`]

Each round runs `profile` with recording and without, in turns, else alike. Prints, in Markdown: the wall
time of the process beside what the profile says of itself, each thread's wall time beside the sum of its
parts, and the processor time with recording over that without, pair by pair.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

Record = dict[str, Any]
# What a thread's time is spent on beside its stages.
PARTS = {
    "waiting": "waited_seconds",
    "room": "blocked_seconds",
    "scheduling": "scheduling_seconds",
    "helping": "helping_seconds",
}


def run(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Wall and processor seconds of a process, from outside."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, **environment})
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def instructions(command: list[str]) -> int:
    """Instructions of a process under valgrind, which has no AVX-512."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "callgrind.out"
        options = ["--tool=callgrind", f"--callgrind-out-file={output}", "--dump-instr=no"]
        run(["valgrind", "-q", *options, *command], {"RECAPTION_CPU": "avx2"})
        lines = output.read_text(encoding="utf-8").splitlines()
        totals = next(line for line in lines if line.startswith(("totals:", "summary:")))
    return int(totals.split()[1])


def describe(profile: Record, wall: float) -> list[str]:
    """What the profile says beside the outside clock."""
    totals = profile["run"]
    inside = totals["load_seconds"] + totals["wall_seconds"]
    lines = [
        f"- process {wall:.3f} s from outside; load and run {inside:.3f} s by the profile,"
        f" {inside / wall:.1%} of it (the rest: process start, reading the graphs, writing the files)",
        f"- {totals['images']} images, {totals['images_per_second']:.3f} images/s by the profile",
        f"- processor time of the run {totals['cpu_seconds']:.2f} s",
    ]
    lines += [
        "",
        "| thread | wall s | of the run | parts | their sum |",
        "|---|---:|---:|---|---:|",
    ]
    for track in profile["tracks"]:
        wall_seconds = track["wall_seconds"]
        parts = {**track["stages"], **{what: track[field] for what, field in PARTS.items()}}
        shown = [f"{part} {seconds / wall_seconds:.2%}" for part, seconds in parts.items()]
        row = [
            track["name"],
            f"{wall_seconds:.3f}",
            f"{wall_seconds / totals['wall_seconds']:.2%}",
            ", ".join(shown),
            f"{sum(parts.values()) / wall_seconds:.3%}",
        ]
        lines.append(f"| {' | '.join(row)} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recaption", type=Path, default=Path("target/release/recaption"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--instructions", action="store_true", help="count them, once each, under valgrind")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("inputs", nargs="+")
    args, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as out:
        fixed = ["--model", str(args.bundle), "--out", out, "--quiet", "--no-peaks", *flags]
        command = [str(args.recaption), "profile", *args.inputs, *fixed]
        print(f"    {Path(args.recaption).name} profile … {' '.join(['--no-peaks', *flags])}\n")
        ratios, walls = [], []
        for number in range(args.rounds):
            found: Record = {}
            for kind in ("on", "off") if number % 2 else ("off", "on"):
                extra = [] if kind == "on" else ["--no-record"]
                found[kind] = run([*command, *extra], {})
                if kind == "on":
                    profile = json.loads((Path(out) / "profile.json").read_text(encoding="utf-8"))
            ratios.append(found["on"][1] / found["off"][1])
            walls.append(found["on"][0] / found["off"][0])
            print(
                f"round {number}: processor time on/off {ratios[-1]:.4f}, wall {walls[-1]:.4f}",
                file=sys.stderr,
            )
            if number == args.rounds - 1:
                print("\n".join(describe(profile, found["on"][0])))
        for what, values in (("processor time", ratios), ("wall time", walls)):
            spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
            median, ends = statistics.median(values), f"{min(values):.4f} to {max(values):.4f}"
            print(
                f"- recording on over off, {what}: median {median:.4f} ({ends}), standard error {spread:.4f}"
            )
        if args.instructions:
            on, off = instructions(command), instructions([*command, "--no-record"])
            print(f"- instructions: {on:,} with recording, {off:,} without: {on / off - 1:+.3%}")


if __name__ == "__main__":
    main()

"""How far `recaption plan --from` is off: profiles a run, plans others, runs them. Prints a Markdown table.

    scripts/plan_check.py --recaption target/release/recaption --model BUNDLE --limit 16 --new-tokens 32 \\
        --case 64x64x32 --case 64x64x8 INPUT...

A case is images x new tokens x slots of each engine. Captions are as long as that says (--ignore-eos).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """A run that is planned and made."""

    images: int
    new_tokens: int
    slots: int

    @classmethod
    def parse(cls, text: str) -> Case:
        images, new_tokens, slots = (int(part) for part in text.split("x"))
        return cls(images, new_tokens, slots)


def call(command: list[str]) -> str:
    """Standard output of a command that must succeed."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def profile(args: argparse.Namespace, folder: Path) -> Path:
    """Makes the profile that all plans scale from."""
    flags = ["--limit", str(args.limit), "--max-new-tokens", str(args.new_tokens), "--ignore-eos", "--quiet"]
    flags += ["--slots", str(args.slots)] if args.slots else []
    call([args.recaption, "profile", *args.inputs, "--model", args.model, "--out", str(folder), *flags])
    return folder / "profile.json"


def planned(args: argparse.Namespace, source: Path, case: Case) -> float:
    """Images per second as the plan has them."""
    flags = ["--images", str(case.images), "--new-tokens", str(case.new_tokens), "--slots", str(case.slots)]
    plan = json.loads(call([args.recaption, "plan", "--from", str(source), "--json", *flags]))
    return plan["job"]["images_per_second"]["likely"]


def measured(args: argparse.Namespace, case: Case) -> list[float]:
    """Images per second of real runs."""
    rates = []
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as out:
            flags = ["--limit", str(case.images), "--max-new-tokens", str(case.new_tokens), "--ignore-eos"]
            flags += ["--slots", str(case.slots), "--out", out, "--quiet"]
            call([args.recaption, "run", *args.inputs, "--model", args.model, *flags])
            rates.append(json.loads((Path(out) / "summary.json").read_text())["images_per_second"])
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recaption", default="recaption")
    parser.add_argument("--model", required=True)
    parser.add_argument("--limit", type=int, default=16, help="images of the profile")
    parser.add_argument("--new-tokens", type=int, default=32, help="new tokens of the profile's captions")
    parser.add_argument("--slots", type=int, help="slots of the profile's engines [default: the program's]")
    parser.add_argument("--rounds", type=int, default=3, help="real runs of each case")
    parser.add_argument("--case", action="append", type=Case.parse, required=True)
    parser.add_argument("--keep", type=Path, help="where to leave the profile.json")
    parser.add_argument("inputs", nargs="+")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = profile(args, Path(folder))
        if args.keep:
            args.keep.write_bytes(source.read_bytes())
        speed = json.loads(source.read_text())["run"]["images_per_second"]
        print(f"profile: {args.limit} images, {args.new_tokens} new tokens, {speed:.3g} images/s\n")
        print("| images | new tokens | slots | planned, images/s | measured, median (all) | ratio |")
        print("|---|---|---|---|---|---|")
        for case in args.case:
            plan, rates = planned(args, source, case), measured(args, case)
            median = statistics.median(rates)
            everything = ", ".join(f"{rate:.3g}" for rate in sorted(rates))
            row = [case.images, case.new_tokens, case.slots, f"{plan:.3g}", f"{median:.3g} ({everything})"]
            print("| " + " | ".join(map(str, [*row, f"{plan / median:.3f}"])) + " |", flush=True)


if __name__ == "__main__":
    main()

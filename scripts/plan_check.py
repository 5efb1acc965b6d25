"""How far `recaption plan --from` is off: profiles a run, plans others, runs them. Prints a Markdown table.

    scripts/plan_check.py --recaption target/release/recaption --model BUNDLE --profile 16x32x8 \\
        --case 64x64x32 --case 64x64x8 INPUT...

A run is images x new tokens x slots of each engine. Captions are as long as that says (--ignore-eos); with 0
new tokens they end as they end, 128 tokens at most. Each round makes its own profile, and then its runs: a
machine that gets slower or faster from hour to hour is no fault of the plan.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

MAX_NEW_TOKENS = 128


@dataclass(frozen=True)
class Run:
    """A run that is profiled, or planned and made."""

    images: int
    new_tokens: int
    slots: int

    @classmethod
    def parse(cls, text: str) -> Run:
        images, new_tokens, slots = (int(part) for part in text.split("x"))
        return cls(images, new_tokens, slots)

    def flags(self) -> list[str]:
        """As `recaption run` and `recaption profile` have them."""
        length = ["--max-new-tokens", str(self.new_tokens or MAX_NEW_TOKENS)]
        length += ["--ignore-eos"] if self.new_tokens else []
        return ["--limit", str(self.images), "--slots", str(self.slots), *length, "--quiet"]

    def __str__(self) -> str:
        length = f"{self.new_tokens} tokens" if self.new_tokens else "captions as they end"
        return f"{self.images} images, {length}, {self.slots} slots"


@dataclass
class Found:
    """Images per second of a case, a value a round."""

    planned: list[float] = field(default_factory=list)
    measured: list[float] = field(default_factory=list)

    def ratios(self) -> list[float]:
        return [plan / real for plan, real in zip(self.planned, self.measured, strict=True)]


def call(command: list[str]) -> str:
    """Standard output of a command that must succeed."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def profile(args: argparse.Namespace, folder: Path) -> Path:
    """Makes the profile that the round's plans scale from."""
    command = [args.recaption, "profile", *args.inputs, "--model", args.model, "--out", str(folder)]
    call([*command, *args.profile.flags()])
    return folder / "profile.json"


def planned(args: argparse.Namespace, source: Path, case: Run) -> float:
    """Images per second as the plan has them."""
    flags = ["--images", str(case.images), "--slots", str(case.slots)]
    flags += ["--new-tokens", str(case.new_tokens)] if case.new_tokens else []
    plan = json.loads(call([args.recaption, "plan", "--from", str(source), "--json", *flags]))
    return plan["job"]["images_per_second"]["likely"]


def measured(args: argparse.Namespace, case: Run) -> float:
    """Images per second of a real run."""
    with tempfile.TemporaryDirectory() as out:
        call([args.recaption, "run", *args.inputs, "--model", args.model, "--out", out, *case.flags()])
        return json.loads((Path(out) / "summary.json").read_text())["images_per_second"]


def several(values: list[float]) -> str:
    """The median, and all of them where there are several."""
    everything = ", ".join(f"{value:.3g}" for value in values)
    return f"{statistics.median(values):.3g}" + (f" ({everything})" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recaption", default="recaption")
    parser.add_argument("--model", required=True)
    parser.add_argument("--profile", type=Run.parse, required=True, help="the run that is profiled")
    parser.add_argument("--case", action="append", type=Run.parse, required=True)
    parser.add_argument("--rounds", type=int, default=3, help="profiles, and runs of each case")
    parser.add_argument("--keep", type=Path, help="where to leave the last profile.json")
    parser.add_argument("inputs", nargs="+")
    args = parser.parse_args()
    speeds: list[float] = []
    cases = {case: Found() for case in args.case}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            source = profile(args, Path(folder))
            speeds.append(json.loads(source.read_text())["run"]["images_per_second"])
            for case, found in cases.items():
                found.planned.append(planned(args, source, case))
                found.measured.append(measured(args, case))
            if args.keep:
                args.keep.write_bytes(source.read_bytes())
    print(f"profile: {args.profile}; {several(speeds)} images/s\n")
    print("| run | planned, images/s | measured | ratio, round by round |")
    print("|---|---|---|---|")
    for case, found in cases.items():
        ratios = found.ratios()
        each = ", ".join(f"{ratio:.3f}" for ratio in ratios)
        row = [str(case), several(found.planned), several(found.measured)]
        row += [f"**{statistics.median(ratios):.3f}** ({each})"]
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()

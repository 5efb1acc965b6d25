"""Runs recaption and its peers in turns on this CPU and writes a table: same images, checkpoints and tokens.

    scripts/bench_peers.sh --quick                    everything once, as small as can be: does it work here?
    scripts/bench_peers.sh --model small --sweep      find each one's best settings, then 5 rounds
    scripts/bench_peers.sh --model small --rounds 7   rounds alone, with settings that the last sweep found
    scripts/bench_peers.sh --case recaption:bundle=int8,slots=32 --case openvino:precision=int8,batch=32
    scripts/bench_peers.sh --report benches/runs/2026-01-31-peers/peers-small.jsonl

A case is PEER:KEY=VALUE,...; peers are recaption, openvino, vllm and transformers. Keys are the options of
`recaption run` and `bundle`, or those of scripts/peers/run_PEER.py; a value such as 8/16/32 is a choice for
--sweep. What is needed is set up in the work folder by pip, 20 GB for all of it; a peer that cannot be set up
is left out, and said so. Exit code 0: everything was measured; 1: something failed; 2: usage or set-up.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import machine
import report
from captioners import Failed
from cases import DEFAULTS, Case, Job, Usage
from measure import limits, measure
from perplexity import evaluate
from specs import SPECS
from workplace import ROOT, Missing, Workplace, say

Record = dict[str, Any]


class Bench:
    """One invocation: its cases, and the file that its records go to."""

    def __init__(self, args: argparse.Namespace, place: Workplace, job: Job, output: Path) -> None:
        self.args, self.place, self.job, self.output = args, place, job, output
        self.version = place.version()
        self.records: list[Record] = report.read(output) if output.exists() else []
        self.first_round = 1 + max((record.get("round", 0) for record in self.records), default=0)

    def write(self, kind: str, **fields: Any) -> Record:
        record = {"kind": kind, **fields}
        self.records.append(record)
        with self.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        return record

    def describe(self, cases: list[Case]) -> None:
        """The machine, and what an image takes."""
        commit = git("rev-parse", "--short", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no") and " with changes"
        date = f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC"
        command = shlex.join(["scripts/bench_peers.sh", *without_places(sys.argv[1:])])
        self.write("machine", **machine.description(), commit=commit + changed, date=date, command=command)
        work: Record = {"model": self.job.model, "prompt_tokens": self.job.prompt_tokens}
        ours = next((case for case in cases if case.peer == "recaption"), None)
        if ours:
            work["flops"] = self.place.flops(self.place.bundle(self.job.model, ours.kind), self.job)
        own = [case for case in cases if case.peer == "recaption"]
        bundles = {case.name: self.place.bundle(self.job.model, case.kind) for case in own}
        work["step_bytes"] = {name: self.place.step_bytes(bundle) for name, bundle in bundles.items()}
        self.write("work", **work)

    def run(self, case: Case, kind: str, **fields: Any) -> Record | None:
        """Measures a case, again when something else disturbed it; None when it failed."""
        for attempt in range(1 + self.args.retries):
            machine.wait_until_quiet(self.args.quiet_seconds)
            try:
                found = measure(self.place, case, self.job, self.version, not self.args.no_split)
            except (Failed, OSError, ValueError) as reason:
                say(f"{case.name}: FAILED: {reason}")
                self.write("failure", case=case.name, reason=str(reason), **fields)
                return None
            is_last = attempt == self.args.retries or found["others"] <= report.DISTURBED_SHARE
            name = kind if is_last else "disturbed"
            record = self.write(name, case=case.name, **fields, **found)
            speed, others = f"{found['images_per_second']:.3f} images/s", f"others {found['others']:.1%}"
            start_up, memory = f"start-up {found['start_up_seconds']:.1f} s", f"{found['peak_rss_mb']:.0f} MB"
            say(f"{name} {case.name}: {speed}, {others}, {start_up}, {memory}")
            if is_last:
                return record
        raise AssertionError("bug: the last attempt returns")

    def sweep(self, choices: dict[str, list[Case]]) -> list[Case]:
        """The best setting of each group."""
        best = []
        for group, cases in choices.items():
            speed: dict[Case, float] = {}
            for case in cases:
                runs = [self.run(case, "sweep", sweep=index) for index in range(self.args.sweep_rounds)]
                found = [run["images_per_second"] for run in runs if run]
                if found:
                    speed[case] = statistics.median(found)
            if speed:
                best.append(max(speed, key=lambda case: speed[case]))
                say(f"best of {group}: {best[-1].name}")
        return best

    def rounds(self, cases: list[Case]) -> None:
        for number in range(self.first_round, self.first_round + self.args.rounds):
            machine.wait_until_quiet(self.args.quiet_seconds)
            for attempt in range(1 + self.args.retries):
                found = limits(self.place, self.job.threads)
                if found["others"] <= report.DISTURBED_SHARE or attempt == self.args.retries:
                    break
            self.write("limits", round=number, **found)
            # Nobody is always first.
            turn = number % len(cases)
            for case in cases[turn:] + cases[:turn]:
                self.run(case, "run", round=number, date=f"{datetime.now(timezone.utc):%H:%M:%S}")


def git(*words: str) -> str:
    result = subprocess.run(["git", *words], capture_output=True, text=True, cwd=ROOT)
    return result.stdout.strip() if result.returncode == 0 else "unknown"


def without_places(words: list[str]) -> list[str]:
    """The command line less the folders of this machine."""
    kept, is_place = [], False
    for word in words:
        if is_place or word in ("--work", "--out", "--recaption"):
            is_place = not is_place
        elif not word.startswith(("--work=", "--out=", "--recaption=")):
            kept.append(word)
    return kept


def parse_arguments() -> argparse.Namespace:
    head, _, text = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="scripts/bench_peers.sh",
        description=head,
        epilog=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", choices=list(SPECS), help="checkpoint [default: small; tiny with --quick]")
    parser.add_argument("--case", action="append", metavar="CASE", help="what to compare; may be repeated")
    parser.add_argument(
        "--bundle", action="append", default=[], metavar="NAME=OPTIONS", help="a kind of `recaption export`"
    )
    parser.add_argument("--images", type=int, help="per run [default: 64 for small, 8 for 1b]")
    parser.add_argument("--new-tokens", type=int, help="of every caption [default: 64]")
    parser.add_argument(
        "--threads", type=int, default=machine.NUM_CORES, help="of everyone [default: all cores]"
    )
    parser.add_argument("--rounds", type=int, help="each runs every case once [default: 5]")
    parser.add_argument(
        "--sweep", action="store_true", help="first find the best of the settings that cases name"
    )
    parser.add_argument("--sweep-rounds", type=int, default=1, help="runs of each setting [default: 1]")
    parser.add_argument(
        "--no-split", action="store_true", help="without the runs of one token, that tell prefill from decode"
    )
    parser.add_argument(
        "--perplexity", action="store_true", help="also measure what the precisions cost on real weights"
    )
    parser.add_argument(
        "--windows", type=int, default=6, help="windows of 512 tokens per text, for it [default: 6]"
    )
    parser.add_argument("--quality", type=Path, nargs="*", help="results of scripts/quality for the table")
    parser.add_argument(
        "--quick", action="store_true", help="the smallest of everything, to see that it works"
    )
    parser.add_argument("--setup", action="store_true", help="set everything up and stop")
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="print the table of a finished run and stop"
    )
    parser.add_argument(
        "--work", type=Path, default=ROOT / "target" / "peers", help="[default: target/peers]"
    )
    parser.add_argument("--out", type=Path, help="folder of the results [default: benches/runs/DATE-NAME]")
    parser.add_argument("--name", default="peers", help="NAME in it [default: peers]")
    parser.add_argument(
        "--recaption", type=Path, help="the program [default: target/release/recaption, built first]"
    )
    parser.add_argument(
        "--quiet-seconds", type=float, help="most to wait for other programs before each run [default: 60]"
    )
    parser.add_argument("--retries", type=int, help="of a run that others disturbed [default: 1]")
    parser.add_argument("--max-seconds", type=float, default=1800, help="most for a run [default: 1800]")
    args = parser.parse_args()
    quick = {"model": "tiny", "new_tokens": 8, "rounds": 1, "quiet_seconds": 0.0, "retries": 0}
    full = {"model": "small", "new_tokens": 64, "rounds": 5, "quiet_seconds": 60.0, "retries": 1}
    for name, value in (quick if args.quick else full).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.quick and args.out is None:
        args.out = args.work / "quick"
    return args


def recaption(args: argparse.Namespace) -> Path:
    """The program, built unless it is given."""
    if args.recaption:
        return args.recaption.resolve()
    for command in (["scripts/fetch_onnxruntime.sh"], ["cargo", "build", "--release", "--locked"]):
        subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
    return Path(os.environ.get("CARGO_TARGET_DIR") or ROOT / "target").resolve() / "release" / "recaption"


def quality_files(args: argparse.Namespace) -> list[Path]:
    """Results of scripts/quality: those given, else those committed, and the work folder's own over them."""
    if args.quality is not None:
        return args.quality
    committed = sorted(ROOT.glob("benches/runs/*/quality-*.json"))
    own = args.work / "quality" / "results.json"
    return [*committed, own] if own.exists() else committed


def chosen(args: argparse.Namespace, place: Workplace, job: Job) -> tuple[dict[str, list[Case]], list[Case]]:
    """The settings to sweep over, by group, and the settled cases. What cannot be set up is left out."""
    texts = args.case or DEFAULTS[args.model]
    groups: dict[str, list[Case]] = {}
    for text in texts:
        case = Case.parse(text)
        try:
            place.prepare(case, job)
        except Missing as reason:
            say(f"left out: {case.name}: {reason}")
            continue
        groups.setdefault(case.group, []).extend(case.settings_of())
    memory = place.folder / f"best-{args.model}.json"
    known = json.loads(memory.read_text(encoding="utf-8")) if memory.exists() else {}
    choices, settled = {}, []
    for group, cases in groups.items():
        if len(cases) == 1:
            settled += cases
        elif args.sweep:
            choices[group] = cases
        else:
            best = next((case for case in cases if case.name == known.get(group)), cases[0])
            settled.append(best)
            if best.name != known.get(group):
                say(f"{group}: no sweep has told the best setting; taking {best.name}")
    return choices, settled


def main() -> int:
    args = parse_arguments()
    if args.report:
        print(report.render(report.read(args.report), quality_files(args)), end="")
        return 0
    bundles = dict(pair.split("=", 1) for pair in args.bundle)
    place = Workplace(args.work, recaption(args), bundles)
    spec = SPECS[args.model]
    num_images = args.images or spec.num_images
    job = Job(
        model=args.model,
        spec=spec,
        num_images=num_images,
        new_tokens=args.new_tokens,
        threads=args.threads,
        images=place.images(3 * num_images + 1),
        prompt_tokens=place.prompt_tokens(args.model),
        max_seconds=args.max_seconds,
    )
    choices, cases = chosen(args, place, job)
    if args.setup:
        return 0
    if not choices and not cases:
        raise Usage("nothing is left to measure")
    folder = args.out or ROOT / "benches" / "runs" / f"{time.strftime('%Y-%m-%d')}-{args.name}"
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / f"peers-{args.model}.jsonl"
    if args.quick:
        output.unlink(missing_ok=True)
    bench = Bench(args, place, job, output)
    bench.describe([*cases, *(case for group in choices.values() for case in group)])
    if choices:
        best = bench.sweep(choices)
        cases += best
        memory = place.folder / f"best-{args.model}.json"
        known = json.loads(memory.read_text(encoding="utf-8")) if memory.exists() else {}
        known.update({case.group: case.name for case in best})
        memory.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    if cases:
        bench.rounds(cases)
    if args.perplexity:
        try:
            results = evaluate(place, cases, args.threads, args.windows)
            (folder / "quality-peers.json").write_bytes(results.read_bytes())
        except Missing as reason:
            say(f"no perplexity: {reason}")
    table = report.render(bench.records, quality_files(args))
    output.with_suffix(".md").write_text(table, encoding="utf-8")
    print(table, end="")
    return 1 if any(record["kind"] == "failure" for record in bench.records) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (Usage, Missing) as error:
        say(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)

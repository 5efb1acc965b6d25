"""Makes the tables of a run from its JSON lines: medians, paired ratios, shares of the machine's limits.

Shares are those of docs/profiling.md, from outside: seconds of vision and prefill are what captions of one
token take, those of decode the rest. Peers read the whole prompt for each image, so it counts as a whole.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cases import Case
from specs import SPECS, WEIGHT_BYTES

Record = dict[str, Any]
Share = Callable[[Case, Record], float | None]
DISTURBED_SHARE = 0.06
MIN_COVERAGE = 0.9
KV_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
REFERENCE = "transformers fp32"


def read(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def interval(values: list[float]) -> tuple[float, float, float]:
    """Median's interval from order statistics, whatever the distribution: its ends and its coverage.

    The narrowest that covers the median in at least nine of ten cases, or else the whole range.
    """
    ordered, n = sorted(values), len(values)
    found = (ordered[0], ordered[-1], 1 - 0.5 ** (n - 1))
    for cut in range(1, (n + 1) // 2):
        tail = sum(math.comb(n, k) for k in range(cut + 1)) / 2**n
        if 1 - 2 * tail < MIN_COVERAGE:
            break
        found = (ordered[cut], ordered[n - 1 - cut], 1 - 2 * tail)
    return found


class Results:
    """The rounds of one model."""

    def __init__(self, records: list[Record]) -> None:
        self.machine = next((record for record in records if record["kind"] == "machine"), {})
        self.work = next((record for record in reversed(records) if record["kind"] == "work"), {})
        self.limits = {record["round"]: record for record in records if record["kind"] == "limits"}
        self.runs: dict[str, dict[int, Record]] = {}
        for record in records:
            if record["kind"] == "run":
                self.runs.setdefault(record["case"], {})[record["round"]] = record
        self.failures = [record for record in records if record["kind"] == "failure"]
        self.spec = SPECS[self.work["model"]]

    def speed(self, case: str) -> float:
        return statistics.median(run["images_per_second"] for run in self.runs[case].values())

    def ratios(self, case: str, other: str, key: str) -> list[float]:
        """Per round, `case` over `other`."""
        ours, theirs = self.runs[case], self.runs[other]
        return [ours[number][key] / theirs[number][key] for number in sorted(ours.keys() & theirs.keys())]

    def prefill_share(self, case: Case, run: Record) -> float | None:
        """Vision and prefill: arithmetic over the time of one token each, of the GEMM rate of that round."""
        flops = self.work.get("flops")
        peak = self.peak(case, run["round"])
        if not flops or not peak or "one_token_seconds" not in run:
            return None
        per_image = flops["vision"] + flops["projector"] + flops["prefill"]
        return per_image * run["images"] / run["one_token_seconds"] / (peak * 1e9)

    def total_share(self, case: Case, run: Record) -> float | None:
        """All the arithmetic over all the time, of the GEMM rate of that round."""
        flops, peak = self.work.get("flops"), self.peak(case, run["round"])
        if not flops or not peak:
            return None
        return sum(flops.values()) * run["images_per_second"] / (peak * 1e9)

    def decode_share(self, case: Case, run: Record) -> float | None:
        """Bytes of weights and cache that the decode steps read, of the memory's rate in that round."""
        rate = self.limits.get(run["round"], {}).get("read_gbs")
        decode_seconds = run["seconds"] - run.get("one_token_seconds", run["seconds"])
        known = self.work.get("step_bytes", {}).get(case.name, {})
        if not rate or decode_seconds <= 0 or not (known or case.weights in WEIGHT_BYTES):
            return None
        text, num_steps = self.spec.text, run["new_tokens"] - 1
        waves = -(-run["images"] // case.in_flight) * (case.in_flight // case.per_engine)
        step_bytes = known.get("weights") or text.num_step_weights * WEIGHT_BYTES[case.weights]
        kv_bytes = known.get("kv") or 2 * text.num_layers * text.kv_width * KV_BYTES.get(case.kind, 1)
        # Step k sees the prompt and k tokens, its own among them.
        num_seen = num_steps * self.work["prompt_tokens"] + num_steps * (num_steps + 1) / 2
        read = waves * num_steps * step_bytes + run["images"] * num_seen * kv_bytes
        return read / decode_seconds / (rate * 1e9)

    def peak(self, case: Case, number: int) -> float | None:
        kind = case.kind if case.kind in ("fp32", "bf16") else "int8"
        return self.limits.get(number, {}).get(f"{kind}_gflops")

    def agreement(self, case: str) -> float | None:
        """Share of captions that begin with the same word as the reference's.

        Not the whole caption: a random model wanders off at any difference, such as a JPEG decoder's.
        """
        reference = next((name for name in self.runs if Case.parse(name).group == REFERENCE), None)
        if reference is None:
            return None
        ours, theirs = (next(iter(self.runs[name].values()))["first_words"] for name in (case, reference))
        return sum(a == b for a, b in zip(ours, theirs, strict=False)) / len(theirs)


def losses(files: list[Path]) -> dict[tuple[str, str], str]:
    """Perplexity lost on real weights, by peer and kind, from results of scripts/quality/evaluate.py."""
    found: dict[tuple[str, str], str] = {}
    for file in files:
        for entry in json.loads(file.read_text(encoding="utf-8")):
            loss = ", ".join(f"{name} {value:+.2%}" for name, value in entry["loss"].items())
            if entry["precision"].startswith("openvino "):
                found["openvino", entry["precision"].removeprefix("openvino ")] = loss
            else:
                name = entry["model"]
                found["recaption", name.removeprefix("smollm2-").removeprefix("smol-")] = loss
    return found


def row(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def percent(values: list[float]) -> str:
    return f"{statistics.median(values):.0%}" if values else ""


def number(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f}" if values else ""


def range_of(values: list[float], digits: int) -> str:
    return f"{number(values, digits)} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def speeds(results: Results, quality: dict[tuple[str, str], str]) -> list[str]:
    head = (
        "case",
        "images/s, median (range)",
        "CPU s/image",
        "all FLOP / GEMM",
        "vision + prefill / GEMM",
        "decode / memory read",
        "start-up s",
        "peak RSS MB",
        f"first word as {REFERENCE}",
        "perplexity loss",
        "others at most",
        "rounds",
    )
    lines = [row(*head), row("---", *["---:"] * (len(head) - 1))]
    by_speed = sorted(results.runs, key=results.speed, reverse=True)
    for name in by_speed:
        case = Case.parse(name)

        runs = list(results.runs[name].values())

        def of(key: str, runs: list[Record] = runs) -> list[float]:
            return [run[key] for run in runs]

        def share(measure: Share, runs: list[Record] = runs, case: Case = case) -> list[float]:
            found = [measure(case, run) for run in runs]
            return [value for value in found if value is not None]

        agreement = results.agreement(name)
        lines.append(
            row(
                f"`{name}`",
                range_of(of("images_per_second"), 3),
                number([run["cpu_seconds"] / run["images"] for run in runs], 3),
                percent(share(results.total_share)),
                percent(share(results.prefill_share)),
                percent(share(results.decode_share)),
                range_of(of("start_up_seconds"), 2),
                number(of("peak_rss_mb"), 0),
                "" if agreement is None else f"{agreement:.0%}",
                "exact" if case.kind == "fp32" else quality.get((case.peer, case.kind), ""),
                f"{max(of('others')):.1%}",
                len(runs),
            )
        )
    return lines


def pairs(results: Results) -> list[str]:
    """Each of our cases over each peer's, round by round."""
    head = ("ours / peer", "images/s, median", "interval", "start-up", "peak RSS", "rounds")
    lines = [row(*head), row("---", *["---:"] * (len(head) - 1))]
    ours = [name for name in results.runs if Case.parse(name).peer == "recaption"]
    theirs = [name for name in results.runs if name not in ours]
    coverage = 1.0
    for our in ours:
        for their in theirs:
            ratios = results.ratios(our, their, "images_per_second")
            if not ratios:
                continue
            low, high, coverage = interval(ratios)
            lines.append(
                row(
                    f"{Case.parse(our).group} / {Case.parse(their).group}",
                    f"{statistics.median(ratios):.2f}",
                    f"{low:.2f}–{high:.2f}",
                    number(results.ratios(our, their, "start_up_seconds"), 2),
                    number(results.ratios(our, their, "peak_rss_mb"), 2),
                    len(ratios),
                )
            )
    if len(lines) == 2:
        return []
    note = f"The interval is of the median of the rounds' ratios, and covers it in {coverage:.0%} of cases."
    return [*lines, "", note] if coverage else lines


def render(records: list[Record], quality_files: list[Path]) -> str:
    """The report, in Markdown."""
    results = Results(records)
    if not results.runs:
        return "# No run was measured\n"
    work, machine = results.work, results.machine
    run = next(iter(next(iter(results.runs.values())).values()))
    size = f"{run['images']} images, {run['new_tokens']} new tokens"
    lines = [
        f"# recaption and its peers: {work['model']}, {size}",
        "",
        f"{machine['processor']}, {machine['cores']} cores ({machine['features']}),"
        f" {machine['memory_gb']} GB; commit {machine['commit']}; {machine['date']}.",
        "",
        f"    {machine['command']}",
        "",
        "JPEG file to caption text, after a warm-up, without loading the model; all captions are as long.",
        "All are timed from outside by one clock, in turns. Start-up: from the start of the process to the",
        "first caption.",
        "",
        *speeds(results, losses(quality_files)),
        "",
    ]
    table = pairs(results)
    if table:
        lines += ["## Round by round", "", *table, ""]
    lines += ["## Limits of the machine, measured in each round", ""]
    names = [
        name for name in next(iter(results.limits.values()), {}) if name not in ("kind", "round", "others")
    ]
    lines += [row("limit", "median (range)"), row("---", "---:")]
    for name in names:
        values = [limits[name] for limits in results.limits.values() if name in limits]
        lines.append(row(name, range_of(values, 1)))
    if work.get("flops"):
        gflop = {stage: value / 1e9 for stage, value in work["flops"].items()}
        parts = ", ".join(f"{stage} {value:.2f}" for stage, value in gflop.items())
        total = sum(gflop.values())
        lines += [
            "",
            f"GFLOP of an image: {parts}; {total:.2f} in all; {work['prompt_tokens']} prompt tokens.",
        ]
    versions = sorted({run["version"] for runs in results.runs.values() for run in runs.values()})
    lines += ["", "Versions: " + "; ".join(versions) + "."]
    disturbed = sum(
        run["others"] > DISTURBED_SHARE for runs in results.runs.values() for run in runs.values()
    )
    if disturbed:
        lines += [
            "",
            f"{disturbed} runs had more than {DISTURBED_SHARE:.0%} of the machine taken by other programs.",
        ]
    for failure in results.failures:
        lines += ["", f"Failed: `{failure['case']}`: {failure['reason']}"]
    return "\n".join(lines) + "\n"

"""The Markdown report of scripts/gpu_check.sh, from the results of its stages."""

from __future__ import annotations

from typing import Any

Result = dict[str, Any]

NOTES = """\
- Parity: `captions alike` is the share of captions with the same ids as the CPU's, `ids alike` the share of
  ids before a caption's first difference. fp32 must have all of them; the other precisions have a floor, set
  by judgement. bf16 is compared with fp32.
- `% of fp16 peak` is the model's arithmetic, as `recaption inspect` counts it, times images per second, over
  the dense fp16 rate of NVIDIA's datasheet. int4 weights are multiplied in fp16, so the same peak holds;
  fp8 is multiplied at twice that rate.
- `GPU %`, `W` and `GB used` are nvidia-smi's while captions were made, loading left out. `GPU %` is the share
  of time in which some kernel ran, not how busy it kept the GPU.
- The 8B checkpoint is random: it has the shapes of the real one, and its captions say nothing."""


def table(columns: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(cell(column) for column in columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(value) for value in row) + " |" for row in rows]
    return "\n".join(lines)


def cell(value: Any) -> str:
    if isinstance(value, float):
        value = f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str("" if value is None else value).replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def fenced(text: str) -> str:
    return "\n".join(["```", text.rstrip().replace("```", "'''"), "```"])


def verdict(results: dict[str, Result], provider: str) -> str:
    """What a reader must know first."""
    named = {status: [name for name, r in results.items() if r["status"] == status] for status in STATUSES}
    counts = ", ".join(f"{len(names)} {status}" for status, names in named.items() if names)
    lines = [f"Stages: {counts or 'none'}."]
    ran = {
        row.get("ran on", row.get("provider", ""))
        for r in results.values()
        for row in r.get("rows", [])
        if row.get("result", "ok") == "ok"
    }
    if provider == "cpu":
        lines.append("**The CPU stood in for the GPU: nothing here is about a GPU.**")
    elif not any(str(name).startswith(("cuda", "tensorrt")) for name in ran):
        lines.append("**Nothing ran on a GPU:** see why below.")
    return " ".join(lines)


STATUSES = ("ok", "failed", "skipped", "unfinished", "not run")


def render(machine: Result, results: dict[str, Result], provider: str) -> str:
    """The report."""
    parts = ["# recaption on this GPU", verdict(results, provider), "## Machine"]
    parts.append(table(["what", "value"], [[k, v] for k, v in machine.items()]))
    summary = [[name, r["status"], r.get("seconds"), r.get("reason", "")] for name, r in results.items()]
    parts += ["## Stages", table(["stage", "result", "seconds", "why"], summary)]
    for name, result in results.items():
        if rows := result.get("rows"):
            columns = list(dict.fromkeys(key for row in rows for key in row))
            # Long texts last.
            columns.sort(key=lambda column: column in ("result", "pictures", "plan"))
            parts += [f"## {name}", table(columns, [[row.get(column) for column in columns] for row in rows])]
        if text := result.get("text"):
            parts += [f"## {name}: output", fenced(text)]
    parts += ["## How to read this", NOTES]
    failures = [row for result in results.values() for row in result.get("failures", [])]
    if failures:
        parts.append("## What programs said that failed")
    for failure in failures:
        code = "time limit" if failure["code"] is None else f"exit code {failure['code']}"
        parts += [f"`{failure['command']}` ({code})", fenced(failure["output"])]
    return "\n\n".join(parts) + "\n"

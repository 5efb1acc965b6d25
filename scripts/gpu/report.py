"""The Markdown report of scripts/gpu_check.sh, from the results of its stages."""

from __future__ import annotations

from typing import Any

Result = dict[str, Any]


def table(columns: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(value) for value in row) + " |" for row in rows]
    return "\n".join(lines)


def cell(value: Any) -> str:
    if isinstance(value, float):
        value = f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str("" if value is None else value).replace("|", "\\|").replace("\n", " ")


def render(machine: Result, results: dict[str, Result]) -> str:
    """The report."""
    parts = [
        "# recaption on this GPU",
        "## Machine",
        table(["what", "value"], [[k, v] for k, v in machine.items()]),
    ]
    summary = [
        [name, result["status"], result.get("seconds"), result.get("reason", "")]
        for name, result in results.items()
    ]
    parts += ["## Stages", table(["stage", "result", "seconds", "why"], summary)]
    for name, result in results.items():
        if rows := result.get("rows"):
            columns = list(dict.fromkeys(key for row in rows for key in row))
            parts += [f"## {name}", table(columns, [[row.get(column) for column in columns] for row in rows])]
        if text := result.get("text"):
            parts += [f"## {name}: output", "```", text.rstrip().replace("```", "'''"), "```"]
    failures = [row for result in results.values() for row in result.get("failures", [])]
    if failures:
        parts.append("## Failures")
    for failure in failures:
        output = failure["output"].replace("```", "'''").rstrip()
        parts += [f"`{failure['command']}` (exit code {failure['code']})", "```", output, "```"]
    return "\n\n".join(parts) + "\n"

"""Runs a command and says how much processor time each of its threads took, by name: who waits for whom.

    python scripts/preprocess/thread_times.py recaption run PICTURES --model BUNDLE --out FOLDER --overwrite

Linux only. Reads the counters of all threads every 20 ms until the command ends. The share is of the time
from the first work of an engine to the end, so loading the model does not count.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

TICK = os.sysconf("SC_CLK_TCK")


def times(process: int) -> dict[tuple[str, str], float]:
    """Processor seconds of each thread, by id and name."""
    found = {}
    for task in Path(f"/proc/{process}/task").glob("*"):
        try:
            text = (task / "stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        name, rest = text[text.index("(") + 1 : text.rindex(")")], text[text.rindex(")") + 2 :].split()
        found[task.name, name] = (int(rest[11]) + int(rest[12])) / TICK
    return found


def main() -> None:
    if not sys.platform.startswith("linux"):
        raise SystemExit("needs Linux's /proc")
    process = subprocess.Popen(sys.argv[1:])
    first: float | None = None
    at_first: dict[tuple[str, str], float] = {}
    last: dict[tuple[str, str], float] = {}
    while process.poll() is None:
        now = times(process.pid)
        if first is None and any(name.startswith("engine") and spent > 0 for (_, name), spent in now.items()):
            first, at_first = time.perf_counter(), now
        last.update(now)
        time.sleep(0.02)
    if first is None:
        raise SystemExit("no engine was at work for as long as the clock can tell")
    wall = time.perf_counter() - first
    by_name: dict[str, float] = {}
    for thread, spent in last.items():
        by_name[thread[1]] = by_name.get(thread[1], 0) + spent - at_first.get(thread, 0)
    for name, spent in sorted(by_name.items(), key=lambda item: -item[1]):
        if spent > 0:
            print(f"{name:16} {spent:8.2f} s  {100 * spent / wall:5.1f} %", file=sys.stderr)
    print(f"{'wall':16} {wall:8.2f} s", file=sys.stderr)


if __name__ == "__main__":
    main()

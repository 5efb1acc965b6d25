"""Readings of nvidia-smi while a run goes on, and what they say about the part of it that was captioning."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from dataclasses import dataclass

COLUMNS = {"utilization.gpu": "GPU %", "power.draw": "W", "memory.used": "GB used"}
QUERY = [f"--query-gpu=index,{','.join(COLUMNS)}", "--format=csv,noheader,nounits", "-lms", "250"]


@dataclass(frozen=True)
class Reading:
    """One GPU at one time; None for what it does not tell."""

    time: float
    gpu: int
    values: tuple[float | None, ...]


def parse(line: str, now: float) -> Reading | None:
    """A line of nvidia-smi; None for one that is none of a GPU's."""
    cells = [cell.strip() for cell in line.split(",")]
    if len(cells) != 1 + len(COLUMNS) or not cells[0].isdigit():
        return None

    def number(cell: str) -> float | None:
        try:
            return float(cell)
        except ValueError:
            return None

    return Reading(now, int(cells[0]), tuple(number(cell) for cell in cells[1:]))


def summarize(readings: list[Reading], gpus: set[int], start: float, end: float) -> dict[str, float]:
    """Means over `gpus` between two times; of memory the most."""
    inside = [reading for reading in readings if start <= reading.time <= end and reading.gpu in gpus]
    found: dict[str, float] = {}
    for i, column in enumerate(COLUMNS.values()):
        values = [value for reading in inside if (value := reading.values[i]) is not None]
        if not values:
            continue
        # MiB.
        found[column] = max(values) * (1 << 20) / 1e9 if column == "GB used" else sum(values) / len(values)
    return found


class Sampler:
    """Reads while it is entered."""

    def __enter__(self) -> Sampler:
        self.readings: list[Reading] = []
        self.process: subprocess.Popen[str] | None = None
        if shutil.which("nvidia-smi"):
            command = ["nvidia-smi", *QUERY]
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            self.thread = threading.Thread(target=self.read, daemon=True)
            self.thread.start()
        return self

    def read(self) -> None:
        assert self.process is not None and self.process.stdout is not None
        for line in self.process.stdout:
            if reading := parse(line, time.monotonic()):
                self.readings.append(reading)

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
            self.thread.join()

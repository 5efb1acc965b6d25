"""What the machine and a tree of processes are doing, from /proc."""

from __future__ import annotations

import os
import platform
import threading
import time
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
NUM_CORES = os.cpu_count() or 1
QUIET_SHARE = 0.15
SAMPLE_SECONDS = 1.0


def busy_seconds() -> float:
    """CPU seconds that the whole machine has been busy since it started."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    idle, waiting = fields[3], fields[4]
    return (sum(fields[:8]) - idle - waiting) / TICKS


def wait_until_quiet(max_seconds: float) -> None:
    """Until the machine has been nearly idle for a second, or `max_seconds` are over."""
    end = time.monotonic() + max_seconds
    while time.monotonic() < end:
        before = busy_seconds()
        time.sleep(1)
        if busy_seconds() - before < QUIET_SHARE * NUM_CORES:
            return


def tree(root: int) -> list[int]:
    """The process `root` and all that descend from it."""
    parents: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            fields = _stat(int(entry.name))
            if fields:
                parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found = [root]
    for process in found:
        found += parents.get(process, [])
    return found


def cpu_seconds(root: int) -> float:
    """CPU seconds of a tree of processes, with those of its ended children."""
    stats = [_stat(process) for process in tree(root)]
    return sum(int(field) for fields in stats for field in fields[11:15]) / TICKS


def _stat(process: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on; none when the process is gone."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _peak_kb(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


class PeakMemory:
    """Watches how much memory a tree of processes holds at most: the sum of each one's own peak."""

    def __init__(self, root: int) -> None:
        self.root, self.peak_kb = root, 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            self.sample()

    def sample(self) -> None:
        self.peak_kb = max(self.peak_kb, sum(_peak_kb(process) for process in tree(self.root)))

    def stop(self) -> float:
        """Megabytes (2^20 bytes) at most."""
        self._over.set()
        self._thread.join()
        return self.peak_kb / 1024


def description() -> dict[str, str | int]:
    """What a result says of the machine it is from."""
    cpu = Path("/proc/cpuinfo").read_text()
    fields = {
        name.strip(): value.strip()
        for name, _, value in (line.partition(":") for line in cpu.splitlines())
        if value
    }
    flags = fields.get("flags", "").split()
    wanted = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8")
    memory = int(Path("/proc/meminfo").read_text().split()[1])
    return {
        "processor": fields.get("model name", platform.processor()),
        "cores": NUM_CORES,
        "features": " ".join(flag for flag in wanted if flag in flags),
        "memory_gb": round(memory / (1 << 20)),
        "kernel": platform.release(),
    }

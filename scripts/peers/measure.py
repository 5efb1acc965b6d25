"""Measures a case: start-up, images per second, memory, and the time of one token, by one clock for all."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import machine
from captioners import Caption, Captioner, Failed, Peer, Recaption
from cases import Case, Job
from workplace import ROOT, Missing, Workplace, say

Record = dict[str, Any]


def open_captioner(place: Workplace, case: Case, job: Job, new_tokens: int, version: str) -> Captioner:
    """Starts the process of a case."""
    command, log = (
        place.command(case, job),
        place.logs / f"run-{re.sub(r'[^a-z0-9=.-]+', '-', case.name)}.log",
    )
    if case.peer == "recaption":
        tokens = ["--max-new-tokens", str(new_tokens)]
        return Recaption([*command, *tokens], log, job.max_seconds, {}, version=version)
    return Peer(command, log, job.max_seconds, place.environment, new_tokens=new_tokens)


def measure(place: Workplace, case: Case, job: Job, version: str, has_one_token: bool) -> Record:
    """The process starts, captions one image, warms up with what it holds in flight, then is timed."""
    started = time.perf_counter()
    with open_captioner(place, case, job, job.new_tokens, version) as captioner:
        memory = machine.PeakMemory(captioner.process.pid)
        found = captioner.version()
        check(captioner.caption(job.images[:1]), 1, job.new_tokens)
        start_up = time.perf_counter() - started
        captioner.caption(job.warm_up[: case.in_flight])
        captions, full = timed(captioner, job.timed)
        check(captions, job.num_images, job.new_tokens)
        prefill: Record = {}
        if has_one_token and isinstance(captioner, Peer):
            captioner.new_tokens = 1
            prefill = timed(captioner, job.one_token)[1]
        memory.sample()
        peak = memory.stop()
    if has_one_token and not prefill:
        with open_captioner(place, case, job, 1, version) as captioner:
            captioner.caption(job.warm_up[: case.in_flight])
            prefill = timed(captioner, job.one_token)[1]
    record = {
        "version": found,
        "images": job.num_images,
        "new_tokens": job.new_tokens,
        "threads": job.threads,
        "images_per_second": round(job.num_images / full["seconds"], 4),
        "seconds": round(full["seconds"], 4),
        "cpu_seconds": round(full["cpu_seconds"], 3),
        "others": round(full["others"], 4),
        "start_up_seconds": round(start_up, 3),
        "peak_rss_mb": round(peak, 1),
        "captions": [caption.digest for caption in captions],
        "first_words": [caption.first_word for caption in captions],
    }
    if prefill:
        record["one_token_seconds"] = round(prefill["seconds"], 4)
        record["one_token_others"] = round(prefill["others"], 4)
    return record


def timed(captioner: Captioner, files: list[Path]) -> tuple[list[Caption], Record]:
    """Captions, and what they took; `others` is the share of the machine that other processes had."""
    process = captioner.process.pid
    busy, own, started = machine.busy_seconds(), machine.cpu_seconds(process), time.perf_counter()
    captions = captioner.caption(files)
    seconds = time.perf_counter() - started
    own_seconds = machine.cpu_seconds(process) - own
    others = max(0.0, machine.busy_seconds() - busy - own_seconds) / (machine.NUM_CORES * seconds)
    return captions, {"seconds": seconds, "cpu_seconds": own_seconds, "others": others}


def check(captions: list[Caption], num_images: int, new_tokens: int) -> None:
    """Everyone does the same amount of work, or it is no comparison."""
    lengths = {caption.num_tokens for caption in captions}
    if len(captions) != num_images or lengths != {new_tokens}:
        counts = f"{len(captions)} of {sorted(lengths)} tokens"
        raise Failed(f"expected {num_images} captions of {new_tokens} tokens, got {counts}")


def limits(place: Workplace, threads: int) -> Record:
    """Matrix products through oneDNN; what registers and memory give, by the kernels' own benchmark."""
    found: Record = {}
    busy, own, started = machine.busy_seconds(), children_seconds(), time.perf_counter()
    try:
        script = Path(__file__).with_name("limits.py")
        output = place.run("limits", [place.python("transformers"), script, "--threads", str(threads)])
        found.update(json.loads(output))
    except Missing as reason:
        say(f"no limits from oneDNN: {reason}")
    try:
        found.update(kernel_limits(threads))
    except (OSError, Failed, subprocess.SubprocessError) as reason:
        say(f"no limits from the kernels' benchmark: {reason}")
    others = machine.busy_seconds() - busy - (children_seconds() - own)
    share = max(0.0, others) / (machine.NUM_CORES * (time.perf_counter() - started))
    return {**found, "others": round(share, 4)}


def children_seconds() -> float:
    """CPU seconds of the children that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def kernel_limits(threads: int) -> Record:
    """The line that `cargo bench -p recaption-kernels` begins with; the rest of it is not waited for."""
    command = [kernels_bench(), str(threads), "--bench"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout
        pattern = re.compile(r"limits: int8 ([\d.]+) GFLOP/s, f32 ([\d.]+) GFLOP/s, read ([\d.]+) GB/s")
        try:
            line = next(filter(None, map(pattern.search, process.stdout)), None)
        finally:
            process.kill()
    if line is None:
        raise Failed("it prints no line of limits")
    names = ("int8_register_gops", "fp32_register_gflops", "read_gbs")
    return {name: float(value) for name, value in zip(names, line.groups(), strict=True)}


@functools.cache
def kernels_bench() -> Path:
    """The kernels' benchmark, built."""
    bench = ["cargo", "bench", "--quiet", "--locked", "-p", "recaption-kernels"]
    built = subprocess.run(
        [*bench, "--no-run", "--message-format=json"], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    programs = re.findall(r'"executable":"([^"]+)"', built.stdout)
    program = next((Path(path) for path in programs if Path(path).name.startswith("kernels-")), None)
    if built.returncode != 0 or program is None:
        raise Failed("it does not build")
    return program

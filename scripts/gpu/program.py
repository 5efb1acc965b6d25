"""Runs programs under a time limit, and recaption with what every stage of scripts/gpu_check.sh needs of it.

In a dry run nothing runs: each command line is noted, and answered with numbers that look like the real ones,
so that the code of the stages is gone through all the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Result = dict[str, Any]

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINTS = ROOT / "tests" / "data" / "checkpoints"
IMAGES = ROOT / "tests" / "data" / "images"
DEMO = ROOT / "models" / "demo"
SHARD = DEMO / "shard" / "00000.tar"
PHOTOS = ROOT / "tests" / "data" / "fetched" / "photos"
TOKENIZER = ROOT / "tests" / "data" / "fetched" / "llama3"
CHECKPOINT_MAKER = ROOT / "scripts" / "size" / "make_checkpoint.py"
# Characters of a failed program's output that the report keeps.
TAIL = 3000
# Errors that say that a provider is not there, as src/error.rs words them; all others are failures.
MISSING_PROVIDER = re.compile(r"provider `\w+` does not work here|CUDA, load the CUDA runtime")
CANNED_IDS = [[1, 2, 3], [4, 5, 6]]


class Skipped(Exception):
    """What can't run here."""


class Failed(Exception):
    """What ran, and went wrong."""


class OutOfTime(Exception):
    """The budget of the whole call is spent: what was begun is to be begun again."""


@dataclass(frozen=True)
class Finished:
    """A program that ended."""

    code: int
    stdout: str = ""
    stderr: str = ""
    seconds: float = 0.0
    peak_rss_bytes: int = 0
    ended: float = 0.0


@dataclass(frozen=True)
class Captions:
    """What one run wrote: token ids by key, its summary, and what it said about itself."""

    ids: dict[str, list[int]]
    summary: Result
    said: list[str]
    decode_rate: float | None
    ended: float

    def new_tokens_per_second(self) -> float:
        return self.summary["new_tokens"] / max(self.summary["run_seconds"], 1e-9)


@dataclass
class Program:
    """recaption, where results go, and what the stages share."""

    recaption: Path
    out: Path
    provider: str = "cuda"
    is_small: bool = False
    is_dry: bool = False
    num_images: int = 1024
    install_cuda_libraries: bool = False
    gpus: list[str] = field(default_factory=list)
    python: str = "python3"
    environment: dict[str, str] = field(default_factory=dict)
    stage_deadline: float = float("inf")
    budget_deadline: float = float("inf")
    commands: list[list[str]] = field(default_factory=list)
    failures: list[Result] = field(default_factory=list)

    @property
    def uses_gpu(self) -> bool:
        return self.provider != "cpu"

    def call(self, command: list[object], may_fail: bool = False, good: tuple[int, ...] = (0,)) -> Finished:
        """Runs a program to its end or the deadline's; a failure is noted, and raised unless it may be."""
        words = [str(word) for word in command]
        self.commands.append(words)
        if self.is_dry:
            return Finished(0, canned_output(words))
        deadline = min(self.stage_deadline, self.budget_deadline)
        finished = execute(words, deadline, {**os.environ, **self.environment})
        if finished is None:
            if self.budget_deadline <= self.stage_deadline:
                raise OutOfTime
            self.note(words, None, "ran past the stage's time limit and was ended")
            raise Failed(f"ran past the stage's time limit: `{' '.join(words[:3])} …`")
        if finished.code not in good and not may_fail:
            self.note(words, finished.code, finished.stderr or finished.stdout)
            raise Failed(first_error(finished))
        return finished

    def note(self, command: list[str], code: int | None, output: str) -> None:
        failure = {"command": " ".join(command), "code": code, "output": output[-TAIL:]}
        self.failures.append(failure)

    def without_paths(self, text: str) -> str:
        """`text` without where things lie on this machine: reports are there to be shown."""
        return (
            text.replace(str(self.out), "OUT/gpu_check")
            .replace(f"{ROOT}/", "")
            .replace(str(Path.home()), "~")
        )

    def run(self, *args: object, may_fail: bool = False, good: tuple[int, ...] = (0,)) -> Finished:
        """Runs recaption."""
        return self.call([self.recaption, *args], may_fail, good)

    def export(self, checkpoint: Path, name: str, *options: object) -> tuple[Path, Finished]:
        """Exports anew."""
        folder = self.out / "bundles" / name
        finished = self.run("export", checkpoint, "--out", folder, "--overwrite", *options)
        if not self.is_dry:
            (folder.parent / f"{name}.made-by").write_text(self.made_by(options))
        return folder, finished

    def bundle(self, checkpoint: Path, *options: str) -> Path:
        """The bundle of these options; exported when this very program has not done so before."""
        name = "-".join([checkpoint.name, *(option.strip("-") for option in options)])
        made_by = self.out / "bundles" / f"{name}.made-by"
        if made_by.is_file() and made_by.read_text() == self.made_by(options):
            return self.out / "bundles" / name
        return self.export(checkpoint, name, *options)[0]

    def has_bundle(self, name: str, *options: object) -> bool:
        made_by = self.out / "bundles" / f"{name}.made-by"
        return self.is_dry or (made_by.is_file() and made_by.read_text() == self.made_by(options))

    def made_by(self, options: tuple[object, ...]) -> str:
        return f"{fingerprint(self.recaption)} {' '.join(map(str, options))}"

    def captions(self, bundle: Path, inputs: list[Path], *options: object) -> Captions:
        """Captions `inputs`. A row that failed is a failure: nothing is compared or timed without its ids."""
        self.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.out) as folder:
            where = Path(folder) / "captions"
            finished = self.run(
                *("run", *inputs, "--model", bundle, "--out", where, "--format", "jsonl"),
                *("--with-token-ids", "--ignore-eos", "--json", *options),
                good=(0, 1),
            )
            if self.is_dry:
                ids = {str(key): row for key, row in enumerate(CANNED_IDS)}
                return Captions(ids, json.loads(finished.stdout), [], 100.0, 0.0)
            lines = [line for file in sorted(where.glob("*.jsonl")) for line in file.read_text().splitlines()]
        rows = [json.loads(line) for line in lines]
        summary = json.loads(finished.stdout)
        bad = [row for row in rows if row["status"] != "ok" or not row["token_ids"]]
        if bad or finished.code or not rows:
            reason = bad[0].get("error") if bad else "no rows"
            self.note(self.commands[-1], finished.code, f"{reason}\n{finished.stderr}")
            raise Failed(f"{len(bad)} of {len(rows)} rows failed: {reason}")
        rates = re.findall(r"decode (\d+(?:\.\d+)?) tok/s", finished.stderr)
        said = [
            line for line in finished.stderr.splitlines() if line.startswith("provider:") or "memory:" in line
        ]
        asked = str(options[options.index("--provider") + 1])
        if not any(line.startswith(f"provider: {asked}") for line in said):
            raise Failed(
                f"asked for {asked}, ran on something else: {said[0] if said else 'it does not say'}"
            )
        ids = {row["key"]: row["token_ids"] for row in rows}
        return Captions(ids, summary, said, float(rates[-1]) if rates else None, finished.ended)

    def needs(self, provider: str) -> None:
        """Skips when `provider` is not there; one that is there and fails is a failure."""
        if self.is_dry or provider == "cpu":
            return
        bundle = self.bundle(DEMO, "--precision", "fp16")
        args = [
            "run",
            SHARD,
            "--limit",
            "1",
            "--model",
            bundle,
            "--provider",
            provider,
            "--max-new-tokens",
            "2",
        ]
        finished = self.run(*args, may_fail=True)
        if finished.code == 0:
            return
        if MISSING_PROVIDER.search(finished.stderr):
            raise Skipped(first_error(finished))
        self.note(self.commands[-1], finished.code, finished.stderr)
        raise Failed(first_error(finished))


def execute(command: list[str], deadline: float, environment: dict[str, str]) -> Finished | None:
    """Runs `command` in a process group of its own; ends the group and gives None at the deadline."""
    started = time.monotonic()
    with tempfile.TemporaryFile("w+b") as stdout, tempfile.TemporaryFile("w+b") as stderr:
        try:
            process = subprocess.Popen(
                command, stdout=stdout, stderr=stderr, cwd=ROOT, env=environment, start_new_session=True
            )
        except OSError as error:
            raise Failed(f"`{command[0]}`: {error}") from error
        status, usage = None, None
        try:
            while status is None:
                pid, code, usage = os.wait4(process.pid, os.WNOHANG)
                if pid:
                    status = os.waitstatus_to_exitcode(code)
                elif time.monotonic() > deadline:
                    return None
                else:
                    time.sleep(0.02)
        finally:
            if status is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                os.waitpid(process.pid, 0)
            process.returncode = -signal.SIGKILL if status is None else status
        ended = time.monotonic()
        texts = []
        for file in (stdout, stderr):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    # Linux counts in KiB.
    peak = usage.ru_maxrss * 1024 if usage is not None else 0
    return Finished(status, texts[0], texts[1], ended - started, peak, ended)


def first_error(finished: Finished) -> str:
    """The line that says what went wrong."""
    lines = [line for line in (finished.stderr or finished.stdout).strip().splitlines() if line.strip()]
    if finished.code < 0:
        return f"ended by signal {-finished.code}; {lines[-1] if lines else 'no output'}"
    errors = [line for line in lines if line.startswith("error")]
    return (errors or lines[-1:] or [f"exit code {finished.code}"])[0]


_fingerprints: dict[Path, str] = {}


def fingerprint(path: Path) -> str:
    """The first digits of a file's SHA-256."""
    if path not in _fingerprints:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
        _fingerprints[path] = digest.hexdigest()[:16]
    return _fingerprints[path]


def canned_output(command: list[str]) -> str:
    """What a dry run takes for the output of `command`."""
    match command[1:2]:
        case ["run"]:
            numbers = {"rows": 2, "ok": 2, "failed": 0, "prompt_tokens": 182, "new_tokens": 6}
            times = {"load_seconds": 1.0, "run_seconds": 2.0, "images_per_second": 1.0}
            return json.dumps(numbers | times)
        case ["inspect"]:
            return json.dumps({"flops_per_image": {"total": 1e12}, "vision": {"num_image_tokens": 64}})
        case ["doctor"] if "--json" in command:
            return "{}"
    return ""

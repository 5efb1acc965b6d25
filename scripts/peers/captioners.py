"""Programs that caption, each a process that is asked through pipes: the peers' runners, and recaption."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

Command = Sequence[str | Path]


class Failed(Exception):
    """A captioner did not do what it was asked."""


@dataclass(frozen=True)
class Caption:
    """What came out for an image."""

    text: str
    num_tokens: int

    @property
    def first_word(self) -> str:
        return next(iter(self.text.split()), "")

    @property
    def digest(self) -> str:
        """Tells captions apart, whatever white space surrounds them."""
        return hashlib.sha256(self.text.strip().encode()).hexdigest()[:8]


class Captioner:
    """A process with a model. It ends with the `with` block, or is killed when `max_seconds` are over."""

    def __init__(self, command: Command, log: Path, max_seconds: float, environment: dict[str, str]) -> None:
        self.log = log
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **environment},
            )
        self._watchdog = threading.Timer(max_seconds, self.process.kill)
        self._watchdog.daemon = True
        self._watchdog.start()

    def __enter__(self) -> Captioner:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in (self._input, self._output):
            try:
                pipe.close()
            except OSError:
                pass
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._watchdog.cancel()

    @property
    def _input(self) -> IO[str]:
        assert self.process.stdin
        return self.process.stdin

    @property
    def _output(self) -> IO[str]:
        assert self.process.stdout
        return self.process.stdout

    def _write(self, text: str) -> None:
        try:
            self._input.write(text)
            self._input.flush()
        except OSError as error:
            raise Failed(f"it ended: see {self.log.name}") from error

    def _read(self) -> dict[str, Any]:
        line = self._output.readline()
        if not line:
            raise Failed(f"it ended or took too long: see {self.log.name}")
        return json.loads(line)

    def version(self) -> str:
        """Waits until the model is loaded, where that can be seen."""
        raise NotImplementedError

    def caption(self, files: Sequence[Path]) -> list[Caption]:
        """Captions of `files`, in their order."""
        raise NotImplementedError


class Peer(Captioner):
    """A runner that speaks as serve.py does."""

    def __init__(self, *args: Any, new_tokens: int) -> None:
        super().__init__(*args)
        self.new_tokens = new_tokens

    def version(self) -> str:
        return str(self._read()["version"])

    def caption(self, files: Sequence[Path]) -> list[Caption]:
        request = {"files": [str(file) for file in files], "new_tokens": self.new_tokens}
        self._write(json.dumps(request) + "\n")
        return [Caption(*row) for row in self._read()["captions"]]


class Recaption(Captioner):
    """`recaption run -`: paths go in one a line, rows come out as they are ready."""

    def __init__(self, *args: Any, version: str) -> None:
        super().__init__(*args)
        self._version = version

    def version(self) -> str:
        return self._version

    def caption(self, files: Sequence[Path]) -> list[Caption]:
        self._write("".join(f"{file}\n" for file in files))
        rows = [self._read() for _ in files]
        for row in rows:
            if row["status"] != "ok":
                raise Failed(row["error"])
        return [Caption(row["re_caption"], row["num_tokens"]) for row in rows]

"""What every peer's runner shares: requests come in on standard input, captions go out on standard output.

A request is a line `{"files": [...], "new_tokens": n}`, an answer `{"captions": [[text, tokens], ...]}`, in
the order of the files. The one who asks holds the clock, for every peer the same. Standard library only.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable

Caption = tuple[str, int]


def parser(doc: str | None, precisions: list[str]) -> argparse.ArgumentParser:
    """The options that every runner has."""
    options = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    options.add_argument("model", help="folder of the checkpoint or model")
    options.add_argument("--precision", choices=precisions, default=precisions[0])
    options.add_argument("--batch", type=int, default=8, help="captions in flight")
    options.add_argument("--threads", type=int, default=os.cpu_count())
    options.add_argument("--max-length", type=int, default=1024, help="tokens of a prompt and its caption")
    return options


def private_output() -> int:
    """Standard output for the answers alone: whatever a library prints goes to standard error."""
    answers = os.dup(1)
    os.dup2(2, 1)
    return answers


def serve(answers: int, version: str, caption: Callable[[list[str], int], list[Caption]]) -> None:
    """Says that the model is loaded, then answers until standard input ends."""
    with os.fdopen(answers, "w", encoding="utf-8", buffering=1) as output:
        print(json.dumps({"version": version}), file=output)
        for line in sys.stdin:
            request = json.loads(line)
            captions = caption(request["files"], request["new_tokens"])
            print(json.dumps({"captions": captions}), file=output)

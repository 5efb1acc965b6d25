"""Writes what transformers finds of decoder activations: the reference of the exporter's calibration pass.

For some of the checkpoints of make_checkpoints.py, seeded token ids go through the language model in windows
of one length. Noted are, layer by layer, the mean square of every channel that a linear layer takes, and the
root mean square of the columns of the weights that take it.

    python scripts/golden/make_calibration.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from make_checkpoints import SPECS, Spec, significant, stored_model

ROOT = Path(__file__).resolve().parents[2]
# Grouped heads and biases, a padded head width with LLaMA-3's rotary scaling, plain, a merged adapter.
NAMES = ("biases-bf16", "head24-llama3-rope-bf16", "published-f16", "lora-published-bf16")
WINDOWS, LENGTH = 2, 12
SITES = {
    "attention_input": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention_output": ("self_attn.o_proj",),
    "mlp_input": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp_hidden": ("mlp.down_proj",),
}


def golden(spec: Spec, folder: Path) -> dict[str, Any]:
    """Runs one checkpoint's language model."""
    model = stored_model(spec, folder).model.language_model
    ids = torch.randint(
        0, model.config.vocab_size, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(0)
    )
    inputs: dict[tuple[int, str], torch.Tensor] = {}
    hooks = []
    for index, layer in enumerate(model.layers):
        for site, (first, *_) in SITES.items():

            def note(
                _: torch.nn.Module, args: tuple[torch.Tensor], key: tuple[int, str] = (index, site)
            ) -> None:
                inputs[key] = args[0].flatten(0, 1)

            hooks.append(layer.get_submodule(first).register_forward_pre_hook(note))
    with torch.no_grad():
        model(input_ids=ids)
    layers = []
    for index, layer in enumerate(model.layers):
        found = {}
        for site, linears in SITES.items():
            weights = torch.cat([layer.get_submodule(name).weight for name in linears])
            found[site] = {
                "mean_square": significant(inputs[index, site].square().mean(0)),
                "weight_rms": significant(weights.square().mean(0).sqrt()),
            }
        layers.append(found)
    return {"token_ids": ids.flatten().tolist(), "length": LENGTH, "layers": layers}


def main() -> None:
    """Writes one file per checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "export/tests/data/calibration")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for spec in SPECS:
        if spec.name in NAMES:
            found = golden(spec, ROOT / "tests/data/checkpoints" / spec.name)
            (args.output / f"{spec.name}.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()

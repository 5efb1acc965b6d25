"""Measures what a bundle's precision costs: perplexity, divergence from a reference bundle, greedy agreement.

The decoders of all the bundles are run side by side, one token per step over a batch of windows, so that the
logits of every position are seen; only text is fed, no image. Models of OpenVINO and llama.cpp made from the
same weights may be among them. Prints JSON, one entry per model, the first being the reference:

- perplexity: per text, over windows of --length tokens, each from its second token on; loss: relative to the
  reference's.
- kl: mean divergence of the next-token distribution from the reference's, over the same positions; top1:
  share of positions with the same most probable token. Both are far less noisy than the perplexity.
- greedy: --prompts prompts are continued by --new tokens; `identical_share` is the mean share of tokens
  before the first that differs from the reference's, `exact_share` the share of continuations without any.

    python scripts/quality/evaluate.py FP32_BUNDLE BUNDLE... --text gpl3=GPL-3 --text alice=alice29.txt
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from bundle import Decoder, log_softmax
from peers import LlamaCppDecoder, OpenVinoDecoder
from texts import prompts, read_texts, windows

AnyDecoder = Decoder | OpenVinoDecoder | LlamaCppDecoder


@dataclass
class Tally:
    """Sums over one bundle's predictions."""

    nll: np.ndarray  # of each window
    kl: float = 0.0
    same_top1: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "models",
        nargs="+",
        help="the reference bundle, then what to compare with it: bundles, openvino:FOLDER, gguf:FILE",
    )
    parser.add_argument("--text", action="append", required=True, metavar="NAME=PATH", help="may be repeated")
    parser.add_argument("--windows", type=int, default=6, help="windows per text")
    parser.add_argument("--length", type=int, default=512, help="tokens per window")
    parser.add_argument("--prompts", type=int, default=50, help="0 leaves greedy decoding out")
    parser.add_argument("--words", type=int, default=8, help="words per prompt")
    parser.add_argument("--new", type=int, default=64, help="new tokens per prompt")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--custom-operators", type=Path, help="library of custom operators the bundles need")
    arguments = parser.parse_args()
    texts = read_texts(arguments.text)
    tokenizer = Tokenizer.from_file(str(Path(arguments.models[0]) / "tokenizer.json"))
    decoders = [load(model, arguments.threads, arguments.custom_operators) for model in arguments.models]
    shape = (arguments.windows, arguments.length)
    tallies = measure(decoders, np.concatenate([windows(tokenizer, text, *shape) for text in texts.values()]))
    continuations = None
    if arguments.prompts:
        starts = prompts(tokenizer, list(texts.values()), arguments.prompts, arguments.words)
        continuations = [greedy(decoder, starts, arguments.new) for decoder in decoders]
    predictions = arguments.windows * (arguments.length - 1)
    perplexities = [perplexity(tally, list(texts), predictions) for tally in tallies]
    results = []
    for index, model in enumerate(names(arguments.models)):
        result: dict[str, Any] = {
            "model": model,
            **decoders[index].description,
            "predictions": predictions * len(texts),
            "perplexity": perplexities[index],
            "loss": {name: value / perplexities[0][name] - 1 for name, value in perplexities[index].items()},
            "kl": tallies[index].kl / (predictions * len(texts)),
            "top1": tallies[index].same_top1 / (predictions * len(texts)),
        }
        if continuations is not None:
            result["greedy"] = agreement(continuations[0], continuations[index])
        results.append(result)
    json.dump(results, sys.stdout, indent=2)
    print()


def load(model: str, threads: int, custom_operators: Path | None) -> AnyDecoder:
    """The decoder that a command line argument names."""
    kind, separator, path = model.partition(":")
    if separator and kind == "openvino":
        return OpenVinoDecoder(Path(path), threads)
    if separator and kind == "gguf":
        return LlamaCppDecoder(Path(path), threads)
    return Decoder(Path(model), threads, custom_operators)


def names(models: list[str]) -> list[str]:
    """Last parts of the paths."""
    return [Path(model.rpartition(":")[2]).name for model in models]


def measure(decoders: list[AnyDecoder], tokens: np.ndarray) -> list[Tally]:
    """Feeds all the windows `[windows, length]` to every decoder; the first is the reference."""
    count, length = tokens.shape
    rows = np.arange(count)
    tallies = [Tally(nll=np.zeros(count)) for _ in decoders]
    for decoder in decoders:
        decoder.start(count, length)
    for position in range(length - 1):
        reference = None
        for decoder, tally in zip(decoders, tallies, strict=True):
            scores = log_softmax(decoder.step(tokens[:, position]))
            if reference is None:
                reference, probabilities, best = scores, np.exp(scores), scores.argmax(axis=1)
            tally.nll -= scores[rows, tokens[:, position + 1]]
            tally.kl += float((probabilities * (reference - scores)).sum(dtype=np.float64))
            tally.same_top1 += int((scores.argmax(axis=1) == best).sum())
    return tallies


def perplexity(tally: Tally, texts: list[str], predictions: int) -> dict[str, float]:
    """Perplexity of each text; every text has as many windows."""
    sums = tally.nll.reshape(len(texts), -1).sum(axis=1)
    return dict(zip(texts, np.exp(sums / predictions).tolist(), strict=True))


def greedy(decoder: AnyDecoder, starts: list[list[int]], num_new: int) -> np.ndarray:
    """`[prompts, num_new]` ids. All sequences are at one position: some are still fed their prompts."""
    longest = max(map(len, starts))
    decoder.start(len(starts), longest + num_new)
    sequences = [list(start) for start in starts]
    for position in range(longest + num_new - 1):
        best = decoder.step(np.array([sequence[position] for sequence in sequences])).argmax(axis=1)
        for sequence, token in zip(sequences, best, strict=True):
            if len(sequence) == position + 1:
                sequence.append(int(token))
    new = [sequence[len(start) :][:num_new] for sequence, start in zip(sequences, starts, strict=True)]
    return np.array(new)


def agreement(reference: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """How far continuations follow the reference's."""
    prefix = (reference == other).cumprod(axis=1).sum(axis=1)
    length = reference.shape[1]
    return {
        "prompts": len(reference),
        "new_tokens": length,
        "identical_share": float((prefix / length).mean()),
        "exact_share": float((prefix == length).mean()),
    }


if __name__ == "__main__":
    main()

"""The texts perplexity is measured on, as windows of token ids, and the prompts for greedy decoding."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

MIN_WORDS = 12


def read_texts(specs: list[str]) -> dict[str, str]:
    """`name=path` arguments to name -> text."""
    texts = {}
    for spec in specs:
        name, separator, path = spec.partition("=")
        if not separator:
            raise SystemExit(f"{spec}: expected name=path")
        texts[name] = Path(path).read_text(encoding="utf-8", errors="replace")
    return texts


def windows(tokenizer: Tokenizer, text: str, count: int, length: int) -> np.ndarray:
    """`[count, length]` ids: the text's first tokens, no special ones added."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids[: count * length]
    if len(ids) < count * length:
        raise SystemExit(f"a text has {len(ids)} tokens, {count * length} are needed")
    return np.array(ids, np.int64).reshape(count, length)


def prompts(tokenizer: Tokenizer, texts: list[str], count: int, num_words: int) -> list[list[int]]:
    """Ids of the first words of `count` distinct sentences, taken evenly from all the texts."""
    sentences = []
    for text in texts:
        found = re.split(r"(?<=[.!?])\s+", " ".join(text.split()))
        words = [sentence.split() for sentence in found]
        starts = [" ".join(sentence[:num_words]) for sentence in words if len(sentence) >= MIN_WORDS]
        sentences.append([start for start in dict.fromkeys(starts) if start[0].isupper()])
    chosen = []
    for position, found in enumerate(sentences):
        wanted = count // len(sentences) + (position < count % len(sentences))
        if len(found) < wanted:
            raise SystemExit(f"text {position} has {len(found)} usable sentences, {wanted} are needed")
        chosen += [found[index * len(found) // wanted] for index in range(wanted)]
    return [tokenizer.encode(start, add_special_tokens=False).ids for start in chosen]

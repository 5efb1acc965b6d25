"""Converts LLaMA-3's tokenizer.model (tiktoken's format) to the tokenizer.json of LLaMA-3 checkpoints.

Needs nothing but Python's standard library. The result has the same content as the published file: the same
vocabulary, merges, pre-tokeniser, special tokens and decoder.

    python scripts/golden/convert_tiktoken.py tokenizer.model tokenizer.json
"""

from __future__ import annotations

import argparse
import base64
import json
from pathlib import Path
from typing import Any

NUM_ORDINARY = 128_000
NUM_SPECIAL = 256
NAMED_SPECIAL = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "<|eot_id|>",
}
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_characters() -> list[str]:
    """The characters that stand for the bytes 0 to 255 in a byte-level vocabulary."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    characters, extra = [], 0
    for byte in range(256):
        if byte in printable:
            characters.append(chr(byte))
        else:
            characters.append(chr(256 + extra))
            extra += 1
    return characters


def read_ranks(path: Path) -> dict[bytes, int]:
    """The tokens' bytes with their ranks, which are the ids."""
    ranks = {}
    for line in path.read_bytes().splitlines():
        if line:
            token, rank = line.split()
            ranks[base64.b64decode(token)] = int(rank)
    if sorted(ranks.values()) != list(range(NUM_ORDINARY)):
        raise ValueError(f"{path} does not hold LLaMA-3's {NUM_ORDINARY} tokens")
    return dict(sorted(ranks.items(), key=lambda item: item[1]))


def merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """All the pairs of tokens which make up a token, in the order of the token made, then of the parts."""
    result = []
    for token in ranks:
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        pairs = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        result.extend(sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]])))
    return result


def special_tokens() -> list[str]:
    """The names of the 256 special tokens in the order of their ids."""
    names, reserved = [], 0
    for index in range(NUM_SPECIAL):
        if index in NAMED_SPECIAL:
            names.append(NAMED_SPECIAL[index])
        else:
            names.append(f"<|reserved_special_token_{reserved}|>")
            reserved += 1
    return names


def convert(ranks: dict[bytes, int]) -> dict[str, Any]:
    """The content of tokenizer.json."""
    characters = byte_characters()
    spelled = {token: "".join(characters[byte] for byte in token) for token in ranks}
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": NUM_ORDINARY + index, "content": name} | flags
            for index, name in enumerate(special_tokens())
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False},
                byte_level | {"add_prefix_space": False, "use_regex": False},
            ],
        },
        "post_processor": byte_level | {"trim_offsets": False},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {spelled[token]: rank for token, rank in ranks.items()},
            "merges": [f"{spelled[left]} {spelled[right]}" for left, right in merges(ranks)],
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="tokenizer.model in tiktoken's format")
    parser.add_argument("output", type=Path, help="the tokenizer.json to write")
    arguments = parser.parse_args()
    content = json.dumps(convert(read_ranks(arguments.model)), ensure_ascii=False, indent=1)
    arguments.output.write_text(content + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

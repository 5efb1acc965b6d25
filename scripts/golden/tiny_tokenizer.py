"""The tiny byte-level BPE tokenizer that all the test checkpoints share.

It has the shape of LLaMA-3's: a byte-level vocabulary, the same pre-tokeniser expression, `ignore_merges`,
the same special tokens and the same post-processor (which adds `<|begin_of_text|>`, so a rendered chat
prompt that already has one must be encoded without special tokens).
"""

from __future__ import annotations

from typing import Any

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

BOS = "<|begin_of_text|>"
END_OF_TEXT = "<|end_of_text|>"
EOT = "<|eot_id|>"
PAD = "<pad>"
IMAGE = "<image>"
# `<image>` is the last one: a text model with a table of `image_token_id()` rows does not hold it.
SPECIALS = [BOS, END_OF_TEXT, "<|start_header_id|>", "<|end_header_id|>", EOT, PAD, IMAGE]

MERGES = [
    ("Ġ", "a"), ("t", "h"), ("i", "n"), ("Ġ", "t"), ("e", "r"), ("a", "n"), ("Ġ", "s"), ("o", "n"),
    ("e", "n"),
    ("Ġt", "h"), ("i", "s"), ("Ġth", "e"), ("in", "g"), ("Ġ", "i"), ("a", "t"), ("Ġi", "m"), ("a", "g"),
    ("Ġim", "ag"), ("Ġimag", "e"), ("o", "r"), ("Ġ", "p"), ("Ġ", "d"), ("Ġd", "e"), ("s", "c"), ("Ġde", "sc"),
    ("r", "i"), ("Ġdesc", "ri"), ("u", "s"), ("us", "er"), ("Ġ", "o"), ("Ċ", "Ċ"), ("a", "s"), ("Ġ", "c"),
    ("t", "e"),
]  # fmt: skip

# Entries which the merges do not build: found only because of `ignore_merges`.
WHOLE_WORDS = ["Ġphotograph", "Ġwater"]


def byte_alphabet() -> list[str]:
    """The 256 characters that stand for the bytes, in the order of GPT-2's (and LLaMA-3's) vocabulary."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]


def vocabulary() -> dict[str, int]:
    """The ordinary tokens (not the special ones) with their ids."""
    tokens = byte_alphabet() + [left + right for left, right in MERGES] + WHOLE_WORDS
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise ValueError("a token is listed twice")
    return vocab


def special_ids() -> dict[str, int]:
    """The special tokens with their ids, which follow the ordinary ones."""
    first = len(vocabulary())
    return {token: first + index for index, token in enumerate(SPECIALS)}


def image_token_id() -> int:
    """The id of `<image>`: the last one."""
    return special_ids()[IMAGE]


def tokenizer_json() -> dict[str, Any]:
    """The content of tokenizer.json."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    specials = special_ids()
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": index, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False, "special": True,
            }
            for token, index in specials.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split", "pattern": {"Regex": LLAMA3_SPLIT}, "behavior": "Isolated",
                    "invert": False,
                },
                byte_level | {"use_regex": False},
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                {"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": BOS, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {BOS: {"id": BOS, "ids": [specials[BOS]], "tokens": [BOS]}},
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
            "vocab": vocabulary(), "merges": [[left, right] for left, right in MERGES],
        },
    }  # fmt: skip

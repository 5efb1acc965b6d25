"""Makes tests/data/text/llama3.json: prompts and detokenised texts by LLaMA-3's tokenizer.

The tokenizer itself (see scripts/fetch_test_data.sh) is not part of this repository; the sentences here are
ours.

    python scripts/golden/make_text.py [--compare OTHER_TOKENIZER_JSON]

`templates`: for each preset template and prompt the text with `<image>` in its place, and the ids of what
stands before and after `<image>` (encoded apart, without adding special tokens).

`decode`: lists of ids with the text that `decode(ids, skip_special_tokens=True)` gives; `cleaned` is added
where transformers 4.x, which obeyed the `clean_up_tokenization_spaces: true` of LLaMA-3's
tokenizer_config.json, gave something else (5.x does not clean up behind a BPE tokenizer).
"""

from __future__ import annotations

import argparse
import json
import sysconfig
from pathlib import Path

from transformers import PreTrainedTokenizerFast

IMAGE = "<image>"
USER_TURN = (
    "<|start_header_id|>user<|end_header_id|>\n\n<image>\nPROMPT<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
SYSTEM_TURN = "<|start_header_id|>system<|end_header_id|>\n\nSYSTEM<|eot_id|>"
TEMPLATES = {
    "llava-next-llama3": "<|begin_of_text|>"
    + SYSTEM_TURN.replace(
        "SYSTEM",
        "You are a helpful language and vision assistant. You are able to understand the visual content that "
        "the user provides, and assist the user with a variety of tasks using natural language.",
    )
    + USER_TURN,
    "llava-pp-llama3": "<|begin_of_text|>"
    + SYSTEM_TURN.replace(
        "SYSTEM",
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, and polite answers to the user's questions.",
    )
    + USER_TURN,
    "plain-llama3": "<|begin_of_text|>" + USER_TURN,
}
PROMPTS = [
    "Please generate a detailed caption of this image. Please be as descriptive as possible.",
    "Describe the image.",
    "What's in the picture?\nList:\n\n1. objects\n2. colours (e.g. #ff8800)\n",
    "请详细描述这张图片。写真を説明してください 🙂👩‍👩‍👧‍👦🇫🇷",
    "  Décris l’image — naïvement… en 3 phrases,  12345 mots\tmax !  ",
    "\n\n# Caption\r\n```json\n{\"caption\": null}\n```\n"
    "ДОКЛАД: что здесь? ¿Qué? Ünïcödé ﬁne\u00a0space\u2028line",
]  # fmt: skip

CAPTIONS = [
    "The image shows a small wooden boat on a calm lake at dawn.",
    "A black-and-white photograph of two children who sit on the steps of an old library, reading.",
    "In the foreground, a red bicycle leans against a stone wall; behind it, lavender reaches the hills.",
    "The sign reads “OPEN 24/7 – come in!” in bright neon letters.",
    "Three people (a man, a woman and a child) are walking a dog; it's raining, and they don't mind.",
    "A close-up of a cat's face. Its eyes are green. The background is blurred.",
    "The poster says: \"SALE: 50% off!!!\" and, below it, \"$19.99 -> $9.99\".",
    "This is a screenshot of a web page titled 'How to bake bread'. It has 4 steps:\n\n"
    "1. Mix.\n2. Knead.\n3. Wait.\n4. Bake.",
    "An aerial view of a river delta, its branching channels resembling the veins of a leaf",
    "Photo taken on 2019-07-04 at 18:45, f/2.8, ISO 100, 1/250 s.",
    "A bowl of phở with basil, lime & chilli; next to it a crème brûlée.",
    "The graffiti shows the letters ÀÉÎÕÜ, ßæøå and the word «жизнь».",
]  # fmt: skip
SPACES = [
    " A leading space and a trailing one ",
    "   three in front",
    "two behind  ",
    "a  double  space   and a triple one",
    "\tA tab\tand another\t",
    "\nA newline in front",
    "a newline behind\n",
    "two\n\nparagraphs\n\n\nand three newlines",
    "carriage\r\nreturn",
    " \n \n ",
    " ",
    "",
    "no-break\u00a0space, thin\u2009space, zero\u200bwidth, line\u2028separator",
]
CLEANED = [
    "A dog , a cat .",
    "Is it a bird ? No !",
    "it 's a plane , is n't it ?",
    "they 're here ; I 'm not ; we 've left",
    "do n't .",
    " .",
    " , ,",
    "a ' quoted ' word",
    "the sign says 'No smoking .'",
    "costs 5 . 50 , or 6 ,50 .",
    "an ellipsis ... and . . . another",
]
UNICODE = [
    "🙂",
    "A smiling face 🙂 and a rocket 🚀!",
    "👩‍👩‍👧‍👦 family",
    "🇫🇷🇩🇪 flags",
    "👍🏽 thumbs up",
    "一张猫的照片，坐在窗台上。",
    "窓辺に座っている猫の写真です。",
    "고양이 한 마리가 창가에 앉아 있다.",
    "龘靐齉爩 rare characters",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𓂀 𐍈",
    "e\u0301 combining and é composed",
    "مرحبا بالعالم",
    "สวัสดีชาวโลก",
    "नमस्ते दुनिया",
]


def decode_cases(tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, list[int]]]:
    """Names and ids."""

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    special = {
        name: tokenizer.convert_tokens_to_ids(f"<|{name}|>")
        for name in ("begin_of_text", "end_of_text", "eot_id", "start_header_id", "end_header_id")
    }
    cases = [("caption", ids(text)) for text in CAPTIONS]
    cases += [("spaces", ids(text)) for text in SPACES]
    cases += [("punctuation", ids(text)) for text in CLEANED]
    cases += [("unicode", ids(text)) for text in UNICODE]
    for text in UNICODE[:1] + UNICODE[2:4] + UNICODE[8:10]:
        tokens = ids(text)
        cases += [("truncated", tokens[:length]) for length in range(1, min(len(tokens), 6))]
        cases.append(("begun in the middle", tokens[1:]))
    split = ids("🚀")  # several tokens
    boat, lake = ids("A boat"), ids(" on a lake.")
    cases += [
        ("truncated, then text", split[:1] + lake),
        ("two truncated", split[:1] + split[:1]),
        ("special inside a character", [*split[:1], special["eot_id"], *split[1:]]),
        ("special between words", [*boat, special["eot_id"], *lake]),
        ("special in front and behind", [special["begin_of_text"], *boat, special["eot_id"]]),
        ("special only", [special["begin_of_text"], special["end_of_text"]]),
        (
            "a header",
            [special["start_header_id"], *ids("assistant"), special["end_header_id"], *ids("\n\nA boat")],
        ),
        ("a reserved token", [*boat, 128_002, 128_255, *lake]),
        ("an id past the vocabulary", [*boat, 128_256, 128_300, *lake]),
        ("the name of a special token in pieces", ids("<|eot") + ids("_id|>") + ids(" is no end")),
        ("the name of the image token", ids("an <image> tag")),
    ]  # fmt: skip
    # Single bytes which are no UTF-8 by themselves.
    alphabet = {byte: tokenizer.convert_tokens_to_ids(character) for byte, character in ODD_BYTES.items()}
    for name, sequence in {
        "a lone continuation byte": [0x80],
        "bytes that never occur": [0xFF, 0xC0],
        "an overlong form": [0xC0, 0xAF],
        "a surrogate": [0xED, 0xA0, 0x80],
        "past the last code point": [0xF4, 0x90, 0x80, 0x80],
        "three of four bytes, twice": [0xF0, 0x9F, 0x98, 0xF0, 0x9F, 0x98],
        "a whole character from bytes": [0xF0, 0x9F, 0x98, 0x80],
    }.items():
        cases.append((name, [alphabet[byte] for byte in sequence]))
    return cases


# How a byte-level vocabulary writes these bytes: as Latin-1 where printable, else from U+0100 on.
ODD_BYTES = {
    0x80: "\u0122",
    0x90: "\u0132",
    0x98: "\u013a",
    0x9F: "\u0141",
    0xA0: "\u0142",
    0xAF: "\u00af",
    0xC0: "\u00c0",
    0xED: "\u00ed",
    0xF0: "\u00f0",
    0xF4: "\u00f4",
    0xFF: "\u00ff",
}


def compare(tokenizer: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast, golden: dict) -> None:
    """Checks that two tokenizers agree on the golden's texts and on the sources of Python's library."""
    if tokenizer.get_vocab() != other.get_vocab():
        raise SystemExit("the vocabularies differ")
    texts = [case["rendered"] for case in golden["templates"]]
    texts += CAPTIONS + SPACES + CLEANED + UNICODE
    texts += [
        path.read_text(encoding="utf-8", errors="replace")
        for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
        if "site-packages" not in path.parts
    ]
    count = 0
    for text in texts:
        ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        if ids != other.backend_tokenizer.encode(text, add_special_tokens=False).ids:
            raise SystemExit(f"other ids for {text[:200]!r}")
        count += len(ids)
    print(f"the same {count} ids for {len(texts)} texts of {sum(map(len, texts))} characters")


def line(value: object) -> str:
    return json.dumps(value, ensure_ascii=True)


def main() -> None:
    data = Path(__file__).resolve().parents[2] / "tests" / "data"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, default=data / "fetched" / "llama3" / "tokenizer.json")
    parser.add_argument("--output", type=Path, default=data / "text" / "llama3.json")
    parser.add_argument("--compare", type=Path, help="another tokenizer.json, which must give the same ids")
    arguments = parser.parse_args()

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(arguments.tokenizer))
    if len(tokenizer) != 128_256:
        raise SystemExit(f"{arguments.tokenizer} has {len(tokenizer)} tokens")
    templates = []
    for name, template in TEMPLATES.items():
        for prompt in PROMPTS:
            rendered = template.replace("PROMPT", prompt)
            before, after = rendered.split(IMAGE)
            templates.append(
                {
                    "template": name,
                    "prompt": prompt,
                    "rendered": rendered,
                    "before_ids": tokenizer.encode(before, add_special_tokens=False),
                    "after_ids": tokenizer.encode(after, add_special_tokens=False),
                }
            )
    decode = []
    for name, ids in decode_cases(tokenizer):
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        cleaned = tokenizer.clean_up_tokenization(text)
        decode.append(
            {"case": name, "ids": ids, "text": text} | ({"cleaned": cleaned} if cleaned != text else {})
        )
    golden = {"templates": templates, "decode": decode}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(
        '{\n  "templates": [\n    '
        + ",\n    ".join(line(case) for case in templates)
        + '\n  ],\n  "decode": [\n    '
        + ",\n    ".join(line(case) for case in decode)
        + "\n  ]\n}\n",
        encoding="utf-8",
    )
    changed = sum("cleaned" in case for case in decode)
    print(f"{len(templates)} prompts, {len(decode)} texts, {changed} of them changed by clean-up")
    if arguments.compare:
        compare(tokenizer, PreTrainedTokenizerFast(tokenizer_file=str(arguments.compare)), golden)


if __name__ == "__main__":
    main()

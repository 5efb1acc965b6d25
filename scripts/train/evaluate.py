"""Score captions of held-out scenes: made by a checkpoint (through its own processor), or a caption file."""

from __future__ import annotations

import argparse
import io
import json
import random
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from vocabulary import BACKGROUND_NAMES, EOT, KIND_NAMES, PLACES, PROMPT, SIZE_NAMES

EVAL_SHAPES = ((256, 256), (224, 224), (320, 240), (240, 320))
KIND_PATTERN = re.compile(r"\b(" + "|".join(sorted(KIND_NAMES, key=len, reverse=True)) + r")\b")
PLACE_PATTERN = re.compile(r"\b(" + "|".join(sorted(PLACES, key=len, reverse=True)) + r")\b")
SIZE_PATTERN = re.compile(r"\b(" + "|".join(SIZE_NAMES) + r")\s*$")
_COLOURS = "|".join(BACKGROUND_NAMES)
BACKGROUND_PATTERN = re.compile(rf"\b(?:({_COLOURS}) background|background is plain ({_COLOURS}))\b")


@dataclass(frozen=True)
class Mention:
    """One named object."""

    kind: str
    size: str | None
    place: str | None


@dataclass
class Score:
    """Running counts over captions."""

    scenes: int = 0
    truth: int = 0
    named: int = 0
    hit: int = 0
    placed: int = 0
    sized: int = 0
    background: int = 0
    exact: int = 0
    stopped: int = 0
    stop_known: int = 0
    misses: list[str] = field(default_factory=list)

    def add(self, caption: str, truth: dict, stopped: bool | None = None) -> None:
        """Compare one caption with one line of truth."""
        mentions, background = parse_caption(caption)
        wanted = {o["kind"]: o for o in truth["objects"]}
        self.scenes += 1
        self.truth += len(wanted)
        self.named += len(mentions)
        seen: set[str] = set()
        for mention in mentions:
            if mention.kind in wanted and mention.kind not in seen:
                seen.add(mention.kind)
                self.hit += 1
                self.placed += mention.place == wanted[mention.kind]["place"]
                self.sized += mention.size == wanted[mention.kind]["size"]
        if len(seen) < len(wanted) or len(mentions) > len(seen):
            self.misses.append(f"{sorted(wanted)} <- {caption}")
        self.background += background == truth["background"]
        self.exact += caption.strip() == truth["caption"]
        if stopped is not None:
            self.stop_known += 1
            self.stopped += stopped

    def report(self) -> dict[str, float | int]:
        """All figures; place and size are shares of the objects that were named rightly."""
        figures: dict[str, float | int] = {
            "scenes": self.scenes,
            "objects": self.truth,
            "object_recall": self.hit / max(1, self.truth),
            "object_precision": self.hit / max(1, self.named),
            "position_accuracy": self.placed / max(1, self.hit),
            "size_accuracy": self.sized / max(1, self.hit),
            "background_accuracy": self.background / max(1, self.scenes),
            "identical_captions": self.exact / max(1, self.scenes),
        }
        if self.stop_known:
            figures["ended_with_stop_token"] = self.stopped / self.stop_known
        return {k: round(v, 4) for k, v in figures.items()}


def parse_caption(caption: str) -> tuple[list[Mention], str | None]:
    """Named objects (whole phrases, longest match) and the background colour of a caption."""
    text = " ".join(caption.lower().split())
    found = list(KIND_PATTERN.finditer(text))
    mentions = []
    for i, match in enumerate(found):
        end = found[i + 1].start() if i + 1 < len(found) else len(text)
        place = PLACE_PATTERN.search(text, match.end(), end)
        size = SIZE_PATTERN.search(text[: match.start()])
        mentions.append(Mention(match[1], size and size[1], place and place[1]))
    colour = BACKGROUND_PATTERN.search(text)
    return mentions, (colour[1] or colour[2]) if colour else None


def score_file(captions: Path, truth: Path) -> Score:
    """Score the `key` and `re_caption` columns of a parquet or JSON-lines file."""
    rows: Iterable[dict]
    if captions.suffix == ".parquet":
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(captions, columns=["key", "re_caption"]).to_pylist()
    else:
        rows = [json.loads(line) for line in captions.read_text().splitlines() if line.strip()]
    by_key = {str(row["key"]): row["re_caption"] or "" for row in rows}
    score = Score()
    for line in truth.read_text().splitlines():
        entry = json.loads(line)
        if entry["key"] not in by_key:
            print(f"no caption for key {entry['key']}")
        score.add(by_key.get(entry["key"], ""), entry)
    return score


def score_checkpoint(args: argparse.Namespace) -> Score:
    """Caption held-out scenes (or the images of a shard) with transformers, weights widened to float32."""
    import tarfile

    import torch
    from PIL import Image
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    from scenes import Painter, describe, sample_scene

    torch.set_num_threads(args.threads)
    work: list[tuple[Image.Image, dict]] = []
    if args.shard is not None:
        lines = (args.shard.parent / "truth.jsonl").read_text().splitlines()
        truths = {entry["key"]: entry for entry in map(json.loads, lines)}
        with tarfile.open(args.shard) as tar:
            for member in tar.getmembers():
                if member.name.endswith(".jpg"):
                    blob = tar.extractfile(member)
                    assert blob is not None
                    picture = Image.open(io.BytesIO(blob.read())).convert("RGB")
                    work.append((picture, truths[member.name.removesuffix(".jpg")]))
    else:
        rng = random.Random(args.seed)
        painter = Painter(args.font, cache=False)
        for _ in range(args.count):
            scene = sample_scene(rng, not args.seen, EVAL_SHAPES)
            work.append((painter.paint(scene, rng)[0], describe(scene)))
    processor = AutoProcessor.from_pretrained(args.checkpoint)
    model = LlavaForConditionalGeneration.from_pretrained(args.checkpoint, dtype=torch.float32).eval()
    content = [{"type": "image"}, {"type": "text", "text": PROMPT}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    eot = processor.tokenizer.convert_tokens_to_ids(EOT)
    score = Score()
    start = time.monotonic()
    for first in range(0, len(work), args.batch):
        part = work[first : first + args.batch]
        inputs = processor(images=[image for image, _ in part], text=[text] * len(part), return_tensors="pt")
        with torch.inference_mode():
            out = model.generate(**inputs, max_new_tokens=128, do_sample=False)
        for row, (_, truth) in zip(out[:, inputs["input_ids"].shape[1] :], part, strict=True):
            caption = processor.tokenizer.decode(row, skip_special_tokens=True)
            score.add(caption, truth, bool((row == eot).any()))
            if args.show > score.scenes - 1:
                print(f"truth: {truth['caption']}\nmodel: {caption}\n")
    print(f"{(time.monotonic() - start) / len(work) * 1000:.0f} ms per image")
    return score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, help="folder of a transformers checkpoint to caption with")
    parser.add_argument("--font", type=Path, help="emoji font, to draw scenes")
    parser.add_argument("--shard", type=Path, help="caption the images of this shard instead of new scenes")
    parser.add_argument("--seen", action="store_true", help="scenes from the training compositions")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=20240)
    parser.add_argument("--show", type=int, default=0, help="print this many captions")
    parser.add_argument("--captions", type=Path, help="parquet or JSON lines with columns key and re_caption")
    parser.add_argument("--truth", type=Path, help="truth.jsonl of the shard")
    parser.add_argument("--misses", action="store_true", help="print captions with a wrong or missing object")
    args = parser.parse_args()
    if args.captions is not None:
        if args.truth is None:
            parser.error("--captions needs --truth")
        score = score_file(args.captions, args.truth)
    elif args.checkpoint is not None:
        if args.shard is None and args.font is None:
            parser.error("--checkpoint needs --font or --shard")
        score = score_checkpoint(args)
    else:
        parser.error("give --checkpoint or --captions")
    if args.misses:
        print("\n".join(score.misses))
    print(json.dumps(score.report(), indent=2))


if __name__ == "__main__":
    main()

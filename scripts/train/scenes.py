"""Scenes of one to three tilted emoji drawings on a plain background, captions and the held-out split."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vocabulary import BACKGROUND_NAMES, BACKGROUNDS, KIND_NAMES, KINDS, PLACES, SIZE_NAMES, SIZES

FONT_SIZE = 109  # the only bitmap strike of the font
MAX_TILT = 20.0
SIZE_JITTER = 0.06
COLOUR_JITTER = 6
SPRITES_PER_SLOT = 20


@dataclass(frozen=True)
class Thing:
    """One drawn object: indices into the vocabulary, drawing box (x, y, side) relative to the image."""

    kind: int
    size: int
    place: int
    cx: float
    cy: float
    scale: float
    tilt: float


@dataclass(frozen=True)
class Scene:
    """A scene: pixel size, background index, exact background colour, objects in reading order."""

    width: int
    height: int
    background: int
    colour: tuple[int, int, int]
    things: tuple[Thing, ...]


def _bucket(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 100


_RESERVED_PAIR = [[_bucket(f"pair {min(a, b)} {max(a, b)}") < 10 for b in range(64)] for a in range(64)]


def pair_is_reserved(a: int, b: int) -> bool:
    """About 10 % of the pairs of kinds never share a training scene."""
    return a != b and _RESERVED_PAIR[a][b]


def single_is_reserved(kind: int, background: int, place: int) -> bool:
    """About 10 % of (kind, background, place) never occur as a one-object training scene."""
    return _bucket(f"single {kind} {background} {place}") < 10


def scene_is_held_out(scene: Scene) -> bool:
    """True when training never shows the composition of this scene."""
    kinds = [t.kind for t in scene.things]
    if len(kinds) == 1:
        return single_is_reserved(kinds[0], scene.background, scene.things[0].place)
    return any(pair_is_reserved(a, b) for i, a in enumerate(kinds) for b in kinds[i + 1 :])


def _place_things(rng: random.Random, kinds: list[int], width: int, height: int) -> list[Thing] | None:
    long_side = max(width, height)
    places = rng.sample(range(9), len(kinds))
    out: list[Thing] = []
    for kind, place in zip(kinds, places, strict=True):
        size = rng.randrange(3)
        scale = SIZES[SIZE_NAMES[size]] * (1.0 + rng.uniform(-SIZE_JITTER, SIZE_JITTER))
        half_w, half_h = scale * long_side / width / 2, scale * long_side / height / 2
        row, column = divmod(place, 3)
        cx = (column + rng.uniform(0.3, 0.7)) / 3
        cy = (row + rng.uniform(0.3, 0.7)) / 3
        cx, cy = min(max(cx, half_w), 1 - half_w), min(max(cy, half_h), 1 - half_h)
        out.append(Thing(kind, size, place, cx, cy, scale, rng.uniform(-MAX_TILT, MAX_TILT)))
    for i, a in enumerate(out):
        for b in out[i + 1 :]:
            reach = (a.scale + b.scale) / 2 * long_side
            over_x = reach - abs(a.cx - b.cx) * width
            over_y = reach - abs(a.cy - b.cy) * height
            if (
                over_x > 0
                and over_y > 0
                and over_x * over_y > 0.06 * (min(a.scale, b.scale) * long_side) ** 2
            ):
                return None
    return sorted(out, key=lambda t: t.place)


def sample_scene(rng: random.Random, held_out: bool, shapes: tuple[tuple[int, int], ...]) -> Scene:
    """Draw a scene at random from the training compositions, or from the held-out ones."""
    width, height = rng.choice(shapes)
    count = rng.choice((1, 2, 2, 3, 3))
    while True:
        kinds = rng.sample(range(len(KIND_NAMES)), count)
        things = _place_things(rng, kinds, width, height)
        if things is None:
            continue
        background = rng.randrange(len(BACKGROUND_NAMES))
        base = BACKGROUNDS[BACKGROUND_NAMES[background]]
        r, g, b = (min(255, max(0, c + rng.randint(-COLOUR_JITTER, COLOUR_JITTER))) for c in base)
        scene = Scene(width, height, background, (r, g, b), tuple(things))
        if scene_is_held_out(scene) == held_out:
            return scene


class Painter:
    """Draws scenes; with `cache` it re-uses a bounded set of tilted sprites per kind and size."""

    def __init__(self, font: Path, cache: bool) -> None:
        self.cache = cache
        self.glyphs = [self._glyph(ImageFont.truetype(str(font), FONT_SIZE), c) for c in KINDS.values()]
        self.sprites: dict[tuple[int, int, int], list[Image.Image]] = {}

    @staticmethod
    def _glyph(font: ImageFont.FreeTypeFont, code_point: int) -> Image.Image:
        canvas = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
        ImageDraw.Draw(canvas).text((8, 8), chr(code_point), font=font, embedded_color=True)
        box = canvas.getbbox()
        if box is None:
            raise ValueError(f"the font draws nothing for U+{code_point:X}")
        return canvas.crop(box)

    def _sprite(self, kind: int, side: float, tilt: float) -> Image.Image:
        glyph = self.glyphs[kind]
        ratio = side / max(glyph.size)
        size = (max(1, round(glyph.width * ratio)), max(1, round(glyph.height * ratio)))
        return glyph.resize(size, Image.Resampling.LANCZOS).rotate(
            tilt, resample=Image.Resampling.BICUBIC, expand=True
        )

    def paint(self, scene: Scene, rng: random.Random) -> tuple[Image.Image, list[Image.Image]]:
        """Render the scene and one coverage mask per object; `rng` only picks among cached sprites."""
        masks: list[Image.Image] = []
        image = Image.new("RGB", (scene.width, scene.height), scene.colour)
        long_side = max(scene.width, scene.height)
        for thing in scene.things:
            if self.cache:
                slot = self.sprites.setdefault((thing.kind, thing.size, long_side), [])
                if len(slot) < SPRITES_PER_SLOT:
                    slot.append(self._sprite(thing.kind, thing.scale * long_side, thing.tilt))
                    sprite = slot[-1]
                else:
                    sprite = slot[rng.randrange(SPRITES_PER_SLOT)]
            else:
                sprite = self._sprite(thing.kind, thing.scale * long_side, thing.tilt)
            x = round(thing.cx * scene.width - sprite.width / 2)
            y = round(thing.cy * scene.height - sprite.height / 2)
            image.paste(sprite, (x, y), sprite)
            mask = Image.new("L", image.size, 0)
            mask.paste(sprite.getchannel("A"), (x, y))
            masks.append(mask)
        return image, masks


COUNT_WORDS = ("one object", "two objects", "three objects")


def caption(scene: Scene) -> str:
    """The reference caption: objects in reading order; the wording is a function of background and count."""
    background = BACKGROUND_NAMES[scene.background]
    article = "an" if background[0] in "aeiou" else "a"
    spots = []
    for t in scene.things:
        name = f"a {SIZE_NAMES[t.size]} {KIND_NAMES[t.kind]}"
        spots.append((name, PLACES[t.place]))
    n = len(spots)
    style = (scene.background + n) % 4
    if style == 0:
        opening = f"The image shows {COUNT_WORDS[n - 1]} on {article} {background} background."
        verbs = ("There is {0} in the {1}", "{0} in the {1}", "{0} in the {1}")
        closing = ""
    elif style == 1:
        opening = f"This is a simple picture with {article} {background} background."
        verbs = ("It shows {0} at the {1}", "{0} at the {1}", "{0} at the {1}")
        closing = " Nothing else can be seen." if n == 1 else ""
    elif style == 2:
        opening = ""
        verbs = ("{0} can be seen in the {1}", "{0} in the {1}", "{0} in the {1}")
        closing = f" The background is plain {background}."
    else:
        opening = f"A drawing of {COUNT_WORDS[n - 1]} on a plain {background} background."
        verbs = ("{0} sits at the {1}", "{0} is at the {1}", "{0} is at the {1}")
        closing = ""
    parts = [v.format(*s) for v, s in zip(verbs[:n], spots, strict=True)]
    if n == 1:
        body = parts[0]
    elif n == 2:
        body = f"{parts[0]}, and {parts[1]}" if style != 1 else f"{parts[0]} and {parts[1]}"
    else:
        body = f"{parts[0]}, {parts[1]}, and {parts[2]}"
    body = body[0].upper() + body[1:] + "."
    return f"{opening} {body}".strip() + closing


def describe(scene: Scene) -> dict:
    """The ground truth of a scene as plain data."""
    return {
        "objects": [
            {"kind": KIND_NAMES[t.kind], "size": SIZE_NAMES[t.size], "place": PLACES[t.place]}
            for t in scene.things
        ],
        "kinds": [KIND_NAMES[t.kind] for t in scene.things],
        "background": BACKGROUND_NAMES[scene.background],
        "caption": caption(scene),
    }

"""The closed world of the demo captioner: kinds, backgrounds, places, sizes, prompt and special tokens."""

from __future__ import annotations

PROMPT = "Please generate a detailed caption of this image. Please be as descriptive as possible."

BOS = "<|begin_of_text|>"
END_OF_TEXT = "<|end_of_text|>"
START_HEADER = "<|start_header_id|>"
END_HEADER = "<|end_header_id|>"
EOT = "<|eot_id|>"
IMAGE = "<image>"
PAD = "<|pad|>"
SPECIAL_TOKENS = (BOS, END_OF_TEXT, START_HEADER, END_HEADER, EOT, IMAGE, PAD)

# name -> Unicode code point of the emoji it is drawn from
KINDS: dict[str, int] = {
    "apple": 0x1F34E,
    "banana": 0x1F34C,
    "strawberry": 0x1F353,
    "watermelon": 0x1F349,
    "pineapple": 0x1F34D,
    "carrot": 0x1F955,
    "mushroom": 0x1F344,
    "avocado": 0x1F951,
    "slice of pizza": 0x1F355,
    "hamburger": 0x1F354,
    "doughnut": 0x1F369,
    "ice cream": 0x1F366,
    "cupcake": 0x1F9C1,
    "pretzel": 0x1F968,
    "wedge of cheese": 0x1F9C0,
    "fried egg": 0x1F373,
    "cat": 0x1F431,
    "dog": 0x1F436,
    "panda": 0x1F43C,
    "frog": 0x1F438,
    "lion": 0x1F981,
    "penguin": 0x1F427,
    "owl": 0x1F989,
    "octopus": 0x1F419,
    "crab": 0x1F980,
    "whale": 0x1F433,
    "turtle": 0x1F422,
    "butterfly": 0x1F98B,
    "bee": 0x1F41D,
    "ladybug": 0x1F41E,
    "snail": 0x1F40C,
    "flamingo": 0x1F9A9,
    "car": 0x1F697,
    "bus": 0x1F68C,
    "tractor": 0x1F69C,
    "rocket": 0x1F680,
    "sailboat": 0x26F5,
    "bicycle": 0x1F6B2,
    "airplane": 0x2708,
    "helicopter": 0x1F681,
    "soccer ball": 0x26BD,
    "basketball": 0x1F3C0,
    "guitar": 0x1F3B8,
    "trumpet": 0x1F3BA,
    "drum": 0x1F941,
    "violin": 0x1F3BB,
    "balloon": 0x1F388,
    "gift box": 0x1F381,
    "umbrella": 0x2602,
    "alarm clock": 0x23F0,
    "camera": 0x1F4F7,
    "key": 0x1F511,
    "hammer": 0x1F528,
    "pair of scissors": 0x2702,
    "light bulb": 0x1F4A1,
    "candle": 0x1F56F,
    "book": 0x1F4D5,
    "crown": 0x1F451,
    "cactus": 0x1F335,
    "sunflower": 0x1F33B,
    "tulip": 0x1F337,
    "rainbow": 0x1F308,
    "snowman": 0x26C4,
    "teddy bear": 0x1F9F8,
}
KIND_NAMES: tuple[str, ...] = tuple(KINDS)

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (248, 248, 248),
    "grey": (150, 150, 150),
    "black": (22, 22, 22),
    "pink": (250, 175, 205),
    "yellow": (250, 232, 130),
    "brown": (120, 75, 45),
    "light green": (165, 225, 165),
    "dark green": (25, 85, 50),
    "light blue": (160, 210, 245),
    "dark blue": (30, 45, 115),
    "purple": (130, 75, 165),
    "orange": (245, 150, 60),
}
BACKGROUND_NAMES: tuple[str, ...] = tuple(BACKGROUNDS)

# Reading order of the 3 x 3 grid; the index is row * 3 + column.
PLACES: tuple[str, ...] = (
    "top left",
    "top centre",
    "top right",
    "middle left",
    "centre",
    "middle right",
    "bottom left",
    "bottom centre",
    "bottom right",
)
# word -> nominal longer side of the drawing as a fraction of the longer image side
SIZES: dict[str, float] = {"small": 0.22, "medium-sized": 0.31, "large": 0.42}
SIZE_NAMES: tuple[str, ...] = tuple(SIZES)

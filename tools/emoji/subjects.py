"""What the embedded model knows: animals, styles, backgrounds, and which pairs are kept out of training."""

from __future__ import annotations

import hashlib

STYLES = ("noto", "blob", "twemoji", "3d", "flat", "emojione", "firefox")

# The words that name a style and a background in captions; white comes first because it is the plainest.
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "yellow": (250, 212, 90),
    "green": (116, 198, 120),
    "blue": (96, 152, 232),
    "purple": (160, 112, 214),
    "red": (230, 90, 90),
    "gray": (150, 154, 162),
}

# The 45 animals of the published DRaFT+ protocol, each with the Unicode names of the pictures that show it.
PROTOCOL: dict[str, tuple[str, ...]] = {
    "cat": ("cat-face", "cat"),
    "dog": ("dog-face", "dog"),
    "horse": ("horse-face", "horse"),
    "monkey": ("monkey-face", "monkey"),
    "rabbit": ("rabbit-face", "rabbit"),
    "zebra": ("zebra",),
    "spider": ("spider",),
    "bird": ("bird",),
    "sheep": ("ewe",),
    "deer": ("deer",),
    "cow": ("cow-face", "cow"),
    "goat": ("goat",),
    "lion": ("lion",),
    "tiger": ("tiger-face", "tiger"),
    "bear": ("bear",),
    "raccoon": ("raccoon",),
    "fox": ("fox",),
    "wolf": ("wolf",),
    "lizard": ("lizard",),
    "beetle": ("beetle",),
    "ant": ("ant",),
    "butterfly": ("butterfly",),
    "fish": ("fish",),
    "shark": ("shark",),
    "whale": ("spouting-whale", "whale"),
    "dolphin": ("dolphin",),
    "squirrel": ("chipmunk",),
    "mouse": ("mouse-face", "mouse"),
    "rat": ("rat",),
    "snake": ("snake",),
    "turtle": ("turtle",),
    "frog": ("frog",),
    "chicken": ("chicken",),
    "duck": ("duck",),
    "goose": ("goose",),
    "bee": ("honeybee",),
    "pig": ("pig-face", "pig"),
    "turkey": ("turkey",),
    "fly": ("fly",),
    "llama": ("llama",),
    "camel": ("camel", "two-hump-camel"),
    "bat": ("bat",),
    "gorilla": ("gorilla",),
    "hedgehog": ("hedgehog",),
    "kangaroo": ("kangaroo",),
}

# Animals that the model knows as well, but on which nobody fine-tunes: the held-out prompts.
HELD_OUT: dict[str, tuple[str, ...]] = {
    "elephant": ("elephant",),
    "panda": ("panda",),
    "koala": ("koala",),
    "penguin": ("penguin",),
    "octopus": ("octopus",),
    "crab": ("crab",),
    "snail": ("snail",),
    "crocodile": ("crocodile",),
    "hamster": ("hamster",),
    "ladybug": ("lady-beetle",),
    "owl": ("owl",),
    "rhinoceros": ("rhinoceros",),
    "giraffe": ("giraffe",),
    "scorpion": ("scorpion",),
    "flamingo": ("flamingo",),
}

ANIMALS = {**PROTOCOL, **HELD_OUT}

# Other words for the same animal, used in a small part of the captions.
ALIASES = {
    "rabbit": "bunny",
    "squirrel": "chipmunk",
    "bee": "honeybee",
    "chicken": "hen",
    "sheep": "lamb",
    "turtle": "tortoise",
    "ladybug": "ladybird",
    "rhinoceros": "rhino",
}

# Near twins of an animal above under another word: as "other subjects" they would only confuse the two.
TWINS = frozenset(
    "orangutan guide-dog service-dog poodle black-cat leopard ox water-buffalo bison ram mammoth hippopotamus rooster "
    "hatching-chick baby-chick front-facing-baby-chick dove black-bird polar-bear tropical-fish blowfish bug boar "
    "pig-nose paw-prints spider-web unicorn donkey moose swan orca cockroach".split()
)

# Where a set names a picture differently from Unicode.
RENAMED: dict[str, dict[str, tuple[str, ...]]] = {
    "firefox": {
        "cat-face": ("cat",),
        "cat": ("catside",),
        "dog-face": ("dog",),
        "dog": ("dogside",),
        "tiger-face": ("tiger",),
        "tiger": ("tigerside",),
        "mouse-face": ("mouse",),
        "mouse": ("mouseside",),
        "pig-face": ("pig",),
        "pig": ("pigside",),
        "rabbit-face": ("bunny",),
        "rabbit": ("bunnyside",),
        "wolf": ("wolfface",),
        "fox": ("foxsmiling",),
        "ewe": ("sheep",),
        "panda": ("pandaface",),
        "hamster": ("hampster",),
        "camel": ("dromedarycamel",),
        "two-hump-camel": ("bactriancamel",),
        "spouting-whale": ("spurtingwhale",),
    },
}

HOLD_OUT_SHARE = 0.09


def is_held_out(animal: str, style: str) -> bool:
    """Whether this (animal, style) pair is kept out of every training but the autoencoder's."""
    digest = hashlib.sha256(f"{animal}/{style}".encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32 < HOLD_OUT_SHARE


def article(noun: str) -> str:
    """The noun with its indefinite article."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def prompt(animal: str, style: str | None = None, background: str | None = None) -> str:
    """The caption of a picture; what is None goes unnamed, so that one caption has many right pictures."""
    text = article(animal)
    if style is not None:
        text += f" in {style} style"
    if background is not None:
        text += f" on {article(background)} background"
    return text

"""Make preference pairs for a reward of the embedded world, each by a rule that is stated below.

    python tools/emoji/pairs.py --out build/pairs --build-dir build/emoji   # needs the stages fetch and render
    python tools/emoji/pairs.py --out build/pairs --without-renders         # needs the installed package alone

Two files of pairs, train.jsonl and validation.jsonl, name PNG files beside them: jpg_0, jpg_1, caption, and label_0 and
label_1, which sum to one. A pair also names its rule. No person and no classifier is asked: a rule knows how both
pictures were made. Whichever picture is better comes first half of the time.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from subjects import BACKGROUNDS, PROTOCOL, STYLES, is_held_out, prompt

MODEL = Path(__file__).resolve().parents[2] / "src" / "draftplus" / "assets" / "emoji"

# These animals of the protocol are in the captions of the validation pairs alone. The fifteen animals that fine-tuning
# is measured on (HELD_OUT in subjects.py) are in no pair at all, as caption or as picture.
VALIDATION = ("zebra", "goat", "dolphin", "turtle", "duck", "bat")

# What the better picture is preferred with. Weak rules, which are wrong now and then, say so.
RULES = {
    "render over the model's own": 0.9,
    "render over an unguided one": 0.95,
    "guided over unguided": 0.8,
    "more steps over fewer": 0.8,
    "right caption over another's": 1.0,
    "clean over blurred": 1.0,
    "clean over noisy": 1.0,
    "another style": 0.5,
    "another background": 0.5,
}

# (steps, guidance scale) of the model's own pictures: as it is meant to be used, hurried, and without guidance.
DRAWN = {"own": (10, 1.75), "hurried": (3, 1.75), "unguided": (6, 1.0)}


@dataclass(frozen=True)
class Item:
    """A caption with every picture that was made for it, by name.

    "own", "hurried" and "unguided" are the model's, from the same noise (DRAWN). Of renders, there is one on the
    background of "own" ("render"), on that of "unguided" ("on unguided"), and on any ("recoloured"); "restyled" is
    another render, on the background of "own".
    """

    animal: str
    style: str | None
    ground: str | None
    pictures: dict[str, Image.Image]

    @property
    def caption(self) -> str:
        return prompt(self.animal, self.style, self.ground)


def captions(animals: list[str], count: int, source: random.Random, held_out: bool) -> list[tuple]:
    """`count` captions of each animal: (animal, style or None, background or None), half of them the bare animal.

    Styles that are held out for an animal are named only if held_out.
    """
    said = []
    for animal in animals:
        styles = [style for style in STYLES if held_out or not is_held_out(animal, style)]
        for i in range(count):
            style = source.choice(styles) if i % 4 in (1, 3) else None
            ground = source.choice(list(BACKGROUNDS)) if i % 4 in (2, 3) else None
            said.append((animal, *((None, None) if i % 8 in (1, 2) else (style, ground))))
    return said


def draw(texts: list[str], steps: int, guidance: float, seed: int) -> list[Image.Image]:
    """The embedded model's picture of each text; the same seed starts from the same noise."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(MODEL)
    pipeline.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    for start in range(0, len(texts), 32):
        chunk = texts[start : start + 32]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(chunk))]
        images += pipeline(chunk, num_inference_steps=steps, guidance_scale=guidance, generator=generators).images
        print(f"{steps} steps, guidance {guidance}: {len(images)} of {len(texts)}", flush=True)
    return images


def renders(build: Path, said: list[tuple], grounds: torch.Tensor, seed: int) -> list[Image.Image]:
    """A render of each caption on these colours (n, 3) in [0, 1], through the model's autoencoder.

    The same seed gives the same pictures at the same place; a style that is not named is drawn. Through the
    autoencoder, because a preference for sharper pixels than its decoder makes would ask of the denoiser what it cannot
    do.
    """
    from data import Pictures, draw_images
    from diffusers import AutoencoderKL

    pictures, source = Pictures.load(build / "pictures.safetensors"), random.Random(seed)
    rows: dict[tuple[str, str], list[int]] = {}
    for i, row in enumerate(pictures.rows):
        rows.setdefault((row.subject, row.style), []).append(i)
    chosen = []
    for animal, style, _ in said:
        # a style that the model did not see with this animal is shown only where the caption names it
        styles = [s for s in STYLES if (animal, s) in rows and not is_held_out(animal, s)]
        drawn = source.choice(styles)
        chosen.append(source.choice(rows[animal, style if (animal, style) in rows else drawn]))
    autoencoder = AutoencoderKL.from_pretrained(MODEL / "vae")
    generator, images = torch.Generator().manual_seed(seed), []
    with torch.no_grad():
        for part, ground in zip(torch.tensor(chosen).split(16), grounds.split(16), strict=True):
            decoded = autoencoder(draw_images(pictures, part, ground, generator) * 2 - 1).sample / 2 + 0.5
            images += [to_image(x) for x in decoded]
    return images


def grounds_of(said: list[tuple], images: list[Image.Image]) -> torch.Tensor:
    """The background (n, 3) in [0, 1] that a caption names, or else that of its picture: the median of its border."""
    colours = []
    for (_, _, ground), image in zip(said, images, strict=True):
        pixels = np.asarray(image)
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        colours.append(BACKGROUNDS[ground] if ground else tuple(np.median(border, 0)))
    return torch.tensor(colours, dtype=torch.float32) / 255


def any_grounds(said: list[tuple], source: random.Random) -> torch.Tensor:
    """The background (n, 3) in [0, 1] that a caption names, or else any of those that have a name."""
    names = [ground or source.choice(list(BACKGROUNDS)) for _, _, ground in said]
    return torch.tensor([BACKGROUNDS[name] for name in names]) / 255


def to_image(pixels: torch.Tensor) -> Image.Image:
    return Image.fromarray((pixels.clamp(0, 1).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))


def noisy(image: Image.Image, source: random.Random) -> Image.Image:
    noise = np.random.default_rng(source.randrange(2**31)).normal(0, source.uniform(8, 40), (*image.size, 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).round().astype(np.uint8))


def blurred(image: Image.Image, source: random.Random) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(source.uniform(0.7, 2.5)))


def compare(item: Item, strangers: list[Item], source: random.Random) -> Iterator[tuple[str, Image.Image, Image.Image]]:
    """The pairs of one caption: rule, better picture, worse picture. strangers: items of other animals.

    A render is compared with what the model draws on the same background. If it were not, or if guidance alone were
    preferred, which deepens colours, the reward would learn which backgrounds are in the better pictures.
    """
    own, stranger = item.pictures["own"], source.choice(strangers).pictures
    best = item.pictures.get("render", own)
    yield "more steps over fewer", own, item.pictures["hurried"]
    yield "right caption over another's", own, stranger["own"]
    yield "clean over blurred", best, blurred(best, source)
    yield "clean over noisy", own, noisy(own, source)
    if "render" not in item.pictures:
        yield "guided over unguided", own, item.pictures["unguided"]
        return
    yield "render over the model's own", best, own
    yield "render over an unguided one", item.pictures["on unguided"], item.pictures["unguided"]
    yield "right caption over another's", best, stranger["render"]
    if item.ground is None:
        yield "another background", best, item.pictures["recoloured"]
    if item.style is None:
        yield "another style", best, item.pictures["restyled"]


def make_items(animals: list[str], count: int, seed: int, held_out: bool, build: Path | None) -> list[Item]:
    """Captions of the animals with their pictures; no renders if build is None."""
    source = random.Random(seed)
    said = captions(animals, count, source, held_out)
    texts = [prompt(*one) for one in said]
    drawn = {name: draw(texts, steps, guidance, 1000 * seed) for name, (steps, guidance) in DRAWN.items()}
    if build is not None:
        own, any_ground = grounds_of(said, drawn["own"]), any_grounds(said, source)
        drawn["render"] = renders(build, said, own, seed)
        drawn["on unguided"] = renders(build, said, grounds_of(said, drawn["unguided"]), seed)
        drawn["recoloured"] = renders(build, said, any_ground, seed)
        drawn["restyled"] = renders(build, said, own, seed + 1)
    return [Item(*one, {name: images[i] for name, images in drawn.items()}) for i, one in enumerate(said)]


def write(items: list[Item], out: Path, split: str, source: random.Random) -> Counter[str]:
    """Write the pairs of a split and their pictures; how many pairs each rule gave."""
    names: dict[int, str] = {}
    kept: list[Image.Image] = []  # a picture is named by its identity, so it must live as long as the names
    folder, counts = out / split, Counter[str]()
    folder.mkdir(parents=True, exist_ok=True)

    def name(image: Image.Image) -> str:
        if id(image) not in names:
            names[id(image)] = f"{split}/{len(kept):05d}.png"
            image.save(out / names[id(image)])
            kept.append(image)
        return names[id(image)]

    with (out / f"{split}.jsonl").open("w", encoding="utf-8") as file:
        for item in items:
            strangers = [other for other in items if other.animal != item.animal]
            for rule, better, worse in compare(item, strangers, source):
                files, labels = [name(better), name(worse)], [RULES[rule], round(1 - RULES[rule], 6)]
                if source.random() < 0.5:
                    files, labels = files[::-1], labels[::-1]
                pair = {"jpg_0": files[0], "jpg_1": files[1], "label_0": labels[0], "label_1": labels[1]}
                file.write(json.dumps(pair | {"caption": item.caption, "rule": rule}) + "\n")
                counts[rule] += 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/pairs"), help="where the pairs go")
    parser.add_argument("--build-dir", type=Path, default=Path("build/emoji"), help="where the rendered pictures are")
    parser.add_argument("--without-renders", action="store_true", help="only rules that need the embedded model alone")
    parser.add_argument("--captions", type=int, default=10, help="per animal")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    build = None if arguments.without_renders else arguments.build_dir
    splits = {
        "train": [animal for animal in PROTOCOL if animal not in VALIDATION],
        "validation": list(VALIDATION),
    }
    for i, (split, animals) in enumerate(splits.items()):
        items = make_items(animals, arguments.captions, arguments.seed + 500 * i, split == "validation", build)
        counts = write(items, arguments.out, split, random.Random(arguments.seed))
        print(f"{split}: {sum(counts.values())} pairs, {len(items)} captions of {len(animals)} animals")
        for rule, count in counts.items():
            print(f"  {count:5d}  {RULES[rule]:.2f}  {rule}")


if __name__ == "__main__":
    main()

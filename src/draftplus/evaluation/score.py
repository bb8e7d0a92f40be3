"""What `draftplus reward score` does: pictures on disk, scored by rewards."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from draftplus import __version__
from draftplus.build import METRICS, build_reward, quiet_libraries
from draftplus.config import Config, RewardConfig, flatten, given_by, is_below, load_config
from draftplus.data.pictures import Undecodable
from draftplus.distributed import pick_device
from draftplus.errors import UserError
from draftplus.evaluation.captions import captioned
from draftplus.evaluation.chunks import SAMPLING_BATCH
from draftplus.evaluation.scores import Rewards, score_images
from draftplus.evaluation.stored import find_pictures, read_pictures
from draftplus.progress import Advance, progress
from draftplus.rewards.names import compares_images, refuse_unknown_reward
from draftplus.runs.files import write_text
from draftplus.runs.journal import finite
from draftplus.runs.rows import reward_key

SETTINGS = ("reward", "device", "data.column", "train.sampling_batch_size")  # that mean something here
WAITING = 2**26  # pixels of pictures that wait for others of their size, 200 MB


class Item(NamedTuple):
    """A picture to score: its place in the result, its image (3, H, W) uint8, and its prompt."""

    place: int
    image: Tensor
    prompt: str


@dataclass(frozen=True)
class Scorers:
    """The rewards to score with, and how."""

    rewards: Rewards
    configs: Mapping[str, RewardConfig]
    device: torch.device
    batch_size: int

    def scores(self, items: Iterable[Item], advance: Advance) -> dict[int, dict[str, float]]:
        """The scores of each item by its place, and by reward."""
        found: dict[int, dict[str, float]] = {}
        for batch in by_size(items, self.batch_size):
            images, prompts = torch.stack([item.image for item in batch]) / 255, [item.prompt for item in batch]
            values = score_images(self.rewards, images, prompts, self.device, self.batch_size)
            for row, item in enumerate(batch):
                found[item.place] = {reward_key(name): float(scores[row]) for name, scores in values.items()}
            advance(len(found), "")
        return found

    def described(self, name: str) -> dict[str, Any]:
        """The settings of a reward."""
        return {"path": self.configs[name].path, "args": self.configs[name].args}


@dataclass
class Skipped:
    """What could not be read, pictures or pairs of them, of which there may be some."""

    most: int
    what: str = "pictures"
    told: list[dict[str, str]] = field(default_factory=list)

    def add(self, picture: object, reason: object) -> None:
        """Raises UserError where it is one too many."""
        self.told.append({"file": str(picture), "reason": str(reason)})
        if len(self.told) > self.most:
            many = f"{len(self.told)} {self.what} cannot be read, more than --skip {self.most} allows"
            raise UserError("{many}; the first is {file}: {reason}".format(many=many, **self.told[0]))


def score(
    targets: Sequence[str | Path], rewards: Sequence[str], overrides: Sequence[str], prompts: str | Path | None,
    prompt: str | None, skip: int, output: Path | None,
) -> dict[str, Any]:  # fmt: skip
    """Scores the pictures of targets. The arguments, and what is returned, are those of `api.rewards.score`."""
    check_output(output)
    if not targets:
        raise UserError("no pictures given; name files, directories or .tar files, or --pairs FILE")
    config = settings_of(overrides)
    chosen = captioned(find_pictures(targets), prompts, config.data.column, prompt)
    tools, skipped = scorers_of(config, rewards, overrides), Skipped(skip)
    places = {picture: place for place, picture in enumerate(chosen.pictures)}
    with progress("scoring", len(chosen.pictures), unit="pictures") as advance:

        def readable() -> Iterator[Item]:
            for picture, image in read_pictures(chosen.pictures):
                if isinstance(image, Undecodable):
                    skipped.add(picture, image)
                else:
                    yield Item(places[picture], image, chosen.prompts[places[picture]])

        scores = tools.scores(readable(), advance)
    if not scores:
        raise UserError(
            f"no picture could be read; the first is {skipped.told[0]['file']}: {skipped.told[0]['reason']}"
        )
    rows: list[dict[str, Any]] = [
        {"file": str(picture), "prompt": text, **scores[place]}
        for place, (picture, text) in enumerate(zip(chosen.pictures, chosen.prompts, strict=True))
        if place in scores
    ]
    told = {
        "draftplus": __version__,
        "rewards": {name: {**tools.described(name), **_summary(rows, name)} for name in tools.rewards},
        "pictures": rows,
        "skipped": skipped.told,
        "left_out": [str(one) for one in chosen.left_out],
    }
    return written_scores(output, told, "pictures")


def _summary(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    """Of the scores that are finite."""
    key = reward_key(name)
    scores = [row[key] for row in rows if math.isfinite(row[key])]
    return {
        "mean": statistics.fmean(scores) if scores else None,
        "standard_deviation": statistics.stdev(scores) if len(scores) > 1 else None,
        "lowest": min(scores, default=None),
        "highest": max(scores, default=None),
        "not_finite": [row["file"] for row in rows if not math.isfinite(row[key])],
    }


def by_size(items: Iterable[Item], most: int) -> Iterator[list[Item]]:
    """Batches of at most `most` items whose images are of one size; not too many wait for others of their size."""
    waiting: dict[tuple[int, int], list[Item]] = defaultdict(list)
    pixels = 0  # of all that wait
    for item in items:
        size = (item.image.shape[1], item.image.shape[2])
        waiting[size].append(item)
        pixels += math.prod(size)
        full = size if len(waiting[size]) == most else None
        if full is None and pixels >= WAITING:
            full = max(waiting, key=lambda size: math.prod(size) * len(waiting[size]))
        if full is not None:
            pixels -= math.prod(full) * len(waiting[full])
            yield waiting.pop(full)
    yield from waiting.values()


def settings_of(overrides: Sequence[str]) -> Config:
    """The configuration of `key=value` settings. Raises UserError for those that mean nothing for pictures on disk."""
    config = load_config(None, overrides)
    for key in flatten(given_by(overrides)):
        if not is_below(key, SETTINGS):
            raise UserError(f"{key} has no effect on pictures on disk; remove it, or give {', '.join(SETTINGS)}")
    return config


def scorers_of(config: Config, names: Sequence[str], overrides: Sequence[str]) -> Scorers:
    """The rewards of these names, and those that the settings name.

    Raises UserError where there is none, or one does not score single pictures.
    """
    chosen = dict.fromkeys([*names, *given_by(overrides).get("reward", {})])
    if not chosen:
        raise UserError("no reward given; add --reward NAME, such as --reward clip_score")
    for name in chosen:
        if name in METRICS:
            raise UserError(f"reward '{name}': this is a metric of many pictures; draftplus evaluate measures it")
        refuse_unknown_reward(name)
        if compares_images([name]):
            raise UserError(f"reward '{name}' scores the pictures of a batch by one another, not a picture")
        one = config.reward.get(name, RewardConfig())
        if one != RewardConfig(path=one.path, args=one.args):
            raise UserError(f"reward.{name}: only path and args mean something here, where nothing is summed")
    quiet_libraries()
    device = pick_device(config.device)
    configs = {name: config.reward.get(name, RewardConfig()) for name in chosen}
    with progress("loading the rewards", None):
        rewards = {name: build_reward(name, one, device) for name, one in configs.items()}
    return Scorers(rewards, configs, device, config.train.sampling_batch_size or SAMPLING_BATCH)


def check_output(output: Path | None) -> None:
    """Raises UserError for a file that could not be written at the end."""
    if output is None:
        return
    if output.suffix not in (".json", ".jsonl"):
        raise UserError(f"-o '{output}': name a .json file, or a .jsonl file for one object on each line")
    if not output.parent.is_dir():
        raise UserError(f"-o '{output}': there is no directory {output.parent}; make it, or name another file")


def written_scores(output: Path | None, told: dict[str, Any], rows: str) -> dict[str, Any]:
    """The result, with null for what is not finite, in the file `output` too: .jsonl for its `rows` alone."""
    told = finite(told)
    if output is not None and output.suffix == ".jsonl":
        write_text(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in told[rows]))
    elif output is not None:
        write_text(output, json.dumps(told, ensure_ascii=False, indent=1) + "\n")
    return told

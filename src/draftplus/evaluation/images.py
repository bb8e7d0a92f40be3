"""Which prompts and seeds `draftplus evaluate` makes images of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from draftplus.data.prompts import load_prompts
from draftplus.errors import UserError
from draftplus.evaluation.held_out_set import evaluation_prompts
from draftplus.evaluation.knobs import Job
from draftplus.evaluation.targets import Target


@dataclass(frozen=True)
class Images:
    """What is made with every target: the same number of images for each prompt, adjacent to one another."""

    prompts: list[str]
    seeds: list[list[int]]

    @property
    def per_prompt(self) -> int:
        return len(self.seeds[0])

    @property
    def same_seeds(self) -> bool:
        return len(self.seeds) > 1 and all(one == self.seeds[0] for one in self.seeds)

    def jobs(self) -> list[Job]:
        return [Job(p, seed) for p, seeds in zip(self.prompts, self.seeds, strict=True) for seed in seeds]


def images_of(
    targets: Sequence[Target], prompts: Sequence[str] | None, images_per_prompt: int | None, seeds: Sequence[int] | None
) -> Images:
    """The prompts and seeds: those that are given, else those of the first run's evaluation during training."""
    chosen = list(dict.fromkeys(prompts)) if prompts is not None else _held_out(targets)
    if "" in (prompt.strip() for prompt in chosen):
        raise UserError("a prompt is empty; describe a picture, such as 'a cat', or leave it out")
    if not chosen:
        raise UserError(
            "no prompts given; give at least one, or leave prompts out to use the held-out prompts of the run"
        )
    if images_per_prompt is not None and images_per_prompt < 1:
        raise UserError(f"images per prompt is {images_per_prompt}; give at least 1")
    if seeds is not None:
        if images_per_prompt not in (None, len(seeds)):
            raise UserError(
                f"images per prompt is {images_per_prompt}, but {len(seeds)} seeds are given; give only one of the two"
            )
        if not seeds or len(set(seeds)) < len(seeds):
            raise UserError(f"seeds {list(seeds)}: give one or more, each once")
        return Images(chosen, [list(seeds)] * len(chosen))
    n = images_per_prompt or first_run(targets).config.eval.images_per_prompt
    return Images(chosen, [list(range(number * n, number * n + n)) for number in range(len(chosen))])


def _held_out(targets: Sequence[Target]) -> list[str]:
    first = first_run(targets)
    chosen = evaluation_prompts(first.config, load_prompts(first.config.data.prompts, first.config.data.column))
    for target in targets:
        if target.run is not None:
            others = evaluation_prompts(
                target.config, load_prompts(target.config.data.prompts, target.config.data.column)
            )
            if others != chosen:
                raise UserError(
                    f"'{first.name}' and '{target.name}' use different held-out prompts; give one set of prompts "
                    "for all targets"
                )
    return chosen


def first_run(targets: Sequence[Target]) -> Target:
    return next((target for target in targets if target.run is not None), targets[0])

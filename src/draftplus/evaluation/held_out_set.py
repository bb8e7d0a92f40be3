"""What is evaluated during training: which prompts, and how many images of each; known before a model is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from draftplus.config import Config
from draftplus.data.prompts import PromptSet, normalized, read_prompts
from draftplus.errors import UserError
from draftplus.evaluation.knobs import Job, Knobs
from draftplus.runs.rows import read_held_out


@dataclass(frozen=True)
class EvaluationSet:
    """The prompts and the images to make of each. Image i of prompt p has seed p * images_per_prompt + i."""

    prompts: list[str]
    images_per_prompt: int

    def jobs(self, rank: int = 0, size: int = 1) -> list[Job]:
        """The jobs of one process: whole prompts, so that diversity is measured where the images are."""
        n = self.images_per_prompt
        return [
            Job(prompt, number * n + i)
            for number, prompt in enumerate(self.prompts)
            if number % size == rank
            for i in range(n)
        ]

    def padding(self, rank: int, size: int) -> list[Job]:
        """Jobs whose images are thrown away, so that all processes make the same number of passes, also of rewards."""
        most = math.ceil(len(self.prompts) / size) * self.images_per_prompt
        whole = EvaluationSet(self.prompts[:1], self.images_per_prompt).jobs()
        return whole * ((most - len(self.jobs(rank, size))) // self.images_per_prompt)


def evaluation_set(config: Config, prompts: PromptSet) -> EvaluationSet:
    """The prompts of `evaluation_prompts`, and `eval.images_per_prompt` images of each.

    Raises UserError if there are no prompts to evaluate on, there is only one image of each, or a variant has an
    annealing schedule that does not exist.
    """
    chosen = evaluation_prompts(config, prompts)
    for variant in config.eval.variants:
        try:
            variant_knobs(variant).check()
        except UserError as error:
            raise UserError(f"eval.variants: {error}") from None
    if config.eval.images_per_prompt < 2:
        raise UserError(
            "eval.images_per_prompt is 1; set it to at least 2, because diversity is measured between images of one "
            "prompt"
        )
    return EvaluationSet(chosen, config.eval.images_per_prompt)


def same_images(row: Mapping[str, Any], which: EvaluationSet) -> bool:
    """Whether a row of eval.jsonl is about these prompts and as many images, so that its numbers are comparable."""
    measured = read_held_out(row)
    return measured.prompts == which.prompts and measured.images == len(which.jobs())


def variant_knobs(variant: Mapping[str, Any]) -> Knobs:
    """The knobs of one of `eval.variants`."""
    return Knobs(float(variant.get("lora_scale", 1.0)), variant.get("anneal"))


def evaluation_prompts(config: Config, prompts: PromptSet) -> list[str]:
    """The held-out part of the prompts, or those of `eval.prompts`, thinned evenly to `eval.max_prompts`.

    Raises UserError if none are held out, or one of `eval.prompts` is trained on.
    """
    if config.eval.prompts is None:
        chosen = prompts.held_out
        if not chosen:
            raise UserError(
                f"data.prompts '{config.data.prompts}' has too few prompts to hold any out for evaluation; "
                "name some in eval.prompts"
            )
    else:
        chosen = list(dict.fromkeys(read_prompts(config.eval.prompts, config.data.column)))
        keys = {normalized(prompt) for prompt in chosen}
        trained = keys.intersection(map(normalized, prompts.train))  # which may be a million
        for prompt in chosen:
            if normalized(prompt) in trained:
                raise UserError(
                    f"eval.prompts '{config.eval.prompts}': '{prompt}' is also a training prompt; "
                    "remove it from one of the two sets"
                )
    most = config.eval.max_prompts or len(chosen)
    if len(chosen) > most:
        return [chosen[i * len(chosen) // most] for i in range(most)]
    return list(chosen)

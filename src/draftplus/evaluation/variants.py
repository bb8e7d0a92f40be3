"""`eval.variants`: other ways to sample the trained model, measured on the evaluation set at the last step."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from draftplus.config import Config
from draftplus.distributed import World
from draftplus.errors import UserError
from draftplus.evaluation.held_out import Total, measure
from draftplus.evaluation.held_out_set import EvaluationSet, same_images, variant_knobs
from draftplus.evaluation.scores import Rewards
from draftplus.progress import Advance
from draftplus.runs import journal
from draftplus.runs.directory import step_name
from draftplus.runs.rows import read_held_out, variant_row
from draftplus.types import Model

Variant = dict[str, Any]


def label(variant: Variant) -> str:
    """Such as `lora_scale=0.5`."""
    return f"checkpoint={variant['checkpoint']}" if "checkpoint" in variant else variant_knobs(variant).label or "tuned"


def check_checkpoints(config: Config, evaluated: Collection[int], step: int) -> None:
    """Refuses, before any training, a variant that names a step that will have no evaluation.

    Raises UserError. evaluated: the steps in eval.jsonl; step: where the run stands.
    """
    for variant in config.eval.variants:
        at = variant.get("checkpoint")
        if at is not None and at not in evaluated and (at < step or at % config.eval.every):
            raise UserError(
                f"eval.variants: step {at} was not evaluated; the evaluated steps of this run are "
                f"{', '.join(map(str, sorted(evaluated)))}"
            )


def add_variants(
    model: Model, rewards: Rewards, total: Total, which: EvaluationSet, config: Config, step: int, run: Path,
    world: World, advance: Advance,
) -> None:  # fmt: skip
    """Adds the variants to the row of a step in eval.jsonl; those that are already there are not made again.

    Their pictures go to samples/step-…/<label>. A variant that is an earlier step takes its numbers from that step's
    row and has no new pictures.

    Raises UserError if the evaluation set is no longer the one of the row.
    """
    if not config.eval.variants:
        return
    rows: dict[int, dict[str, Any]] = world.gather({row["step"]: row for row in journal.read_rows(run / "eval.jsonl")})[
        0
    ]
    row = rows[step]
    done = {variant["label"]: variant for variant in row.get("variants", [])}
    for variant in config.eval.variants:
        name, earlier = label(variant), rows.get(variant.get("checkpoint", step))
        if name in done or earlier is None:  # a run that ended early has not reached every checkpoint
            continue
        _refuse_other_set(row, which, rewards)
        _refuse_other_set(earlier, which, rewards)
        if "checkpoint" in variant:
            measured = read_held_out(earlier)
        else:
            pictures = run / "samples" / step_name(step) / name.replace(":", "-")
            measured = measure(model, rewards, total, which, config, pictures, world, advance, variant_knobs(variant))
        done[name] = variant_row(name, variant, measured)
        row["variants"] = [done[label(one)] for one in config.eval.variants if label(one) in done]
        if world.is_main:
            journal.replace_row(run / "eval.jsonl", row)


def _refuse_other_set(row: dict[str, Any], which: EvaluationSet, rewards: Rewards) -> None:
    if not same_images(row, which) or read_held_out(row).per_image.keys() != rewards.keys():
        raise UserError(
            f"eval.variants: step {row['step']} was evaluated with other prompts, images or rewards than eval now "
            "specifies, so no variant is comparable with it; restore the previous eval settings"
        )

"""`draftplus reward train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from draftplus.cli.shared import examples
from draftplus.config import RewardTrainConfig, describe_keys

EXAMPLES = examples(
    "Examples:\n"
    "  draftplus reward train pairs.jsonl                            from the embedded CLIP\n"
    "  draftplus reward train 'pickapic/*.parquet' model.path=laion/CLIP-ViT-H-14-laion2B-s32B-b79K optim.lr=3e-6\n"
    "  draftplus reward train runs/reward-1a2b3c4d train.steps=800   continue a run and train longer\n"
    "  draftplus train emoji reward=clip reward.clip.path=runs/reward-1a2b3c4d/reward\n\n"
    f"Keys, with their defaults:\n{describe_keys(RewardTrainConfig)}"
)


def train(
    target: Annotated[
        str | None,
        typer.Argument(metavar="PAIRS|RECIPE|RUN", help="File of preference pairs, YAML file, or run to continue."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings that override the recipe; all keys are listed below."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Take one trial step, print what to expect, and stop.")
    ] = False,
) -> None:
    """Train a reward, any CLIPModel, on preference pairs. Repeat the command to continue an unfinished run."""
    if target and "=" in target and not Path(target).exists():
        settings = [target, *(settings or [])]
        target = None
    from draftplus.api import rewards
    from draftplus.launcher import is_main_process

    if dry_run:
        told = rewards.describe_reward(target, settings or [])
    else:
        run = rewards.train_reward(target, settings or [])
        told = f"reward: {run / 'reward'}\nreport: {run / 'report.html'}"
    if is_main_process():
        print(told)

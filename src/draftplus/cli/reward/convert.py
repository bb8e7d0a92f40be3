"""`draftplus reward convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from draftplus.cli.shared import examples

EXAMPLES = examples(
    "Examples:\n"
    "  draftplus reward convert reward_model.nemo -o my_clip\n"
    "  draftplus train sd15 reward=pickscore reward.pickscore.path=my_clip    then trains with it\n"
    "  draftplus reward convert reward_model.nemo -o my_clip --processor clip_h    without a network"
)


def convert(
    file: Annotated[Path, typer.Argument(metavar="FILE.nemo", help="Reward of NeMo-Aligner: a CLIP in a .nemo file.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory to write; it must not exist, or be empty.")],
    processor: Annotated[
        str | None,
        typer.Option(
            "--processor",
            help="Directory or hub id of the tokenizer. Default: the one that the file names, else CLIP ViT-H/14's.",
        ),
    ] = None,
) -> None:
    """Convert a reward of NeMo-Aligner to a CLIPModel directory, which the path of a CLIP reward loads."""
    from draftplus.api import rewards
    from draftplus.progress import progress

    with progress(f"converting {file.name}", None):
        directory = rewards.convert_reward(file, output, processor)
    print("\n".join(str(path) for path in sorted(directory.iterdir())))

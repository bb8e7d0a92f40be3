"""What the process does that makes itself ready while a sweep is planned, see `sweeps.ahead`."""

from __future__ import annotations

import gc
import json
import os
import sys
from contextlib import suppress
from pathlib import Path

from draftplus import cli
from draftplus.garbage import collection_paused


def main() -> None:
    """Imports, reads from the sweep what to do, and does it."""
    with suppress(Exception), collection_paused():  # which the run meets again, and tells
        # of the embedded model; most of what is imported for it, other families need too
        from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel  # noqa: F401
        from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer  # noqa: F401

        import draftplus.training.train  # noqa: F401

        gc.freeze()  # the libraries stay, and each look for garbage among all they made takes half a second
    text = sys.stdin.buffer.read()
    if not text:  # the sweep is gone
        return
    told = json.loads(text)
    with Path(told["log"]).open("ab") as log, Path(os.devnull).open("rb") as nothing:
        for ours, theirs in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(ours.fileno(), theirs)
    sys.argv = ["draftplus", *told["arguments"]]
    cli.main()


if __name__ == "__main__":
    main()

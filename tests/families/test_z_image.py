"""What Z-Image has of its own: guidance from 0 on, latents in float32, and a size that no configuration tells."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from draftplus import api
from draftplus.errors import UserError
from tests.families.cases import CASES, PROMPTS, load_model, stock_picture, stock_pipe
from tests.families.conftest import Saved

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
CASE, SEED = CASES["zimage"], 5


@pytest.mark.parametrize(
    ("name", "scale", "negative"),
    [("zimage", 1.0, None), ("zimage", 0.5, "a dog"), ("zimage_turbo", 0.0, None), ("zimage_turbo", 3.0, None)],
)
def test_guidance_is_on_from_0(saved: Saved, name: str, scale: float, negative: str | None) -> None:
    setting = (CASE.sizes[1], 3, scale, negative)
    theirs = stock_picture(stock_pipe(saved(name)), PROMPTS[0], SEED, **CASE.call(*setting))
    ours = api.generate(str(saved(name)), [PROMPTS[0]], [SEED], CASE.overrides(*setting))
    assert (ours - theirs).abs().max() < 1e-4
    unguided = api.generate(str(saved(name)), [PROMPTS[0]], [SEED], CASE.overrides(CASE.sizes[1], 3, 0.0))
    assert ((ours - unguided).abs().max() > 1e-3) == (scale > 0)


def test_half_precision_is_stocks_but_for_the_last_bit(saved: Saved) -> None:
    """Latents and guidance are in float32 there too. Stock rounds the picture to bfloat16."""
    setting = (CASE.sizes[1], 4, CASE.guided, "a dog")
    theirs = stock_picture(stock_pipe(saved("zimage"), torch.bfloat16), PROMPTS[0], SEED, **CASE.call(*setting))
    overrides = [*CASE.overrides(*setting), "model.dtype=bfloat16"]
    ours = api.generate(str(saved("zimage")), [PROMPTS[0]], [SEED], overrides)
    assert (ours.bfloat16().float() - theirs).abs().mean() < 2**-12


def test_the_size_where_none_is_given(saved: Saved) -> None:
    pipe = stock_pipe(saved("zimage"))
    latents = pipe(PROMPTS[0], num_inference_steps=1, guidance_scale=0.0, output_type="latent").images
    assert load_model(saved("zimage"), trainable=False).latent_shape() == tuple(latents.shape[1:]) == (16, 128, 128)


def test_what_is_refused(saved: Saved, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sampler.height is 72; it must be a multiple of 16 for this model"):
        api.generate(str(saved("zimage")), ["a cat"], [0], ["device=cpu", "sampler.height=72", "sampler.width=64"])
    other = shutil.copytree(saved("zimage"), tmp_path / "other")
    file = other / "transformer/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "in_channels": 32}))
    with pytest.raises(
        UserError, match=r"model.path .*: its transformer is not one of a text-to-image model of Z-Image"
    ):
        load_model(other)

"""What Qwen-Image has of its own: guidance that a negative prompt switches on, and an autoencoder of videos."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from draftplus import api
from draftplus.errors import UserError
from tests.families.cases import CASES, PROMPTS, load_model, stock_picture, stock_pipe
from tests.families.conftest import Saved
from tests.tiny import normal

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
CASE, SEED = CASES["qwen_image"], 5


@pytest.fixture
def directory(saved: Saved) -> Path:
    return saved("qwen_image")


def test_only_a_negative_prompt_makes_guidance(directory: Path) -> None:
    def drawn(scale: float, negative: str | None) -> torch.Tensor:
        return api.generate(
            str(directory), [PROMPTS[0]], [SEED], CASE.overrides(CASE.sizes[0], 2, scale, negative)
        )  # fmt: skip

    plain = drawn(1.0, None)
    assert torch.equal(drawn(4.0, None), plain)  # stock's default, whose user asks for nothing
    assert torch.equal(drawn(1.0, "a dog"), plain)
    empty, space = drawn(4.0, ""), drawn(4.0, "' '")
    assert min((a - b).abs().max() for a, b in [(empty, plain), (space, plain), (empty, space)]) > 1e-3
    with pytest.raises(UserError, match=r"sampler.guidance_scale is 6, but without a negative prompt Qwen-Image has"):
        drawn(6.0, None)


def test_each_patch_is_as_long_as_its_prediction_for_the_prompt(directory: Path) -> None:
    model = load_model(directory, trainable=False)
    x, t, given = normal(2, 16, 8, 12, seed=1), torch.tensor(500.0), model.encode(PROMPTS[:2])
    with torch.no_grad():
        guided, plain = (model.guided(given, negative, 6.0)(x, t) for negative in ("a dog", None))
    lengths = [torch.nn.functional.unfold(raw, 2, stride=2).norm(dim=1) for raw in (guided, plain)]  # (b, tokens)
    torch.testing.assert_close(*lengths)
    assert (guided - plain).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_decodes_as_stock_does(directory: Path, dtype: torch.dtype) -> None:
    """Bit for bit, without the memory of frames that the autoencoder has for videos."""
    pipe, arguments = stock_pipe(directory, dtype), CASE.call(CASE.sizes[1], 2, 1.0)
    latents = pipe(
        PROMPTS[0], generator=torch.Generator().manual_seed(SEED), output_type="latent", **arguments
    ).images  # (1, tokens, 64)
    theirs = stock_picture(pipe, PROMPTS[0], SEED, **arguments)
    model = load_model(directory, dtype, trainable=False)
    height, width = CASE.sizes[1]
    unpacked = pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor).squeeze(2)
    with torch.no_grad():
        assert torch.equal(model.decode(unpacked).to(dtype).float(), theirs)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("transformer", {"in_channels": 32}, "its transformer is not one of a text-to-image model of Qwen-Image"),
        ("transformer", {"use_additional_t_cond": True}, "its transformer is not one of a text-to-image model"),
        ("transformer", {"guidance_embeds": True}, "its transformer is told the guidance scale, which is not supp"),
        (None, {"text_encoder": ["transformers", "Qwen3Model"]}, "its text_encoder is a Qwen3Model, which is not supp"),
    ],
)
def test_what_is_refused(
    directory: Path, tmp_path: Path, part: str | None, change: dict[str, Any], message: str
) -> None:
    other = shutil.copytree(directory, tmp_path / "other")
    file = other / part / "config.json" if part else other / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError, match=rf"model.path '{other}'.*: {re.escape(message)}"):
        load_model(other)


def test_sizes_that_stock_crops_are_refused(directory: Path) -> None:
    with pytest.raises(UserError, match=r"sampler.width is 72; it must be a multiple of 16 for this model"):
        api.generate(str(directory), ["a cat"], [0], ["device=cpu", "sampler.height=64", "sampler.width=72"])

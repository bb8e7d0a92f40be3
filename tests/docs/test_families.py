"""The table of families in docs/models.md is true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.shapes import SHAPES
from draftplus.config import recipe_names
from draftplus.diffusion.schedule import make_schedule
from draftplus.models.families import FAMILIES
from draftplus.models.single_file import PIPELINES as WHOLE
from draftplus.publish.write import KOHYA
from tests.benchmarks.test_shapes import PARAMETERS
from tests.families.cases import CASES, load_model
from tests.support.pipelines import save_pipeline

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
ROWS = {
    cells[1].strip("`"): cells
    for line in PAGE.splitlines()
    if re.match(r"\| .* \| `\w+Pipeline` \|", line)
    and len(cells := [c.strip() for c in line.strip("|").split("|")]) == 9
}
TINY = {
    "StableDiffusionXLPipeline": "sdxl", "StableDiffusion3Pipeline": "sd3", "FluxPipeline": "flux_dev",
    "ChromaPipeline": "chroma", "Flux2KleinPipeline": "flux2_klein_base", "QwenImagePipeline": "qwen_image",
    "ZImagePipeline": "zimage",
}  # fmt: skip


def test_every_family_has_a_row() -> None:
    assert set(ROWS) == set(FAMILIES) == {"StableDiffusionPipeline", *TINY}
    assert all(f"`{name}`" in PAGE for name in recipe_names() if name.endswith("_pickscore"))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row(name: str) -> None:
    _, _, steps, guidance, negative, _, single, kohya, _ = ROWS[name]
    assert int(steps) == FAMILIES[name].sampler["steps"]
    assert float(guidance) == FAMILIES[name].sampler["guidance_scale"]
    assert negative == ("yes" if name not in TINY or CASES[TINY[name]].negative else "no")
    assert single == ("whole" if name in WHOLE.values() else "denoiser")
    assert kohya == ("yes" if name in KOHYA else "no")


@pytest.mark.parametrize("name", [name for name in TINY if ROWS[name][5] != "–"])
def test_the_last_sigma(name: str, tmp_path: Path) -> None:
    """Of the stock pipeline's schedule at 1024 pixels, with the published scheduler, which the tiny pipelines have."""
    model = load_model(save_pipeline(TINY[name], tmp_path / "model"), trainable=False)
    channels = model.latent_shape(*CASES[TINY[name]].sizes[0])[0]
    side = 64 if name == "Flux2KleinPipeline" else 128
    steps = int(ROWS[name][2])
    schedule, _ = make_schedule(model.scheduler((channels, side, side), steps), steps)
    assert float(ROWS[name][5]) == pytest.approx(schedule.last_sigma, abs=0.005)


@pytest.mark.parametrize("name", [name for name in ROWS if ROWS[name][8] != "–"])
def test_the_size_of_the_denoiser(name: str) -> None:
    shape = next(key for key, shape in SHAPES.items() if shape.pipeline == name)
    assert float(ROWS[name][8].split()[0]) == pytest.approx(2 * PARAMETERS[shape][0] / 1e9, abs=0.05)

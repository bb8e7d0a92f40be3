"""FLUX.1, FLUX.2 klein and Chroma: what the tests over all families do not see."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors import safe_open

from draftplus import api
from draftplus.build import build_sampler
from draftplus.config import ModelConfig, SamplerConfig
from draftplus.errors import UserError
from draftplus.models.families import family_of
from draftplus.models.lora_files import LORA_FILE
from draftplus.models.pipeline import PipelineModel
from tests.families.cases import PROMPTS, Case, load_model, stock_picture, stock_pipe
from tests.families.conftest import Saved
from tests.families.test_adapters import theirs
from tests.support.runs import small_settings, train_here
from tests.tiny import normal

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
SEED = 5


def edited(directory: Path, to: Path, file: str, **changes: Any) -> Path:
    """A copy of a model, with changes to one of its JSON files."""
    shutil.copytree(directory, to)
    told = json.loads((to / file).read_text())
    (to / file).write_text(json.dumps({**told, **changes}))
    return to


@pytest.mark.parametrize(("name", "scale"), [("flux_schnell", None), ("flux_schnell", 1.0), ("flux2_klein", None)])
def test_a_distilled_model_is_sampled_without_guidance(saved: Saved, name: str, scale: float | None) -> None:
    size = {"height": 96, "width": 64, "num_inference_steps": 4}
    told = {} if scale is None else {"guidance_scale": scale}
    expected = stock_picture(stock_pipe(saved(name)), PROMPTS[0], SEED, **size, **told)
    overrides = ["device=cpu", "sampler.height=96", "sampler.width=64", "sampler.steps=4"]
    overrides += [] if scale is None else [f"sampler.guidance_scale={scale}"]
    assert (api.generate(str(saved(name)), [PROMPTS[0]], [SEED], overrides) - expected).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("flux_dev", {"negative_prompt": ""}, "sampler.negative_prompt is '', but FLUX.1 is sampled without one"),
        ("flux_dev", {"height": 72}, "sampler.height is 72; it must be a multiple of 16"),
        ("flux_schnell", {"guidance_scale": 7.0}, "sampler.guidance_scale is 7.0, but this distilled model has no"),
        ("flux2_klein", {"guidance_scale": 3.5}, "sampler.guidance_scale is 3.5, but this distilled model has no"),
        ("flux2_klein_base", {"negative_prompt": "a dog"}, "is 'a dog', but that of FLUX.2 klein is always empty"),
        ("flux2_klein_base", {"width": 40}, "sampler.width is 40; it must be a multiple of 16"),
    ],
)
def test_what_has_no_effect_is_refused(saved: Saved, name: str, settings: dict[str, Any], says: str) -> None:
    model = load_model(saved(name), torch.float32, trainable=False)
    with pytest.raises(UserError, match=says) as told:
        build_sampler(model, SamplerConfig(**{"steps": 2, "guidance_scale": 1.0, **settings}))
    assert len(str(told.value).splitlines()) == 1


def test_flux_2_dev_is_refused_by_name(saved: Saved, tmp_path: Path) -> None:
    directory = edited(saved("flux2_klein"), tmp_path / "dev", "model_index.json", _class_name="Flux2Pipeline")
    with pytest.raises(UserError, match=r"is a Flux2Pipeline, which is not supported; supported: .*Flux2KleinPipeline"):
        family_of(ModelConfig(path=str(directory)))


@pytest.mark.parametrize(
    ("name", "shape"),
    [("flux_dev", (16, 128, 128)), ("flux2_klein", (128, 64, 64)), ("chroma", (16, 128, 128))],
)
def test_the_default_size_is_that_of_stock(saved: Saved, name: str, shape: tuple[int, int, int]) -> None:
    assert load_model(saved(name), torch.float32, trainable=False).latent_shape() == shape


@pytest.mark.parametrize(("name", "steps"), [("flux_dev", 28), ("flux2_klein", 4)])
def test_the_levels_are_stocks_at_the_true_size(saved: Saved, name: str, steps: int) -> None:
    """Where the shift by resolution is that of 1024 pixels, which FLUX.2 makes depend on the number of steps."""
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    model = load_model(saved(name), torch.float32, trainable=False)
    scheduler = stock_pipe(saved(name)).scheduler
    mu = 1.15 if name == "flux_dev" else compute_empirical_mu(4096, steps)
    scheduler.set_timesteps(sigmas=numpy.linspace(1.0, 1 / steps, steps), mu=mu)
    schedule = build_sampler(model, SamplerConfig(steps=steps, guidance_scale=1.0)).schedule
    levels = torch.tensor([*(step.sigma for step in schedule.steps), schedule.steps[-1].next_sigma])
    torch.testing.assert_close(levels, scheduler.sigmas, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", ["flux_dev", "flux2_klein_base", "chroma"])
def test_half_precision_is_rounded_where_stock_rounds(saved: Saved, name: str) -> None:
    """The time and the guidance scale, which the network multiplies by 1000, before and not after; to the bit."""
    pipe = stock_pipe(saved(name), torch.bfloat16)
    model = load_model(saved(name), torch.bfloat16, trainable=False)
    shape, case = model.latent_shape(64, 96), Case()
    noise = normal(1, *shape, seed=1).bfloat16()
    packed = noise if name.startswith("flux2") else pipe._pack_latents(noise, 1, *shape)
    theirs: list[torch.Tensor] = []
    forward = pipe.transformer.forward
    pipe.transformer.forward = lambda *given, **told: theirs.append(out := forward(*given, **told)) or out
    with torch.no_grad():
        pipe(prompt=PROMPTS[0], latents=packed, output_type="latent", **case.call((64, 96), 2, 3.3))
        sampler = build_sampler(model, SamplerConfig(steps=2, guidance_scale=3.3, height=64, width=96))
        seen = _outputs(model)
        model.guided(model.encode(PROMPTS[:1]), None, 3.3)(noise, sampler.schedule.timestep(0, "cpu"))
    assert torch.equal(seen[0][-1], theirs[0][0][-1])


def _outputs(model: PipelineModel) -> list[torch.Tensor]:
    seen: list[torch.Tensor] = []
    network = model.tuned.network
    forward = network.forward

    def spy(*given: Any, **told: Any) -> Any:
        out = forward(*given, **told)
        seen.append(out[0])
        return out

    network.forward = spy
    return seen


def test_chroma_with_sigmas_of_a_beta_distribution(saved: Saved, tmp_path: Path) -> None:
    directory = edited(
        saved("chroma"), tmp_path / "chroma", "scheduler/scheduler_config.json", use_beta_sigmas=True, shift=2.0
    )
    case = Case()
    picture = api.generate(str(directory), [PROMPTS[0]], [SEED], case.overrides((64, 96), 5, 4.0))
    expected = stock_picture(stock_pipe(directory), PROMPTS[0], SEED, **case.call((64, 96), 5, 4.0))
    assert (picture - expected).abs().max() < 1e-3
    with pytest.raises(UserError, match=r"sampler.sigmas is \[1.0, 0.5\], but .* use_beta_sigmas: true"):
        api.generate(str(directory), ["a"], [0], ["device=cpu", "sampler.steps=2", "sampler.sigmas=[1,0.5]"])


def test_what_is_read_of_a_prompt_is_counted(saved: Saved) -> None:
    long = "a cat " * 400
    for name, tokenizer in (("flux_dev", "tokenizer_2"), ("flux2_klein", "tokenizer"), ("chroma", "tokenizer")):
        model = load_model(saved(name), torch.float32, trainable=False)
        for prompt, cut in (("a cat", False), (long, True)):
            ((which, (count, limit)),) = model.kind.lengths(model.pipe, prompt).items()
            assert (which, limit, count > limit) == (tokenizer, 512, cut)


def test_export_for_kohya(saved: Saved, tmp_path: Path) -> None:
    """There is such a format of SDXL's, and the stock pipeline reads it; of FLUX, one line says that there is none."""
    told = ["train.steps=1", "eval.max_prompts=1", "sampler.height=64", "sampler.width=64", "optim.lr=0.3"]
    (tmp_path / "flux").mkdir()
    with pytest.raises(UserError, match="tuned from a FluxPipeline, for which the format kohya does not exist; use"):
        api.export(str(train_here(small_settings(saved("flux_dev"), tmp_path / "flux"), *told)), "kohya")
    run = train_here(small_settings(saved("sdxl"), tmp_path), *told)
    written = next(api.export(str(run), "kohya").glob("*.safetensors"))
    with safe_open(written, "pt") as header:
        assert header.metadata()["ss_base_model_version"] == "sdxl_base_v1-0"
    pictures, files = [], (run / "adapter" / LORA_FILE, written)
    untuned = theirs(Case(), stock_pipe(saved("sdxl")))
    for file in files:
        pipe = stock_pipe(saved("sdxl"))
        pipe.load_lora_weights(file.parent, weight_name=file.name)
        pictures.append(theirs(Case(), pipe))
    assert (pictures[0] - untuned).abs().max() > 1e-2
    assert (pictures[0] - pictures[1]).abs().max() < 1e-4

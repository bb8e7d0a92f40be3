"""What `generate` draws is the stock pipeline's picture, of every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from draftplus import api
from tests.families.cases import PROMPTS, Case, load_model, stock_picture, stock_pipe
from tests.families.conftest import Below
from tests.tiny import normal

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
SEED = 5
LARGEST = 1e-3  # difference of any pixel, in [0, 1]


@pytest.mark.parametrize(
    ("which", "steps", "guided", "negative"),
    [(0, 3, True, None), (1, 4, True, None), (1, 3, False, None), (0, 4, True, "a grey dog"), (1, 3, True, "")],
    ids=str,
)
def test_it_is_the_stock_pipelines(
    case: Case, directory: Path, which: int, steps: int, guided: bool, negative: str | None, below: Below
) -> None:
    if negative is not None and not case.negative:
        pytest.skip("a family without negative prompts, which are refused")
    setting = (case.sizes[which], steps, case.guided if guided else case.plain, negative)
    theirs = stock_picture(stock_pipe(directory), PROMPTS[0], SEED, **case.call(*setting))
    ours = api.generate(str(directory), [PROMPTS[0]], [SEED], case.overrides(*setting))
    assert ours.shape[2:] == case.sizes[which]
    assert theirs.std() > 0.05
    below("picture", (ours - theirs).abs().max(), LARGEST)


def test_nulls_are_what_the_stock_pipeline_does(
    case: Case, directory: Path, monkeypatch: pytest.MonkeyPatch, below: Below
) -> None:
    """Size, steps, guidance and negative prompt."""
    pipe, sizes = stock_pipe(directory), {}
    if not hasattr(pipe, "default_sample_size"):  # 1024 in the code of Z-Image's call, which has a test of its own
        sizes = {"height": 64, "width": 64}
    elif pipe.default_sample_size == 128:  # hard-coded in some, and too many pixels for a test
        small = property(lambda _: 8, lambda _, value: None)
        monkeypatch.setattr(type(pipe), "default_sample_size", small, raising=False)
    theirs = stock_picture(pipe, PROMPTS[1], SEED, **case.arguments, **sizes)
    overrides = ["device=cpu", *(f"sampler.{key}={value}" for key, value in sizes.items())]
    ours = api.generate(str(directory), [PROMPTS[1]], [SEED], overrides)
    below("picture without settings", (ours - theirs).abs().max(), LARGEST)


def test_a_batch_of_prompts_is_each_alone(case: Case, directory: Path, below: Below) -> None:
    setting = case.overrides(case.sizes[1], 3, case.guided, "a grey dog" if case.negative else None)
    together = api.generate(str(directory), PROMPTS, [SEED], setting)
    alone = [api.generate(str(directory), [prompt], [SEED], setting) for prompt in PROMPTS]
    assert (together[0] - together[1]).abs().max() > 0.01
    below("batch and alone", (together - torch.cat(alone)).abs().max(), 1e-4)


@pytest.mark.parametrize("negative", [None, "a grey dog"])
def test_what_guidance_costs(case: Case, directory: Path, negative: str | None) -> None:
    model, passes = load_model(directory, trainable=False), []
    x, given = normal(1, *model.latent_shape(*case.sizes[0])), model.encode(PROMPTS[:1])
    model.predict = lambda latents, *_: (passes.append(len(latents)), latents)[1]  # type: ignore[method-assign]
    for scale in (case.guided, case.plain):
        passes.clear()
        model.guided(given, negative, scale)(x, torch.tensor(500.0))
        assert (sum(passes) == 2) == model.doubles(negative, scale)


def test_half_precision(case: Case, directory: Path, below: Below) -> None:
    """Nearer than stock's own pictures are to each other where they are drawn in batches of another size."""
    arguments = case.call(case.sizes[1], 3, case.guided)
    pipe = stock_pipe(directory, torch.bfloat16)
    theirs = stock_picture(pipe, PROMPTS[0], SEED, **arguments)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in (SEED, 6, 7)]
    batch = pipe(prompt=list(PROMPTS), generator=generators, output_type="pt", **arguments).images[:1].float()
    overrides = [*case.overrides(case.sizes[1], 3, case.guided), "model.dtype=bfloat16"]
    ours = api.generate(str(directory), [PROMPTS[0]], [SEED], overrides)
    spread = (theirs - batch).abs().mean()
    below("bfloat16, mean", (ours - theirs).abs().mean(), max(spread, 2**-16))  # which may be 0
    below("bfloat16, stock in two batches, mean", spread, 0.1)

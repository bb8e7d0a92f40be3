"""What training exports, in stock diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from draftplus import rng
from draftplus.config import LoraConfig
from draftplus.diffusion.sampler import Rollout, Sampler
from draftplus.diffusion.schedule import make_schedule
from draftplus.diffusion.solvers import make_solver
from draftplus.errors import UserError
from draftplus.models.lora import layers
from draftplus.models.lora_files import LORA_FILE
from draftplus.models.stable_diffusion import StableDiffusion
from tests.tiny import PROMPTS, SHAPE, normal, randomize, stock_pipeline, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
STEPS, GUIDANCE = 4, 4.0


def lora(targets: Any = "all") -> LoraConfig:
    return LoraConfig(rank=3, alpha=6.0, targets=targets)


@torch.no_grad()
def picture(made: StableDiffusion) -> Tensor:
    schedule, name = make_schedule(made.scheduler_config, STEPS)
    start = Rollout(rng.stock_noise(SHAPE, [1, 2, 3]).to(made.unet.conv_in.weight.dtype))
    sampler = Sampler(made, schedule, make_solver(name), GUIDANCE)
    return made.decode(sampler.sample(made.encode(PROMPTS), start).latents)


def stock_picture(pipe: Any) -> Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2, 3)]
    return pipe(
        PROMPTS, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generators, output_type="pt"
    ).images  # fmt: skip


@pytest.mark.parametrize("targets", ["attention", "all", ["to_q", "conv_in"]], ids=str)
def test_a_stock_pipeline_loads_the_adapter(tiny_path: Path, tmp_path: Path, targets: Any) -> None:
    made = tiny_model(tiny_path, torch.float32, lora(targets))
    randomize(made, size=0.3)
    made.tuned.save(tmp_path / "adapter")
    base, tuned = stock_pipeline(tiny_path, torch.float32), stock_pipeline(tiny_path, torch.float32)
    tuned.load_lora_weights(tmp_path / "adapter")
    ours, theirs, untuned = picture(made), stock_picture(tuned), stock_picture(base)
    assert (ours - theirs).abs().max() < 1e-3
    assert (ours - untuned).abs().max() > 1e-2
    with made.tuned.folded():
        assert (picture(made) - theirs).abs().max() < 1e-3


def test_a_stock_denoiser_loads_the_full_weights(tiny_path: Path, tmp_path: Path) -> None:
    made = tiny_model(tiny_path, torch.float32, full=True)
    before = picture(made)
    randomize(made, size=0.5)
    made.tuned.save(tmp_path)
    pipe = stock_pipeline(tiny_path, torch.float32)
    pipe.unet = UNet2DConditionModel.from_pretrained(tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(pipe.unet.parameters(), made.unet.parameters(), strict=True))
    assert (picture(made) - stock_picture(pipe)).abs().max() < 1e-3
    assert (picture(made) - before).abs().max() > 1e-2


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("trainable", [False, True])
def test_round_trip(tiny_path: Path, tmp_path: Path, full: bool, trainable: bool) -> None:
    made = tiny_model(tiny_path, lora=lora(), full=full)
    base = picture(made)
    randomize(made, size=0.3)
    made.tuned.save(tmp_path / "a")
    other = tiny_model(tiny_path, lora=lora("attention"), full=full, trainable=trainable)
    other.tuned.load(tmp_path / "a")
    torch.testing.assert_close(picture(other), picture(made), rtol=0, atol=1e-10)
    with other.tuned.reference():  # the base model stays at hand
        torch.testing.assert_close(picture(other), base, rtol=0, atol=1e-10)
    other.tuned.save(tmp_path / "b")
    name = "diffusion_pytorch_model.safetensors" if full else LORA_FILE
    first, second = (load_file(tmp_path / which / name) for which in "ab")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_another_adapter_takes_the_place_of_the_first(tiny_path: Path, tmp_path: Path) -> None:
    made, pictures = tiny_model(tiny_path, trainable=False), []
    for seed, targets in ((1, "all"), (2, "attention")):
        tuned = tiny_model(tiny_path, lora=lora(targets))
        randomize(tuned, seed, size=0.3)
        tuned.tuned.save(tmp_path / str(seed))
        pictures.append(picture(tuned))
    for seed, expected in ((1, pictures[0]), (2, pictures[1]), (1, pictures[0])):
        made.tuned.load(tmp_path / str(seed))
        torch.testing.assert_close(picture(made), expected, rtol=0, atol=1e-10)


def test_an_adapter_stays_in_float32_beside_half_weights(tiny_path: Path, tmp_path: Path) -> None:
    made = tiny_model(tiny_path, torch.bfloat16)
    randomize(made)
    made.tuned.save(tmp_path)
    other = tiny_model(tiny_path, torch.bfloat16, trainable=False)
    other.tuned.load(tmp_path)
    assert {p.dtype for p in made.tuned.trainable().values()} == {p.dtype for p in other.tuned.trainable().values()}
    assert next(iter(other.tuned.trainable().values())).dtype == torch.float32
    assert other.unet.conv_in.weight.dtype == torch.bfloat16


def test_scale(tiny_path: Path) -> None:
    made = tiny_model(tiny_path)
    base = picture(made)
    randomize(made, size=0.1)
    x, t = normal(3, *SHAPE), torch.tensor(300)

    def at(scale: float) -> Tensor:
        made.tuned.set_scale(scale)
        with torch.no_grad():
            return made.predict(x, t, made.encode(PROMPTS))

    zero, half, one = at(0.0), at(0.5), at(1.0)
    with made.tuned.reference(), torch.no_grad():
        assert torch.equal(zero, made.predict(x, t, made.encode(PROMPTS)))
    assert (zero - one).norm() > max((zero - half).norm(), (half - one).norm()) > 0.05 * (zero - one).norm()
    assert torch.equal(at(1.0), one)
    made.tuned.set_scale(0.0)
    assert torch.equal(picture(made), base)
    made.tuned.set_scale(1.0)
    assert not torch.equal(picture(made), base)


def test_scale_halves_the_weights_change(tiny_path: Path) -> None:
    made = tiny_model(tiny_path)
    randomize(made)
    whole = [layer.get_delta_weight("default").clone() for layer in layers(made.unet)]
    made.tuned.set_scale(0.5)
    for layer, delta in zip(layers(made.unet), whole, strict=True):
        torch.testing.assert_close(layer.get_delta_weight("default"), delta / 2)


def test_a_fully_tuned_denoiser_has_no_scale(tiny_path: Path) -> None:
    made = tiny_model(tiny_path, full=True)
    made.tuned.set_scale(1.0)
    with pytest.raises(UserError, match=r"scale is 0\.5"):
        made.tuned.set_scale(0.5)


def test_an_adapter_that_does_not_fit_is_refused(tiny_path: Path, tmp_path: Path) -> None:
    made = tiny_model(tiny_path, torch.float32)
    randomize(made)
    made.tuned.save(tmp_path / "good")
    good = load_file(tmp_path / "good" / LORA_FILE)
    first, other = min(good), tiny_model(tiny_path, torch.float32, trainable=False)
    wrong = {
        "of other shapes": {name: torch.zeros(*(2 * n for n in tensor.shape)) for name, tensor in good.items()},
        "of other layers": {name.replace("unet.", "unet.other."): tensor for name, tensor in good.items()},
        "with a layer too many": {
            **good, "unet.extra.lora_A.weight": torch.zeros(2, 8), "unet.extra.lora_B.weight": torch.zeros(8, 2),
        },
        "with half of a layer": {name: tensor for name, tensor in good.items() if name != first},
        "with an alpha of its own": {**good, first.replace("lora_A.weight", "alpha"): torch.tensor(1.0)},
        "of a text encoder": {name.replace("unet.", "text_encoder."): tensor for name, tensor in good.items()},
        "of nothing": {},
    }  # fmt: skip
    for what, state in wrong.items():
        directory = tmp_path / what
        directory.mkdir()
        save_file(state, directory / LORA_FILE)
        with pytest.raises(UserError, match=r"the adapter does not fit this model|no adapter of the denoiser") as error:
            other.tuned.load(directory)
        assert str(directory) in str(error.value) and "\n" not in str(error.value), what
    other.tuned.load(tmp_path / "good")
    torch.testing.assert_close(picture(other), picture(made), rtol=0, atol=1e-5)
    (tmp_path / "good" / LORA_FILE).write_bytes(b"short")
    with pytest.raises(UserError, match="damaged or not a safetensors file"):
        other.tuned.load(tmp_path / "good")
    with pytest.raises(UserError, match="give the adapter/ directory of a run"):
        other.tuned.load(tmp_path / "nowhere")


@pytest.mark.parametrize("full", [False, True])
def test_what_is_written_is_what_was_gathered(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    """Not what this process happens to hold; also where it takes more than one file."""
    made = tiny_model(tiny_path, torch.float32, full=full)
    randomize(made)
    state = {name: tensor + 1 for name, tensor in made.tuned.state().items()}
    monkeypatch.setattr("draftplus.models.tuned.LARGEST_FILE", 50_000)
    made.tuned.write(tmp_path, state)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == full
    other = tiny_model(tiny_path, torch.float32, full=full)
    other.tuned.load(tmp_path)
    found = other.tuned.state()
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=0)
    if full:  # stock diffusers reads it too
        unet = type(made.unet).from_pretrained(tmp_path)
        assert torch.equal(unet.conv_in.bias, state["conv_in.bias"])


def test_a_denoiser_that_does_not_fit_is_refused(tiny_path: Path, tmp_path: Path) -> None:
    tiny_model(tiny_path, torch.float32, full=True).tuned.save(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    good = load_file(file)
    for state in (
        {name: tensor for name, tensor in good.items() if name != "conv_in.bias"},
        {**good, "conv_in.bias": torch.zeros(3)},
    ):
        save_file(state, file)
        with pytest.raises(UserError, match=r"the denoiser does not fit this model.*conv_in\.bias"):
            tiny_model(tiny_path, torch.float32, trainable=False).tuned.load(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match=r"no \.safetensors weights"):
        tiny_model(tiny_path, torch.float32, trainable=False).tuned.load(tmp_path)

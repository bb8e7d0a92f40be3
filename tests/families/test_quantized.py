"""A model with quantised weights: the stock pipeline's pictures, exact gradients of the adapters, and less memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from draftplus import api
from draftplus.config import LoraConfig
from draftplus.errors import UserError
from draftplus.models.embedding_store import EmbeddingStore
from draftplus.models.lora import layers
from draftplus.models.quantize import is_quantised
from tests.families.cases import CASES, Case, load_model, stock_picture
from tests.families.conftest import Below, Saved
from tests.support.processes import command
from tests.support.runs import rows, small_settings, train_here, weights
from tests.tiny import PROMPTS, normal, save_tiny
from tests.training.test_resume import assert_same_run

torchao: Any = pytest.importorskip("torchao")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
KINDS = ("int8", "fp8")
WHICH = [*((name, "int8") for name in ("sd", "sdxl", "sd3", "flux_dev", "zimage")), ("sd", "fp8"), ("flux_dev", "fp8")]
SMALL = Case(sizes=((16, 16),) * 2)  # Stable Diffusion, whose tiny pipeline has pictures of 16 pixels


@pytest.fixture(params=["sd", "flux_dev"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def case(name: str) -> Case:
    return CASES.get(name, SMALL)


@pytest.fixture
def directory(name: str, saved: Saved, tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "tiny") if name == "sd" else saved(name)


def stock_quantised(directory: Path, kind: str) -> Any:
    """The stock pipeline with what stock's own configuration makes of its denoiser and text encoders."""
    import diffusers
    import transformers
    from diffusers.quantizers import PipelineQuantizationConfig
    from torchao import quantization

    made = {"int8": quantization.Int8WeightOnlyConfig, "fp8": quantization.Float8WeightOnlyConfig}[kind]
    ours, theirs = diffusers.TorchAoConfig(made()), transformers.TorchAoConfig(made())
    parts = {
        "unet": ours,
        "transformer": ours,
        **dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3"), theirs),
    }
    there = {key: one for key, one in parts.items() if (directory / key).is_dir()}
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        directory, torch_dtype=torch.float32, quantization_config=PipelineQuantizationConfig(quant_mapping=there)
    )
    pipe.set_progress_bar_config(disable=True)
    assert sum(is_quantised(p) for key in there for p in getattr(pipe, key).parameters()) > 10
    return pipe


@pytest.mark.parametrize(("name", "kind"), WHICH)
def test_pictures_are_the_stock_pipelines(case: Case, directory: Path, kind: str, below: Below) -> None:
    setting = (case.sizes[0], 3, case.guided, None)
    call = case.call(*setting)
    theirs = stock_picture(stock_quantised(directory, kind), PROMPTS[0], 5, **call)
    ours = api.generate(str(directory), [PROMPTS[0]], [5], [*case.overrides(*setting), f"model.quantize={kind}"])
    plain = api.generate(str(directory), [PROMPTS[0]], [5], case.overrides(*setting))
    assert (theirs - plain).abs().max() > 3e-3, "quantisation shows, so that the next line can fail"
    below(f"picture in {kind}", (ours - theirs).abs().max(), 1e-3)


def bytes_of(tensor: Tensor) -> int:
    """As it lies in memory, whatever it stands for."""
    if not is_quantised(tensor):
        return tensor.numel() * tensor.element_size()
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return sum(bytes_of(getattr(tensor, name)) for name in names if getattr(tensor, name) is not None)


@pytest.mark.parametrize(("name", "kind"), WHICH)
def test_frozen_weights_take_a_quarter(case: Case, directory: Path, kind: str) -> None:
    """Of float32, and one scale per row, and at float32's size what is no linear layer."""
    model = load_model(directory, torch.float32, trainable=False, quantize=kind)
    model.as_pipeline()  # which loads the encoders
    networks = [model.tuned.denoiser, *model.tuned.encoders.values()]
    assert len(networks) > 1
    for network in networks:
        linear = [m for m in network.modules() if isinstance(m, nn.Linear)]
        small = [m.weight for m in linear if is_quantised(m.weight)]
        assert len(small) >= len(linear) - 3  # transformers leaves a head in full precision, of T5 one of each block
        assert all(bytes_of(one) <= one.numel() + 5 * len(one) for one in small)
    assert not any(map(is_quantised, model.vae.parameters()))


def dequantised(model: Any) -> None:
    """Gives a model's denoiser plain weights of the same values."""
    for module in model.tuned.denoiser.modules():
        if isinstance(module, nn.Linear) and is_quantised(module.weight):
            weight = module.weight.dequantize().double()  # type: ignore[operator]
            module.weight, module.__class__ = nn.Parameter(weight, requires_grad=False), nn.Linear


def predicted(model: Any, case: Case, dtype: torch.dtype, like: Any = None) -> Tensor:
    x = normal(2, *model.latent_shape(*case.sizes[0])).to(dtype)
    given = (like or model).encode(PROMPTS[:2])
    raw: Tensor = model.guided(given, None, case.plain)(x, torch.tensor(500.0))
    return raw


@pytest.mark.parametrize(("name", "kind"), WHICH)
def test_gradients_are_those_through_the_dequantised_weights(
    case: Case, directory: Path, kind: str, below: Below
) -> None:
    """Which autograd takes by itself in float64, of a network without any quantised layer."""
    model = load_model(directory, torch.float32, quantize=kind, lora=LoraConfig(rank=2, alpha=4.0, targets="linear"))
    ours = model.tuned.trainable()
    assert all(p.dtype == torch.float32 for p in ours.values())
    generator = torch.Generator().manual_seed(3)
    for parameter in ours.values():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    got = torch.autograd.grad((predicted(model, case, torch.float32) ** 2).mean(), list(ours.values()))
    plain = load_model(directory, torch.float64, lora=LoraConfig(rank=2, alpha=4.0, targets="linear"))
    wide = load_model(directory, torch.float32, quantize=kind, lora=LoraConfig(rank=2, alpha=4.0, targets="linear"))
    dequantised(wide)
    state = {key: value.double() for key, value in wide.tuned.denoiser.state_dict().items()}
    plain.tuned.denoiser.load_state_dict(state)
    theirs = plain.tuned.trainable()
    for key, parameter in theirs.items():
        parameter.data = ours[key].data.double()
    loss = (predicted(plain, case, torch.float64, like=model) ** 2).mean()
    wanted = torch.autograd.grad(loss, list(theirs.values()))
    assert len(got) == len(wanted) > 8
    error = sum(float((a.double() - b).norm() ** 2) for a, b in zip(got, wanted, strict=True))
    size = sum(float(b.norm() ** 2) for b in wanted)
    assert size > 0
    below(f"gradient in {kind}", math.sqrt(error / size), 1e-4)


def test_the_backward_pass_keeps_no_weight(case: Case, directory: Path) -> None:
    """None in full precision that is quantised, as torchao's own would once for each call."""
    model = load_model(directory, torch.float32, quantize="int8")
    quantised = [m for m in model.tuned.denoiser.modules() if isinstance(m, nn.Linear) and is_quantised(m.weight)]

    def kept() -> int:
        found = 0

        def keep(tensor: Tensor) -> Tensor:
            nonlocal found
            found += tensor.dtype == torch.float32 and any(_is_of(tensor, m.weight) for m in quantised)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            predicted(model, case, torch.float32).sum().backward()
        return found

    assert len(quantised) > 10 and kept() == 0
    for layer in quantised:
        layer.__class__ = nn.Linear
    assert kept() > 10, "torchao's own"


def _is_of(tensor: Tensor, weight: Any) -> bool:
    """Whether a tensor has the values of a quantised weight, in either layout."""
    values = weight.qdata.float()
    return any(tensor.shape == one.shape and torch.equal(tensor, one) for one in (values, values.t()))


def test_kl_is_nothing_at_first_and_weights_stay(case: Case, directory: Path) -> None:
    model = load_model(directory, torch.bfloat16, quantize="int8")
    before = {n: p.detach().clone() for n, p in model.tuned.denoiser.named_parameters() if is_quantised(p)}
    assert before and model.tuned.precision == torch.bfloat16
    with torch.no_grad():
        for here in (model.tuned.folded, model.tuned.widened):
            with here():
                now = predicted(model, case, torch.float32)
                with model.tuned.reference():
                    assert torch.equal(now, predicted(model, case, torch.float32))
                assert all(is_quantised(p) for n, p in model.tuned.denoiser.named_parameters() if n in before)
    after = dict(model.tuned.denoiser.named_parameters())
    assert all(torch.equal(after[n].qdata, p.qdata) for n, p in before.items())  # type: ignore[attr-defined]
    assert len(layers(model.tuned.denoiser)) > 0


def settings_of(case: Case, directory: Path, tmp_path: Path) -> list[str]:
    height, width = (16, 16) if case is SMALL else case.sizes[1]
    return [
        *small_settings(directory, tmp_path), "train.steps=2", "train.global_batch_size=2", "train.micro_batch_size=2",
        "checkpoint.every=1", "eval.max_prompts=1", f"sampler.height={height}", f"sampler.width={width}",
        f"sampler.guidance_scale={case.guided}", "model.quantize=int8", "objective.kl_coeff=0.5", "eval.every=1",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["small", "flux_dev"])
def test_a_run_continues_exactly(case: Case, name: str, saved: Saved, small: Path, tmp_path: Path) -> None:
    """In another process. Adapters load into the quantised model, and are refused as merged ones."""
    settings = settings_of(case, small if name == "small" else saved(name), tmp_path)
    settings = [one.replace("=16", "=32") if name == "small" and "sampler" in one else one for one in settings]
    whole = train_here(settings, "name=whole")
    made = rows(whole / "metrics.jsonl")
    assert made[0]["kl"] == 0 < made[1]["kl"]
    assert all(math.isfinite(row["reward"]) and row["grad_norm"] > 0 for row in made)
    run = train_here(settings, "train.steps=1")
    child = command(["train", *settings, "--trust"], tmp_path)
    assert child.wait() == 0, child.err.read_text()
    assert "torchao" not in child.err.read_text()
    assert_same_run(run, whole)
    assert all("default" not in key for key in weights(run / "adapter"))
    first, tuned = (api.generate(str(one), ["a cat"], [1], ["device=cpu"]) for one in (f"{run}@0", run))
    assert (first - tuned).abs().max() > 1e-4
    with pytest.raises(UserError, match=r"model.quantize=int8, and adapters cannot be merged"):
        api.export(str(run), "merged")
    card = (api.export(str(run)) / "README.md").read_text()
    assert "Int8WeightOnlyConfig" in card


def test_embeddings_are_kept_apart(saved: Saved) -> None:
    stores = [load_model(saved("sd3"), torch.float32, quantize=kind).encode._store for kind in (None, *KINDS)]
    assert all(isinstance(store, EmbeddingStore) for store in stores)
    assert len({store.name("a cat") for store in stores if store}) == 3


def test_a_replaced_denoiser_is_quantised(saved: Saved, tmp_path: Path) -> None:
    """From a directory; a single file, which diffusers would leave as it is, is refused."""
    from safetensors.torch import save_file

    directory = saved("sdxl")
    plain = load_model(directory, torch.float32, trainable=False)
    file = tmp_path / "unet.safetensors"
    save_file(dict(plain.tuned.denoiser.state_dict()), file)
    wanted = predicted(
        load_model(directory, torch.float32, trainable=False, quantize="int8"), CASES["sdxl"], torch.float32
    )
    with pytest.raises(UserError, match=r"model\.denoiser '.*unet.safetensors': .* a single file, and model\.quantize"):
        _ = load_model(directory, torch.float32, trainable=False, quantize="int8", denoiser=str(file)).tuned
    given = str(directory / "unet")
    made = load_model(directory, torch.float32, trainable=False, quantize="int8", denoiser=given)
    assert sum(map(is_quantised, made.tuned.denoiser.parameters())) > 10
    assert torch.equal(predicted(made, CASES["sdxl"], torch.float32), wanted)

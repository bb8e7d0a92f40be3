"""What is planned of quantised weights and of moments in 8 bits."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from draftplus.build import build_model
from draftplus.config import Config
from draftplus.errors import UserError
from draftplus.models.bare import Encoder
from draftplus.models.bare_quantized import BYTES
from draftplus.models.quantize import is_quantised
from draftplus.planning.meter import META, counting, storages
from draftplus.planning.optimizer import eight_bit_moments
from draftplus.planning.plan import plan_memory
from tests.planning.conftest import FAMILIES, Configured, planned
from tests.tiny import CPU

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.mark.parametrize("kind", BYTES)
def test_frozen_linear_layers_shrink(configured: Configured, kind: str) -> None:
    """And with them what the KL term widens; adapters, the autoencoder and what is kept of images stay."""
    plain, small = (planned(configured("sdxl", f"model.quantize={one}")) for one in ("null", kind))
    assert small.weights["denoiser"] < 0.8 * plain.weights["denoiser"]
    assert small.weights["text encoders"] < plain.weights["text encoders"]
    for part in ("adapters", "autoencoder", "rewards"):
        assert small.weights[part] == plain.weights[part]
    assert small.kept["window"] == pytest.approx(plain.kept["window"], rel=0.01)
    assert small.trained == plain.trained


def test_what_the_kl_term_widens_shrinks(configured: Configured) -> None:
    plain, small = (
        planned(configured("sd", "model.dtype=bfloat16", f"model.quantize={one}")) for one in ("null", "int8")
    )
    assert 0 < small.kept["widened weights"] < plain.kept["widened weights"]
    assert small.phases["step"] < plain.phases["step"]


def test_nf4_is_planned_where_there_is_no_gpu(configured: Configured) -> None:
    """And no back end; what does not go together is refused as in training."""
    assert plan_memory(configured("sd", "model.quantize=nf4")).memory.peak > 0
    with pytest.raises(UserError, match=r"model.quantize is int8, but model.lora is null"):
        plan_memory(configured("sd", "model.quantize=int8", "model.lora=null"))


def bytes_of(tensor: Tensor) -> int:
    """As it lies in memory, whatever it stands for."""
    if not is_quantised(tensor):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return sum(bytes_of(getattr(tensor, name)) for name in names if getattr(tensor, name) is not None)


def sizes(config: Config, device: torch.device) -> dict[str, dict[str, int]]:
    """The bytes of every parameter of a model, by part."""
    model: Any = build_model(config.model, device, config.seed)
    with counting() if device == META else nullcontext():
        model.encode([None])
    parts = {"denoiser": model.tuned.denoiser, **model.tuned.encoders}
    networks = {name: one.network if isinstance(one, Encoder) else one for name, one in parts.items()}
    of = (lambda one: one.untyped_storage().nbytes()) if device == META else bytes_of
    return {part: {name: of(one) for name, one in net.named_parameters()} for part, net in networks.items()}


@pytest.mark.parametrize("kind", ["null", "int8", "fp8"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_weight_has_the_bytes_of_the_real_one(
    configured: Configured, name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the rounding of a whole number of weights: which layers are quantised, and what their scales take."""
    monkeypatch.setenv("DRAFTPLUS_CACHE", str(tmp_path))  # encoders are not read where a prompt is embedded already
    if kind != "null":
        pytest.importorskip("torchao")
    config = configured(name, f"model.quantize={kind}", "model.dtype=bfloat16")
    told, true = sizes(config, META), sizes(config, CPU)
    assert told.keys() == true.keys() and len(told) > 1
    for part in told:
        assert told[part].keys() == true[part].keys()
        wrong = {
            key: (size, true[part][key]) for key, size in told[part].items() if not 0 <= size - true[part][key] < 2
        }
        assert not wrong, (part, wrong)


@pytest.mark.parametrize(("rows", "columns"), [(64, 96), (100, 30), (7, 9)])
def test_bytes_of_nf4_are_those_of_its_back_end(rows: int, columns: int) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(torch.randn(rows, columns), quant_type="nf4")
    assert BYTES["nf4"](rows, columns) == packed.nbytes + state.absmax.nbytes + state.code.nbytes


def test_bytes_of_moments_are_those_of_the_back_end() -> None:
    optim = pytest.importorskip("bitsandbytes.optim")
    parameters = [nn.Parameter(torch.randn(*shape)) for shape in ((96, 100), (10, 10), (4096,), (64, 65))]
    optimizer = optim.AdamW8bit(parameters, lr=1e-3)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [one for of in optimizer.state.values() for one in of.values() if isinstance(one, Tensor)]
    assert eight_bit_moments(parameters) == sum({one.data_ptr(): one.nbytes for one in states}.values())


def test_moments_in_8_bits_are_what_the_plan_tells(configured: Configured) -> None:
    plain, small = (
        planned(configured("sdxl", "model.lora=null", f"optim.name={name}")) for name in ("adamw", "adamw_8bit")
    )
    assert small.trained["gradients"] == plain.trained["gradients"] == plain.trained["optimizer"] // 2
    assert plain.trained["optimizer"] / 4 < small.trained["optimizer"] < plain.trained["optimizer"]
    assert plain.fixed - small.fixed == plain.trained["optimizer"] - small.trained["optimizer"]


def test_a_layer_that_stands_for_a_quantised_one_is_as_small(configured: Configured) -> None:
    """Also while nothing passes through it, and its backward pass keeps no weight in full precision."""
    from draftplus.models.bare_quantized import imitate

    with META:
        network = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512))
    network._keep_in_fp32_modules = None  # type: ignore[assignment]
    imitate(network.requires_grad_(False), "unet", "int8", True)
    assert storages([network]) == 2 * (BYTES["int8"](512, 512) + 4 * 512)
    with counting() as meter:
        x = torch.empty(1, 512, device=META, requires_grad=True)
        before = meter.restart()
        out = network(x)
        assert meter.peak - before >= 4 * 512 * 512, "made in full for the pass"
        assert meter.now - before <= 2 * 4 * 512
        out.sum().backward()
        assert x.grad is not None

"""The benchmarks' models are of the published sizes, and their floor makes the passes that a step makes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, offload, throughput
from benchmarks.floor import floor, recorded, take_step, training
from benchmarks.shapes import CLIP_H, SHAPES, build, made, making, random_row
from draftplus.models import compiling
from draftplus.rewards.clip import load_emoji_clip
from tests.tiny import CPU

# of the denoiser and the autoencoder, as the published files have them
PARAMETERS = {
    "sd15": (859_520_964, 83_653_863),
    "sdxl": (2_567_463_684, 83_653_863),
    "sd35m": (2_243_171_520, 83_819_683),
    "flux1": (11_901_408_320, 83_819_683),
}
TEXT = {
    "sd15": ((77, 768), {}),
    "sdxl": ((77, 2048), {"text_embeds": 1280}),
    "sd35m": ((333, 4096), {"pooled_projections": 2048}),
    "flux1": ((512, 4096), {"pooled_projections": 768}),
}


@pytest.mark.parametrize("name", SHAPES)
def test_sizes_are_the_published_ones(name: str) -> None:
    shape = SHAPES[name]
    networks = [made(part, "meta", torch.bfloat16) for part in (shape.denoiser, shape.vae)]
    assert tuple(sum(p.numel() for p in network.parameters()) for network in networks) == PARAMETERS[name]
    assert {p.dtype for network in networks for p in network.parameters()} == {torch.bfloat16}
    row = random_row(shape, "a", CPU, torch.bfloat16)
    assert (row.hidden.shape[1:], {key: value.shape[1] for key, value in row.extras.items()}) == TEXT[name]


def test_the_reward_is_of_pickscores_size() -> None:
    from transformers import CLIPConfig, CLIPModel

    with making("meta", torch.float32):
        model = CLIPModel(CLIPConfig(**CLIP_H))
    assert sum(p.numel() for p in model.parameters()) == 986_109_441


@pytest.mark.parametrize(
    ("name", "dtype"), [("sd15", "bfloat16"), ("sdxl", "float32"), ("sd35m", "bfloat16"), ("flux1", "float32")]
)
def test_the_floor_is_of_the_passes_of_a_step(name: str, dtype: str) -> None:
    shape = gpu.tiny(SHAPES[name])
    config = gpu.settings(shape, 64, 2, steps=3)
    model = build(shape, config.model.lora, CPU, getattr(torch, dtype))
    setup, state = training(config, model, {"pickscore": load_emoji_clip()})
    passes = recorded(setup, state)
    folded = dtype == "float32"
    rows = 2 if shape.pipeline == "FluxPipeline" else 4  # guidance is of two rows for each image
    expected = [("denoiser", False, not folded)] * 2 + [("denoiser", True, True), ("vae", True, True)]
    expected += [("reward", True, True), ("denoiser", False, False)]
    assert [(one.network, one.gradient, one.adapters) for one in passes] == expected
    again = recorded(setup, state)
    assert [_shapes(one.given) for one in passes] == [_shapes(one.given) for one in again]
    assert {shapes[0][0] for one in passes if one.network == "denoiser" for shapes in [_shapes(one.given)]} == {rows}

    before = {key: tensor.clone() for key, tensor in model.tuned.denoiser.state_dict().items()}
    calls = _calls(model, floor(setup, passes))
    assert calls == _calls(model, lambda: take_step(setup, state))
    assert calls == [(False, not folded, dtype)] * 2 + [(True, True, "float32"), (False, False, "float32")]
    in_one = _calls(model, floor(setup, passes, getattr(torch, dtype)))
    assert in_one == [(gradient, adapters, dtype) for gradient, adapters, _ in calls]
    frozen = {key for key in before if "lora_" not in key}
    after = model.tuned.denoiser.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in frozen), "the floor left the model changed"


def _shapes(given: Any) -> list[tuple[int, ...]]:
    from torch.utils._pytree import tree_leaves

    return sorted((tuple(x.shape) for x in tree_leaves(given) if isinstance(x, torch.Tensor)), key=len, reverse=True)


def _calls(model: Any, work: Any) -> list[tuple[bool, bool, str]]:
    """Of the denoiser: with gradient or not, with adapters or not, and its precision."""
    from draftplus.models import lora

    seen: list[tuple[bool, bool, str]] = []
    denoiser, layer = model.tuned.denoiser, lora.layers(model.tuned.denoiser)[0]

    def hook(*_: Any) -> None:
        weight = layer.get_base_layer().weight
        seen.append((torch.is_grad_enabled(), not layer._disable_adapters, str(weight.dtype).removeprefix("torch.")))

    handle = denoiser.register_forward_pre_hook(hook)
    try:
        work()
    finally:
        handle.remove()
    return seen


def test_the_benchmark_runs_and_goes_on_where_memory_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = gpu.row

    def row(model: Any, *rest: Any) -> dict[str, Any]:
        if model.kind.component == "transformer":
            raise torch.OutOfMemoryError
        return whole(model, *rest)

    monkeypatch.setattr(gpu, "row", row)
    command = ["--device", "cpu", "--tiny", "--only", "sd35m", "sdxl-64", "--sizes", "64", "--steps", "2"]
    command += ["--repeats", "1", "--json", str(tmp_path / "gpu.json")]
    gpu.main(gpu.parser().parse_args(command))
    told = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    by = {found["model"]: found for found in told}
    assert by["sdxl"]["ratio"] == pytest.approx(by["sdxl"]["floor"] / by["sdxl"]["step"])
    assert by["sd35m"]["failed"] == "out of memory"
    assert "| SDXL | 64 | 2 |" in capsys.readouterr().out
    assert gpu.main(gpu.parser().parse_args([*command, "--minutes", "0"]))[0]["failed"] == "no time left"


@pytest.mark.slow
def test_what_leaving_the_device_saves() -> None:
    """The code of the benchmark; without a GPU there is nothing to measure."""
    found = offload.main(offload.parser().parse_args("--device cpu --tiny --size 64 --only sdxl".split()))
    assert found["sdxl"]["differences"] == {"offload": 0.0, "again": 0.0}
    assert len(found["sdxl"]["offload"]["rows"]) == 3 and found["sdxl"]["offload"]["step"] == 0


@pytest.mark.slow
def test_images_a_second_plain_and_compiled(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By torch's own kernels in place of compiled ones, which take minutes to make."""
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    options = argparse.Namespace(
        model="sd15", device="cpu", size=64, images=1, steps=2, repeats=1, minutes=8.0, tiny=True
    )  # fmt: skip
    with torch._dynamo.config.patch(recompile_limit=64):
        found = throughput.main(options)
    torch._dynamo.reset()
    assert found.keys() == {"plain", "compiled"}
    for row in found.values():
        assert row["ratio"] == pytest.approx(row["floor"] / row["step"])
    assert found["compiled"]["compiling"] > 1 / found["compiled"]["step"]
    assert "| compiled | " in capsys.readouterr().out
    assert set(throughput.NAMES.values()) == set(SHAPES)

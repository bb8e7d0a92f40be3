"""`draftplus export`: what other programs load is the run's model, and a hub takes the card."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import draftplus
from draftplus.config import Config, LoraConfig
from draftplus.errors import UserError
from draftplus.models import lora
from draftplus.models.lora_files import LORA_FILE
from draftplus.runs.rows import read_held_out
from tests.support.ldm import as_single_file
from tests.support.runs import rows, save_small, small_settings, train_here
from tests.tiny import randomize, stock_pipeline, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
PROMPT, SEEDS = "a cat", [0, 1]


@pytest.fixture(scope="module")
def run(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose adapter is on every layer and shows in a picture; not to be changed."""
    return trained(small, tmp_path_factory.mktemp("lora"), "model.lora={rank: 2, alpha: 4, targets: all}")


@pytest.fixture(scope="module")
def full(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(small, tmp_path_factory.mktemp("full"), "model.lora=null", "optim.lr=0.005", "train.steps=1")


def trained(model: Path, directory: Path, *settings: str) -> Path:
    wanted = ["sampler.guidance_scale=3", "sampler.spacing=trailing", "eval.every=1", "train.steps=2", "optim.lr=0.1"]
    return train_here(small_settings(model, directory), *wanted, *settings)


def ours(target: str | Path) -> Tensor:
    return draftplus.generate(str(target), [PROMPT], SEEDS)


def drawn(pipe: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in SEEDS]
    told = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "pt"}
    return pipe([PROMPT] * len(SEEDS), generator=generators, **told).images


def as_trained(model: Path) -> Any:
    from diffusers import DDIMScheduler

    pipe = stock_pipeline(model, torch.float32)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    return pipe


def from_snippet(directory: Path, monkeypatch: pytest.MonkeyPatch, model: Path | None = None) -> Image.Image:
    """Runs the Python of the card, beside it, and returns its picture. model: the base model, which the card names."""
    code = re.search(r"```python\n(.*?)```", (directory / "README.md").read_text(), re.DOTALL)
    assert code
    told: dict[str, Any] = {}
    if model is not None:
        (directory / model.name).symlink_to(model)
    monkeypatch.chdir(directory)
    exec(code[1], told)
    return told["image"]


def is_shown(picture: Image.Image, directory: Path) -> bool:
    """Whether a picture is the one that the card shows first, of the same prompt and seed."""
    first = ModelCard.load(directory / "README.md").data.widget[0]["output"]["url"]
    assert first.endswith("-0.png")
    with Image.open(directory / first) as shown:
        pairs = zip(picture.tobytes(), shown.tobytes(), strict=True)
        return max(abs(one - other) for one, other in pairs) <= 1


@pytest.mark.parametrize("form", ["diffusers", "kohya", "merged"])
def test_stock_draws_our_picture(
    draftplus: Callable[..., Any], run: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    out = tmp_path / "out"
    printed = draftplus("export", run, "--format", form, "-o", out)
    assert printed.code == 0, printed.err
    assert str(out / "README.md") in printed.out.splitlines()
    base = drawn(as_trained(small))
    if form == "merged":
        pipe = StableDiffusionPipeline.from_pretrained(out)
        assert not list(out.rglob("*.bin")) and pipe.scheduler.config.timestep_spacing == "trailing"
    else:
        pipe = as_trained(small)
        pipe.load_lora_weights(out)
    theirs, mine = drawn(pipe), ours(run)
    assert (theirs - mine).abs().max() < 1e-3
    assert (theirs - base).abs().max() > 1e-2
    assert is_shown(from_snippet(out, monkeypatch, small), out)


def test_a_fully_tuned_model(
    draftplus: Callable[..., Any], refused: Callable[..., None], full: Path, small: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    mine, base = ours(full), drawn(as_trained(small))
    assert (mine - base).abs().max() > 1e-2
    for form in ("diffusers", "merged"):
        assert draftplus("export", full, "--format", form).code == 0
        out = full / "export" / form
        pipe = as_trained(small) if form == "diffusers" else StableDiffusionPipeline.from_pretrained(out)
        if form == "diffusers":
            pipe.unet = UNet2DConditionModel.from_pretrained(out)
        assert (drawn(pipe) - mine).abs().max() < 1e-3
        assert is_shown(from_snippet(out, monkeypatch, small), out)
    refused(["export", full, "--format", "kohya"], "fully fine-tuned denoiser, and the format kohya is for LoRA")


def test_a_step_and_the_best(draftplus: Callable[..., Any], run: Path, tmp_path: Path) -> None:
    assert draftplus("export", f"{run}@1").code == 0
    assert draftplus("export", f"{run}@best", "-o", tmp_path / "best").code == 0
    step = run / "export" / "diffusers-step-000001" / LORA_FILE
    assert step.read_bytes() == (run / "adapters" / "step-000001" / LORA_FILE).read_bytes()
    assert (tmp_path / "best" / LORA_FILE).is_file()
    assert "at step 1." in (step.parent / "README.md").read_text()


def test_the_result_of_a_run_that_went_on(
    draftplus: Callable[..., Any], refused: Callable[..., None], run: Path, tmp_path: Path
) -> None:
    """adapter/ is as old as the end that it was written at; the card tells of that step, and of no later one."""
    copy = shutil.copytree(run, tmp_path / "me@host" / "run")
    shutil.rmtree(copy / "adapter")
    shutil.copytree(copy / "adapters" / "step-000001", copy / "adapter")
    assert draftplus("export", copy, "-o", tmp_path / "out").code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "at step 1." in card
        and (tmp_path / "out" / LORA_FILE).read_bytes() == (copy / "adapters" / "step-000001" / LORA_FILE).read_bytes()
    )
    assert draftplus("export", f"{copy}@2").code == 0
    shutil.rmtree(copy / "adapters" / "step-000001")
    refused(["export", copy], "has the weights of none of the steps in .*adapters; name a step: .*run@STEP")


def test_other_evaluation_prompts_since(draftplus: Callable[..., Any], run: Path, tmp_path: Path) -> None:
    """A picture has the prompt that it was drawn of, and only what was measured on the same images is compared."""
    copy = shutil.copytree(run, tmp_path / "run")
    drawn_of = json.loads((copy / "samples" / "prompts.json").read_text())
    (copy / "samples" / "prompts.json").write_text(json.dumps(["something else"] * len(drawn_of)))
    draftplus("export", copy, "-o", tmp_path / "one")
    widget = ModelCard.load(tmp_path / "one" / "README.md").data.widget
    assert [entry["text"] for entry in widget] == drawn_of
    evaluated = [json.loads(line) for line in (copy / "eval.jsonl").read_text().splitlines()]
    evaluated[0]["lpips_per_prompt"] = {f"{prompt}!": d for prompt, d in evaluated[0]["lpips_per_prompt"].items()}
    (copy / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in evaluated))
    draftplus("export", copy, "-o", tmp_path / "two")
    text = (tmp_path / "two" / "README.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("| reward"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1] == "–" == cells[3] and cells[2] != "–"
    assert not (tmp_path / "two" / "images" / "before.png").exists() and "Base model |" not in text


def test_the_card(draftplus: Callable[..., Any], run: Path, small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    draftplus("export", run, "--format", "kohya", "-o", out)
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "diffusers" and card.data.pipeline_tag == "text-to-image"
    assert "lora" in card.data.tags
    assert card.data.base_model is None and card.data.license is None  # neither is known
    for entry in card.data.widget:
        assert (out / entry["output"]["url"]).is_file() and entry["text"].startswith("a ")
    assert len(list((out / "images").iterdir())) == 2 + len(card.data.widget)
    last = read_held_out(rows(run / "eval.jsonl")[-1])
    first = read_held_out(rows(run / "eval.jsonl")[0])
    (name,) = last.rewards
    line = next(line for line in card.text.splitlines() if line.startswith("| reward"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert name in cells[0]
    for cell, held in zip(cells[1:3], (first, last), strict=True):
        mean, error = map(float, cell.replace("−", "-").split(" ± "))
        assert mean == pytest.approx(held.rewards[name], abs=1e-3)
        groups = held.scores(name)
        assert groups is not None
        spread = sum(torch.tensor(group).double().var().item() / len(group) for group in groups) ** 0.5 / len(groups)
        assert error == pytest.approx(spread, rel=0.15, abs=1e-3)
    assert "±" in cells[3] and cells[3][0] in "+−"
    assert f"{last.lpips:.2f}"[:3] in next(line for line in card.text.splitlines() if "LPIPS" in line)
    assert "sampler.spacing=trailing" in card.text and str(small.parent) not in card.content
    assert "models/loras" in card.text and "<lora:run:1>" in card.text and (out / "run.safetensors").is_file()


def test_base_model_and_licence_are_those_that_are_known(
    draftplus: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_small(tmp_path / "model")
    (model / "README.md").write_text("---\nlicense: other\nlicense_name: mine\ntags: [x]\n---\ntext\n")
    run = trained(model, tmp_path, "train.steps=1")
    (model / "README.md").rename(tmp_path / "kept")
    (model / "README.md").write_text("---\nlicense: [\n---\n")  # not YAML
    assert draftplus("export", run).code == 0
    (tmp_path / "kept").rename(model / "README.md")
    draftplus("export", run)
    data = ModelCard.load(run / "export" / "diffusers" / "README.md").data
    assert data.license == "other" and data.license_name == "mine" and "x" not in data.tags
    from draftplus.config import load_config
    from draftplus.publish import card

    given = load_config(None, ["model.path=someone/some-model"])
    monkeypatch.setattr(card, "hf_hub_download", lambda *_, **__: str(model / "README.md"))
    assert card._base(given) == {"base_model": "someone/some-model", "license": "other", "license_name": "mine"}
    (model / "README.md").write_text("---\nlicense: other\nlicense_link: LICENSE.md\n---\n")
    assert card._base(given)["license_link"] == "https://huggingface.co/someone/some-model/blob/main/LICENSE.md"
    monkeypatch.setattr(card, "hf_hub_download", lambda *_, **__: 1 / 0)
    assert card._base(given) == {"base_model": "someone/some-model"}
    assert card._base(load_config(None, [])) == {"license": "apache-2.0"}


def test_merged_weights_keep_the_base_models_precision(
    draftplus: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And are rounded once, after the sum."""
    model, dtype = save_small(tmp_path / "model"), torch.bfloat16
    StableDiffusionPipeline.from_pretrained(model, torch_dtype=dtype).save_pretrained(model)
    run = trained(model, tmp_path, "train.steps=1")
    draftplus("export", run, "--format", "merged", "-o", tmp_path / "out")
    made = {
        part: load_file(tmp_path / "out" / part / file)
        for part, file in (("unet", "diffusion_pytorch_model.safetensors"), ("text_encoder", "model.safetensors"))
    }
    assert {tensor.dtype for state in made.values() for tensor in state.values()} == {dtype}
    adapter = load_file(run / "adapter" / LORA_FILE)
    base = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    name = next(key for key in adapter if "lora_A" in key)
    layer = name.removeprefix("unet.").partition(".lora_A")[0]
    delta = adapter[name.replace("lora_A", "lora_B")] @ adapter[name]
    assert torch.equal(made["unet"][f"{layer}.weight"], (base[f"{layer}.weight"].float() + delta).to(dtype))
    assert f"rounded to {str(dtype).removeprefix('torch.')}" in (tmp_path / "out" / "README.md").read_text()
    assert from_snippet(tmp_path / "out", monkeypatch).size == (32, 32)


def test_a_single_file_is_merged_too(tiny_path: Path, tmp_path: Path, run: Path) -> None:
    from draftplus.config import load_config
    from draftplus.publish import write

    save_file(as_single_file(tiny_path), tmp_path / "model.safetensors")
    made = tiny_model(tiny_path, torch.float32)
    randomize(made, size=0.3)
    made.tuned.save(tmp_path / "adapter")
    config = load_config(None, [f"model.path={tmp_path / 'model.safetensors'}", f"model.config={tiny_path}"])
    what = write.Export(write.read_run(run), config, tmp_path / "adapter", 1, "x")
    assert write._merged(what, tmp_path / "out") == {"dtype": "float32"}
    tuned = stock_pipeline(tiny_path, torch.float32)
    base = drawn(tuned)
    tuned.load_lora_weights(tmp_path / "adapter")
    assert (drawn(StableDiffusionPipeline.from_pretrained(tmp_path / "out")) - drawn(tuned)).abs().max() < 1e-3
    assert (drawn(tuned) - base).abs().max() > 1e-2


def test_what_stands_there_is_kept(refused: Callable[..., None], draftplus: Callable[..., Any], run: Path,
                                   tmp_path: Path) -> None:  # fmt: skip
    out = tmp_path / "out"
    (tmp_path / "file").write_text("mine")
    refused(["export", run, "-o", tmp_path / "file"], "is not a directory")
    refused(["export", run, "-o", tmp_path / "x.safetensors"], "writes a directory")
    out.mkdir()
    assert draftplus("export", run, "-o", out).code == 0  # an empty one
    assert draftplus("export", run, "--format", "kohya", "-o", out).code == 0  # its own
    assert not (out / LORA_FILE).exists() and (out / "run.safetensors").exists()
    (out / ".git").mkdir()
    refused(["export", run, "-o", out], r"something that export did not write \('\.git', for one\)")
    (out / ".git").rmdir()
    (out / "another.safetensors").write_text("mine")
    refused(["export", run, "-o", out], r"\('another\.safetensors', for one\); name another output")
    (out / "another.safetensors").unlink()
    (out / "README.md").write_text("# mine\n")
    refused(["export", run, "-o", out], r"export did not write \('README\.md', for one\); name another output")
    assert (out / "run.safetensors").exists() and (out / "README.md").read_text() == "# mine\n"


def test_nothing_is_left_of_an_export_that_failed(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("draftplus.publish.write.write_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        draftplus.export(str(run), output=tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_mistakes(refused: Callable[..., None], run: Path, small: Path, tmp_path: Path) -> None:
    refused(["export", small], "is not a run directory; export takes RUN, RUN@step or RUN@best")
    refused(["export", run, "--format", "onnx"], "format 'onnx': choose one of diffusers, kohya, merged")
    refused(["export", f"{run}@7"], "no adapter of step 7")


def key_map() -> dict[str, str]:
    """Where a kohya LoRA of Stable Diffusion 1.x finds its layers: their names in the original layout.

    Written from the structure of that UNet, as ComfyUI and AUTOMATIC1111 use it: four resolutions of two residual
    blocks down and three up, with attention at the first three.
    """
    found = {}

    def residual(ours: str, theirs: str, shortcut: bool) -> None:
        parts = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1"}
        parts |= {"conv_shortcut": "skip_connection"} if shortcut else {}
        for mine, original in parts.items():
            found[f"lora_unet_{ours}_{mine}"] = f"{theirs}.{original}"

    def transformer(ours: str, theirs: str) -> None:
        inner = [f"attn{n}.{part}" for n in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")]
        inner = [f"transformer_blocks.0.{part}" for part in [*inner, "ff.net.0.proj", "ff.net.2"]]
        for part in ["proj_in", "proj_out", *inner]:
            found[f"lora_unet_{ours}_{part.replace('.', '_')}"] = f"{theirs}.{part}"

    for block in range(4):
        for i in range(2):
            number = 1 + 3 * block + i
            residual(f"down_blocks_{block}_resnets_{i}", f"input_blocks.{number}.0", i == 0 and block in (1, 2))
            if block < 3:
                transformer(f"down_blocks_{block}_attentions_{i}", f"input_blocks.{number}.1")
        if block < 3:
            found[f"lora_unet_down_blocks_{block}_downsamplers_0_conv"] = f"input_blocks.{3 * block + 3}.0.op"
        for i in range(3):
            number = 3 * block + i
            residual(f"up_blocks_{block}_resnets_{i}", f"output_blocks.{number}.0", True)
            if block > 0:
                transformer(f"up_blocks_{block}_attentions_{i}", f"output_blocks.{number}.1")
        if block < 3:
            last = 1 if block == 0 else 2
            found[f"lora_unet_up_blocks_{block}_upsamplers_0_conv"] = f"output_blocks.{3 * block + 2}.{last}.conv"
    for i in range(2):
        residual(f"mid_block_resnets_{i}", f"middle_block.{2 * i}", False)
        found[f"lora_unet_time_embedding_linear_{i + 1}"] = f"time_embed.{2 * i}"
    transformer("mid_block_attentions_0", "middle_block.1")
    return found | {"lora_unet_conv_in": "input_blocks.0.0", "lora_unet_conv_out": "out.2"}


def test_the_key_map_is_right() -> None:
    """Its original names are those that diffusers itself reads a file in the original layout by."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    names = key_map()
    state = {f"model.diffusion_model.{theirs}.weight": torch.tensor(i) for i, theirs in enumerate(names.values())}
    config = {
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3, "layers_per_block": 2,
        "class_embed_type": None, "addition_embed_type": None, "block_out_channels": [320, 640, 1280, 1280],
    }  # fmt: skip
    padding = {"out.0": "", "input_blocks.0.0": ""}
    state |= {f"model.diffusion_model.{k}.{end}": torch.tensor(-1) for k in (*padding, *names.values()) for end in
              ("bias", "weight") if f"model.diffusion_model.{k}.{end}" not in state}  # fmt: skip
    for theirs in [n for n in names.values() if n.endswith("in_layers.2")]:
        for norm in ("in_layers.0", "out_layers.0"):
            for end in ("weight", "bias"):
                state[f"model.diffusion_model.{theirs.removesuffix('in_layers.2')}{norm}.{end}"] = torch.tensor(-1)
    converted = convert_ldm_unet_checkpoint(state, config)
    for i, ours in enumerate(names):
        found = next(key for key, value in converted.items() if int(value) == i)
        assert f"lora_unet_{found.removesuffix('.weight').replace('.', '_')}" == ours


@pytest.mark.parametrize(("targets", "groups"), [("attention", 128), ("all", 282)])
def test_the_keys_are_those_that_other_programs_know(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch, targets: str, groups: int
) -> None:
    """An adapter of Stable Diffusion 1.5's own shape, exported as kohya: every key, and no other."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8
        )
    attention = ("to_q", "to_k", "to_v", "to_out.0")
    with torch.device("meta"):
        lora.add_lora(unet, LoraConfig(rank=1, targets=targets), 0, attention)
    parameters = {name.replace(".default", ""): p.shape for name, p in lora.trained(unet).items()}
    state = {f"unet.{name}": torch.zeros(shape) for name, shape in parameters.items()}
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(state, adapter / LORA_FILE)
    from draftplus.publish import write

    what = write.Export(write.read_run(run), Config(), adapter, 1, "sd")
    write._kohya(what, tmp_path)
    with safe_open(tmp_path / "sd.safetensors", framework="pt") as opened:
        names, header = list(opened.keys()), opened.metadata()
    known = key_map()
    wanted = {name for name in known if targets == "all" or re.search(r"attn\d_to_", name)}
    assert len(wanted) == groups and len(set(known.values())) == 282
    assert set(names) == {
        f"{name}.{part}" for name in wanted for part in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    assert header["ss_v2"] == "False"
    back, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(load_file(tmp_path / "sd.safetensors"))
    assert len(alphas) == groups and len(back) == 2 * groups


def test_the_second_version_is_told(tmp_path: Path, run: Path) -> None:
    from draftplus.publish import write

    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    save_file({f"{layer}.lora_A.weight": torch.zeros(4, 1024), f"{layer}.lora_B.weight": torch.zeros(8, 4)},
              tmp_path / LORA_FILE)  # fmt: skip
    write._kohya(write.Export(write.read_run(run), Config(), tmp_path, 1, "sd"), tmp_path)
    with safe_open(tmp_path / "sd.safetensors", framework="pt") as opened:
        header = opened.metadata()
    assert header["ss_v2"] == "True" and header["ss_network_dim"] == "4"


def test_a_layer_without_a_name_is_not_lost(tmp_path: Path, run: Path) -> None:
    """The embedded model adds the text to the time embedding, and no LoRA of Stable Diffusion has a name for that."""
    from draftplus.publish import write

    layer = "unet.add_embedding.text_proj"
    save_file({f"{layer}.lora_A.weight": torch.zeros(4, 8), f"{layer}.lora_B.weight": torch.zeros(8, 4)},
              tmp_path / LORA_FILE)  # fmt: skip
    with pytest.raises(
        UserError, match=r"'unet\.add_embedding\.text_proj' has no name in the format kohya; use diffusers or merged"
    ):
        write._kohya(write.Export(write.read_run(run), Config(), tmp_path, 1, "sd"), tmp_path)


def test_linspace_is_told(small: Path) -> None:
    """Where stock diffusers' DDIM goes to other levels than ours."""
    from draftplus.config import load_config
    from draftplus.models.scheduler_file import differs_from_stock, scheduler_config
    from draftplus.publish.usage import snippet

    def of(*settings: str) -> bool:
        config = load_config(None, [f"model.path={small}", *settings])
        return differs_from_stock(scheduler_config(config.model), config.sampler)

    assert of("sampler.spacing=linspace") and not of() and not of("sampler.spacing=linspace", "sampler.solver=euler")
    config = load_config(None, [f"model.path={small}", "sampler.solver=dpmpp_2m", "sampler.eta=0.5"])
    text = snippet(config, "diffusers", True, LORA_FILE, None, 'a "cat"')
    assert f'base = "{small.name}"' in text and str(small.parent) not in text
    assert "DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, steps_offset=1)" in text
    assert "eta=0.5" in text and r'"a \"cat\""' in text


def test_the_lines_for_stock_name_what_stock_has(small: Path, tmp_path: Path) -> None:
    """The only variant, which stock has to be told of, and no configuration that is in this package alone."""
    from draftplus.config import load_config
    from draftplus.publish.usage import snippet

    def of(path: str, *settings: str) -> str:
        return snippet(load_config(None, [f"model.path={path}", *settings]), "diffusers", True, LORA_FILE, None, "x")

    copy = shutil.copytree(small, tmp_path / "copy")
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert 'from_pretrained(base, variant="fp16")' in of(str(copy)) and "from_pretrained(base)" in of(str(small))
    assert "from_single_file(base)" in of("models/v2.safetensors", "model.config=sd2-base")
    assert 'from_single_file(base, config="copy")' in of("models/v2.safetensors", f"model.config={copy}")
    assert 'base = "someone/model"' in of("someone/model")


def test_the_function_is_the_command(run: Path, tmp_path: Path) -> None:
    assert draftplus.export(str(run), "kohya", tmp_path / "out") == tmp_path / "out"
    with pytest.raises(UserError, match="choose one of"):
        draftplus.export(str(run), "safetensors")

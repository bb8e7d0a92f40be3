"""LoRA files of every kind that stock diffusers loads: the picture is stock's, or one line says why not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from draftplus.config import SamplerConfig
from draftplus.errors import UserError
from draftplus.evaluation.generate import Job, Knobs, generate_images
from draftplus.models.lora_files import LORA_FILE, lora_file
from draftplus.models.stable_diffusion import StableDiffusion
from tests.tiny import PROMPTS, stock_pipeline, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::RuntimeWarning")
SAMPLER = SamplerConfig(steps=3, guidance_scale=4.0, negative_prompt="")
SEEDS = [1, 2, 3]

State = dict[str, Tensor]
Ranks = Callable[[str], int]


@pytest.fixture(scope="module")
def pipe(tiny_path: Path) -> Any:
    return stock_pipeline(tiny_path, torch.float32)


@pytest.fixture(scope="module")
def made(tiny_path: Path) -> StableDiffusion:
    return tiny_model(tiny_path, torch.float32, trainable=False)


@pytest.fixture(scope="module")
def untuned(pipe: Any) -> Tensor:
    return stock(pipe)


@torch.no_grad()
def stock(pipe: Any) -> Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    return pipe(PROMPTS, num_inference_steps=3, guidance_scale=4.0, generator=generators, output_type="pt").images


def ours(made: StableDiffusion, scale: float = 1.0, anneal: str | None = None) -> Tensor:
    jobs = [Job(prompt, seed) for prompt, seed in zip(PROMPTS, SEEDS, strict=True)]
    return generate_images(made, jobs, SAMPLER, knobs=Knobs(scale, anneal))


def stocks(pipe: Any, path: Path, scale: float = 1.0) -> Tensor:
    """The stock pipeline's picture with a file or a directory."""
    pipe.load_lora_weights(path, adapter_name="a")
    try:
        pipe.set_adapters("a", scale)
        return stock(pipe)
    finally:
        pipe.unload_lora_weights()


def attention(name: str) -> bool:
    return name.endswith(("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj"))


def layers_of(network: nn.Module, wanted: Callable[[str], bool]) -> dict[str, nn.Module]:
    kinds = (nn.Linear, nn.Conv2d)
    return {name: module for name, module in network.named_modules() if isinstance(module, kinds) and wanted(name)}


def adapters(network: nn.Module, wanted: Callable[[str], bool] = attention, rank: Ranks = lambda _: 2) -> State:
    """Random A and B by layer, in peft's spelling, large enough that a picture shows them."""
    generator, state = torch.Generator().manual_seed(5), {}
    for name, module in layers_of(network, wanted).items():
        out, into = module.weight.shape[0], module.weight.shape[1:]
        r, thin = rank(name), (1, 1) if isinstance(module, nn.Conv2d) else ()
        state[f"{name}.lora_A.weight"] = torch.randn(r, *into, generator=generator) * 0.5
        state[f"{name}.lora_B.weight"] = torch.randn(out, r, *thin, generator=generator) * 0.5
    return state


def respelled(state: State, prefix: str, *changes: tuple[str, str]) -> State:
    """The tensors after a prefix, each of the changes made to their names."""
    found = {}
    for name, tensor in state.items():
        for old, new in changes:
            name = name.replace(old, new)
        found[prefix + name] = tensor
    return found


def peft(pipe: Any, *halves: str, **how: Any) -> State:
    state: State = {}
    for half in halves or ("unet",):
        state |= respelled(adapters(getattr(pipe, half), **how), f"{half}.")
    return state


def kohya(pipe: Any, alpha: Callable[[str], float | None], *halves: str, **how: Any) -> State:
    state: State = {}
    for half in halves or ("unet",):
        prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}[half]
        for name, tensor in adapters(getattr(pipe, half), **how).items():
            layer, _, part = name.partition(".lora_")
            key = prefix + layer.replace(".", "_")
            state[f"{key}.lora_{'down' if part[0] == 'A' else 'up'}.weight"] = tensor
            told = alpha(layer)
            if told is not None:
                state[f"{key}.alpha"] = torch.tensor(told)
    return state


PROCESSOR = [
    (f".{layer}.lora_{part}.", f".processor.{layer.removesuffix('.0')}_lora.{direction}.")
    for layer in ("to_q", "to_k", "to_v", "to_out.0")
    for part, direction in (("A", "down"), ("B", "up"))
]
OLD_TEXT = [
    (f".{layer}_proj.lora_{part}.", f".to_{layer}_lora.{direction}.")
    for layer in "qkv"
    for part, direction in (("A", "down"), ("B", "up"))
] + [(".out_proj.lora_A.", ".to_out_lora.down."), (".out_proj.lora_B.", ".to_out_lora.up.")]
DOWN_UP = [(".lora_A.", ".lora.down."), (".lora_B.", ".lora.up.")]
LINEAR_LAYER = [(".lora_A.", ".lora_linear_layer.down."), (".lora_B.", ".lora_linear_layer.up.")]


def everything(_: str) -> bool:
    return True


def by_length(name: str) -> int:
    return 1 + len(name) % 3


def header(**told: Any) -> dict[str, Any]:
    return {"r": 2, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"], **told}


def both(**told: Any) -> dict[str, Any]:
    text = {**header(**told), "target_modules": ["q_proj", "k_proj", "v_proj", "out_proj"]}
    return {f"unet.{k}": v for k, v in header(**told).items()} | {f"text_encoder.{k}": v for k, v in text.items()}


def unet(**told: Any) -> dict[str, Any]:
    return {f"unet.{key}": value for key, value in header(**told).items()}


HALVES = ("unet", "text_encoder")
# name of a kind -> (tensors of a pipeline, metadata of the header)
KINDS: dict[str, tuple[Callable[[Any], State], dict[str, Any] | None]] = {
    "peft": (peft, None),
    "peft, every layer, ranks that differ": (lambda p: peft(p, wanted=everything, rank=by_length), None),
    "peft, both halves": (lambda p: peft(p, *HALVES), None),
    "peft, text encoder alone": (lambda p: peft(p, "text_encoder"), None),
    "header: alpha half the rank": (peft, unet(lora_alpha=1)),
    "header: alpha, both halves": (lambda p: peft(p, *HALVES), both(lora_alpha=1)),
    "header: rslora": (peft, unet(lora_alpha=2, use_rslora=True)),
    "header: patterns of alpha and rank": (
        lambda p: peft(p, rank=lambda name: 3 if "attn2" in name else 2),
        unet(
            lora_alpha=1, rank_pattern={f".*attn2.{end}": 3 for end in ("to_q", "to_k", "to_v", "to_out.0")},
            alpha_pattern={".*attn2.to_v": 6},
        ),
    ),
    "diffusers: lora.down": (lambda p: respelled(adapters(p.unet), "unet.", *DOWN_UP), None),
    "diffusers: lora.down and lora_linear_layer": (
        lambda p: respelled(adapters(p.unet), "unet.", *DOWN_UP)
        | respelled(adapters(p.text_encoder), "text_encoder.text_model.", *LINEAR_LAYER),
        None,
    ),
    "diffusers: processors": (lambda p: respelled(adapters(p.unet), "unet.", *PROCESSOR), None),
    "diffusers: processors, both halves": (
        lambda p: respelled(adapters(p.unet), "unet.", *PROCESSOR)
        | respelled(adapters(p.text_encoder), "text_encoder.text_model.", *OLD_TEXT),
        None,
    ),
    "kohya": (lambda p: kohya(p, lambda _: 1.0), None),
    "kohya without alpha": (lambda p: kohya(p, lambda _: None), None),
    "kohya, every layer": (lambda p: kohya(p, lambda _: 1.0, wanted=everything), None),
    "kohya, convolutions with an alpha of their own": (
        lambda p: kohya(p, lambda name: 0.5 if "conv" in name else 1.0, wanted=everything), None,
    ),
    "kohya, both halves": (lambda p: kohya(p, lambda _: 1.0, *HALVES), None),
    "kohya, both halves, every layer": (
        lambda p: kohya(p, lambda name: 3.0 if "encoder" in name else 1.0, *HALVES, wanted=everything), None,
    ),
}  # fmt: skip


def written(kind: str, pipe: Any, file: Path) -> Path:
    make, metadata = KINDS[kind]
    return write(make(pipe), file, metadata)


def write(state: State, file: Path, metadata: dict[str, Any] | None = None) -> Path:
    told = {LORA_ADAPTER_METADATA_KEY: json.dumps(metadata)} if metadata else {}
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, file, {"format": "pt", **told})
    else:
        torch.save(state, file)
    return file


@pytest.mark.parametrize("kind", KINDS)
def test_the_picture_is_that_of_stock(
    pipe: Any, made: StableDiffusion, untuned: Tensor, tmp_path: Path, kind: str
) -> None:
    file = written(kind, pipe, tmp_path / LORA_FILE)
    theirs = stocks(pipe, tmp_path)
    made.tuned.load(tmp_path)
    assert (ours(made) - theirs).abs().max() < 1e-3
    assert (theirs - untuned).abs().max() > 1e-2
    made.tuned.load(file)  # in place of itself
    assert (ours(made) - theirs).abs().max() < 1e-3
    assert (ours(made, 0.0) - untuned).abs().max() < 1e-4
    if KINDS[kind][1] is not None:  # what the header says is not small
        save_file(load_file(file), file)
        assert (stocks(pipe, file) - theirs).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["header: alpha half the rank", "kohya, both halves", "peft, text encoder alone"])
def test_the_scale_is_that_of_stock(
    pipe: Any, made: StableDiffusion, untuned: Tensor, tmp_path: Path, kind: str
) -> None:
    file = written(kind, pipe, tmp_path / LORA_FILE)
    theirs, whole = stocks(pipe, file, 0.3), stocks(pipe, file)
    made.tuned.load(file)
    assert (ours(made, 0.3) - theirs).abs().max() < 1e-3
    assert (theirs - untuned).abs().max() > 1e-2 and (theirs - whole).abs().max() > 1e-2
    assert (ours(made) - whole).abs().max() < 1e-3  # the scale is taken back, and no embedding of it is kept


def test_annealing_starts_from_the_base_models_text_encoder(
    pipe: Any, made: StableDiffusion, untuned: Tensor, tmp_path: Path
) -> None:
    """Steps of share 0 alone are the base model's, though another share follows."""
    made.tuned.load(written("kohya, both halves", pipe, tmp_path / LORA_FILE))
    tuned = ours(made)
    assert torch.equal(ours(made, anneal="step:1"), ours(made, anneal="base"))
    seen = []
    encode, made.encode = made.encode, lambda prompts: seen.append(made.tuned.encoders_state()) or encode(prompts)  # type: ignore[method-assign, func-returns-value, assignment]
    try:
        late = ours(made, anneal="step:0.9")  # of 3 steps none is that late
        half = ours(made, anneal="step:0.6")
    finally:
        made.encode = encode
    assert (late - untuned).abs().max() < 1e-4
    assert {on for _, _, on in seen} == {True, False}  # type: ignore[misc]
    assert (half - tuned).abs().max() > 1e-3 and (half - untuned).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("style.safetensors", "header: alpha half the rank"),
        ("pytorch_lora_weights.bin", "diffusers: processors, both halves"),
        ("old.bin", "kohya, both halves"),
        ("old.pt", "kohya, both halves"),
    ],
)
def test_any_file_name(pipe: Any, made: StableDiffusion, untuned: Tensor, tmp_path: Path, name: str, kind: str) -> None:
    file = written(kind, pipe, tmp_path / name)
    theirs = stocks(pipe, file)
    assert (theirs - untuned).abs().max() > 1e-2
    made.tuned.load(file if file.suffix == ".pt" else tmp_path)
    assert (ours(made) - theirs).abs().max() < 1e-3


def test_what_was_read_is_written_whole(pipe: Any, made: StableDiffusion, tmp_path: Path) -> None:
    made.tuned.load(written("kohya, both halves, every layer", pipe, tmp_path / "k.safetensors"))
    made.tuned.save(tmp_path / "again")
    expected = ours(made)
    assert (stocks(pipe, tmp_path / "again") - expected).abs().max() < 1e-3
    made.tuned.load(tmp_path / "again")
    assert (ours(made) - expected).abs().max() < 1e-5


def test_an_adapter_of_the_denoiser_alone_leaves_the_text(pipe: Any, made: StableDiffusion, tmp_path: Path) -> None:
    """Also where the one before it did not."""
    before = made.encode(PROMPTS).hidden if not made.tuned.has_adapters() else None
    made.tuned.load(written("peft, both halves", pipe, tmp_path / "a.safetensors"))
    adapted = made.encode(PROMPTS).hidden
    made.tuned.load(written("peft", pipe, tmp_path / "b.safetensors"))
    plain = made.encode(PROMPTS).hidden
    assert not torch.equal(plain, adapted)
    assert before is None or torch.equal(plain, before)


REFUSED: dict[str, tuple[Callable[[Any], State], dict[str, Any] | None, str]] = {
    "DoRA, kohya": (
        lambda p: kohya(p, lambda _: 1.0) | {"lora_unet_x.dora_scale": torch.ones(1)}, None, "is a DoRA adapter"
    ),
    "DoRA, peft": (
        lambda p: peft(p) | {"unet.mid_block.x.lora_magnitude_vector": torch.ones(8)}, None, "is a DoRA adapter"
    ),
    "DoRA, header": (peft, unet(lora_alpha=1, use_dora=True), "use_dora=True"),
    "PiSSA, header": (peft, unet(lora_alpha=1, init_lora_weights="pissa"), "init_lora_weights='pissa'"),
    "LoHa": (lambda _: {"lora_unet_x.hada_w1_a": torch.ones(2, 2)}, None, "is a LoHa adapter"),
    "LoKr": (lambda _: {"unet.x.lokr_w1": torch.ones(2, 2)}, None, "is a LoKr adapter"),
    "bias": (
        lambda p: peft(p) | {next(iter(peft(p))).replace("A.weight", "B.bias"): torch.ones(8)}, None, r"lora_B\.bias"
    ),
    "tucker": (
        lambda p: kohya(p, lambda _: 1.0) | {"lora_unet_x.lora_mid.weight": torch.ones(1)}, None, "lora_mid"
    ),
    "two encoders": (
        lambda p: peft(p) | {"text_encoder_2.x.lora_A.weight": torch.ones(2, 8)}, None, r"text_encoder_2\.x"
    ),
    "no prefix": (lambda p: adapters(p.unet), None, r"would start with 'unet\.'"),
    "alphas that stock ignores": (
        lambda p: kohya(p, lambda name: 1.0 if "attn1" in name else 2.0), None, "stock diffusers ignores"
    ),
    "a text layer that is not there": (
        lambda p: peft(p) | respelled(
            {"encoder.layers.9.self_attn.q_proj.lora_A.weight": torch.ones(2, 8),
             "encoder.layers.9.self_attn.q_proj.lora_B.weight": torch.ones(8, 2)}, "text_encoder."),
        None, "does not fit",
    ),
    "header of another network": (lambda p: peft(p), {"transformer.r": 2}, "does not fit"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_more_or_less_is_refused_by_name(pipe: Any, made: StableDiffusion, tmp_path: Path, kind: str) -> None:
    make, metadata, says = REFUSED[kind]
    write(make(pipe), tmp_path / "some.safetensors", metadata)
    with pytest.raises(UserError, match=says) as error:
        made.tuned.load(tmp_path / "some.safetensors")
    assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)


def test_stock_ignores_those_alphas(pipe: Any, tmp_path: Path) -> None:
    """The reason of a refusal above: two files of different alphas, the same picture."""
    pictures = []
    for number, alpha in enumerate((2.0, 4.0)):
        state = kohya(pipe, lambda name, a=alpha: a if "attn1.to_q" in name else 1.0)  # type: ignore[misc]
        pictures.append(stocks(pipe, write(state, tmp_path / f"{number}.safetensors")))
    assert torch.equal(*pictures)


def test_a_scale_that_is_no_tensor_is_not_dropped(pipe: Any, made: StableDiffusion, tmp_path: Path) -> None:
    state: dict[str, Any] = kohya(pipe, lambda _: 1.0)
    name = next(key for key in state if key.endswith("alpha"))
    torch.save({**state, name: 1.0}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="is a float where a tensor is expected"):
        made.tuned.load(tmp_path / "a.pt")


def test_a_pickle_that_would_run_code_is_refused(made: StableDiffusion, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"unet.x.lora_A.weight": Evil()}, tmp_path / "pytorch_lora_weights.bin")
    with pytest.raises(UserError, match="would run code"):
        made.tuned.load(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_several_files_are_a_question(pipe: Any, tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors", "optimizer.safetensors"):
        write(peft(pipe), tmp_path / name)
    with pytest.raises(UserError, match=r"several adapters: a\.safetensors, b\.safetensors; give one file"):
        lora_file(tmp_path)
    (tmp_path / "b.safetensors").unlink()
    assert lora_file(tmp_path) == tmp_path / "a.safetensors"


def test_a_model_is_no_adapter(tiny_path: Path) -> None:
    assert lora_file(tiny_path) is None and lora_file(tiny_path / "unet") is None
    assert lora_file(tiny_path / "unet" / "diffusion_pytorch_model.safetensors") is None


def test_stock_saves_what_is_read(pipe: Any, made: StableDiffusion, tmp_path: Path) -> None:
    """The header as `save_lora_weights` writes it, from peft's own configuration."""
    from peft import LoraConfig

    told = LoraConfig(r=2, lora_alpha=1, target_modules=["to_q", "to_k", "to_v", "to_out.0"]).to_dict()
    layers = {name: tensor.contiguous() for name, tensor in adapters(pipe.unet).items()}
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata=told)
    assert (stocks(pipe, tmp_path) - (made.tuned.load(tmp_path) or ours(made))).abs().max() < 1e-3  # type: ignore[func-returns-value]

"""Rewards of CLIP's shape against the procedure of PickScore's model card, written here with transformers' classes."""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPConfig, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from draftplus.errors import UserError
from draftplus.rewards.clip import (
    EMOJI_CLIP,
    load_clip_reward,
    load_clip_score,
    load_emoji_clip,
    load_pickscore,
)

PROMPTS = ["a cat", "a dog on a blue background", "a very long caption of a zebra " * 9, "a cat"]


def save_random(directory: Path, size: int, width: int, patch: int) -> str:
    """Saves a randomly initialised checkpoint of PickScore's classes and scale, in float16, with its processor."""
    tokenizer = AutoTokenizer.from_pretrained(EMOJI_CLIP)
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4}
    config = CLIPConfig(
        text_config={
            **layers,
            "hidden_size": 32,
            "intermediate_size": 48,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 16,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            **layers,
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "image_size": size,
            "patch_size": patch,
        },
        projection_dim=width,
        logit_scale_init_value=4.6,  # scores are about 100 cosines
    )
    torch.manual_seed(0)
    CLIPModel(config).half().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=size).save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A tiny checkpoint for images of 32 pixels."""
    return save_random(tmp_path_factory.mktemp("clip"), size=32, width=32, patch=8)


@pytest.fixture(scope="module")
def wide_checkpoint(tmp_path_factory) -> str:
    """One that is wide enough to average the rounding of single pixels out, as real ones do."""
    return save_random(tmp_path_factory.mktemp("wide"), size=224, width=384, patch=16)


@pytest.fixture
def copied(checkpoint, tmp_path) -> Path:
    """A copy of the checkpoint to spoil."""
    return shutil.copytree(checkpoint, tmp_path / "copy")


def pictures(size: int, count: int = 4) -> torch.Tensor:
    coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    smooth = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1)
    return (smooth * 255).round() / 255


def model_card(path: str, images: torch.Tensor, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """(exp(logit_scale)·cos, cos) by the reference processor and model, each (b,)."""
    model = CLIPModel.from_pretrained(path, dtype=torch.float32).eval()
    arrays = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    pils = [Image.fromarray(np.ascontiguousarray(array)) for array in arrays]
    pixels = CLIPImageProcessorPil.from_pretrained(path)(images=pils, return_tensors="pt")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokens = tokenizer(prompts, padding=True, truncation=True, max_length=16, return_tensors="pt")
    with torch.no_grad():
        image = model.get_image_features(**pixels).pooler_output
        text = model.get_text_features(**tokens).pooler_output
        image = image / torch.norm(image, dim=-1, keepdim=True)
        text = text / torch.norm(text, dim=-1, keepdim=True)
        cosine = torch.diag(text @ image.T)
        return model.logit_scale.exp() * cosine, cosine


def assert_scores_of_the_model_card(path: str, images: torch.Tensor, tolerance: float):
    logit, cosine = model_card(path, images, PROMPTS)
    assert logit.std() > 30 * tolerance
    for scores, expected in (
        (load_pickscore(path)(images, PROMPTS), logit),
        (load_clip_score(path)(images, PROMPTS), 100 * cosine.clamp(min=0)),
    ):
        torch.testing.assert_close(scores, expected, atol=tolerance, rtol=0)


def test_scores_of_the_model_card_where_nothing_is_resized(checkpoint):
    assert_scores_of_the_model_card(checkpoint, pictures(32), 1e-5)


@pytest.mark.parametrize("size", [512, 300, 168])
def test_scores_of_the_model_card_where_pil_resizes(wide_checkpoint, size):
    assert_scores_of_the_model_card(wide_checkpoint, pictures(size), 1e-2)


def test_each_image_is_scored_against_its_own_prompt(checkpoint):
    reward = load_clip_reward(checkpoint)
    images = pictures(32, 2)
    both = reward(images, ["a cat", "a dog"])
    swapped = reward(images.flip(0), ["a dog", "a cat"])
    torch.testing.assert_close(both, swapped.flip(0))
    assert not torch.allclose(both, reward(images, ["a dog", "a cat"]))
    with pytest.raises(ValueError, match="2 images but 1 prompts"):
        reward(images, ["a cat"])


def test_gradient_equals_finite_differences_and_weights_stay_frozen(checkpoint):
    reward = load_clip_reward(checkpoint, dtype=torch.float64)
    images = (0.2 + 0.6 * pictures(40, 1)).double().requires_grad_()
    scores = reward(images, ["a cat"])
    assert scores.dtype == torch.float64
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    direction = torch.randn(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        up, down = (reward(images + h * direction, ["a cat"]) for h in (1e-5, -1e-5))
    slope = (up - down).item() / 2e-5
    assert slope == pytest.approx((gradient * direction).sum().item(), rel=1e-5) and abs(slope) > 1e-3
    assert not any(parameter.requires_grad for parameter in reward.model.parameters())


def test_weights_are_float32_whatever_they_are_stored_in(checkpoint):
    assert {tensor.dtype for tensor in load_file(f"{checkpoint}/model.safetensors").values()} == {torch.float16}
    assert {parameter.dtype for parameter in load_clip_reward(checkpoint).model.parameters()} == {torch.float32}
    low = load_clip_reward(checkpoint, dtype=torch.bfloat16)
    assert low(pictures(32), PROMPTS).dtype == torch.float32


def test_scores_do_not_depend_on_the_cache_nor_on_the_batch_that_filled_it(checkpoint):
    warm, cold = load_clip_reward(checkpoint), load_clip_reward(checkpoint)
    with torch.inference_mode():
        warm(pictures(32, 3), ["a zebra", "a much longer caption than the others", "a cat"])
    images = pictures(32, 1).requires_grad_()
    scores = warm(images, ["a cat"])
    assert torch.equal(scores, cold(images, ["a cat"]))
    scores.backward()  # also with features that were cached under inference_mode
    assert images.grad.abs().sum() > 0


def test_the_cache_encodes_a_prompt_once_and_is_bounded(checkpoint):
    reward = load_clip_reward(checkpoint)
    reward(pictures(32, 3), ["a cat"] * 3)
    info = reward._text_features.cache_info()
    assert info.misses == 1 and info.hits == 2 and info.maxsize is not None


def test_the_embedded_reward_loads_and_has_gradient():
    reward = load_emoji_clip()
    images = pictures(64, 2).requires_grad_()
    scores = reward(images, ["a cat", "a dog"])
    scores.sum().backward()
    assert scores.shape == (2,) and scores.dtype == torch.float32
    assert all(image.abs().sum() > 0 for image in images.grad)


def test_pickscore_takes_the_processor_named_in_args(checkpoint, copied):
    for name in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        os.remove(f"{copied}/{name}")
    images = pictures(32)
    given = load_pickscore(str(copied), processor=checkpoint)
    assert torch.equal(given(images, PROMPTS), load_pickscore(checkpoint)(images, PROMPTS))


def test_plain_pickled_weights_load(checkpoint, copied):
    weights = load_file(f"{copied}/model.safetensors")
    os.remove(f"{copied}/model.safetensors")
    torch.save(weights, f"{copied}/pytorch_model.bin")
    images = pictures(32)
    assert torch.equal(load_clip_reward(copied)(images, PROMPTS), load_clip_reward(checkpoint)(images, PROMPTS))


class Payload:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def plain_pickle(value, path):
    with open(path, "wb") as file:
        pickle.dump(value, file, protocol=2)


@pytest.mark.parametrize("write", [torch.save, plain_pickle])
def test_a_pickle_that_needs_code_is_refused_and_not_run(copied, tmp_path, write):
    os.remove(f"{copied}/model.safetensors")
    write({"weight": Payload(tmp_path / "ran")}, f"{copied}/pytorch_model.bin")
    with pytest.raises(UserError, match=r"mkdir(.|\n)*safetensors"):
        load_clip_reward(copied)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("place", ["path", "processor"])
def test_a_tokenizer_that_needs_code_is_refused_and_not_run(copied, checkpoint, monkeypatch, place):
    """Nor is anybody asked on the terminal, as transformers does by default."""
    (copied / "theirs.py").write_text(f"open({str(copied / 'ran')!r}, 'w')\n")
    code = {"AutoConfig": "theirs.Config", "AutoTokenizer": ["theirs.Tokenizer", None]}
    for name, more in (("tokenizer_config.json", {"tokenizer_class": "Theirs"}), ("config.json", {"model_type": "x"})):
        if name == "tokenizer_config.json" or place == "processor":
            told = json.loads((copied / name).read_text()) | {"auto_map": code, **more}
            (copied / name).write_text(json.dumps(told))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    if place == "path":  # the network's own kind of tokenizer is taken
        assert load_clip_reward(copied, device="cpu")
    else:
        with pytest.raises(UserError, match=r"the tokenizer in '.*copy' cannot be loaded: it would run code"):
            load_clip_reward(checkpoint, processor=str(copied), device="cpu")
    assert not (copied / "ran").exists()


def keep_half(path):
    with open(f"{path}/model.safetensors", "r+b") as file:
        file.truncate(os.path.getsize(f"{path}/model.safetensors") // 2)


def drop_projection(path):
    weights = load_file(f"{path}/model.safetensors")
    save_file({k: v for k, v in weights.items() if "projection" not in k}, f"{path}/model.safetensors")


def other_crop(path):
    CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size=48).save_pretrained(path)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (keep_half, "cannot be loaded"),
        (drop_projection, "2 tensors are missing, for example text_projection.weight"),
        (other_crop, r"crops images to \(48, 48\)"),
        (lambda path: os.remove(f"{path}/model.safetensors"), "cannot be loaded: .*model.safetensors"),
        (lambda path: os.remove(f"{path}/config.json"), "no config.json"),
        (lambda path: os.remove(f"{path}/tokenizer.json"), "no tokenizer.json"),
        (lambda path: (path / "config.json").write_text('{"model_type": "bert"}'), "bert model.*clip model"),
    ],
)
def test_broken_checkpoints_are_refused(copied, spoil, words):
    spoil(copied)
    with pytest.raises(UserError, match=words):
        load_clip_reward(copied)


def test_missing_weights_name_the_path_and_a_mend(tmp_path, checkpoint):
    with pytest.raises(UserError, match=r"absent': no such directory; .*hub id"):
        load_emoji_clip(str(tmp_path / "absent"))
    with pytest.raises(UserError, match="this is a file"):
        load_emoji_clip(f"{checkpoint}/config.json")


def test_a_hub_id_that_cannot_be_had_says_so(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"'nobody/nothing' has no .* on the hub or in the local cache"):
        load_clip_score("nobody/nothing")

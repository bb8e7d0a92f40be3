"""A reward out of a .nemo file scores as NeMo's own mathematics does; whatever else is in such a file is refused."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
import torch

from draftplus.build import build_reward
from draftplus.config import RewardConfig
from draftplus.errors import UserError
from draftplus.rewards.clip import EMOJI_CLIP, load_clip_reward
from draftplus.rewards.nemo import convert_nemo
from draftplus.rewards.preprocessing import CLIP_MEAN, CLIP_STD
from tests.support.nemo import (
    LENGTH,
    SIZE,
    clip_config,
    clip_nemo,
    clip_scores,
    clip_weights,
    divided,
    write_nemo,
)

PROMPTS = ["a cat", "a dog on a blue background", "a very long caption of a zebra " * 9]


def images() -> torch.Tensor:
    return torch.rand(len(PROMPTS), 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def expected(layout: str, activation: str = "gelu", weights: str | None = None) -> torch.Tensor:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(EMOJI_CLIP)
    ids = torch.full((len(PROMPTS), LENGTH), 0)
    for row, prompt in zip(ids, PROMPTS, strict=True):  # filled up with 0, as NeMo may do
        tokens = tokenizer([prompt], truncation=True, max_length=LENGTH).input_ids[0]
        row[: len(tokens)] = torch.tensor(tokens)
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return clip_scores(layout, activation, clip_weights(weights or layout), (images() - mean) / deviation, ids)


def scores(directory: Path) -> torch.Tensor:
    return load_clip_reward(directory)(images(), PROMPTS)


@pytest.mark.parametrize("layout", ["legacy", "by head", "core"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_scores_are_nemos(tmp_path: Path, layout: str, ranks: int) -> None:
    """In each layout, of one process and merged from two."""
    parts = divided(layout, clip_weights(layout), 2) if ranks == 2 else []
    file = clip_nemo(tmp_path / "reward.nemo", layout, ranks=parts)
    found = scores(convert_nemo(file, tmp_path / "clip", str(EMOJI_CLIP)))
    assert torch.allclose(found, expected(layout), rtol=0, atol=2e-4) and found.std() > 1
    if layout == "legacy":  # whose weights have the names and shapes of the other
        assert not torch.allclose(found, expected("by head", weights=layout), rtol=0, atol=1)


@pytest.mark.parametrize("spelling", ["gzip", "no dot", "module", "half", "padded"])
def test_spellings_of_one_reward(tmp_path: Path, spelling: str) -> None:
    """Older files are compressed, O2 wraps the model in a `module`, and a vocabulary may be padded."""
    state = clip_weights()
    if spelling == "padded":
        words = "model.text_encoder.language_model.embedding.word_embeddings.weight"
        state[words] = torch.cat([state[words], torch.zeros(4, state[words].shape[1])])
    if spelling == "module":
        state = {name.replace("model.", "model.module.", 1): tensor for name, tensor in state.items()}
    if spelling == "half":
        state = {name: tensor.bfloat16() for name, tensor in state.items()}
    mode, prefix = "w:gz" if spelling == "gzip" else "w:", "" if spelling == "no dot" else "./"
    file = write_nemo(tmp_path / "reward.nemo", clip_config(), {"model_weights.ckpt": state}, mode, prefix)
    found = scores(convert_nemo(file, tmp_path / "clip", str(EMOJI_CLIP)))
    assert torch.allclose(found, expected("legacy"), rtol=0, atol=2 if spelling == "half" else 2e-4)


def test_the_activation_is_the_files(tmp_path: Path) -> None:
    file = clip_nemo(tmp_path / "reward.nemo", activation="approx-gelu")
    found = scores(convert_nemo(file, tmp_path / "clip", str(EMOJI_CLIP)))
    assert torch.allclose(found, expected("legacy", "approx-gelu"), rtol=0, atol=2e-4)
    assert not torch.allclose(found, expected("legacy"), rtol=0, atol=1e-2)


def refused(file: Path, *words: str, output: Path | None = None, processor: str | None = str(EMOJI_CLIP)) -> None:
    with pytest.raises(UserError) as error:
        convert_nemo(file, output or file.parent / "clip", processor)
    message = str(error.value)
    assert all(word in message for word in words), message
    assert len(message.splitlines()) <= 2
    assert not (file.parent / "clip").exists()


def spoilt(directory: Path, config: Any = None, state: Any = None) -> Path:
    whole = {"model_weights.ckpt": clip_weights() if state is None else state}
    return write_nemo(directory / "reward.nemo", clip_config() if config is None else config, whole)


def without(name: str) -> dict[str, Any]:
    return {key: tensor for key, tensor in clip_weights().items() if key != name}


def changed(tower: str, **settings: Any) -> dict[str, Any]:
    config = clip_config()
    config[tower] |= settings
    return config


class Code:
    def __reduce__(self) -> Any:
        return print, ("run",)


def test_no_nemo_file(tmp_path: Path) -> None:
    file = tmp_path / "reward.nemo"
    refused(file, "no such file")
    for content in (b"text", b"", gzip.compress(b"text")):
        file.write_bytes(content)
        refused(file, "not a .nemo file", "model_config.yaml")
    whole = clip_nemo(file).read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    refused(file, "damaged")
    file.write_bytes(gzip.compress(whole)[: len(whole) // 2])
    refused(file, "damaged")


def test_another_files_content(tmp_path: Path) -> None:
    refused(write_nemo(tmp_path / "a.nemo", clip_config(), {"weights.ckpt": {}}), "it has no model_weights.ckpt")
    refused(
        write_nemo(tmp_path / "b.nemo", clip_config(), {"model_weights/common.pt": {}}), "distributed", "torch.save"
    )
    pipeline = {"tp_rank_00_pp_rank_001/model_weights.ckpt": {}}
    refused(write_nemo(tmp_path / "c.nemo", clip_config(), pipeline), "pipeline parallelism", "torch.save")
    refused(spoilt(tmp_path, {"target": "nemo.collections.nlp.models.MegatronGPTModel"}), "MegatronGPTModel", "CLIP")
    tuned = {"target": "nemo_aligner.MegatronSDDRaFTPModel", "unet_config": {}, "peft": {}}
    refused(spoilt(tmp_path, tuned), "MegatronSDDRaFTPModel", "docs/from-nemo-aligner.md")
    refused(spoilt(tmp_path, ["a list"]), "expected keys and values, found list")


def test_code_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(spoilt(tmp_path, state={"model.logit_scale": Code()}), "reward.nemo", "would run code")
    config = tmp_path / "config.nemo"
    write_nemo(config, clip_config(), {"model_weights.ckpt": clip_weights()})
    text = config.read_bytes()
    config.write_bytes(text.replace(b"activation: gelu", b"activation: !!a!", 1))
    refused(config, "config.nemo, model_config.yaml in it", "line")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("tower", "settings", "words"),
    [
        ("vision", {"global_average_pool": True}, "vision.global_average_pool True"),
        ("vision", {"class_token_length": 8}, "vision.class_token_length 8"),
        ("vision", {"img_w": 24}, "not square"),
        ("vision", {"patch_dim": None}, "vision.patch_dim None"),
        ("vision", {"kv_channels": 8}, "vision.kv_channels 8"),
        ("text", {"normalization": "layernorm1p"}, "text.normalization layernorm1p"),
        ("text", {"activation": "geglu"}, "text.activation geglu"),
        ("text", {"num_attention_heads": "many"}, "text.num_attention_heads many"),
        ("text", {"layernorm_epsilon": "small"}, "text.layernorm_epsilon small"),
    ],
)
def test_what_a_clip_model_cannot_be(tmp_path: Path, tower: str, settings: dict[str, Any], words: str) -> None:
    refused(spoilt(tmp_path, changed(tower, **settings)), words)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    state = clip_weights()
    head, scale = "model.vision_encoder.head.weight", "model.logit_scale"
    refused(spoilt(tmp_path, state=without(head)), "missing", "visual_projection.weight")
    refused(spoilt(tmp_path, state=without(scale)), "missing", "logit_scale")
    refused(spoilt(tmp_path, state=without("model.text_encoder.head.weight")), "no text_projection.weight")
    refused(spoilt(tmp_path, state={**state, "model.extra.weight": torch.zeros(2)}), "unknown", "extra.weight")
    refused(spoilt(tmp_path, state={**state, head: torch.zeros(3, 16)}), "of another shape", "visual_projection")
    refused(spoilt(tmp_path, changed("vision", num_layers=3)), "missing", "layers.2")
    refused(spoilt(tmp_path, changed("vision", num_layers=1)), "unknown", "layers.1")
    refused(spoilt(tmp_path, changed("text", hidden_size=16)), "of another shape")
    refused(spoilt(tmp_path, changed("text", num_attention_heads=5, kv_channels=None)), "5 heads")


def test_the_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, the one that the file names is asked for, with what to run."""
    file = spoilt(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr("draftplus.rewards.checkpoints.why_offline", lambda: "HF_HUB_OFFLINE is set")
    refused(file, "CLIP-ViT-H-14", "--processor=DIRECTORY", "hf download laion/CLIP-ViT-H-14", processor=None)
    (tmp_path / "empty").mkdir()
    refused(file, "tokenizer.json", "--processor", processor=str(tmp_path / "empty"))
    small = clip_weights("legacy", 100)
    refused(spoilt(tmp_path, state=small), "1536 tokens", "knows 100", "--processor")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    file = spoilt(tmp_path)
    kept = tmp_path / "mine"
    kept.mkdir()
    assert convert_nemo(file, kept, str(EMOJI_CLIP)) == kept
    before = {path: path.read_bytes() for path in kept.iterdir()}
    refused(file, "mine", "give another", output=kept)
    assert before == {path: path.read_bytes() for path in kept.iterdir()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "reward.nemo"]


@pytest.mark.parametrize("reward", ["emoji_clip", "pickscore", "clip_score", "dissimilarity"])
def test_a_reward_that_is_given_one_names_the_command(tmp_path: Path, reward: str) -> None:
    file = spoilt(tmp_path)
    with pytest.raises(UserError, match=f"run: draftplus reward convert {file} -o"):
        build_reward(reward, RewardConfig(path=str(file)), torch.device("cpu"))

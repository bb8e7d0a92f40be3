"""`draftplus reward score`: pictures and pairs on disk, their prompts, and what is refused."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from draftplus import api
from draftplus.api import rewards as scoring
from draftplus.data.pictures import decode
from draftplus.errors import UserError
from draftplus.evaluation.score import Item, by_size
from tests.support import rewards
from tests.support.runs import REWARDS

KEY = f"reward/{REWARDS}:by_prompt"
BY_PROMPT = ["--reward", f"{REWARDS}:by_prompt", "device=cpu"]
PROMPTS = {"2.png": "a cat", "10.jpg": "a dog", "deep/3.webp": "two bees"}  # in order: 2 is before 10


def png(number: int, width: int = 8, height: int = 6, kind: str = "PNG") -> bytes:
    generator, file = torch.Generator().manual_seed(number), io.BytesIO()
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator).byte()
    Image.fromarray(pixels.numpy()).save(file, kind)
    return file.getvalue()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A directory of three pictures of two sizes, without prompts."""
    directory = tmp_path / "pictures"
    (directory / "deep").mkdir(parents=True)
    (directory / "2.png").write_bytes(png(2))
    (directory / "10.jpg").write_bytes(png(10, 12, 10, "JPEG"))
    (directory / "deep" / "3.webp").write_bytes(png(3, kind="WEBP"))
    (directory / ".hidden.png").write_bytes(png(4))
    (directory / "notes.md").write_text("no picture")
    return directory


def expected(directory: Path, prompts: dict[str, str] = PROMPTS) -> dict[str, float]:
    """By each picture's name, its score of `by_prompt` by hand."""
    images = {name: decode((directory / name).read_bytes())[None] / 255 for name in prompts}
    return {name: float(rewards.by_prompt(images[name], [text])) for name, text in prompts.items()}


def scores(told: dict[str, Any], directory: Path) -> dict[str, float]:
    return {str(Path(row["file"]).relative_to(directory)): row[KEY] for row in told["pictures"]}


def as_tar(directory: Path, target: Path, mode: str = "w") -> Path:
    with tarfile.open(target, mode) as tar:  # type: ignore[call-overload]
        tar.add(directory, "shard")
    return target


def test_prompts_from_everywhere_are_the_same(pictures: Path, tmp_path: Path) -> None:
    """A list in order, a table or lines by name, texts beside the pictures, and texts in an archive."""
    known = expected(pictures)
    (tmp_path / "prompts.txt").write_text("".join(f"{text}\n" for text in PROMPTS.values()))
    rows = [{"file_name": name, "text": text} for name, text in reversed(PROMPTS.items())]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "prompts.csv").write_text("prompt,file\n" + "".join(f"{t},{n}\n" for n, t in PROMPTS.items()))
    for name in ("prompts.txt", "prompts.jsonl", "prompts.csv"):
        told = scoring.score(pictures, BY_PROMPT[1], ["device=cpu"], tmp_path / name)
        assert list(scores(told, pictures)) == list(PROMPTS), name
        assert scores(told, pictures) == pytest.approx(known, rel=1e-5), name
    for name, text in PROMPTS.items():
        (pictures / name).with_suffix(".txt").write_text(f"{text}\n")
    assert scores(scoring.score(pictures, BY_PROMPT[1]), pictures) == pytest.approx(known, rel=1e-5)
    for mode, name in (("w", "shard.tar"), ("w:gz", "shard.tar.gz")):
        path = as_tar(pictures, tmp_path / name, mode)
        found = scores(scoring.score(path, BY_PROMPT[1]), path / "shard")
        assert found == pytest.approx(known, rel=1e-5)
    together = scoring.score([pictures / "2.png", pictures, path], BY_PROMPT[1])["pictures"]
    assert len(together) == 6, "a picture that is named twice is scored once"


def test_one_prompt_and_all_outputs(draftplus: Callable[..., Any], pictures: Path, tmp_path: Path) -> None:
    known = expected(pictures, dict.fromkeys(PROMPTS, "a fox"))
    command = ["reward", "score", pictures, *BY_PROMPT, "--reward", f"{REWARDS}:redness", "--prompt", "a fox"]
    printed = draftplus(*command, "-o", tmp_path / "scores.json")
    assert (printed.code, printed.err) == (0, ""), printed
    for name, score in known.items():
        assert any(line.startswith(str(pictures / name)) and f"{score:.4f}" in line for line in printed.out.split("\n"))
    told = json.loads((tmp_path / "scores.json").read_text())
    assert scores(told, pictures) == pytest.approx(known, rel=1e-5)
    summary = told["rewards"][f"{REWARDS}:by_prompt"]
    assert summary["mean"] == pytest.approx(sum(known.values()) / 3, rel=1e-5)
    assert (summary["lowest"], summary["highest"]) == pytest.approx(
        (min(known.values()), max(known.values())), rel=1e-5
    )
    assert json.loads(draftplus(*command, "--json").out) == told
    draftplus(*command, "-o", tmp_path / "scores.jsonl")
    lines = (tmp_path / "scores.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == told["pictures"]


def test_settings_reach_a_reward(pictures: Path) -> None:
    name = f"{REWARDS}:brightness"
    half, whole = (
        scoring.score(pictures, overrides=[f"reward={{'{name}': {{args: {{gain: {gain}}}}}}}"], prompt="")
        for gain in (50.0, 100.0)
    )
    assert half["rewards"][name]["args"] == {"gain": 50.0}
    assert half["rewards"][name]["mean"] == pytest.approx(whole["rewards"][name]["mean"] / 2)


def test_what_is_generated_is_scored_as_it_was_made(small: Path, tmp_path: Path) -> None:
    """But for the rounding of a picture to 8 bits; the grid is left out, and said to be."""
    rows = api.write_images(
        tmp_path / "made", str(small), ["a cat", "a dog"], [0, 1], ["sampler.steps=2", "device=cpu"],
        rewards=[f"{REWARDS}:by_prompt"],
    )  # fmt: skip
    told = scoring.score(tmp_path / "made", BY_PROMPT[1], prompts=tmp_path / "made" / "images.jsonl")
    assert [row[KEY] for row in told["pictures"]] == pytest.approx([row[KEY] for row in rows], abs=0.05)
    assert told["left_out"] == [str(tmp_path / "made" / "grid.png")]


def test_what_does_not_decode_is_named_and_skipped(
    draftplus: Callable[..., Any], refused: Callable[..., None], pictures: Path
) -> None:
    command = ["reward", "score", pictures, *BY_PROMPT, "--prompt", "a fox"]
    for name in ("0.png", "11.jpg"):
        (pictures / name).write_bytes(png(1)[:60])
    printed = draftplus(*command, "--json")
    told = json.loads(printed.out)
    assert printed.code == 0
    assert [Path(one["file"]).name for one in told["skipped"]] == ["0.png", "11.jpg"]
    known = expected(pictures, dict.fromkeys(PROMPTS, "a fox"))
    assert scores(told, pictures) == pytest.approx(known, rel=1e-5), "the others keep their prompts and scores"
    assert f"skipped {pictures / '0.png'}: damaged" in draftplus(*command).out
    refused([*command, "--skip", "1"], r"2 pictures cannot be read, more than --skip 1 allows; the first is .*0\.png")
    for name in PROMPTS:
        (pictures / name).unlink()
    refused(command, "no picture could be read; the first is .*0.png: damaged")


def test_a_score_that_is_not_finite_is_named(draftplus: Callable[..., Any], pictures: Path) -> None:
    name, settings = f"{REWARDS}:NanAt", "{args: {bad: [1]}}"  # of two calls, one for each size
    printed = draftplus("reward", "score", pictures, f"reward={{'{name}': {settings}}}", "--prompt", "")
    assert printed.code == 2 and "Traceback" not in printed.err
    assert "is not finite for 1 pictures, such as" in printed.err and "10.jpg" in printed.err
    assert "not finite" in printed.out, "the others are told"


def test_what_is_refused(refused: Callable[..., None], pictures: Path, tmp_path: Path) -> None:
    score, fox = ["reward", "score", pictures, *BY_PROMPT], ["--prompt", "a fox"]
    refused(score, r"2\.png' has no prompt: .* give --prompts FILE or --prompt")
    refused(["reward", "score", *BY_PROMPT], "no pictures given")
    refused(["reward", "score", pictures, *fox], "no reward given")
    refused([*score, *fox, "--reward", "emoji_clap"], "did you mean 'emoji_clip'")
    refused([*score, *fox, "--reward", "lpips"], "is a metric of many pictures")
    refused([*score, *fox, "--reward", "dissimilarity"], "by one another")
    refused([*score, *fox, "sampler.steps=3"], r"sampler\.steps has no effect on pictures on disk")
    refused(
        [*score, *fox, f"reward={{'{REWARDS}:by_prompt': {{weight: 2}}}}"], "only path and args mean something here"
    )
    refused([*score, *fox, "--prompts", "x.txt"], "both given")
    refused([*score, "--prompts", "gone.txt"], "gone.txt': no such")
    refused([*score, *fox, "-o", "scores.txt"], r"name a \.json file")
    refused([*score, *fox, "--skip", "-1"], "--skip is -1")
    refused(["reward", "score", tmp_path / "gone", *BY_PROMPT, *fox], "gone': no such picture")
    (tmp_path / "two.txt").write_text("a\nb\n")
    refused([*score, "--prompts", tmp_path / "two.txt"], "2 prompts for 3 pictures")
    (tmp_path / "absent.jsonl").write_text('{"file": "7.png", "prompt": "a"}\n')
    refused([*score, "--prompts", tmp_path / "absent.jsonl"], r"names '7\.png', but there is no such picture")
    (tmp_path / "twice.jsonl").write_text('{"file": "2.png", "prompt": "a"}\n{"file": "2.png", "prompt": "b"}\n')
    refused([*score, "--prompts", tmp_path / "twice.jsonl"], r"two prompts for '2\.png'")
    (tmp_path / "empty").mkdir()
    refused(["reward", "score", tmp_path / "empty", *BY_PROMPT, *fox], "has no pictures")
    refused([*score, "--pairs", "pairs.jsonl"], "leave out TARGETS")


def test_archives_that_are_damaged_or_reach_out(refused: Callable[..., None], pictures: Path, tmp_path: Path) -> None:
    whole = as_tar(pictures, tmp_path / "whole.tar").read_bytes()
    for end in (700, len(whole) // 2, 5000):
        (tmp_path / "cut.tar").write_bytes(whole[:end])
        refused(["reward", "score", tmp_path / "cut.tar", *BY_PROMPT, "--prompt", "a"], "truncated or not a tar file")
    with tarfile.open(tmp_path / "out.tar", "w") as tar:
        member = tarfile.TarInfo("link.png")
        member.type, member.linkname = tarfile.SYMTYPE, str(pictures / "2.png")
        tar.addfile(member)
        tar.add(pictures / "2.png", "../../out.png")
    refused(["reward", "score", tmp_path / "out.tar", *BY_PROMPT, "--prompt", "a fox"], "out.tar' has no pictures")


def test_batches_are_of_one_size_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [(1, 1 + i % 5) for i in range(40)]
    items = [Item(place, torch.zeros(3, *size), "") for place, size in enumerate(sizes)]
    for waiting in (2**26, 12):
        monkeypatch.setattr("draftplus.evaluation.score.WAITING", waiting)
        batches = list(by_size(items, 4))
        assert sorted(item.place for batch in batches for item in batch) == list(range(40))
        assert all(len({item.image.shape for item in batch}) == 1 and len(batch) <= 4 for batch in batches)
    assert len(batches) > 10, "none waited for long"


def write_pairs(pictures: Path, labels: bool = True) -> Path:
    """Of `redness`: whether the first is redder, its label right but for the last, and one that is broken."""
    images: dict[str, Tensor] = {name: decode((pictures / name).read_bytes())[None] / 255 for name in PROMPTS}
    red = {name: float(rewards.redness(images[name], [""])) for name in images}
    low, _, high = sorted(red, key=lambda name: red[name])
    rows = [(low, high, 0, 1), (high, low, 0.8, 0.2), (low, low, 0.5, 0.5), (high, low, 0, 1), ("gone.png", low, 1, 0)]
    told = [dict(zip(("jpg_0", "jpg_1", "label_0", "label_1"), row, strict=True)) for row in rows]
    lines = [{key: value for key, value in row.items() if labels or key[:3] == "jpg"} for row in told]
    (pictures / "pairs.jsonl").write_text("".join(json.dumps({**row, "caption": "a"}) + "\n" for row in lines))
    return pictures / "pairs.jsonl"


def test_pairs(draftplus: Callable[..., Any], pictures: Path, tmp_path: Path) -> None:
    pairs = write_pairs(pictures)
    command = ["reward", "score", "--pairs", pairs, "--reward", f"{REWARDS}:redness", "device=cpu"]
    printed = draftplus(*command, "-o", tmp_path / "pairs.json")
    assert (printed.code, printed.err) == (0, ""), printed
    told = json.loads((tmp_path / "pairs.json").read_text())
    summary = told["rewards"][f"{REWARDS}:redness"]
    assert [summary[key] for key in ("first_wins", "second_wins", "ties", "labelled")] == [2, 1, 1, 3]
    assert summary["accuracy"] == pytest.approx(2 / 3)
    assert [row["label"] for row in told["pairs"]] == [0, 0.8, 0.5, 0]
    signs = [first - second for first, second in (row[f"reward/{REWARDS}:redness"] for row in told["pairs"])]
    assert [sign > 0 for sign in signs] == [False, True, False, True] and signs[2] == 0
    assert len(told["skipped"]) == 1 and "gone.png" in told["skipped"][0]["reason"]
    assert "0.667" in printed.out and "skipped" in printed.out
    with pytest.raises(UserError, match="1 pairs cannot be read, more than --skip 0 allows"):
        scoring.score_pairs(pairs, f"{REWARDS}:redness", skip=0)


def test_pairs_without_labels(pictures: Path) -> None:
    told = scoring.score_pairs(write_pairs(pictures, labels=False), f"{REWARDS}:redness")
    summary = told["rewards"][f"{REWARDS}:redness"]
    assert (summary["first_wins"], summary["accuracy"], summary["labelled"]) == (2, None, 0)
    assert {row["label"] for row in told["pairs"]} == {None}


def test_names_beside_one_another_do_not_mix(pictures: Path, tmp_path: Path) -> None:
    """Two models' pictures of the same names have one file of prompts."""
    shutil.copytree(pictures, tmp_path / "other")
    (tmp_path / "names.csv").write_text("file,prompt\n" + "".join(f"{n},{t}\n" for n, t in PROMPTS.items()))
    told = scoring.score([pictures, tmp_path / "other"], BY_PROMPT[1], prompts=tmp_path / "names.csv")
    assert [row["prompt"] for row in told["pictures"]] == 2 * list(PROMPTS.values())

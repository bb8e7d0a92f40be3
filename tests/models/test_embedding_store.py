"""What was embedded comes back bit for bit or not at all, in bounded room, whoever else uses the directory."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

from draftplus.config import ModelConfig
from draftplus.errors import UserError, notice
from draftplus.models import embedding_store, loading
from draftplus.models.embedding_store import EmbeddingStore, encoders_hash
from draftplus.types import Conditioning
from tests.support.processes import Child
from tests.tiny import CPU, normal

KINDS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
CUTS = {"the text encoder": (99, 77)}


@pytest.fixture(autouse=True)
def all_notices() -> None:
    notice.cache_clear()


def row(prompt: str | None, dtype: torch.dtype = torch.float32, width: int = 8) -> Conditioning:
    """An embedding with all that one may have, of numbers that the prompt decides."""
    seed = sum(map(ord, repr(prompt)))
    hidden = normal(1, 4, width, seed=seed).to(dtype)
    hidden[0, 0, 0], hidden[0, 0, 1] = torch.nan, -0.0
    mask = torch.arange(4)[None] < 1 + seed % 4
    # views of one tensor, the second of them not contiguous
    return Conditioning(hidden, mask, {"pooled": hidden[:, 0], "ids": torch.tensor([[seed, 3]]), "t": hidden.mT})


def same(a: Conditioning, b: Conditioning) -> bool:
    one, other = ({"hidden": c.hidden, "mask": c.mask, **c.extras} for c in (a, b))
    return one.keys() == other.keys() and all(
        (tensor is None and other[key] is None)
        or (tensor.dtype, tensor.shape, bits(tensor)) == (other[key].dtype, other[key].shape, bits(other[key]))
        for key, tensor in one.items()
    )


def bits(tensor: Tensor) -> list[int]:
    return tensor.contiguous().view(torch.uint8).flatten().tolist()


def store(directory: Path, limit: int | None = None, **told: Any) -> EmbeddingStore:
    return EmbeddingStore(lambda: {"encoder": "abc", **told}, CPU, directory, limit)


def got(made: EmbeddingStore, prompt: str | None) -> Conditioning | None:
    found = made.get(prompt)
    return found.row if found else None


def used(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.iterdir())


@pytest.mark.parametrize("dtype", KINDS)
def test_it_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    given = row("a cat", dtype)
    size = store(tmp_path).put("a cat", given, CUTS)
    found = store(tmp_path).get("a cat")
    assert found is not None and same(found.row, given) and found.cuts == CUTS
    assert store(tmp_path).size("a cat") == (size, CUTS) and used(tmp_path) == size
    bare = Conditioning(given.hidden)
    store(tmp_path).put("bare", bare, {})
    again = store(tmp_path).get("bare")
    assert again is not None and again.row.mask is None and same(again.row, bare) and again.cuts == {}


def test_each_tensor_has_memory_of_its_own(tmp_path: Path) -> None:
    store(tmp_path).put("a cat", row("a cat"), {})
    found = got(store(tmp_path), "a cat")
    assert found is not None
    tensors = [found.hidden, found.mask, *found.extras.values()]
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors if tensor is not None)


def test_no_prompt_is_another_and_no_encoder(tmp_path: Path) -> None:
    prompts = [None, "", " ", "None", "null", "a cat", "A cat", "a\ncat", "\udce9", "é"]
    made = store(tmp_path)
    for prompt in prompts:
        made.put(prompt, row(prompt), {})
    for prompt in prompts:
        found = got(made, prompt)
        assert found is not None and same(found, row(prompt))
    others = [store(tmp_path, encoder="abd"), store(tmp_path, dtype="bfloat16"), store(tmp_path, length=256)]
    other_device = EmbeddingStore(lambda: {"encoder": "abc"}, torch.device("cuda"), tmp_path)
    assert not any(other.size(prompt) for other in [*others, other_device] for prompt in prompts)


def test_damage_is_seen_said_once_and_mended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, given = store(tmp_path), row("a cat")
    made.put("a cat", given, CUTS)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    flipped = [whole[:i] + bytes([whole[i] ^ 4]) + whole[i + 1 :] for i in range(0, len(whole), 7)]
    for damaged in (b"", b"{", whole[:5], whole[: len(whole) // 2], whole[:-1], whole + b"\0", *flipped):
        file.write_bytes(damaged)
        found = made.get("a cat")
        # what is said of the prompt's length may be other numbers, but no embedding is another
        assert found is None or same(found.row, given)
        if len(damaged) != len(whole):
            assert found is None and made.size("a cat") is None
    file.write_bytes(flipped[-1])  # inside a tensor
    assert made.get("a cat") is None
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(file) in said and "damaged" in said and "made again" in said
    made.put("a cat", given, CUTS)
    again = got(made, "a cat")
    assert again is not None and same(again, given) and list(tmp_path.iterdir()) == [file]


def test_a_folder_in_a_files_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = store(tmp_path)
    (tmp_path / made.name("a cat") / "inside").mkdir(parents=True)
    assert made.get("a cat") is None and made.put("a cat", row("a cat"), {}) is None
    assert "cannot be kept" in capsys.readouterr().err


def test_what_was_used_the_longest_ago_goes_first(tmp_path: Path) -> None:
    one = store(tmp_path / "size").put("0", row("0"), {})
    assert one is not None
    limit = 5 * one + one // 2
    made = store(tmp_path / "s", limit)
    for number in range(5):
        made.put(str(number), row("0"), {})
    assert made.get("0") and made.size("1")  # used once more
    made.put("5", row("0"), {})
    made.put("6", row("0"), {})
    assert [made.size(str(number)) is not None for number in range(7)] == [True, True, False, False, True, True, True]
    for number in range(7, 30):
        made.put(str(number), row("0"), {})
        assert used(tmp_path / "s") <= limit
    (tmp_path / "s" / ".left.building").write_bytes(bytes(3 * one))  # of a process that died
    os.utime(tmp_path / "s" / ".left.building", (0, 0))
    made.put("30", row("0"), {})
    assert used(tmp_path / "s") <= limit and not (tmp_path / "s" / ".left.building").exists()
    assert made.size("30") and made.size("29") and made.size("28")


def test_a_runs_own_prompts_stay(tmp_path: Path) -> None:
    one = store(tmp_path / "size").put("0", row("0"), {})
    assert one is not None
    made = store(tmp_path / "s", 4 * one + one // 2)
    made.keep(["0", "1", "2"])
    for number in range(20):
        made.put(str(number), row("0"), {})
    assert [number for number in range(20) if made.size(str(number))] == [0, 1, 2, 19]
    made.refuse_too_many([one] * 4, 4)
    with pytest.raises(UserError, match=r"the embeddings of 5 prompts take .* GB on disk, and DRAFTPLUS_CACHE_GB"):
        made.refuse_too_many([one] * 5, 5)
    with pytest.raises(UserError, match="the embeddings of 10,000,000 prompts take about"):
        made.refuse_too_many([one], 10**7)


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def full_in_rust(_: Any, path: Path, *__: Any) -> None:
    path.write_bytes(b"half")
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("fails", [full, full_in_rust])
def test_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fails: Any
) -> None:
    made = store(tmp_path)
    made.put("a cat", row("a cat"), {})
    before = list(tmp_path.iterdir())
    monkeypatch.setattr(embedding_store, "save_file", fails)
    assert made.put("a dog", row("a dog"), {}) is None and made.put("a bee", row("a bee"), {}) is None
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "No space left" in said and str(tmp_path) in said and "DRAFTPLUS_CACHE" in said
    assert list(tmp_path.iterdir()) == before and made.get("a cat")


def test_a_directory_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    made = store(tmp_path / "file" / "embeddings")
    assert made.size("a cat") is None and made.get("a cat") is None
    assert made.put("a cat", row("a cat"), {}) is None
    assert "cannot be kept" in capsys.readouterr().err


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("DRAFTPLUS_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert EmbeddingStore(dict, CPU).directory == home / ".cache/draftplus/embeddings"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which is to be ignored, by its specification
    assert EmbeddingStore(dict, CPU).directory == home / ".cache/draftplus/embeddings"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert EmbeddingStore(dict, CPU).directory == tmp_path / "xdg/draftplus/embeddings"
    monkeypatch.setenv("DRAFTPLUS_CACHE", "~/mine")
    assert EmbeddingStore(dict, CPU).directory == home / "mine/embeddings"
    monkeypatch.setenv("DRAFTPLUS_CACHE", "~nobody-of-that-name/mine")
    made = EmbeddingStore(dict, CPU)
    assert made.get("a cat") is None and made.put("a cat", row("a cat"), {}) is None
    assert "set DRAFTPLUS_CACHE" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["", "0.5"])
def test_its_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: str) -> None:
    monkeypatch.setenv("DRAFTPLUS_CACHE_GB", given)
    limit = float(given or 20) * 1e9
    made = EmbeddingStore(dict, CPU, tmp_path)
    made.refuse_too_many([int(limit)], 1)
    with pytest.raises(UserError):
        made.refuse_too_many([int(limit) + 1], 1)


@pytest.mark.parametrize("given", ["0", "-1", "nan", "inf", "20GB"])
def test_a_limit_that_is_none(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("DRAFTPLUS_CACHE_GB", given)
    with pytest.raises(UserError, match=f"DRAFTPLUS_CACHE_GB is '{given}'; .* above 0"):
        EmbeddingStore(dict, CPU)


def many_at_once(directory: str, limit: int, first: int) -> None:
    made = store(Path(directory), limit)
    for number in range(300):
        prompt = str((first + number * 7) % 40)
        found = got(made, prompt)
        assert found is None or same(found, row(prompt)), prompt
        if found is None:
            assert made.put(prompt, row(prompt), {})


@pytest.mark.slow
def test_two_processes_at_once(tmp_path: Path) -> None:
    one = store(tmp_path / "size").put("0", row("0"), {})
    assert one is not None
    children = []
    for first in (0, 20):
        (tmp_path / str(first)).mkdir()
        children.append(Child(many_at_once, [str(tmp_path / "s"), 20 * one, first], tmp_path / str(first), {}))
    assert [child.wait() for child in children] == [0, 0], [child.err.read_text() for child in children]
    assert [child.err.read_text() for child in children] == ["", ""]
    assert used(tmp_path / "s") <= 22 * one  # each process has a file in hand that the other does not know of
    assert all(file.suffix == ".safetensors" for file in (tmp_path / "s").iterdir())


def test_which_encoder_it_is(tiny_path: Path, tmp_path: Path) -> None:
    from transformers import CLIPTextModel

    path = tmp_path / "m"
    shutil.copytree(tiny_path, path)

    def hashed() -> str:
        source = loading.source(ModelConfig(path=str(path)), str(path), path, {"text_encoder": CLIPTextModel}, dict)
        return encoders_hash(source, str(path))

    seen = {hashed()}
    (path / "unet/diffusion_pytorch_model.safetensors").unlink()
    (path / "scheduler/scheduler_config.json").write_text("{}")
    assert hashed() in seen
    deciding = ("text_encoder/model.safetensors", "text_encoder/config.json", "tokenizer/tokenizer.json")
    for name in (*deciding, "unet/config.json", "model_index.json"):
        data = (path / name).read_bytes()
        (path / name).write_bytes(data[:-2] + b" " + data[-2:])
        seen.add(hashed())
    assert len(seen) == 6
    hub = loading.Source(ModelConfig(path="me/fine"), tmp_path / "snapshots" / "c0ffee", {})
    assert encoders_hash(hub, "me/fine").startswith("me/fine@c0ffee")

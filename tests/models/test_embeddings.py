"""Every prompt is embedded once for all runs, and how many are cut is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from draftplus.errors import UserError, notice
from draftplus.models import embeddings
from draftplus.models.embedding_store import EmbeddingStore
from draftplus.models.embeddings import Embeddings
from draftplus.types import Conditioning
from tests.tiny import CPU, normal

READS = 5  # tokens, which are letters here


class Encoder:
    """Embeds letters; prompts differ in length, and long ones are cut. made: every prompt that it was called with."""

    def __init__(self, directory: Path | None, limit: int | None = None) -> None:
        self.made: list[str | None] = []
        self.state: str | None = None
        store = EmbeddingStore(lambda: {"encoder": "letters"}, CPU, directory, limit) if directory else None
        self.encode = Embeddings(self.embed, lambda: self.state, store)

    def embed(self, prompt: str | None) -> Conditioning:
        self.made.append(prompt)
        text = prompt or ""
        self.encode.cut(len(text), READS)
        self.encode.cut(len(text), 2 * READS, "the second text encoder")
        tokens = torch.tensor([ord(letter) for letter in text[:READS]] or [0])
        hidden = normal(256, 8, seed=0 if prompt is None else 1)[tokens][None].bfloat16()
        return Conditioning(hidden, None, {"pooled": hidden.mean(1)})

    def prepare(self, prompts: list[str | None], share: tuple[int, int] = (0, 1)) -> tuple[bool, list[int]]:
        told: list[int] = []
        return self.encode.prepare(prompts, lambda done, _: told.append(done), share), told


PROMPTS = ["cat", "dog", "cat", None, "", "elk", "dog"]
DISTINCT = ["cat", "dog", None, "", "elk"]


@pytest.fixture(autouse=True)
def all_notices() -> None:
    notice.cache_clear()


def same(a: Conditioning, b: Conditioning) -> bool:
    assert a.mask is not None and b.mask is not None
    return a.hidden.equal(b.hidden) and a.mask.equal(b.mask) and a.extras["pooled"].equal(b.extras["pooled"])


def test_nothing_is_embedded_twice(tmp_path: Path) -> None:
    bare, first, second = Encoder(None), Encoder(tmp_path), Encoder(tmp_path)
    assert first.prepare(PROMPTS) == (True, [0, 1, 2, 3, 4, 5])
    assert first.made == DISTINCT
    assert second.prepare([*PROMPTS, "bee"]) == (True, [5, 6])
    expected = bare.encode(PROMPTS)
    assert same(first.encode(PROMPTS), expected) and same(second.encode(PROMPTS), expected)
    assert first.made == DISTINCT and second.made == ["bee"]
    assert not bare.encode([None]).hidden.equal(bare.encode([""]).hidden), "this encoder knows no null prompt"


def test_without_prepare_too(tmp_path: Path) -> None:
    first, second = Encoder(tmp_path), Encoder(tmp_path)
    assert same(first.encode(PROMPTS), second.encode(PROMPTS))
    assert first.made == DISTINCT and second.made == []


def test_a_small_cache_in_memory_reads_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "CACHE_BYTES", 1)
    made = Encoder(tmp_path)
    made.prepare(PROMPTS)
    for _ in range(2):
        assert same(made.encode(PROMPTS), Encoder(None).encode(PROMPTS))
    assert made.made == DISTINCT and len(made.encode._rows) == 1


def test_every_process_embeds_its_share(tmp_path: Path) -> None:
    ranks = [Encoder(tmp_path), Encoder(tmp_path)]
    assert ranks[0].prepare(PROMPTS, (0, 2)) == (True, [0, 1, 2, 3])
    assert ranks[1].prepare(PROMPTS, (1, 2)) == (True, [0, 1, 2])
    assert [rank.prepare(PROMPTS) for rank in ranks] == [(True, [5])] * 2
    assert [rank.made for rank in ranks] == [DISTINCT[0::2], DISTINCT[1::2]]
    assert same(ranks[0].encode(PROMPTS), ranks[1].encode(PROMPTS))


def test_adapted_encoders_are_not_stored(tmp_path: Path) -> None:
    made = Encoder(tmp_path)
    made.prepare(["cat"])
    made.state = "adapted"
    assert made.prepare(["cat"]) == (False, [])
    made.encode(["cat", "dog"])
    assert made.made == ["cat", "cat", "dog"], "what the adapted encoder makes is another embedding"
    assert len(list(tmp_path.iterdir())) == 1


def test_without_a_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Encoder(None).prepare(PROMPTS) == (False, [])
    (tmp_path / "file").write_text("in the way")
    made = Encoder(tmp_path / "file")
    assert made.prepare(PROMPTS) == (False, [0]) and made.prepare(PROMPTS) == (False, [0])
    assert same(made.encode(PROMPTS), Encoder(None).encode(PROMPTS))
    assert capsys.readouterr().err.count("\n") == 1


def test_more_prompts_than_there_is_room_for(tmp_path: Path) -> None:
    made = Encoder(tmp_path / "size")
    made.prepare(["cat"])
    one = sum(file.stat().st_size for file in (tmp_path / "size").iterdir())
    made = Encoder(tmp_path / "s", 4 * one + one // 2)
    with pytest.raises(UserError, match=r"the embeddings of 100 prompts take .*DRAFTPLUS_CACHE_GB"):
        made.prepare([f"{number:03}" for number in range(100)])
    assert made.made == ["000"], "known from the first, and the others are not embedded"
    enough, less = ["000", "001", "002", "003"], Encoder(tmp_path / "s", 3 * one)
    assert made.prepare(enough) == (True, [1, 2, 3, 4])
    with pytest.raises(UserError, match="the embeddings of 4 prompts"):
        less.prepare(enough)
    assert less.made == []


def test_a_run_does_not_push_out_its_own(tmp_path: Path) -> None:
    made = Encoder(tmp_path / "size")
    made.prepare(["cat"])
    one = sum(file.stat().st_size for file in (tmp_path / "size").iterdir())
    made, later = (Encoder(tmp_path / "s", 5 * one) for _ in range(2))
    assert made.prepare(["cat", "dog", "bee"])[0]
    assert later.prepare(["elk", "fox", "cat"])[0]
    again = Encoder(tmp_path / "s")
    again.prepare(["elk", "fox", "cat", "dog", "bee"])
    assert set(again.made) < {"dog", "bee"} and again.made


def test_damage_found_late_is_mended(tmp_path: Path) -> None:
    made = Encoder(tmp_path)
    made.prepare(["cat"])
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    again = Encoder(tmp_path)
    assert again.prepare(["cat"]) == (True, [1]), "the header is whole"
    assert again.encode(["cat"]).hidden.equal(made.encode(["cat"]).hidden)
    assert again.made == ["cat"]
    last = Encoder(tmp_path)
    assert last.encode(["cat"]).hidden.equal(made.encode(["cat"]).hidden) and last.made == []


LONG = ["a cat", "a spotted cat", "a dog", "a wolf", None]


@pytest.mark.parametrize("shares", [1, 2])
def test_how_many_prompts_are_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str], shares: int) -> None:
    """Also where they were embedded earlier, or by other processes."""
    for time in range(2):
        notice.cache_clear()
        made = Encoder(tmp_path)
        if shares == 2 and time == 0:
            made.prepare(LONG, (0, 2))
            Encoder(tmp_path).prepare(LONG, (1, 2))
            assert capsys.readouterr().err == ""
        made.prepare(LONG)
        made.encode(LONG)
        first, second = capsys.readouterr().err.splitlines()
        assert "2 of 5 prompts are longer than the 5 tokens that the text encoder reads" in first
        assert "one with 13 tokens: 'a spotted cat'" in first
        assert "1 of 5 prompts are longer than the 10 tokens that the second text encoder reads" in second
        assert made.made == [] if time else True


def test_prompts_that_fit_are_not_spoken_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = Encoder(tmp_path)
    made.prepare(["a cat"])
    assert capsys.readouterr().err == ""
    made.encode(["a wolf", "a lemur"])  # later, and without being announced
    assert capsys.readouterr().err.count("\n") == 1

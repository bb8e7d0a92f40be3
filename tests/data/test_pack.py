"""Packed prompts: what is kept, what is told, and that training reads the same from them as from a file."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import shutil
import tarfile
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from draftplus.api.prompts import pack_prompts as api_pack
from draftplus.data import shards
from draftplus.data.batches import batch, visited
from draftplus.data.index import INDEX, Packed, Some, read_index
from draftplus.data.near import folded
from draftplus.data.pack import PackRules, pack_prompts
from draftplus.data.prompts import hold_out, load_prompts, normalized, read_prompts
from draftplus.data.show import describe_prompts
from draftplus.errors import UserError, notice
from draftplus.runs import checksums
from draftplus.runs.checksums import text_hash, texts_hash

PROMPTS = [f"a cat with {number} hats" for number in range(95)]


def write(path: Path, prompts: Sequence[str]) -> Path:
    path.write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")
    return path


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def texts(directory: Path) -> list[str]:
    """What a reader that knows nothing of draftplus finds: each KEY.txt."""
    found = []
    for path in sorted(directory.glob("*.tar")):
        with tarfile.open(path) as tar:
            found += [tar.extractfile(one).read().decode() for one in tar if one.name.endswith(".txt")]  # type: ignore[union-attr]
    return found


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "prompts.txt", PROMPTS)


def test_all_prompts_are_there_in_their_order_once(source: Path, tmp_path: Path) -> None:
    told = pack_prompts([source], tmp_path / "out", rules=PackRules(shard_size=10, held_out=0.1))
    packed = load_prompts(tmp_path / "out")
    assert isinstance(packed.train, Packed) and (told["train"], told["held_out"]) == (85, 10)
    assert sorted([*packed.train, *packed.held_out]) == sorted(PROMPTS)
    assert list(packed.train) == [prompt for prompt in PROMPTS if prompt not in set(packed.held_out)]
    assert texts(tmp_path / "out") == list(packed.train)
    assert len(list((tmp_path / "out").glob("0*.tar"))) == 9
    assert json.loads((tmp_path / "out" / "pack.json").read_text())["read"] == 95


def test_a_sequence_like_any_other(source: Path, tmp_path: Path) -> None:
    pack_prompts([source], tmp_path / "out", rules=PackRules(held_out=0))
    found = read_index(tmp_path / "out")
    assert found is not None and len(found[1]) == 0
    train = found[0]
    assert train[0] == PROMPTS[0] and train[-1] == PROMPTS[-1] and train[3:90:7] == PROMPTS[3:90:7]
    assert train[::-1] == PROMPTS[::-1] and list(train) == PROMPTS and PROMPTS[5] in train
    with pytest.raises(IndexError):
        train[95]
    packed, plain = load_prompts(tmp_path / "out"), load_prompts(source)  # nothing is held out: the rule of files
    assert (list(packed.train), packed.held_out) == (plain.train, plain.held_out)


def test_batches_and_hashes_are_those_of_a_list(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack_prompts([source], tmp_path / "out", rules=PackRules(held_out=0.1))
    packed = load_prompts(tmp_path / "out").train
    listed = list(packed)
    for step in (0, 3, 17, 400):
        assert batch(packed, step, 5, 6, 2) == batch(listed, step, 5, 6, 2)
    assert visited(packed, range(90), 5, 6) == visited(listed, range(90), 5, 6)
    monkeypatch.setattr(checksums, "CHUNK", 20)
    for some in (listed, listed[:40], listed[:1], [], ['"é\u2028\\', "猫"]):
        assert texts_hash(some) == text_hash(some)
    assert texts_hash(packed) == text_hash(listed)


@pytest.mark.parametrize("names", [None, "p-{000..006}.tar"])
def test_with_and_without_the_index(source: Path, tmp_path: Path, names: str | None) -> None:
    out = tmp_path / "out"
    pack_prompts([source], out / names if names else out, rules=PackRules(shard_size=20, held_out=7))
    train, held_out = map(list, read_index(out) or ([], []))
    everything = read_prompts(out)
    assert len(held_out) == 7 and everything == train + held_out
    (out / INDEX).unlink()
    prompts = load_prompts(out)
    assert (prompts.train, prompts.held_out, read_prompts(out)) == (train, held_out, everything)
    assert read_prompts(f"{out}/*0*.tar") == train if names is None else read_prompts(out / names) == train


def test_the_same_again_is_the_same_and_another_seed_holds_out_others(source: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        pack_prompts([source], tmp_path / name, rules=PackRules(seed=seed, held_out=9))
    a, b = (files(tmp_path / name) for name in "ab")
    assert a.keys() == b.keys() and {name for name in a if a[name] != b[name]} <= {INDEX}  # which has times
    assert load_prompts(tmp_path / "a").held_out[:] != load_prompts(tmp_path / "c").held_out[:]
    write(source, PROMPTS[::-1])
    pack_prompts([source], tmp_path / "d", rules=PackRules(held_out=9))
    assert set(load_prompts(tmp_path / "d").held_out) == set(load_prompts(tmp_path / "a").held_out)


def test_what_is_dropped_is_counted_and_shown(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"text": "a cat"}, {"text": "a cat"}, {"text": "A  Cat!"}, {"text": None}, {"text": " "}, {"text": "a\0dog"},
        {"text": "dog"}, {"text": "a dog " * 9}, {"text": "a cow in a field of grass"}, {"text": "a\ncow"},
        {"text": "a cow in a field of green grass"}, {"text": "\n".join(["a line"] * 60)},
    ]  # fmt: skip
    path = write(tmp_path / "rows.jsonl", [json.dumps(row) for row in rows])
    told = pack_prompts([path], tmp_path / "out", rules=PackRules(min_words=2, max_words=15, near=0.6, held_out=0))
    assert told["dropped"] == {
        "nearly repeated": 1, "over 50 lines": 1, "repeated": 1, "too long": 1, "too short": 1, "unusable": 3,
        "repeated but for case, punctuation or white space": 1,
    }  # fmt: skip
    assert told["examples"]["unusable"][0].endswith("line 4: text is null; it must be a string that is not empty.")
    assert told["examples"]["nearly repeated"] == ["a cow in a field of green grass (kept: a cow in a field of grass)"]
    assert read_prompts(tmp_path / "out") == ["a cat", "a cow in a field of grass", "a\ncow"]
    by_length = pack_prompts([path], tmp_path / "short", rules=PackRules(max_characters=5, held_out=0))
    assert by_length["train"] == 3 and by_length["dropped"]["too long"] == 4


def test_duplicates_may_be_kept_and_are_on_one_side(tmp_path: Path) -> None:
    source = write(tmp_path / "prompts.txt", [text for one in PROMPTS for text in (one, one.upper() + "!", one)])
    told = pack_prompts([source], tmp_path / "out", rules=PackRules(keep_duplicates=True, held_out=0.2))
    prompts = load_prompts(tmp_path / "out")
    assert (told["train"], told["held_out"], told["dropped"]) == (3 * 76, 3 * 19, {})
    assert not {folded(one) for one in prompts.train} & {folded(one) for one in prompts.held_out}


def test_the_split_of_a_source_is_kept_and_wins_over_training(tmp_path: Path) -> None:
    rows = [("a cat", "train"), ("A dog.", "held_out"), ("a dog", "train"), ("a cow", None), ("a dog", "held_out")]
    path = write(tmp_path / "rows.jsonl", [json.dumps({"prompt": text, "split": split}) for text, split in rows])
    told = pack_prompts([path], tmp_path / "out")
    prompts = load_prompts(tmp_path / "out")
    assert (list(prompts.train), list(prompts.held_out)) == (["a cat", "a cow"], ["A dog."])
    assert told["dropped"] == {"held out too": 1, "repeated but for case, punctuation or white space": 1}
    pack_prompts([tmp_path / "out"], tmp_path / "again")  # packed prompts are a source, and so are built-in ones
    assert load_prompts(tmp_path / "again").train[:] == ["a cat", "a cow"]
    pack_prompts(["animals", tmp_path / "out"], tmp_path / "both", rules=PackRules(held_out=3))
    assert len(load_prompts(tmp_path / "both").held_out) == 3
    animals = load_prompts("animals")
    pack_prompts(["animals"], tmp_path / "animals")
    assert list(load_prompts(tmp_path / "animals").held_out) == list(animals.held_out)


def test_a_changed_shard_is_seen_and_a_copy_is_not(source: Path, tmp_path: Path, capsys: Any) -> None:
    pack_prompts([source], tmp_path / "out", rules=PackRules(shard_size=50, held_out=0))
    shutil.copytree(tmp_path / "out", tmp_path / "copy", copy_function=shutil.copyfile)  # with other times
    copied = read_index(tmp_path / "copy")
    assert copied is not None and list(copied[0]) == PROMPTS
    shard = tmp_path / "copy" / "00000.tar"
    data = shard.read_bytes()
    shard.write_bytes(data.replace(b"a cat with 3 hats", b"a dog with 3 hats"))  # of the same size
    notice.cache_clear()
    changed = load_prompts(tmp_path / "copy")
    assert "a dog with 3 hats" in [*changed.train, *changed.held_out] and read_index(tmp_path / "copy") is None
    assert "00000.tar was changed; all shards are read instead" in capsys.readouterr().err
    shard.write_bytes(data)
    assert read_index(tmp_path / "copy") is not None
    shutil.copy(shard, tmp_path / "copy" / "more.tar")
    notice.cache_clear()
    assert read_index(tmp_path / "copy") is None and "more.tar was added" in capsys.readouterr().err
    (tmp_path / "copy" / "more.tar").unlink()
    (tmp_path / "copy" / "00001.tar").unlink()
    assert read_index(tmp_path / "copy") is None and "00001.tar was removed" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "other"])
def test_a_damaged_index_is_not_used(source: Path, tmp_path: Path, capsys: Any, damage: str) -> None:
    pack_prompts([source], tmp_path / "out", rules=PackRules(held_out=0))
    index = tmp_path / "out" / INDEX
    data = bytearray(index.read_bytes())
    data[-10] ^= damage == "flipped"
    index.write_bytes({"cut": data[:-5], "flipped": data, "emptied": b"", "other": b"[]\n" + data}[damage])
    notice.cache_clear()
    assert read_index(tmp_path / "out") is None and read_prompts(tmp_path / "out") == PROMPTS
    assert "is damaged" in capsys.readouterr().err


def test_headers_are_those_of_tarfile() -> None:
    for name, size in (("000000001.txt", 0), ("000000001.json", 77), ("x" * 100, 8**11 - 1)):
        info = tarfile.TarInfo(name)
        info.size = size
        assert shards._header(name, size) == info.tobuf(tarfile.USTAR_FORMAT)


def test_a_lone_prompt_of_several_lines_is_no_list(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(["a cat\non a mat"]))
    pack_prompts([path], tmp_path / "out")
    (tmp_path / "out" / INDEX).unlink()
    assert read_prompts(tmp_path / "out") == ["a cat\non a mat"]


def test_gzip_is_read_and_others_are_named(tmp_path: Path) -> None:
    whole = gzip.compress("\ufeffa cat\r\na dög\n".encode())
    (tmp_path / "prompts.TXT.gz").write_bytes(whole)
    (tmp_path / "table.csv.gz").write_bytes(gzip.compress(b"id,title\n1,a cow\n"))
    (tmp_path / "rows.json.gz").write_bytes(gzip.compress(b'["a fox"]'))
    assert read_prompts(tmp_path / "prompts.TXT.gz") == ["a cat", "a dög"]
    assert read_prompts(tmp_path / "table.csv.gz", "title") == ["a cow"]
    assert load_prompts(tmp_path / "rows.json.gz").train == ["a fox"]
    for content in (whole[:-12], whole[:10], b"a cat\n"):
        (tmp_path / "cut.txt.gz").write_bytes(content)
        with pytest.raises(UserError, match=r"cut\.txt\.gz' is truncated or not gzip"):
            read_prompts(tmp_path / "cut.txt.gz")
    (tmp_path / "latin.txt.gz").write_bytes(gzip.compress(b"a d\xf6g\n"))
    with pytest.raises(UserError, match=r"latin\.txt\.gz is not UTF-8"):
        read_prompts(tmp_path / "latin.txt.gz")
    for name, mend in (("p.txt.zst", "zstd -d"), ("p.jsonl.bz2", "bunzip2"), ("p.tar.zst", "zstd -d")):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(UserError, match=f"compressed: unpack it first, by {mend}"):
            pack_prompts([tmp_path / name], tmp_path / "out")


def test_nul_is_refused_in_training_and_counted_in_packing(tmp_path: Path) -> None:
    path = tmp_path / "wide.txt"
    path.write_bytes("a cat\na dog\n".encode("utf-16-le"))
    with pytest.raises(UserError, match=r"wide\.txt, line 1 contains NUL characters, as UTF-16 does"):
        load_prompts(path)
    with pytest.raises(UserError, match=r"no prompt is left of \d \(\d unusable\).*as UTF-16 does"):
        pack_prompts([path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("empty.txt", {}, r"no prompt is left of 0 \(none read\)"),
    ("table.csv", {"column": "captoin"}, r"no field named 'captoin'.*did you mean 'caption'\?"),
    ("latin.txt", {}, "not UTF-8"),
    ("cut.tar", {}, "truncated or not a tar file"),
    ("absent.txt", {}, "no prompt file"),
    ("table.csv", {"rules": PackRules(min_words=5, max_words=3)}, "--min-words 5 is above --max-words 3"),
    ("table.csv", {"rules": PackRules(near=0.3)}, "--near is 0.3; it must be from 0.5 to 1"),
    ("table.csv", {"rules": PackRules(near=0.9, keep_duplicates=True)}, "leave one of them out"),
    ("table.csv", {"rules": PackRules(held_out=1.5)}, "--held-out is 1.5"),
    ("table.csv", {"rules": PackRules(held_out=2)}, "--held-out 2 leaves nothing to train on"),
    ("table.csv", {"rules": PackRules(shard_size=0)}, "--shard-size is 0"),
    ("held.jsonl", {}, "only held-out prompts are left"),
]


@pytest.mark.parametrize(("name", "arguments", "words"), BAD, ids=[words for *_, words in BAD])
def test_bad_input_is_named_and_leaves_nothing(
    tmp_path: Path, name: str, arguments: dict[str, Any], words: str
) -> None:
    write(tmp_path / "empty.txt", ["", " "])
    write(tmp_path / "table.csv", ["id,caption", "1,a cat", "2,a dog"])
    write(tmp_path / "held.jsonl", ['{"prompt": "a cat", "split": "held_out"}'])
    (tmp_path / "latin.txt").write_bytes(b"a d\xf6g\n")
    with tarfile.open(tmp_path / "cut.tar", "w") as tar:
        info = tarfile.TarInfo("0.txt")
        info.size = 600
        tar.addfile(info, io.BytesIO(b"x" * 600))
    (tmp_path / "cut.tar").write_bytes((tmp_path / "cut.tar").read_bytes()[:900])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=words):
        pack_prompts([tmp_path / name], tmp_path / "out", **arguments)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("output", ["out.tar", "out/{0..10}.tar", "out/{a..c}.tar", "out/{00..01}-{0..1}.tar"])
def test_outputs_that_are_neither_a_directory_nor_a_range(source: Path, tmp_path: Path, output: str) -> None:
    with pytest.raises(UserError, match="give a directory of its own, or one range"):
        pack_prompts([source], tmp_path / output)


def test_nothing_is_overwritten_unasked(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack_prompts([source], out)
    before = files(out)
    with pytest.raises(UserError, match="is there already; name another one, or add --overwrite"):
        pack_prompts([source], out)
    assert files(out) == before
    pack_prompts([write(source, ["a cow", "a hen"])], out, rules=PackRules(held_out=0), overwrite=True)
    assert read_prompts(out) == ["a cow", "a hen"] and sorted(p.name for p in tmp_path.iterdir()) == [
        "out",
        source.name,
    ]
    (tmp_path / "mine").mkdir()
    write(tmp_path / "mine" / "novel.txt", ["once"])
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"mine' (is there already|holds something else)"):
            pack_prompts([source], tmp_path / "mine", overwrite=overwrite)
    with pytest.raises(UserError, match="is not a directory"):
        pack_prompts([source], source)
    with pytest.raises(UserError, match=r"cannot be made: .*txt cannot be written to"):
        pack_prompts([source], source / "below" / "this")
    if Path("/proc/self").exists():  # where nobody can make a directory
        with pytest.raises(UserError, match=r"cannot be made \("):
            pack_prompts([source], "/proc/prompts")
    with pytest.raises(UserError, match=r"3 shards for 1 prompts: name fewer"):
        pack_prompts([source], tmp_path / "few" / "{0..2}.tar", rules=PackRules(held_out=1))


def test_a_full_disk_leaves_what_was_there(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    pack_prompts([source], out)
    before = files(out)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out))

    monkeypatch.setattr(shards, "write_index", full)
    with pytest.raises(OSError, match="No space left"):
        pack_prompts([write(source, ["a cow", "a hen"])], out, overwrite=True)
    assert files(out) == before and sorted(p.name for p in tmp_path.iterdir()) == ["out", source.name]


def test_twenty_thousand_prompts_stay_on_the_disk(tmp_path: Path) -> None:
    source = write(tmp_path / "many.txt", [f"a picture of number {n}, {n * 7919 % 20011}" for n in range(20_000)])
    pack_prompts([source], tmp_path / "out", rules=PackRules(near=0.9))
    prompts = load_prompts(tmp_path / "out")
    assert isinstance(prompts.train, Packed) and isinstance(prompts.held_out, Packed)
    assert (len(prompts.train), len(prompts.held_out)) == (19_800, 200)
    assert not {normalized(one) for one in prompts.train} & {normalized(one) for one in prompts.held_out}


def test_what_is_shown(tmp_path: Path) -> None:
    rows = [{"text": text, "n": 1} for text in ["a cat", "a cat", "A cat.", "", *PROMPTS]]
    path = write(tmp_path / "rows.jsonl", [json.dumps(row) for row in rows])
    told = describe_prompts(path, examples=4)
    assert (told["prompts"], told["unusable"], told["distinct"], told["repeated"]) == (98, 1, 96, 1)
    assert told["repeated_but_for_form"] == 1 and told["columns"] == ["text", "n"]
    assert told["words"] == {"least": 2, "median": 5, "mean": round((95 * 5 + 3 * 2) / 98, 2), "most": 5}
    assert [(begin, count) for begin, _, count in told["histogram"] if count] == [(0, 3), (5, 95)]
    assert told["train"] is None and "line 4" in told["refused"] and len(told["examples"]) == 4
    pack_prompts([path], tmp_path / "out", rules=PackRules(held_out=6))
    packed = describe_prompts(tmp_path / "out")
    assert packed["indexed"] and (packed["train"], packed["held_out"], packed["prompts"]) == (90, 6, 96)
    assert [Path(one).name for one in packed["files"]] == ["00000.tar", "held_out.tar"]
    json.dumps(packed)


def test_prompts_of_too_many_tokens_are_dropped(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    from draftplus.models.single_file import CONFIGS, tokenizer
    from draftplus.rewards.clip import EMOJI_CLIP

    prompts = ["a cat", "a cat with " + "one hat and " * 30 + "tail", "a dog, " * 40, "a very fluffy rabbit"]
    path = write(tmp_path / "prompts.txt", prompts)
    told = api_pack(path, tmp_path / "out", rules=PackRules(max_tokens=77, held_out=0))
    assert told["dropped"] == {"with too many tokens": 2} and told["train"] == 2
    assert told["examples"]["with too many tokens"][0].startswith("96 tokens: a cat with one")
    assert isinstance(tokenizer(CONFIGS / "sd1"), CLIPTokenizer)
    few = api_pack(path, tmp_path / "few", rules=PackRules(max_tokens=4, held_out=0))  # with start and end
    assert few["train"] == 1 and list(load_prompts(tmp_path / "few").train) == ["a cat"]
    # of a directory; its vocabulary is that of emoji, in which other words have more tokens
    own = api_pack(path, tmp_path / "own", rules=PackRules(max_tokens=7, tokenizer=str(EMOJI_CLIP), held_out=0))
    assert own["train"] == 1 and own["rules"]["tokenizer"] == str(EMOJI_CLIP)


def test_a_tokenizer_that_is_not_there_is_named_before_anything_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "prompts.txt", ["a cat"])
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match=r"the tokenizer in '.*model' cannot be loaded"):
        api_pack(path, tmp_path / "out", rules=PackRules(max_tokens=7, tokenizer=str(tmp_path / "model")))
    with pytest.raises(UserError, match="--tokenizer counts for --max-tokens only"):
        api_pack(path, tmp_path / "out", rules=PackRules(tokenizer=str(tmp_path / "model")))
    with pytest.raises(UserError, match="--max-tokens is 0; it must be at least 1"):
        api_pack(path, tmp_path / "out", rules=PackRules(max_tokens=0))


def by_dictionary(prompts: Sequence[str]) -> tuple[list[str], list[str]]:
    """The rule of the split in plain words: a tenth of the distinct prompts, evenly spaced, at most 50."""
    distinct: dict[str, str] = {}
    for prompt in prompts:
        distinct.setdefault(normalized(prompt), prompt)
    n, keys = len(distinct), list(distinct)
    count = min(-(-n // 10), 50) if n >= 5 else 0
    chosen = [keys[(2 * i + 1) * n // (2 * count)] for i in range(count)]
    return [one for one in prompts if normalized(one) not in chosen], [distinct[key] for key in chosen]


@pytest.mark.parametrize("count", [1, 4, 5, 95, 2000])
def test_what_is_packed_without_a_held_out_part_is_split_on_the_disk(count: int, tmp_path: Path) -> None:
    prompts = [f"a cat with {number * 7919 % 1999} hats" for number in range(count)]
    prompts += [prompt.upper() for prompt in prompts[::3]]
    write(tmp_path / "prompts.txt", prompts)
    rules = PackRules(held_out=0, keep_duplicates=True, shard_size=500)
    pack_prompts([tmp_path / "prompts.txt"], tmp_path / "out", rules=rules)
    packed = load_prompts(tmp_path / "out")
    train, held_out = by_dictionary(prompts)
    assert isinstance(packed.train, Some) and (list(packed.train), packed.held_out) == (train, held_out)
    assert (packed.train[-1], packed.train[1:3]) == (train[-1], train[1:3]) and len(packed.train) == len(train)
    split = hold_out(prompts)
    assert (split.train, split.held_out) == (train, held_out)


def test_splitting_a_packed_set_takes_few_bytes_a_prompt(tmp_path: Path) -> None:
    count = 50_000
    write(tmp_path / "prompts.txt", [f"a rather long prompt, {'as people write them ' * 5}, {n}" for n in range(count)])
    pack_prompts([tmp_path / "prompts.txt"], tmp_path / "out", rules=PackRules(held_out=0))
    tracemalloc.start()
    try:
        prompts = load_prompts(tmp_path / "out")
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(prompts.train) == count - 50
    assert kept < 10 * count and peak < 120 * count  # bytes; their texts alone are 140 each

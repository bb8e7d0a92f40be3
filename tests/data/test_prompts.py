"""Prompt sets from every source, their held-out part, and bad files."""

import io
import tarfile

import pytest

from draftplus.data.prompts import hold_out, load_prompts, normalized, read_prompts
from draftplus.errors import UserError


def write_tar(path, members: dict[str, bytes]):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def shared(prompts) -> set[str]:
    return {normalized(p) for p in prompts.train} & {normalized(p) for p in prompts.held_out}


def test_animals_are_the_45_of_the_protocol_with_others_held_out():
    animals = load_prompts("animals")
    assert len(animals.train) == 45 and "a cat" in animals.train and "a kangaroo" in animals.train
    assert len(animals.held_out) >= 6 and not shared(animals)
    assert read_prompts("animals") == animals.train + animals.held_out


def test_txt_leaves_out_comments_and_empty_lines(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff# animals\r\n  a cat \r\n\r\n\t\r\na dög #1\r\n".encode())
    assert load_prompts(path).train == ["a cat", "a dög #1"]
    assert load_prompts(str(path)) == load_prompts(path)


def test_jsonl_reads_three_fields_and_splits(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": "a cat", "caption": "not this"}\n\n{"text": "a dog", "split": "held_out"}\n'
        '{"caption": " a\u2028cow ", "split": "train"}\n'
    )
    prompts = load_prompts(path)
    assert prompts.train == ["a cat", "a\u2028cow"] and prompts.held_out == ["a dog"]
    assert read_prompts(path) == ["a cat", "a dog", "a\u2028cow"]


def test_tar_reads_txt_members(tmp_path):
    members = {"0.jpg": b"picture", "0.txt": b"a cat\n", "1.json": b"{}", "1.txt": "a dög".encode(), "2.txt": b"  "}
    assert load_prompts(write_tar(tmp_path / "shard.tar", members)).train == ["a cat", "a dög"]


@pytest.mark.parametrize(
    ("count", "held_out"), [(1, 0), (4, 0), (5, 1), (10, 1), (11, 2), (45, 5), (500, 50), (9999, 50)]
)
def test_a_file_holds_out_a_tenth_at_most_50_from_five_prompts_on(tmp_path, count, held_out):
    names = [f"prompt {n}" for n in range(count)]
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(names))
    prompts = load_prompts(path)
    assert len(prompts.held_out) == held_out and not shared(prompts)
    assert sorted(prompts.train + prompts.held_out) == sorted(names)
    assert prompts == load_prompts(path)
    gaps = {b - a for a, b in zip(*[[names.index(p) for p in prompts.held_out][i:] for i in (0, 1)], strict=False)}
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_repeated_prompts_are_never_on_both_sides():
    prompts = [prompt for n in range(20) for prompt in (f"a cat {n}", f"A  CAT {n}", f"a cat {n}")]
    split = hold_out(prompts)
    assert len(split.held_out) == 2 and not shared(split)
    assert len(split.train) == 54  # what is not held out stays repeated


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", "empty.txt' has no prompts"),
        ("blank.txt", b"# only\n\n  \n", "has no prompts"),
        ("latin.txt", b"a cat\na d\xf6g\n", r"not UTF-8 text \(byte 9, line 2\)"),
        ("empty.jsonl", b"\n", "has no prompts"),
        ("broken.jsonl", b'{"prompt": "a"}\n\n{"prompt": \n', "line 3: not valid JSON"),
        ("list.jsonl", b'["a cat"]\n', "line 1: .* is not an object"),
        (
            "field.jsonl",
            b'{"prompt": "a"}\n{"promt": "a cat"}\n',
            "line 2: none of the fields prompt, text, caption, but only promt",
        ),
        ("number.jsonl", b'{"prompt": 3}\n', "line 1: prompt is 3; it must be a string"),
        ("blank.jsonl", b'{"prompt": " "}\n', "line 1: prompt is"),
        ("split.jsonl", b'{"prompt": "a cat", "split": "test"}\n', 'line 1: split is "test".*train or held_out'),
        ("both.jsonl", b'{"text": "A Cat"}\n{"text": "a  cat", "split": "held_out"}\n', "line 1 and line 2"),
        ("held.jsonl", b'{"text": "a cat", "split": "held_out"}\n', "only held-out prompts"),
        ("other.csv", b"a cat\n", "give a .txt, .jsonl or .tar"),
        ("no.tar", b"a cat\n", "truncated or not a tar"),
        ("empty.tar", b"", "truncated or not a tar"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        load_prompts(tmp_path / name)


def test_a_tar_without_captions_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"at least one \.txt member"):
        load_prompts(write_tar(tmp_path / "shard.tar", {"0.jpg": b"picture"}))


def test_a_caption_that_is_not_utf8_is_named(tmp_path):
    with pytest.raises(UserError, match=r"member 1\.txt is not UTF-8"):
        load_prompts(write_tar(tmp_path / "shard.tar", {"0.txt": b"a cat", "1.txt": b"\xff"}))


def test_a_tar_truncated_anywhere_is_refused(tmp_path):
    whole = write_tar(tmp_path / "whole.tar", {f"{n}.txt": f"a cat {n}".encode() for n in range(5)}).read_bytes()
    members = 5 * 1024  # a header and a block each; the end mark follows, and only its first block is needed
    for length in [*range(0, members, 97), 1024, 2048, 3072, 4096, members, members + 511]:
        (tmp_path / "short.tar").write_bytes(whole[:length])
        with pytest.raises(UserError, match="truncated"):
            load_prompts(tmp_path / "short.tar")


def test_a_tar_damaged_inside_is_refused(tmp_path):
    path = write_tar(tmp_path / "shard.tar", {f"{n}.txt": b"a cat" for n in range(5)})
    data = bytearray(path.read_bytes())
    data[2048:2560] = b"x" * 512  # a header, where tarfile stops without a word
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"neither a member nor the end mark at byte 2048"):
        load_prompts(path)


def test_unknown_sets_and_missing_files(tmp_path):
    with pytest.raises(UserError, match=r"no prompt set 'animal'.*'animals'"):
        load_prompts("animal")
    with pytest.raises(UserError, match=r"no prompt file '.*absent\.txt'"):
        load_prompts(tmp_path / "absent.txt")
    with pytest.raises(UserError, match="is a directory"):
        load_prompts(tmp_path)

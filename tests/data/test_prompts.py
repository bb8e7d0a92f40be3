"""Prompt sets from every source, their held-out part, and bad files."""

import io
import sys
import tarfile
import tracemalloc

import pytest

from draftplus.data.near import folded
from draftplus.data.prompts import PromptSet, hold_out, load_prompts, normalized, read_prompts
from draftplus.errors import UserError


def write_tar(path, members: dict[str, bytes], compression: str = ""):
    with tarfile.open(path, f"w:{compression}") as tar:
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


def test_parti_is_built_in_and_holds_a_tenth_out():
    parti = load_prompts("parti")
    assert (len(parti.train), len(parti.held_out)) == (1467, 164) and not shared(parti)
    assert {folded(one) for one in parti.train}.isdisjoint(folded(one) for one in parti.held_out)


def test_txt_leaves_out_empty_lines_only(tmp_path):
    path = tmp_path / "prompts.TXT"
    path.write_bytes("\ufeff#1 dad mug\r\n  a cat \r\n\r\n\t\r\na dög #1\r\n".encode())
    assert load_prompts(path).train == ["#1 dad mug", "a cat", "a dög #1"]
    assert load_prompts(str(path)) == load_prompts(path)


def test_a_line_ends_at_cr_and_lf_and_nowhere_else(tmp_path):
    inside = [f"a{character}b" for character in "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"]
    path = tmp_path / "prompts.txt"
    path.write_bytes(f"{inside[0]}\n{inside[1]}\r{inside[2]}\r\n{chr(10).join(inside[3:])}".encode())
    assert read_prompts(path) == inside


def test_jsonl_reads_three_fields_and_splits(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": "a cat", "caption": "not this"}\n\n{"text": "a dog", "split": "held_out"}\n'
        '{"caption": " a\u2028cow ", "split": "train"}\n'
    )
    prompts = load_prompts(path)
    assert prompts.train == ["a cat", "a\u2028cow"] and prompts.held_out == ["a dog"]
    assert read_prompts(path) == ["a cat", "a dog", "a\u2028cow"]


def test_json_is_a_list_of_strings_or_objects(tmp_path):
    path = tmp_path / "prompts.JSON"
    path.write_text('["a cat", {"caption": "a dog", "split": "held_out"}, {"prompt": "a\\u2028cow"}]')
    prompts = load_prompts(path)
    assert prompts.train == ["a cat", "a\u2028cow"] and prompts.held_out == ["a dog"]


@pytest.mark.parametrize(("name", "mark"), [("table.csv", ","), ("table.TSV", "\t")])
def test_tables(tmp_path, name, mark):
    path = tmp_path / name
    rows = [
        ["id", "caption", "title"],
        ["1", f'"a ""big""{mark} cat\u2028"', "A"],
        ["2", '"a\ndog"', "B"],
        [],
        ["3", "é", "C"],
    ]
    path.write_bytes("\r\n".join(mark.join(row) for row in rows).encode("utf-8-sig"))
    assert read_prompts(path) == [f'a "big"{mark} cat', "a\ndog", "é"]
    assert read_prompts(path, "title") == ["A", "B", "C"]
    path.write_text(f"caption{mark}split\na cat{mark}train\na dog{mark}held_out\na cow{mark}\n")
    assert load_prompts(path) == PromptSet(["a cat", "a cow"], ["a dog"])


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "table.parquet"
    whole = {"id": [1, 2], "caption": ["a cat", "a\u2028dog"], "alt": pyarrow.array(["x", "y"]).dictionary_encode()}
    parquet.write_table(pyarrow.table(whole), path, row_group_size=1)
    assert read_prompts(path) == ["a cat", "a\u2028dog"] and read_prompts(path, "alt") == ["x", "y"]
    with pytest.raises(UserError, match="row 1: id is 1; it must be a string"):
        load_prompts(path, "id")
    with pytest.raises(UserError, match=r"no field named 'nothing', which data\.column asks for, but id, caption, alt"):
        load_prompts(path, "nothing")
    parquet.write_table(pyarrow.table({"text": ["a cat", None]}), path)
    with pytest.raises(UserError, match=r"table\.parquet, row 2: text is null"):
        load_prompts(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="damaged or not a parquet file"):
        load_prompts(path)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "table.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"pip install 'draftplus\[parquet\]'"):
        load_prompts(tmp_path / "table.parquet")


def test_a_column_of_jsonl_and_of_what_has_none(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "not this", "blip": "a cat"}\n{"blip": "a dog"}\n')
    assert read_prompts(path, "blip") == ["a cat", "a dog"]
    with pytest.raises(UserError, match=r"line 2: no field named 'prompt', which data\.column asks for, but blip"):
        load_prompts(path, "prompt")
    (tmp_path / "prompts.txt").write_text("a cat")
    for source in (tmp_path / "prompts.txt", "animals"):
        with pytest.raises(UserError, match=r"has no columns: leave data\.column out"):
            load_prompts(source, "blip")
    assert read_prompts(tmp_path / "prompts.txt", "blip") == ["a cat"]  # eval.prompts beside data of another kind


@pytest.mark.parametrize("ending", ["tar", "tar.gz", "TGZ"])
@pytest.mark.parametrize("compression", ["", "gz", "bz2", "xz"])
def test_tars_may_be_compressed(tmp_path, ending, compression):
    members = {f"{n}.TXT": f"a cat {n}".encode() for n in range(4)}
    path = write_tar(tmp_path / f"shard.{ending}", members, compression)
    assert load_prompts(path).train == [f"a cat {n}" for n in range(4)]
    if compression:
        path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2])
        with pytest.raises(UserError, match=r"truncated or not a tar file \(.*\): download"):
            load_prompts(path)


def test_a_sample_gives_one_caption_whatever_its_form(tmp_path):
    """A sample is what is equal up to the last dot, as in a folder of pictures with captions beside them."""
    members = {
        "a/1.5 cat.jpg": b"", "a/1.5 cat.json": b'{"caption": "not this", "blip": "A"}', "a/1.5 cat.txt": b"a cat",
        "a/1.6 cat.caption": b"a dog", "a/1.6 cat.txt.bak": b"no", "b/1.json": b'{"text": "a cow", "blip": "B"}',
        "a/._1.txt": b"\x00\x05\x16\xff",
    }  # fmt: skip
    path = write_tar(tmp_path / "shard.tar", members)
    assert read_prompts(path) == ["a cat", "a dog", "a cow"]
    assert read_prompts(path, "blip") == ["A", "B"]


def test_shards(tmp_path):
    for n in range(12):
        write_tar(tmp_path / f"{n:05d}.tar", {"0.txt": f"a cat {n}".encode()}, "gz" if n % 2 else "")
    (tmp_path / "notes.md").write_text("no shard")
    whole = [f"a cat {n}" for n in range(12)]
    for source in (tmp_path, f"{tmp_path}/*.tar", f"{tmp_path}/{{00000..00011}}.tar", f"{tmp_path}/0000?.tar"):
        assert read_prompts(source) == (whole[:10] if "?" in str(source) else whole)
    with pytest.raises(UserError, match=r"no prompt file .*00012\.tar and 87 more"):
        load_prompts(f"{tmp_path}/{{00000..00099}}.tar")
    with pytest.raises(UserError, match="more than 100,000 files"):
        load_prompts(f"{tmp_path}/{{0..99999999999}}.tar")
    with pytest.raises(UserError, match="no prompt file"):
        load_prompts(f"{tmp_path}/shard-*.tar")
    with pytest.raises(UserError, match=r"cannot read prompts from '.*notes\.md'"):
        load_prompts(f"{tmp_path}/n*.md")
    write_tar(tmp_path / "00003.tar", {"0.txt": b"a cat", "1.txt": b"\xff"})
    with pytest.raises(UserError, match=r"00003\.tar, member 1\.txt is not UTF-8"):
        load_prompts(tmp_path)


def test_a_name_with_brackets_is_itself(tmp_path):
    (tmp_path / "[a]{1..2}.txt").write_text("a cat")
    assert read_prompts(tmp_path / "[a]{1..2}.txt") == ["a cat"]


@pytest.mark.parametrize("apart", [False, True])
def test_two_members_of_one_name_are_refused_for_that_reason(tmp_path, apart):
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for name in ["1.txt", *["0.txt"] * apart, "1.txt"]:
            info = tarfile.TarInfo(name)
            info.size = 5
            tar.addfile(info, io.BytesIO(b"a cat"))
    with pytest.raises(UserError, match=r"two members named 1\.txt: rename or remove one"):
        load_prompts(tmp_path / "shard.tar")


def test_a_link_to_a_caption_is_not_left_out(tmp_path):
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        info = tarfile.TarInfo("1.txt")
        info.type, info.linkname = tarfile.SYMTYPE, "0.txt"
        tar.addfile(info)
    with pytest.raises(UserError, match=r"member 1\.txt is a link"):
        load_prompts(tmp_path / "shard.tar")


def test_a_list_of_prompts_in_a_tar_is_not_one_prompt(tmp_path):
    path = tmp_path / "shard.tar"
    for members in ({"prompts.txt": b"a cat\na dog\n"}, {"a.txt": b"a cat\n" * 51, "b.txt": b"a dog"}):
        with pytest.raises(UserError, match=r"lines, but a member is one prompt; unpack it"):
            load_prompts(write_tar(path, members))
    assert read_prompts(write_tar(path, {"0.jpg": b"", "0.txt": b"a cat,\non a mat"})) == ["a cat,\non a mat"]


@pytest.mark.parametrize("name", ["deep.jsonl", "deep.json", "deep.tar"])
def test_lists_within_lists(tmp_path, name):
    data = b"[" * 200_000 + b"]" * 200_000
    path = tmp_path / name
    write_tar(path, {"1.json": data}) if name == "deep.tar" else path.write_bytes(data)
    with pytest.raises(UserError, match=f"{name}.*too deep"):
        load_prompts(path)


def test_a_file_of_many_prompts_is_read_line_by_line(tmp_path):
    path = tmp_path / "many.txt"
    path.write_bytes(b"".join(b"a photograph of a cat number %d\n" % n for n in range(20_000)))
    tracemalloc.start()
    prompts = load_prompts(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(prompts.train) == 19_950 and len(prompts.held_out) == 50
    assert peak < 600 * 20_000, "bytes, of which the prompts themselves are 90 each"


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
        ("blank.txt", b"\n\n  \n", "has no prompts"),
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
        ("half.jsonl", b'{"prompt": "a cat"}\n{"prompt": "a \\ud83d cat"}\n', r"half\.jsonl, line 2: prompt .*ud83d"),
        ("half.json", b'["a \\udc00 cat"]', r"half\.json, entry 1: prompt contains"),
        ("object.json", b'{"prompts": ["a cat"]}', r"object\.json holds .*it must be a list"),
        ("number.json", b'["a cat", 3]', "entry 2: prompt is 3"),
        ("broken.json", b'["a cat"', r"broken\.json: not valid JSON"),
        ("none.csv", b"", "line 1: none of the fields .* no field at all"),
        ("headless.csv", b"a cat\na dog\n", "line 1: none of the fields .*only a cat: .*data.column"),
        ("twice.csv", b"text,text\na,b\n", "two columns are named 'text'"),
        ("empty.csv", b"id,text\n1,\n", "line 2: text is"),
        ("short.csv", b"id,text\n1,a cat\n2,a cat, on a mat\n", "line 3: 3 cells, but line 1 names 2 columns"),
        ("open.csv", b'id,text\n1,"a cat\n2,a dog\n', r"open\.csv, line \d: "),
        ("latin.csv", b"text\na d\xf6g\n", r"not UTF-8 text \(byte 8, line 2\)"),
        ("other.xlsx", b"a cat\n", "give a .txt, .jsonl, .json, .csv, .tsv, .parquet or .tar"),
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

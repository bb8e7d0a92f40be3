"""Reading files of unknown origin: tensors, or a plain refusal."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from draftplus.errors import UserError
from draftplus.weights import first_line, read_header, read_state_dict, sort_metadata

TENSORS = {"a": torch.arange(3.0), "b": torch.eye(2)}


def test_tensors_come_back(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "w.safetensors")
    torch.save(TENSORS, tmp_path / "w.ckpt")
    torch.save({"state_dict": TENSORS, "epoch": 3}, tmp_path / "w.pt")
    torch.save({**TENSORS, "epoch": 3}, tmp_path / "w.bin", _use_new_zipfile_serialization=False)
    for file in tmp_path.iterdir():
        found = read_state_dict(file)
        assert found.keys() == TENSORS.keys() and all(torch.equal(found[k], TENSORS[k]) for k in found), file


def test_what_a_file_says_of_itself_has_one_order(tmp_path: Path) -> None:
    told = {"format": "pt", "b": 'quoted "é"', "a": "1", "c": ""}
    files = [tmp_path / f"{index}.safetensors" for index in range(20)]
    for file in files:  # in as many orders as safetensors draws
        save_file(TENSORS, file, metadata=told)
        sort_metadata(file)
    assert len({file.read_bytes() for file in files}) == 1
    assert read_header(files[0])[1] == told
    assert all(torch.equal(value, TENSORS[name]) for name, value in read_state_dict(files[0]).items())


@pytest.mark.parametrize("content", [[1, 2], None, 3, torch.zeros(2), {"state_dict": 5}], ids=str)
def test_something_else_than_tensors_by_name(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(UserError, match="expected tensors by name"):
        read_state_dict(tmp_path / "w.pt")


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    (tmp_path / "short.safetensors").write_bytes(b"abc")
    (tmp_path / "empty.ckpt").write_bytes(b"")
    for name in ("no.safetensors", "no.ckpt", "short.safetensors", "empty.ckpt"):
        with pytest.raises(UserError, match=f"{name}: damaged or not a"):
            read_state_dict(tmp_path / name)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_no_bytes_end_in_a_traceback(tmp_path: Path) -> None:
    """Random bytes, text, and whole files with some bytes changed: each is read or refused."""
    draw, file, outcomes = random.Random(0), tmp_path / "w.ckpt", set()
    torch.save(TENSORS, file)
    new = file.read_bytes()
    torch.save(TENSORS, file, _use_new_zipfile_serialization=False)
    old = file.read_bytes()
    for i in range(200):
        if i % 4 == 0:
            data = bytearray(draw.randbytes(draw.randrange(200)))
        elif i % 4 == 1:
            data = bytearray(draw.choices(b'hello world\n{}"', k=30))
        else:
            data = bytearray(new if i % 4 == 2 else old)
            for _ in range(3):
                data[draw.randrange(len(data))] = draw.randrange(256)
        file.write_bytes(data)
        try:
            read_state_dict(file)
            outcomes.add("read")
        except UserError as error:
            assert str(file) in str(error) and "\n" not in str(error)
            outcomes.add("refused")
    assert "refused" in outcomes


def test_the_first_line_of_an_error() -> None:
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(ValueError("\n  one \n")) == "one"
    assert first_line(RuntimeError("Error(s):\n\tmissing key a\n\tmissing key b")) == "Error(s): missing key a"
    assert first_line(EOFError()) == "EOFError"

"""Properties of the tables and texts from which the embedded model is made."""

from __future__ import annotations

import io
import pickle
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools" / "emoji"
ASSETS = Path(__file__).resolve().parents[2] / "src" / "draftplus" / "assets"


@pytest.fixture(autouse=True)
def tools_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))
    for name in ("subjects", "perceptual"):
        sys.modules.pop(name, None)


def test_the_published_protocol_is_known_and_disjoint_from_the_held_out_animals():
    import subjects

    assert len(subjects.PROTOCOL) == 45
    assert not set(subjects.PROTOCOL) & set(subjects.HELD_OUT)
    names = [name for names in subjects.ANIMALS.values() for name in names]
    assert len(names) == len(set(names)), "one picture belongs to one animal"
    assert not subjects.TWINS & set(names)


def test_captions_name_what_they_are_told():
    import subjects

    assert subjects.prompt("ant") == "an ant"
    assert subjects.prompt("cat", "flat") == "a cat in flat style"
    assert subjects.prompt("owl", "3d", "blue") == "an owl in 3d style on a blue background"


def test_every_animal_keeps_styles_to_train_on():
    import subjects

    for animal in subjects.ANIMALS:
        held = [style for style in subjects.STYLES if subjects.is_held_out(animal, style)]
        assert len(held) <= 3, animal


def test_prompt_files_are_the_tables():
    import subjects

    for file, animals in {"animals": subjects.PROTOCOL, "animals_held_out": subjects.HELD_OUT}.items():
        lines = (ASSETS / "prompts" / f"{file}.txt").read_text().splitlines()
        assert lines == [subjects.prompt(animal) for animal in animals]


def test_the_unpickler_refuses_code():
    from perceptual import ArraysOnly

    with pytest.raises(pickle.UnpicklingError, match=r"refused to load .*system"):
        ArraysOnly(io.BytesIO(b"cposix\nsystem\n(S'true'\ntR.")).load()

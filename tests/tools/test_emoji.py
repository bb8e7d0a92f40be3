"""Properties of the tables and texts from which the embedded model is made."""

from __future__ import annotations

import io
import json
import pickle
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from draftplus.data.pairs import read_pairs

TOOLS = Path(__file__).resolve().parents[2] / "tools" / "emoji"
ASSETS = Path(__file__).resolve().parents[2] / "src" / "draftplus" / "assets"


@pytest.fixture(autouse=True)
def tools_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))
    for name in ("subjects", "perceptual", "pairs"):
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


def drawn(seed: int, *names: str) -> dict[str, Image.Image]:
    """A picture of each name, no two alike."""
    source = np.random.default_rng(seed)
    return {name: Image.fromarray(source.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for name in names}


def items(*names: str):
    import pairs

    return [pairs.Item(animal, None, None, drawn(i, *names)) for i, animal in enumerate(("cat", "dog"))]


def test_no_pair_is_of_an_animal_that_fine_tuning_is_measured_on():
    import pairs
    import subjects

    assert set(pairs.VALIDATION) < set(subjects.PROTOCOL)
    assert not set(subjects.PROTOCOL) & set(subjects.HELD_OUT)


def test_training_captions_name_no_held_out_style():
    import pairs
    import subjects

    said = pairs.captions(list(subjects.PROTOCOL), 40, random.Random(0), held_out=False)
    named = {(animal, style) for animal, style, _ in said if style}
    assert named and not any(subjects.is_held_out(*pair) for pair in named)
    assert any(style is None and ground is None for _, style, ground in said)
    validated = pairs.captions(list(subjects.PROTOCOL), 40, random.Random(0), held_out=True)
    assert any(subjects.is_held_out(animal, style) for animal, style, _ in validated if style)


@pytest.mark.parametrize("renders", [(), ("render", "on unguided", "recoloured", "restyled")])
def test_pairs_are_read_as_their_rules_say(tmp_path: Path, renders: tuple[str, ...]):
    import pairs

    made = items("own", "hurried", "unguided", *renders)
    counts = pairs.write(made, tmp_path, "train", random.Random(0))
    read = read_pairs(tmp_path / "train.jsonl")
    rules = [json.loads(line)["rule"] for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert len(read) == sum(counts.values()) == len(rules)
    without = {"render over the model's own", "render over an unguided one", "another background", "another style"}
    assert set(rules) == set(pairs.RULES) - ({"guided over unguided"} if renders else without)
    assert {read.caption(i) for i in range(len(read))} == {"a cat", "a dog"}
    firsts = set()
    for i, rule in enumerate(rules):
        if rule == "more steps over fewer":
            better, worse = read.pictures(i) if read.label(i) > 0.5 else read.pictures(i)[::-1]
            own = made[read.caption(i) == "a dog"].pictures
            assert (better.permute(1, 2, 0).numpy() == np.asarray(own["own"])).all()
            assert (worse.permute(1, 2, 0).numpy() == np.asarray(own["hurried"])).all()
        assert max(read.label(i), 1 - read.label(i)) == pytest.approx(pairs.RULES[rule])
        if read.label(i) != 0.5:
            firsts.add(read.label(i) > 0.5)
    assert firsts == {True, False}, "the better picture is not always on the same side"


def test_another_caption_is_of_another_animal():
    import pairs

    made = items("own", "hurried", "unguided")
    for item in made:
        strangers = [other for other in made if other is not item]
        found = [worse for rule, _, worse in pairs.compare(item, strangers, random.Random(0)) if "caption" in rule]
        assert found == [strangers[0].pictures["own"]]

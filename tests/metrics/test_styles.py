"""The words that styles are asked for by are those that the embedded model was trained on."""

from __future__ import annotations

from pathlib import Path

import pytest

from draftplus.metrics.styles import STYLES, style_captions

ROOT = Path(__file__).parents[2]


def test_styles_are_those_of_the_model() -> None:
    text = " ".join((ROOT / "src" / "draftplus" / "assets" / "README.md").read_text(encoding="utf-8").split())
    assert f"style words are {', '.join(STYLES[:-1])} and {STYLES[-1]}; the background words" in text


@pytest.mark.parametrize(
    ("prompt", "flat"),
    [
        ("a cat", "a cat in flat style"),
        ("an owl on a blue background", "an owl in flat style on a blue background"),
        ("a cat in 3d style on a red background", "a cat in flat style on a red background"),
        ("a cat in noto style", "a cat in flat style"),
    ],
)
def test_captions(prompt: str, flat: str) -> None:
    captions = style_captions(prompt)
    assert len(captions) == len(set(captions)) == 7
    assert captions[STYLES.index("flat")] == flat

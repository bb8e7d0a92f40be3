"""Near duplicates against every pair compared by hand."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from draftplus.data.near import MISSED, bands_of, folded, near_duplicates


def pairs(prompt: str) -> set[tuple[str, ...]]:
    words = folded(prompt).split()
    return set(pairwise(words)) if len(words) > 1 else {tuple(words)}


def similarity(one: set[tuple[str, ...]], other: set[tuple[str, ...]]) -> float:
    return len(one & other) / len(one | other)


def mutants(count: int) -> list[str]:
    """Prompts of 12 words, many of them an earlier one with a word or two changed."""
    draw = random.Random(1)
    words = [f"w{number}" for number in range(400)]
    made: list[list[str]] = []
    for _ in range(count):
        if made and draw.random() < 0.6:
            one = [*draw.choice(made)]
            for _ in range(draw.randint(0, 3)):
                one[draw.choice([0, draw.randrange(12)])] = draw.choice(words)
        else:
            one = draw.choices(words, k=12)
        made.append(one)
    return [" ".join(one) for one in made]


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.9])
def test_it_finds_what_comparing_all_pairs_finds(threshold: float) -> None:
    prompts = mutants(400)
    found, sets = near_duplicates(prompts, threshold).tolist(), [pairs(prompt) for prompt in prompts]
    missed = 0
    for number, before in enumerate(found):
        if before >= 0:
            assert before < number and found[before] == -1
            assert similarity(sets[number], sets[before]) >= threshold
        else:
            kept = [other for other in range(number) if found[other] == -1]
            missed += any(similarity(sets[number], sets[other]) >= threshold for other in kept)
    dropped = sum(before >= 0 for before in found)
    assert dropped > 40 and missed <= max(2, 0.02 * dropped)


def test_the_bands_miss_few_at_the_threshold_and_there_are_not_more_than_are_needed() -> None:
    for threshold in (0.5, 0.6, 0.75, 0.9, 1.0):
        bands, rows = bands_of(threshold)
        assert (1 - threshold**rows) ** bands <= MISSED and bands * rows <= 128


def test_single_words_and_pairs() -> None:
    prompts = ["cat", "Cat!", "a cat", "cat a", "the a cat", "dog", "...", "!!!"]
    assert near_duplicates(prompts, 1.0).tolist() == [-1, 0, -1, -1, -1, -1, -1, -1]
    assert near_duplicates(prompts, 0.5).tolist() == [-1, 0, -1, -1, 2, -1, -1, -1]  # {a cat} in {the a, a cat}
    assert near_duplicates(["a cat"], 0.9).tolist() == [-1]


def test_a_template_that_all_share_is_no_duplicate_and_ends() -> None:
    prompts = [f"a photo of a large animal, number {number} of {number * 7919 % 4001}" for number in range(4000)]
    assert (near_duplicates(prompts, 0.9) == -1).all()


def test_the_order_of_equals_decides_and_nothing_else() -> None:
    prompts = mutants(200)
    assert near_duplicates(prompts, 0.7).tolist() == near_duplicates(prompts, 0.7).tolist()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("A Cat, sitting!", "a cat sitting"),
        ("a\n cat\u3000sitting", "a cat sitting"),
        ("Straße — Nacht", "STRASSE nacht"),
        ("ｆｕｌｌ ① width", "full 1 width"),
    ],
)
def test_folding(one: str, other: str) -> None:
    assert folded(one) == folded(other) != folded("another")


def test_folding_keeps_what_is_not_punctuation() -> None:
    assert folded("1.5") != folded("15") and folded("🐱") == "🐱" and folded("?!") == "?!"
    assert len({folded(text) for text in ("猫", "犬", "c#", "c++", "c")}) == 4  # + is no punctuation, # is

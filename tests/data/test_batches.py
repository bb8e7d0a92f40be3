"""Batches as a pure function of (seed, step, rank)."""

import re
from collections import Counter

import pytest

from draftplus.data.batches import batch, check_batch_sizes, steps_of_epochs
from draftplus.errors import UserError

PROMPTS = [f"prompt {n}" for n in range(10)]


def stream(steps: int, size: int, repeats: int = 1, seed: int = 0, prompts=PROMPTS) -> list[str]:
    return [p for step in range(steps) for p in batch(prompts, step, seed, size, repeats).prompts]


def test_each_epoch_has_every_prompt_once_across_batch_boundaries():
    drawn = stream(steps=15, size=4)  # 60 draws, 6 epochs of 10 in batches of 4
    for epoch in range(6):
        assert sorted(drawn[10 * epoch : 10 * (epoch + 1)]) == sorted(PROMPTS)
    assert drawn[:10] != drawn[10:20] != PROMPTS


def test_order_depends_on_the_seed_and_nothing_else():
    assert stream(5, 4, seed=1) == stream(5, 4, seed=1) != stream(5, 4, seed=2)
    assert stream(10, 2) == stream(5, 4) == stream(2, 10)


@pytest.mark.parametrize("world_size", [2, 3, 6, 12])
@pytest.mark.parametrize("repeats", [1, 3, 4])
def test_ranks_together_are_the_single_process(world_size, repeats):
    for step in range(7):
        whole = batch(PROMPTS, step, 0, 12, repeats)
        shares = [batch(PROMPTS, step, 0, 12, repeats, rank, world_size) for rank in range(world_size)]
        assert [p for share in shares for p in share.prompts] == whole.prompts
        assert [i for share in shares for i in share.indices] == whole.indices == list(range(12))
        assert {len(share) for share in shares} == {12 // world_size}


def test_images_of_a_prompt_are_neighbours_and_the_prompts_those_of_a_smaller_batch():
    repeated = batch(PROMPTS, 3, 0, 12, images_per_prompt=3)
    single = batch(PROMPTS, 3, 0, 4)
    assert repeated.prompts == [prompt for prompt in single.prompts for _ in range(3)]


def test_a_batch_may_be_larger_than_the_prompt_set():
    counts = Counter(batch(["a", "b", "c"], 0, 0, 8).prompts)
    assert set(counts) == {"a", "b", "c"} and max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize(("epochs", "size", "repeats"), [(1, 4, 1), (3, 4, 2), (2, 16, 1), (1, 10, 10), (0, 4, 1)])
def test_steps_of_epochs_is_the_fewest_that_suffice(epochs, size, repeats):
    steps = steps_of_epochs(epochs, len(PROMPTS), size, repeats)

    def rounds(steps: int) -> int:
        counts = Counter(stream(steps, size, repeats))
        return min(counts[prompt] for prompt in PROMPTS) // repeats

    assert rounds(steps) >= epochs and (steps == 0 or rounds(steps - 1) < epochs)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((8, 8, 3, 1), "train.global_batch_size=8 .*data.images_per_prompt=3"),
        ((8, 8, 1, 3), "train.global_batch_size=8 .*by 3 ranks.\nUse train.global_batch_size=9 or [24] ranks"),
        (
            (8, 3, 1, 1),
            r"train.global_batch_size=8 .*by train.micro_batch_size=3.\nUse train.global_batch_size=9 or "
            r"train.micro_batch_size=[24], for example",
        ),
        (
            (8, 8, 1, 2),
            "train.global_batch_size=8 gives 4 images on each of 2 ranks, .*train.micro_batch_size=8.\n"
            "Use train.global_batch_size=16 or train.micro_batch_size=4",
        ),
        ((8, 1, 1, 1, 3), "train.global_batch_size=8 .*objective.ddpo.updates=3"),
        (
            (8, 4, 1, 2, 2),
            "train.global_batch_size=8 gives 2 images in each of 2 updates on each of 2 ranks, .*=4.\n"
            "Use train.global_batch_size=16 or train.micro_batch_size=2",
        ),
        ((0, 1, 1, 1), "train.global_batch_size=0: it must be at least 1"),
        ((8, 0, 1, 1), "train.micro_batch_size=0"),
        ((8, 8, 0, 1), "data.images_per_prompt=0"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(sizes, words):
    with pytest.raises(UserError, match=words):
        check_batch_sizes(*sizes)


@pytest.mark.parametrize("sizes", [(8, 1, 3, 1), (8, 1, 1, 3), (8, 3, 1, 2), (8, 1, 1, 2, 3), (8, 4, 1, 2, 2)])
def test_the_batch_that_is_proposed_instead_is_accepted(sizes):
    with pytest.raises(UserError) as error:
        check_batch_sizes(*sizes)
    proposed = int(re.search(r"Use train.global_batch_size=(\d+)", str(error.value))[1])
    check_batch_sizes(proposed, *sizes[1:])


def test_sizes_that_divide_pass():
    check_batch_sizes(8, 2, images_per_prompt=4, world_size=2)
    check_batch_sizes(8, 2, images_per_prompt=4, world_size=2, updates=2)

"""Randomness is addressed: a draw depends on where it stands, on nothing that happened before it."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from draftplus import rng

SHAPE = (4, 8, 8)


def test_draws_do_not_depend_on_batching() -> None:
    whole = rng.normal(SHAPE, 7, "x_T", 3, range(8))
    assert whole.shape == (8, *SHAPE) and whole.dtype == torch.float32
    for size in (1, 2, 3):
        parts = [rng.normal(SHAPE, 7, "x_T", 3, range(i, min(i + size, 8))) for i in range(0, 8, size)]
        assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(rng.normal(SHAPE, 7, "x_T", 3, [6, 1]), whole[[6, 1]])


def test_draws_do_not_depend_on_what_was_drawn() -> None:
    first = rng.normal(SHAPE, 7, "x_T")
    state = torch.get_rng_state()
    torch.randn(5)
    rng.normal(SHAPE, 7, "draft_lv", 1)
    assert torch.equal(rng.normal(SHAPE, 7, "x_T"), first)
    torch.set_rng_state(state)
    rng.permutation(10, 0, "order"), rng.integer(0, 9, 0, "refl"), rng.normal(SHAPE, 0, "x_T")
    assert torch.equal(torch.get_rng_state(), state)  # and they use up nobody else's


def test_every_part_of_an_address_matters() -> None:
    addresses = [
        (seed, stream, step, index, draw)
        for seed in (0, 1, 11, -1)
        for stream in ("x_T", "draft_lv", "solver", "solver/1", "lora", "")
        for step in (0, 1, 11)
        for index in (0, 1, 11)
        for draw in (0, 1, 11)
    ]
    seeds = [rng.address(*address) for address in addresses]
    assert len(set(seeds)) == len(addresses)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_streams_never_coincide() -> None:
    streams = ["x_T", "solver", "solver/0", "draft_lv", "dropout", "ddpo"]
    draws = [rng.normal(SHAPE, 0, stream).flatten() for stream in streams]
    draws += [rng.normal(SHAPE, 0, "x_T", step).flatten() for step in (1, 2)]
    draws += [rng.normal(SHAPE, 0, "x_T", 0, (0,), draw).flatten() for draw in (1, 2)]
    draws += [rng.normal(SHAPE, 1, "x_T").flatten(), rng.stock_noise(SHAPE, [0]).flatten()]
    for a, b in combinations(draws, 2):
        assert torch.corrcoef(torch.stack([a, b]))[0, 1].abs() < 0.25  # 256 values: 4 standard errors


def test_draws_are_standard_normal() -> None:
    draws = rng.normal((1000,), 0, "x_T", 0, range(100))
    assert draws.mean().abs() < 0.01 and (draws.std() - 1).abs() < 0.01


def test_integers_are_uniform_and_addressed() -> None:
    draws = torch.tensor([rng.integer(2, 6, 0, "refl", step) for step in range(2000)])
    counts = torch.bincount(draws, minlength=7)
    assert counts[:2].sum() == counts[6] == 0
    assert (counts[2:6] - 500).abs().max() < 100
    assert [rng.integer(2, 6, 0, "refl", step) for step in (5, 1)] == draws[[5, 1]].tolist()
    assert any(rng.integer(0, 100, 0, "refl", s) != rng.integer(0, 100, 0, "alignprop", s) for s in range(5))


def test_permutations() -> None:
    order = rng.permutation(20, 0, "prompts", 3)
    assert sorted(order) == list(range(20)) and order == rng.permutation(20, 0, "prompts", 3)
    assert order != rng.permutation(20, 0, "prompts", 4) != rng.permutation(20, 1, "prompts", 4)


def test_stock_noise_is_diffusers() -> None:
    seeds = [3, 14, 15]
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    expected = randn_tensor((3, *SHAPE), generator=generators)
    assert torch.equal(rng.stock_noise(SHAPE, seeds), expected)
    assert torch.equal(rng.stock_noise(SHAPE, [14]), expected[1:2])
    for shape in (SHAPE, (3, 7, 5)):  # the latter are not those of float32, rounded
        for dtype in (torch.bfloat16, torch.float16):
            generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
            for draw in range(2):
                expected = randn_tensor((3, *shape), generator=generators, dtype=dtype)
                assert torch.equal(rng.stock_noise(shape, seeds, dtype, draw), expected.float())


def test_samples_say_where_a_draw_is() -> None:
    """By seed, step and image; a second call is another draw, and images may be cut anywhere."""

    def drawn(seed: int, step: int, indices: list[int], calls: int = 1) -> list[torch.Tensor]:
        with rng.samples(seed, step, indices):
            for _ in range(calls):
                made = [torch.randn(256, generator=g) for g in rng.generators("dropout", len(indices))]
        return made

    before = torch.get_rng_state()
    whole = drawn(0, 3, [4, 5, 6])
    assert torch.equal(torch.stack(drawn(0, 3, [5, 6])), torch.stack(whole[1:]))
    assert torch.equal(whole[0], torch.randn(256, generator=rng.generator(0, "dropout", 3, 4)))
    others = [*drawn(1, 3, [4]), *drawn(0, 4, [4]), *drawn(0, 3, [4], calls=2), *whole]
    for a, b in combinations(others, 2):
        assert torch.corrcoef(torch.stack([a, b]))[0, 1].abs() < 0.25
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match="2 samples, but the step is at 3"), rng.samples(0, 0, [1, 2, 3]):
        rng.generators("dropout", 2)


def test_without_samples_draws_come_from_the_global_generator() -> None:
    made = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        made.append(torch.stack([torch.randn(8, generator=g) for g in rng.generators("dropout", 2)]))
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    assert not torch.equal(made[0][0], made[0][1])

"""Standard errors and intervals where the truth is known: closed forms, and how often simulations are covered."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from draftplus.metrics.intervals import (
    _all_but_one_group,
    leaving_out,
    leaving_out_of_all,
    mean_over_images,
    mean_over_pairs,
    paired_gain,
    paired_gain_over_pairs,
)


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def squared_differences(values: Tensor) -> Tensor:
    return (values[:, None] - values) ** 2


def test_the_error_of_a_mean_is_the_textbooks() -> None:
    values = [draws(7, seed=1), 3 + 2 * draws(7, seed=2), draws(7, seed=3)]
    estimate = mean_over_images(values)
    assert estimate.mean == pytest.approx(float(torch.cat(values).mean()))
    assert estimate.per_prompt == pytest.approx([float(one.mean()) for one in values])
    expected = math.sqrt(sum(float(one.var()) / 7 for one in values)) / 3  # prompts are strata
    assert estimate.standard_error == pytest.approx(expected, rel=0.05)
    assert estimate.interval is not None and estimate.images == 21
    low, high = estimate.interval
    assert low < estimate.mean < high
    assert high - low == pytest.approx(2 * 1.96 * expected, rel=0.1)


def test_prompts_that_differ_widen_nothing() -> None:
    """The interval is about other seeds, not about other prompts."""
    estimate = mean_over_images([torch.full((5,), 1.0), torch.full((5,), 9.0)])
    assert (estimate.mean, estimate.standard_error, estimate.interval) == (5.0, 0.0, (5.0, 5.0))


def test_the_error_of_a_paired_gain() -> None:
    """Gains of known variances, prompts as strata; how the images or the prompts' gains differ is no error."""
    base = [10 * draws(6, seed=1), 100 + 10 * draws(6, seed=2)]
    gains = [torch.tensor([0.0, 0.0, 0.0, 2.0, 2.0, 2.0]), torch.tensor([5.0, 5.0, 5.0, 8.0, 8.0, 8.0])]
    estimate = paired_gain([one + gain for one, gain in zip(base, gains, strict=True)], base)
    assert (estimate.mean, estimate.per_prompt) == (pytest.approx(3.75), pytest.approx((1.0, 6.5)))
    # s² of {0, 2} is 6/5, of {5, 8} 27/10: √(6/5/6 + 27/10/6)/2 = √0.65/2
    assert estimate.standard_error == pytest.approx(math.sqrt(0.65) / 2, rel=0.05)
    as_one_sample = float(torch.cat(gains).std()) / math.sqrt(12)
    assert as_one_sample > 1.2 * math.sqrt(0.65) / 2, "another definition would be told apart"


def test_a_gain_that_all_images_share_has_no_error() -> None:
    base = [draws(5), draws(5, seed=1)]
    estimate = paired_gain([one + 0.5 for one in base], base)
    assert estimate.mean == pytest.approx(0.5) and estimate.standard_error == pytest.approx(0, abs=1e-12)
    distances = [squared_differences(one) for one in base]
    more = [one + 0.1 * (1 - torch.eye(5)) for one in distances]
    estimate = paired_gain_over_pairs(more, distances)
    assert estimate.mean == pytest.approx(0.1) and estimate.standard_error == pytest.approx(0, abs=1e-12)


def test_the_mean_over_pairs() -> None:
    values = draws(6)
    estimate = mean_over_pairs([squared_differences(values)])
    assert estimate.mean == pytest.approx(2 * float(values.var()))  # E (x - y)² = 2 s², without bias


def test_an_image_drawn_twice_is_no_pair() -> None:
    """All pairs equally far: whatever is drawn, the mean distance is the same, and no zero of a copy lowers it."""
    estimate = mean_over_pairs([0.3 * (1 - torch.eye(5))])
    assert estimate.interval == pytest.approx((0.3, 0.3)) and estimate.standard_error == pytest.approx(0, abs=1e-12)


def test_the_error_of_a_mean_over_pairs_is_over_images() -> None:
    """x normal, d = (x - y)²: the mean over pairs is 2 s², whose variance is 8/(n - 1)."""
    n, trials = 16, 120
    errors, covered, naive = [], 0, []
    for seed in range(trials):
        distances = squared_differences(draws(n, seed=seed))
        estimate = mean_over_pairs([distances])
        assert estimate.standard_error is not None and estimate.interval is not None
        errors.append(estimate.standard_error)
        covered += estimate.interval[0] <= 2.0 <= estimate.interval[1]
        pairs = distances[torch.ones(n, n).triu(1).bool()]
        naive.append(float(pairs.std()) / math.sqrt(len(pairs)))
    truth = math.sqrt(8 / (n - 1))
    assert sum(errors) / trials == pytest.approx(truth, rel=0.2)
    assert sum(naive) / trials < 0.6 * truth, "pairs as if they were independent"
    assert covered >= 0.82 * trials


def test_shared_seeds_are_drawn_together() -> None:
    """Two prompts with the same images: the second tells nothing new. Two whose values cancel: nothing varies."""
    values = draws(12)
    alone, apart, together, cancelled = (
        mean_over_images([values]), mean_over_images([values, values]), mean_over_images([values, values], True),
        mean_over_images([values, -values], True),
    )  # fmt: skip
    assert together.standard_error == pytest.approx(alone.standard_error)
    assert apart.standard_error == pytest.approx(alone.standard_error / math.sqrt(2), rel=0.1)
    assert cancelled.standard_error == pytest.approx(0, abs=1e-12)

    def mean(which: list[Tensor]):
        return lambda p, kept: float(which[p][kept].mean())

    error = float(values.std()) / math.sqrt(12)
    assert leaving_out([12, 12], mean([values, values])).standard_error == pytest.approx(error / math.sqrt(2))
    assert leaving_out([12, 12], mean([values, values]), True).standard_error == pytest.approx(error)
    assert leaving_out([12, 12], mean([values, -values]), True).standard_error == pytest.approx(0, abs=1e-12)


def test_the_jackknife_of_a_mean_is_the_textbooks() -> None:
    values = [draws(9, seed=1), draws(9, seed=2)]
    estimate = leaving_out([9, 9], lambda p, kept: float(values[p][kept].mean()))
    expected = math.sqrt(sum(float(one.var()) / 9 for one in values)) / 2
    assert estimate.standard_error == pytest.approx(expected)
    assert estimate.interval == pytest.approx(
        (estimate.mean - 1.96 * expected, estimate.mean + 1.96 * expected), rel=1e-3
    )
    everything = draws(250, seed=3)  # more images than groups
    whole = leaving_out_of_all([250], lambda kept: float(everything[kept].mean()))
    assert whole.standard_error == pytest.approx(float(everything.std()) / math.sqrt(250), rel=0.2)


def test_intervals_keep_to_the_range() -> None:
    values = torch.tensor([1.0, 1.0, 1.0, 0.0])
    estimate = leaving_out([4], lambda p, kept: float(values[kept].mean()), within=(0.0, 1.0))
    assert estimate.interval is not None and estimate.interval[1] == 1.0 > estimate.mean


def test_prompts_are_strata_of_a_statistic_of_all_images() -> None:
    """How far apart prompts are is no error; images of one seed are left out together."""
    noise = torch.stack([draws(12, seed=4), draws(12, seed=5)])
    near, far = noise, noise + torch.tensor([[0.0], [100.0]])

    def error(values: Tensor) -> float | None:
        return leaving_out_of_all([12, 12], lambda kept: float(values.flatten()[kept].mean())).standard_error

    errors = [error(near), error(far)]
    expected = math.sqrt(sum(float(one.var()) / 12 for one in noise)) / 2
    assert errors == pytest.approx([expected, expected], rel=0.1)
    shared = torch.stack([noise[0], noise[0]]).flatten()
    joint = leaving_out_of_all([12, 12], lambda kept: float(shared[kept].mean()), same_seeds=True).standard_error
    assert joint == pytest.approx(float(noise[0].std()) / math.sqrt(12))


@pytest.mark.parametrize("n", [101, 150, 200, 260])
def test_groups_that_are_left_out_are_of_one_size_or_nearly(n: int) -> None:
    sizes = {n - len(kept) for kept in _all_but_one_group(n)}
    assert sizes == {1} if n <= 200 else max(sizes) <= 1.5 * min(sizes)


def test_too_few_images_have_no_interval() -> None:
    assert mean_over_images([torch.ones(1)]).interval is None
    two = mean_over_pairs([torch.tensor([[0.0, 0.4], [0.4, 0.0]])])
    assert (two.mean, two.standard_error, two.interval) == (pytest.approx(0.4), None, None)
    assert leaving_out([2], lambda p, kept: float(len(kept))).interval is None
    assert leaving_out_of_all([2], lambda kept: 1.0).interval is None


def test_numbers_that_are_not_finite_have_no_interval() -> None:
    estimate = mean_over_images([torch.tensor([1.0, float("nan"), 2.0])])
    assert math.isnan(estimate.mean) and estimate.interval is None and estimate.standard_error is None


def test_the_same_numbers_give_the_same_interval() -> None:
    values = [draws(10)]
    assert mean_over_images(values) == mean_over_images(values)

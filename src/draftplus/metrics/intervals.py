"""Standard errors and 95% intervals over images: what other seeds would have given for the same prompts.

The unit that is drawn again is the image, never the pair: n images give n(n - 1)/2 pairs, and pairs that share an image
are not independent. Prompts are fixed, each is a stratum of its own.

Two ways, since drawing with replacement repeats images. Where a statistic is a mean over images or over pairs, the
bootstrap does: a pair of one image with itself is no pair of two images, and is left out. A statistic of a set of
images (its k-nearest neighbours, its number of effective images) would take every repeat for a second image that
happens to be equal; there the jackknife, which leaves images out, is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from draftplus import rng

DRAWS = 2000
GROUPS = 100  # that the jackknife leaves out one after another where images are many
NORMAL_95 = 1.959964


@dataclass(frozen=True)
class Estimate:
    """A statistic of `images` images. standard_error, interval: None where there are too few images to tell.

    interval: the 95% interval (low, high). per_prompt: the statistic of each prompt's images, where it has one.
    """

    mean: float
    standard_error: float | None
    interval: tuple[float, float] | None
    images: int
    per_prompt: tuple[float, ...] | None = None


def mean_over_images(values: Sequence[Tensor], same_seeds: bool = False) -> Estimate:
    """The mean over prompts of each prompt's mean. values: for each prompt (n,), one number per image."""
    groups = [one.double() for one in values]
    per_prompt = [float(group.mean()) for group in groups]
    sizes = [len(group) for group in groups]
    draws = None
    if min(sizes) >= 2:
        counts = _counts(tuple(sizes), same_seeds, least=1)
        draws = [c @ group / c.sum(1) for c, group in zip(counts, groups, strict=True)]
    return _bootstrapped(per_prompt, draws, sum(sizes))


def mean_over_pairs(distances: Sequence[Tensor], same_seeds: bool = False) -> Estimate:
    """The mean over prompts of the mean distance of two images of a prompt.

    distances: for each prompt (n, n), symmetric with a zero diagonal, n >= 2. An interval needs three images.
    """
    groups = [one.double() for one in distances]
    sizes = [len(group) for group in groups]
    per_prompt = [float(group.sum() / (n * (n - 1))) for group, n in zip(groups, sizes, strict=True)]
    draws = None
    if min(sizes) >= 3:
        counts = _counts(tuple(sizes), same_seeds, least=2)
        # an image drawn c times makes c² - c pairs with itself, whose distance 0 says nothing: they are not counted
        draws = [
            ((c @ group) * c).sum(1) / (c.sum(1).square() - c.square().sum(1))
            for c, group in zip(counts, groups, strict=True)
        ]
    return _bootstrapped(per_prompt, draws, sum(sizes))


def paired_gain(now: Sequence[Tensor], base: Sequence[Tensor], same_seeds: bool = False) -> Estimate:
    """What images gained over the base model's of the same prompts and noise: the mean over prompts of the mean gain.

    now, base: for each prompt (n,), one score per image, in the same order. The error is that of the paired
    differences, each prompt a stratum of its own. The bootstrap's comes to √(Σ s²/n) over the number of prompts, s² the
    variance of a prompt's gains.
    """
    return mean_over_images(_differences(now, base), same_seeds)


def paired_gain_over_pairs(now: Sequence[Tensor], base: Sequence[Tensor], same_seeds: bool = False) -> Estimate:
    """The same of the mean distance of two images of a prompt; now, base: (n, n), as `mean_over_pairs` takes them."""
    return mean_over_pairs(_differences(now, base), same_seeds)


def _differences(now: Sequence[Tensor], base: Sequence[Tensor]) -> list[Tensor]:
    return [a.double() - b.double() for a, b in zip(now, base, strict=True)]


def leaving_out(
    sizes: Sequence[int], statistic: Callable[[int, Tensor], float], same_seeds: bool = False,
    within: tuple[float, float] = (-math.inf, math.inf), least: int = 2,
) -> Estimate:  # fmt: skip
    """The mean over prompts of a statistic of a set of images, with the jackknife.

    sizes: images of each prompt. statistic: (prompt number, indices of the images that are kept) -> number, which
    needs at least `least` images. within: its range, which the interval is cut to.
    """
    per_prompt = tuple(statistic(prompt, torch.arange(n)) for prompt, n in enumerate(sizes))
    mean = sum(per_prompt) / len(per_prompt)
    if min(sizes) <= least:
        return Estimate(mean, None, None, sum(sizes), per_prompt)
    left = [[statistic(prompt, kept) for kept in _all_but_one_group(n)] for prompt, n in enumerate(sizes)]
    if same_seeds and len(set(sizes)) == 1:  # image i of every prompt grew from one noise: they are left out together
        left = [[sum(column) for column in zip(*left, strict=True)]]
    return _normal(mean, math.sqrt(sum(map(_jackknifed, left))) / len(sizes), within, sum(sizes), per_prompt)


def leaving_out_of_all(
    sizes: Sequence[int], statistic: Callable[[Tensor], float], same_seeds: bool = False,
    within: tuple[float, float] = (-math.inf, math.inf),
) -> Estimate:  # fmt: skip
    """A statistic of the images of all prompts together, with the jackknife.

    sizes: images of each prompt. statistic: indices of the images that are kept, a prompt's next to one another ->
    number. Images are left out of one prompt at a time, each prompt a stratum: how prompts differ is no error.
    """
    images = sum(sizes)
    mean = statistic(torch.arange(images))
    if min(sizes) < 2 or images < 3:
        return Estimate(mean, None, None, images)
    if same_seeds and len(set(sizes)) == 1:
        starts = [sizes[0] * prompt for prompt in range(len(sizes))]
        strata = [[torch.cat([kept + start for start in starts]) for kept in _all_but_one_group(sizes[0])]]
    else:
        strata = []
        for prompt, n in enumerate(sizes):
            start = sum(sizes[:prompt])
            before, after = torch.arange(start), torch.arange(start + n, images)
            groups = _all_but_one_group(n, max(2, GROUPS // len(sizes)))
            strata.append([torch.cat([before, kept + start, after]) for kept in groups])
    variances = [_jackknifed([statistic(kept) for kept in stratum]) for stratum in strata]
    return _normal(mean, math.sqrt(sum(variances)), within, images, None)


def _all_but_one_group(n: int, most: int = GROUPS) -> list[Tensor]:
    """The indices that are left of range(n), one group at a time left out; a group is an image where n <= 2 * most.

    Groups of one and of two images would mix statistics of sets of different sizes, which differ by more than chance.
    """
    groups = n if n <= 2 * most else most
    group = torch.arange(n) % groups
    return [(group != one).nonzero()[:, 0] for one in range(groups)]


def _jackknifed(left: Sequence[float]) -> float:
    """The jackknife's variance (g - 1) / g Σ (θ_i - mean θ)² from the statistic without each of g groups."""
    return (len(left) - 1) * torch.tensor(left).double().var(unbiased=False).item()


@lru_cache(maxsize=2)  # a run's page asks for the same draws at each of its evaluations
def _counts(sizes: tuple[int, ...], same_seeds: bool, least: int) -> list[Tensor]:
    """How often each image is drawn: for each prompt (DRAWS, n) float64, with at least `least` different ones.

    n - 1 images are drawn of n (Rao and Wu 1988), which makes the standard error of a mean s/√n; drawing n would make
    it √((n - 1)/n) of that, too small by 30% for two images of a prompt.
    """
    counts: list[Tensor] = []
    for prompt, n in enumerate(sizes):
        if counts and same_seeds and n == sizes[0]:
            counts.append(counts[0])
            continue
        generator = rng.generator(0, "bootstrap", index=prompt)
        drawn = torch.randint(n, (DRAWS, n - 1), generator=generator)
        count = torch.zeros(DRAWS, n, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(drawn.shape).double())
        while (few := (count > 0).sum(1) < least).any():
            drawn = torch.randint(n, (int(few.sum()), n - 1), generator=generator)
            count[few] = torch.zeros(len(drawn), n, dtype=torch.float64).scatter_add_(
                1, drawn, torch.ones(drawn.shape).double()
            )
        counts.append(count)
    return counts


def _bootstrapped(per_prompt: Sequence[float], draws: Sequence[Tensor] | None, images: int) -> Estimate:
    mean = sum(per_prompt) / len(per_prompt)
    if draws is None:
        return Estimate(mean, None, None, images, tuple(per_prompt))
    replicates = torch.stack(list(draws)).mean(0)  # (DRAWS,)
    if not bool(replicates.isfinite().all()):
        return Estimate(mean, None, None, images, tuple(per_prompt))
    low, high = torch.quantile(replicates, torch.tensor([0.025, 0.975]).double()).tolist()
    return Estimate(mean, float(replicates.std()), (low, high), images, tuple(per_prompt))


def _normal(
    mean: float, error: float, within: tuple[float, float], images: int, per_prompt: tuple[float, ...] | None
) -> Estimate:
    interval = (max(within[0], mean - NORMAL_95 * error), min(within[1], mean + NORMAL_95 * error))
    return Estimate(mean, error, interval, images, per_prompt)

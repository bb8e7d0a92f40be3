"""The metrics: what each needs to know about the images, and how that becomes a number with an interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from draftplus.metrics.features import (
    NEIGHBOURS,
    coverage,
    frechet_distance,
    pairwise_distances,
    precision,
    radii,
    recall,
    vendi_score,
)
from draftplus.metrics.intervals import (
    Estimate,
    leaving_out,
    leaving_out_of_all,
    mean_over_images,
    mean_over_pairs,
)
from draftplus.metrics.styles import style_entropy


@dataclass(frozen=True)
class Seen:
    """What was seen of the n images of one prompt; None: not asked for.

    distances: (n, n) LPIPS. features: (n, d) of unit length. base: (m, d), of the base model's images of this prompt.
    styles: (n, s) probabilities.
    """

    distances: Tensor | None = None
    features: Tensor | None = None
    base: Tensor | None = None
    styles: Tensor | None = None


@dataclass(frozen=True)
class Metric:
    """needs: fields of `Seen`. least: images of each prompt. of_finite: (one `Seen` per prompt, whether all prompts
    have the same seeds) -> the number, where all that was seen is finite."""

    needs: frozenset[str]
    least: int
    of_finite: Callable[[Sequence[Seen], bool], Estimate]

    def estimate(self, seen: Sequence[Seen], same_seeds: bool) -> Estimate:
        """The number; NaN, without an interval, where an image gave numbers that are not finite."""
        own = min(self.needs - {"base"})  # what it looks at in the images themselves
        images = [_given(getattr(one, own)) for one in seen]
        base = [_given(one.base) for one in seen] if "base" in self.needs else []
        if all(bool(one.isfinite().all()) for one in [*images, *base]):
            return self.of_finite(seen, same_seeds)
        return Estimate(math.nan, None, None, sum(map(len, images)))


def _lpips(seen: Sequence[Seen], same_seeds: bool) -> Estimate:
    return mean_over_pairs([_given(one.distances) for one in seen], same_seeds)


def _vendi(seen: Sequence[Seen], same_seeds: bool) -> Estimate:
    features = [_given(one.features) for one in seen]
    sizes = [len(one) for one in features]
    return leaving_out(sizes, lambda p, kept: vendi_score(features[p][kept]), same_seeds, (1.0, math.inf))


def _precision(seen: Sequence[Seen], same_seeds: bool) -> Estimate:
    inside = [precision(_across(one), radii(_among(one.base))) for one in seen]
    return mean_over_images([one.double() for one in inside], same_seeds)


def _recall(seen: Sequence[Seen], same_seeds: bool) -> Estimate:
    own, across = [_among(one.features) for one in seen], [_across(one) for one in seen]

    def of_some(prompt: int, kept: Tensor) -> float:
        balls = radii(own[prompt][kept][:, kept])
        return float(recall(across[prompt][kept], balls).double().mean())

    return leaving_out([len(one) for one in own], of_some, same_seeds, (0.0, 1.0), NEIGHBOURS + 1)


def _coverage(seen: Sequence[Seen], same_seeds: bool) -> Estimate:
    across, balls = [_across(one) for one in seen], [radii(_among(one.base)) for one in seen]

    def of_some(prompt: int, kept: Tensor) -> float:
        return float(coverage(across[prompt][kept], balls[prompt]).double().mean())

    return leaving_out([len(one) for one in across], of_some, same_seeds, (0.0, 1.0), 1)


def _drift(seen: Sequence[Seen], same_seeds: bool) -> Estimate:
    # of all prompts together, as the FID is: a prompt's few images say nothing of a covariance
    features, base = torch.cat([_given(s.features) for s in seen]), torch.cat([_given(s.base) for s in seen])
    sizes = [len(_given(one.features)) for one in seen]
    return leaving_out_of_all(sizes, lambda kept: frechet_distance(features[kept], base), same_seeds, (0.0, math.inf))


def _of_styles(statistic: Callable[[Tensor], Tensor]) -> Callable[[Sequence[Seen], bool], Estimate]:
    """The mean over prompts of a statistic of a prompt's (n, s) probabilities. It needs two images to be of a set."""

    def estimate(seen: Sequence[Seen], same_seeds: bool) -> Estimate:
        styles = [_given(one.styles).double() for one in seen]

        def of_some(prompt: int, kept: Tensor) -> float:
            return float(statistic(styles[prompt][kept]))

        return leaving_out([len(one) for one in styles], of_some, same_seeds, (0.0, math.inf))

    return estimate


def _entropy(styles: Tensor) -> Tensor:
    return style_entropy(styles.mean(0))


def _count(styles: Tensor) -> Tensor:
    return _entropy(styles).exp()


def _divergence(styles: Tensor) -> Tensor:
    """The entropy of the mean distribution less the mean entropy: the Jensen-Shannon divergence of the images, 0 where
    all are alike in style, however much in doubt that is."""
    return _entropy(styles) - style_entropy(styles).mean()


def _given(seen: Tensor | None) -> Tensor:
    assert seen is not None, "a metric needs something that was not computed"
    return seen


def _across(one: Seen) -> Tensor:
    return pairwise_distances(_given(one.features), _given(one.base))


def _among(rows: Tensor | None) -> Tensor:
    return pairwise_distances(_given(rows), _given(rows))


_TO_BASE = frozenset({"features", "base"})

LPIPS = Metric(frozenset({"distances"}), 2, _lpips)
VENDI = Metric(frozenset({"features"}), 2, _vendi)
PRECISION = Metric(_TO_BASE, NEIGHBOURS + 1, _precision)
RECALL = Metric(_TO_BASE, NEIGHBOURS + 1, _recall)
COVERAGE = Metric(_TO_BASE, NEIGHBOURS + 1, _coverage)
DRIFT = Metric(_TO_BASE, 2, _drift)
STYLE_ENTROPY = Metric(frozenset({"styles"}), 2, _of_styles(_entropy))
STYLE_COUNT = Metric(frozenset({"styles"}), 2, _of_styles(_count))
STYLE_DIVERGENCE = Metric(frozenset({"styles"}), 2, _of_styles(_divergence))

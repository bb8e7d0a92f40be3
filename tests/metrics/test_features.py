"""Metrics of features on sets whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from draftplus.metrics.features import (
    coverage,
    frechet_distance,
    pairwise_distances,
    precision,
    radii,
    recall,
    vendi_score,
)
from draftplus.metrics.metric import (
    COVERAGE,
    DRIFT,
    LPIPS,
    PRECISION,
    RECALL,
    STYLE_COUNT,
    STYLE_DIVERGENCE,
    STYLE_ENTROPY,
    VENDI,
    Seen,
)


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("n", [1, 3, 8])
def test_vendi_counts_what_is_different(n: int) -> None:
    assert vendi_score(torch.eye(8)[:n]) == pytest.approx(n)
    assert vendi_score(torch.eye(8)[[2] * n]) == pytest.approx(1)
    assert vendi_score(torch.eye(8)[:n].repeat(5, 1)) == pytest.approx(n), "copies add nothing; more rows than columns"


def test_vendi_of_two() -> None:
    """Eigenvalues (1 ± cos)/2."""
    angle = 0.7
    rows = torch.tensor([[1.0, 0.0], [math.cos(angle), math.sin(angle)]])
    p, q = (1 + math.cos(angle)) / 2, (1 - math.cos(angle)) / 2
    assert vendi_score(rows) == pytest.approx(math.exp(-p * math.log(p) - q * math.log(q)), rel=1e-5)


def test_vendi_does_not_depend_on_which_side_is_longer() -> None:
    rows = F.normalize(draws(6, 4), dim=1)
    values = torch.linalg.eigvalsh(rows @ rows.T / 6).clamp(min=1e-300)
    assert vendi_score(rows) == pytest.approx(float((-values * values.log()).sum().exp()))


def line(*places: float) -> Tensor:
    return torch.tensor(places)[:, None]


def test_radii_leave_out_the_point_itself_and_no_copy_of_it() -> None:
    points = line(0, 1, 3, 3)
    among = pairwise_distances(points, points)
    assert radii(among, 1).tolist() == [1, 1, 0, 0]
    assert radii(among, 2).tolist() == [3, 2, 2, 2]


def test_precision_recall_and_coverage_on_a_line() -> None:
    base, ours = line(0, 1, 10, 12), line(1.5, 2.5, 30)
    base_radii = radii(pairwise_distances(base, base), 1)
    own_radii = radii(pairwise_distances(ours, ours), 1)
    assert base_radii.tolist() == [1, 1, 2, 2] and own_radii.tolist() == [1, 1, 27.5]
    across = pairwise_distances(ours, base)
    assert precision(across, base_radii).tolist() == [True, False, False]  # 1.5 is in 1's ball
    assert coverage(across, base_radii).tolist() == [False, True, False, False]
    assert recall(across, own_radii).tolist() == [False, True, True, True]  # the outlier's ball reaches 10 and 12


def test_the_same_images_and_others_far_away() -> None:
    base = draws(12, 3)
    balls = radii(pairwise_distances(base, base))
    across = pairwise_distances(base, base)
    assert precision(across, balls).all() and recall(across, balls).all() and coverage(across, balls).all()
    away = pairwise_distances(base + 100, base)
    assert not precision(away, balls).any() and not recall(away, balls).any() and not coverage(away, balls).any()


def test_collapse_keeps_precision_and_loses_recall_and_coverage() -> None:
    base = draws(40, 2)
    ours = base[7].repeat(20, 1)
    across = pairwise_distances(ours, base)
    balls = radii(pairwise_distances(base, base))
    assert precision(across, balls).all()
    assert recall(across, radii(pairwise_distances(ours, ours))).sum() == 1, "balls of copies have no radius"
    assert coverage(across, balls).double().mean() < 0.5


def test_drift_of_a_shift_and_of_a_scale() -> None:
    rows = draws(50, 6)
    shift = draws(6, seed=1)
    assert frechet_distance(rows, rows) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(rows + shift, rows) == pytest.approx(float(shift.square().sum()))
    centre = rows.mean(0)
    wider = centre + 1.5 * (rows - centre)
    assert frechet_distance(wider, rows) == pytest.approx(0.25 * float(rows.var(0).sum()))


@pytest.mark.parametrize(("n", "m", "d"), [(40, 30, 5), (6, 4, 9), (5, 60, 9)])
def test_drift_is_its_formula(n: int, m: int, d: int) -> None:
    from scipy.linalg import sqrtm

    first, second = draws(n, d), 0.5 + draws(m, d, seed=1) @ draws(d, d, seed=2)
    a, b = (torch.cov(rows.T).numpy() for rows in (first, second))
    mean = float((first.mean(0) - second.mean(0)).square().sum())
    expected = mean + (a + b - 2 * sqrtm(a @ b).real).trace()
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-4)


def seen(images: Tensor, base: Tensor) -> Seen:
    return Seen(features=F.normalize(images, dim=1), base=F.normalize(base, dim=1))


def test_metrics_average_over_prompts() -> None:
    """One prompt's images are the base model's, the other's are far from them."""
    base = [draws(8, 4, seed=1), draws(8, 4, seed=2)]
    pairs = [seen(base[0], base[0]), seen(torch.tensor([[50.0, 0, 0, 0]]) - 0.01 * base[1], base[1] - 9)]
    for metric in (PRECISION, RECALL, COVERAGE):
        estimate = metric.estimate(pairs, False)
        assert (estimate.mean, estimate.per_prompt, estimate.images) == (0.5, (1.0, 0.0), 16)
        assert estimate.interval is not None


def test_drift_is_of_all_prompts_together() -> None:
    base = [draws(8, 4, seed=1), draws(8, 4, seed=2)]
    ours = [draws(8, 4, seed=3), draws(8, 4, seed=4)]
    estimate = DRIFT.estimate([seen(a, b) for a, b in zip(ours, base, strict=True)], False)
    whole = frechet_distance(*(F.normalize(torch.cat(rows), dim=1) for rows in (ours, base)))
    assert estimate.mean == pytest.approx(whole) and estimate.per_prompt is None
    assert estimate.standard_error is not None and estimate.standard_error > 0


def test_styles() -> None:
    one, all_of_them = torch.eye(7)[[3] * 14], torch.eye(7).repeat(2, 1)
    for rows, count in ((one, 1.0), (all_of_them, 7.0)):
        assert STYLE_ENTROPY.estimate([Seen(styles=rows)], False).mean == pytest.approx(math.log(count), abs=1e-9)
        assert STYLE_COUNT.estimate([Seen(styles=rows)], False).mean == pytest.approx(count)
    both = STYLE_ENTROPY.estimate([Seen(styles=one), Seen(styles=all_of_them)], False)
    assert both.mean == pytest.approx(math.log(7) / 2) and both.per_prompt == pytest.approx((0, math.log(7)))


def test_styles_are_of_the_average_image_not_the_average_of_images() -> None:
    """Seven images, each surely of one style, are as varied as seven that nobody can tell."""
    sure, unsure = torch.eye(7), torch.full((7, 7), 1 / 7)
    for rows in (sure, unsure):
        assert STYLE_ENTROPY.estimate([Seen(styles=rows)], False).mean == pytest.approx(math.log(7))


def test_divergence_leaves_doubt_out() -> None:
    sure, unsure = torch.eye(7), torch.full((7, 7), 1 / 7)
    half = 0.5 * sure + 0.5 * sure.roll(1, 0)  # each in doubt between two
    for rows, expected in ((sure, math.log(7)), (unsure, 0.0), (half, math.log(7) - math.log(2))):
        estimate = STYLE_DIVERGENCE.estimate([Seen(styles=rows)], False)
        assert estimate.mean == pytest.approx(expected, abs=1e-12)


def test_vendi_and_lpips_of_what_was_seen() -> None:
    assert VENDI.estimate(
        [Seen(features=torch.eye(6)), Seen(features=torch.eye(6)[[0] * 6])], False
    ).mean == pytest.approx(3.5)
    distances = torch.tensor([[0.0, 0.2, 0.4], [0.2, 0.0, 0.6], [0.4, 0.6, 0.0]])
    assert LPIPS.estimate([Seen(distances=distances)], False).mean == pytest.approx(0.4)

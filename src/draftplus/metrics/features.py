"""Metrics of images by their features: how many there are in effect, and how they lie to those of the base model.

Features are rows of unit length, (n, d), from whatever network the caller took them; distances are Euclidean, which for
unit rows is a function of the cosine.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEIGHBOURS = 5


def vendi_score(features: Tensor) -> float:
    """The effective number of different images, exp(-Σ λ ln λ) (Friedman and Dieng 2022, arXiv 2210.02410).

    features: (n, d) rows of unit length. λ: the eigenvalues of the matrix of their cosines over n, which sum to 1.
    From 1 (all alike) to n (all orthogonal).
    """
    rows = features.double()
    small = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows  # the same eigenvalues but for zeros
    values = torch.linalg.eigvalsh(small / len(rows)).clamp(min=0)
    return float(torch.special.entr(values).sum().exp())


def pairwise_distances(first: Tensor, second: Tensor) -> Tensor:
    """Euclidean distances of all rows of (n, d) and (m, d): (n, m) float64, exactly 0 between equal rows."""
    # by differences: |a|² + |b|² - 2ab would put a copy of an image a rounding error away, past a radius of 0
    return torch.cdist(first.double(), second.double(), compute_mode="donot_use_mm_for_euclid_dist")


def radii(distances: Tensor, neighbours: int = NEIGHBOURS) -> Tensor:
    """The distance of each of n images to its k-th nearest neighbour, (n,).

    distances: (n, n) among them. An image is not its own neighbour, n is at least k + 1.
    """
    others = distances.clone().fill_diagonal_(torch.inf)
    return others.kthvalue(neighbours, dim=1).values


def precision(across: Tensor, base_radii: Tensor) -> Tensor:
    """Which of n images look like the base model's: inside the ball of any, (n,) bool.

    across: (n, m) distances of n images to the base model's m; base_radii: (m,), to the k-th nearest neighbour among
    them (Kynkäänniemi et al. 2019, arXiv 1904.06991; k = 3 there). The precision is the mean.
    """
    return (across <= base_radii).any(1)


def recall(across: Tensor, own_radii: Tensor) -> Tensor:
    """Which of the base model's m images lie inside the ball of any of n images, (m,) bool; the recall is the mean.

    across: (n, m); own_radii: (n,), to the k-th nearest neighbour among the n (Kynkäänniemi et al. 2019).
    """
    return (across <= own_radii[:, None]).any(0)


def coverage(across: Tensor, base_radii: Tensor) -> Tensor:
    """Which of the base model's m images have any of n images inside their ball, (m,) bool; the coverage is the mean.

    across: (n, m); base_radii: (m,) (Naeem et al. 2020, arXiv 2002.09797). Unlike the recall it does not grow where n
    images have one outlier with a large ball.
    """
    return (across <= base_radii).any(0)


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """|μ1 - μ2|² + tr(Σ1 + Σ2 - 2 (Σ1 Σ2)^½) of the normal distributions fitted to (n, d) and (m, d), n and m >= 2.

    The distance of the FID (Heusel et al. 2017, arXiv 1706.08500). With A and B the centred rows over √(n - 1) and
    √(m - 1), tr (Σ1 Σ2)^½ is the sum of the singular values of A Bᵀ: no matrix square root, and exact where there are
    fewer images than features.
    """
    means, centred = [], []
    for rows in (first.double(), second.double()):
        means.append(rows.mean(0))
        centred.append((rows - rows.mean(0)) / (len(rows) - 1) ** 0.5)
    a, b = centred
    if len(a) > a.shape[1]:  # as many rows as features carry the same covariance
        a = torch.linalg.qr(a, mode="r").R
    if len(b) > b.shape[1]:
        b = torch.linalg.qr(b, mode="r").R
    trace = a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum()
    return max(0.0, float((means[0] - means[1]).square().sum() + trace))

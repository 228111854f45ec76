"""Distances between two sets of points: nearest neighbours, coverage, and Frechet distance."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
NEIGHBOURS = 5
"""Of coverage, as in its paper."""


def nearest(points: Floats, others: Floats) -> Floats:
    """Euclidean distance of each point to the nearest of ``others``; float64 [N].

    >>> nearest(np.array([[0.0, 0.0], [3.0, 4.0]]), np.array([[0.0, 1.0], [3.0, 4.0]])).tolist()
    [1.0, 0.0]
    """
    return _k_nearest(points, others, 1)[:, 0]


def coverage(real: Floats, fake: Floats, neighbours: int = NEIGHBOURS) -> float:
    """Share of real points with a fake point nearer than their k-th real neighbour (Naeem et al. 2020, 2002.09797).

    In [0, 1], higher is more varied; it grows with the number of fake points, so compare at equal numbers.

    >>> line = np.arange(10.0)[:, None]
    >>> coverage(line, line + 0.1), coverage(line, np.zeros((10, 1)), neighbours=1)
    (1.0, 0.1)
    """
    if len(real) < 2:
        return float("nan")
    neighbours = min(neighbours, len(real) - 1)
    radius = _k_nearest(real, real, neighbours + 1)[:, -1]  # the first neighbour is the point itself
    return float((nearest(real, fake) < radius).mean())


def frechet_distance(first: Floats, second: Floats) -> float:
    """Frechet distance between normal distributions fitted to two sets of features [N, F] (arXiv 1706.08500).

    ``|m1 - m2|^2 + Tr(C1 + C2 - 2 (C1 C2)^(1/2))``: 0 for equal moments, and biased upwards by about F / N: compare
    only at equal numbers of points.
    """
    gap = first.mean(0) - second.mean(0)
    one, two = (np.atleast_2d(np.cov(points, rowvar=False)) for points in (first, second))
    # Tr (C1 C2)^(1/2) through the symmetric C1^(1/2) C2 C1^(1/2), whose eigenvalues are real.
    values, vectors = np.linalg.eigh(one)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ two @ root), 0, None)).sum()
    return float(gap @ gap + np.trace(one) + np.trace(two) - 2 * cross)


def _k_nearest(points: Floats, others: Floats, neighbours: int) -> Floats:
    """Distances to the nearest ``neighbours`` of ``others``, ascending; [N, neighbours]."""
    found = np.empty((len(points), neighbours))
    squares = (others**2).sum(1)
    for start in range(0, len(points), 1024):
        block = points[start : start + 1024]
        near = (block**2).sum(1)[:, None] + squares - 2 * block @ others.T
        near = np.partition(near, neighbours - 1, axis=1)[:, :neighbours]
        found[start : start + 1024] = np.sqrt(np.clip(np.sort(near, axis=1), 0, None))
    return found

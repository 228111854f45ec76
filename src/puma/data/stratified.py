"""Choosing rows by class: never a prefix, since EDM files are sorted by class and by confidence inside each class."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from puma.errors import UsageError
from puma.rng import mixed_key, permuted


def stratified_rows(labels: NDArray[np.int64], size: int, seed: int) -> NDArray[np.int64]:
    """``size`` rows with every class in its share, chosen at random inside each class, in ascending order.

    Shares are rounded by largest remainders, so each class is within one row of its exact share. Subsets of one seed
    are nested only by chance; the same arguments give the same rows on every machine.

    Args:
        labels: int64 ``[N]``.
        size: how many rows, 1 to N.
        seed: another seed is another choice.

    >>> stratified_rows(np.array([0, 0, 0, 0, 1, 1]), 3, seed=0).size
    3

    Raises:
        UsageError: size outside 1..N.
    """
    if not 1 <= size <= len(labels):
        raise UsageError(f"a subset of {size:,} cannot be taken from {len(labels):,} images")
    counts = np.bincount(labels)
    exact = counts * (size / len(labels))
    quota = np.floor(exact).astype(np.int64)
    order = np.argsort(-(exact - quota), kind="stable")
    quota[order[: size - int(quota.sum())]] += 1
    by_class = np.argsort(labels, kind="stable")
    starts = np.concatenate([[0], np.cumsum(counts)])
    chosen = [
        by_class[starts[label] + permuted(np.arange(quota[label]), int(counts[label]), mixed_key(seed, label))]
        for label in range(len(counts))
        if quota[label]
    ]
    return np.sort(np.concatenate(chosen))

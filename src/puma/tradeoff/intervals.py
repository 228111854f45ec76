"""Intervals: of one accuracy (Wilson), and of a mean over seeds whose runs share their test images (Student's t).

Not scipy's: ``scipy.stats`` takes 0.5 s to import, ``binomtest`` whole hits only, and ``bootstrap`` resamples one
statistic at a time, where one resample of the test images has to serve all runs and both accuracies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from puma.errors import DataError, UsageError
from puma.tradeoff.results import Flags, RunKey

LEVEL = 0.95  # nominal coverage of every interval
DRAWS = 1_000


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its 95 % interval; no ends where there is none (one seed, no per-image flags).

    ``seed_error`` and ``image_error`` are standard errors: of the seeds, of the choice of test images; NaN if unknown.
    """

    value: float
    low: float | None
    high: float | None
    seeds: int
    seed_error: float = math.nan
    image_error: float = math.nan

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:.3f}"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """Wilson's score interval of a share in [0, 1] seen in ``n`` independent images (JASA 22, 1927), inside [0, 1].

    Raises:
        UsageError: ``share`` outside [0, 1], or ``n`` below 1.
    """
    if not 0 <= share <= 1 or n < 1:
        raise UsageError(f"no interval of a share {share!r} of {n!r} images")
    z = float(special.ndtri((1 + LEVEL) / 2))
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def mean_interval(values: ArrayLike, resampled: ArrayLike | None = None) -> Estimate:
    """The mean over seeds with Student's t, and the variance of the test images that all seeds share added.

    Seeds share their test images, so their spread does not show how much the images matter. The part of the variance
    under resamples that all seeds have in common is added (two-way random effects); each part has its own Student's t,
    and the half-widths add in quadrature. Coverage in simulation: docs/statistics.md. With one seed the interval shows
    the images only, or is None without resamples.

    Args:
        values: one per seed, finite ``[S]``.
        resampled: ``[B, S]``, the same under B resamples of the images; NaN where it could not be computed.

    >>> print(mean_interval([0.50, 0.52, 0.54]))
    0.520 [0.470, 0.570]

    Raises:
        UsageError: no values.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or not len(sample):
        raise UsageError("a mean over seeds needs at least one value")
    seeds = len(sample)
    between = float(sample.var(ddof=1)) / seeds if seeds > 1 else math.nan
    images, draws = _shared_variance(np.asarray(resampled, np.float64)) if resampled is not None else (math.nan, 0)
    value, errors = float(sample.mean()), (math.sqrt(between), math.sqrt(images))
    freedom = [count - 1 if count > 1 else math.nan for count in (seeds, draws)]
    halves = [float(special.stdtrit(df, (1 + LEVEL) / 2)) * error for df, error in zip(freedom, errors, strict=True)]
    known = [half for half in halves if math.isfinite(half)]
    if not known:
        return Estimate(value, None, None, seeds, *errors)
    return Estimate(value, value - math.hypot(*known), value + math.hypot(*known), seeds, *errors)


def _shared_variance(resampled: NDArray[np.float64]) -> tuple[float, int]:
    """Variance over image resamples that all seeds have in common, and how many resamples could be used."""
    usable = resampled[np.isfinite(resampled).all(axis=1)]
    draws, seeds = usable.shape
    if draws < 2:
        return math.nan, draws
    of_mean = float(usable.mean(axis=1).var(ddof=1))
    if seeds == 1:
        return of_mean, draws
    of_each = float(usable.var(axis=0, ddof=1).mean())
    return max((seeds * of_mean - of_each) / (seeds - 1), 0.0), draws


@dataclass(frozen=True)
class Resampled:
    """A run's accuracies under each resample of the test images: ``clean`` and ``robust``, float64 ``[B]``."""

    clean: NDArray[np.float64]
    robust: NDArray[np.float64]


def resample(flags: Mapping[RunKey, Flags], draws: int = DRAWS, seed: int = 0) -> dict[RunKey, Resampled]:
    """Accuracies of every run under ``draws`` bootstrap resamples of the test images.

    All runs and both accuracies share the images of a resample, so that differences keep what these have in common.

    Raises:
        DataError: the runs were not evaluated on equally many images.
    """
    if not flags:
        return {}
    lengths = {len(np.asarray(part)) for each in flags.values() for part in (each.clean, each.robust)}
    if len(lengths) != 1 or lengths == {0}:
        what = f"the runs were evaluated on different numbers of test images: {sorted(lengths)}"
        raise DataError(what, fix="evaluate all runs on the same test set")
    (images,) = lengths
    hits = {
        name: np.stack([np.asarray(getattr(each, name), np.float64) for each in flags.values()], axis=1)
        for name in ("clean", "robust")
    }
    again: dict[str, list[NDArray[np.float64]]] = {"clean": [], "robust": []}
    rng = np.random.default_rng(seed)
    block = max(1, 4_000_000 // images)  # so many resamples at a time that their weights take 32 MB
    for start in range(0, draws, block):
        weights = rng.multinomial(images, np.full(images, 1 / images), size=min(block, draws - start)).astype(float)
        for name, values in hits.items():
            known = np.isfinite(values)
            with np.errstate(invalid="ignore", divide="ignore"):
                again[name].append((weights @ np.where(known, values, 0)) / (weights @ known.astype(float)))
    clean, robust = (np.concatenate(again[name]) for name in ("clean", "robust"))
    return {key: Resampled(clean[:, i], robust[:, i]) for i, key in enumerate(flags)}

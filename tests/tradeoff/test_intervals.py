"""Intervals cover what they say, in simulations of thousands of studies with a known truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from puma.errors import UsageError
from puma.tradeoff import mean_interval, wilson_interval

STUDIES = 3_000


def test_wilson_against_the_published_formula_and_at_the_ends() -> None:
    low, high = wilson_interval(0.8, 400)
    reference = stats.binomtest(320, 400).proportion_ci(0.95, method="wilson")
    assert (low, high) == pytest.approx((reference.low, reference.high), abs=1e-12)
    assert wilson_interval(0.0, 10)[0] == 0
    assert wilson_interval(1.0, 10)[1] == 1
    for share, n in ((1.2, 10), (-0.1, 10), (math.nan, 10), (0.5, 0)):
        with pytest.raises(UsageError):
            wilson_interval(share, n)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.98])
def test_wilson_covers(share: float) -> None:
    hits = np.random.default_rng(0).binomial(400, share, size=4_000)
    ends = {int(count): wilson_interval(count / 400, 400) for count in np.unique(hits)}
    covered = np.mean([ends[int(count)][0] <= share <= ends[int(count)][1] for count in hits])
    assert 0.93 <= covered <= 0.97


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_student_t_covers(seeds: int) -> None:
    draws = np.random.default_rng(seeds).normal(0.7, 0.02, size=(4_000, seeds))
    estimates = [mean_interval(row) for row in draws]
    covered = np.mean([estimate.low <= 0.7 <= estimate.high for estimate in estimates])
    assert covered == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 4_000))


def test_student_t_against_scipy() -> None:
    values = [0.61, 0.64, 0.60, 0.67]
    estimate = mean_interval(values)
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert (estimate.low, estimate.high) == pytest.approx((low, high))
    assert estimate.seed_error == pytest.approx(stats.sem(values))
    assert math.isnan(estimate.image_error)


def test_one_seed_has_no_interval_without_images_and_the_images_with_them() -> None:
    alone = mean_interval([0.5])
    assert (alone.low, alone.high) == (None, None)
    assert str(alone) == "0.500"
    resampled = np.random.default_rng(0).normal(0.5, 0.01, size=(4_000, 1))
    with_images = mean_interval([0.5], resampled)
    assert with_images.high - with_images.low == pytest.approx(2 * 1.96 * 0.01, rel=0.05)
    with pytest.raises(UsageError):
        mean_interval([])


IMAGES = 400
WEIGHTS = np.random.default_rng(1).multinomial(IMAGES, np.full(IMAGES, 1 / IMAGES), size=400) / IMAGES


def _study(rng: np.random.Generator, seeds: int, spread: tuple[float, float, float]) -> tuple[object, object]:
    """Paired difference of two arms, seeds by images, with the same resamples for all seeds; its truth is 0.03."""
    seed, image, both = spread
    per_image = rng.normal(0.03, both, (seeds, IMAGES))
    per_image += rng.normal(0, seed, (seeds, 1)) + rng.normal(0, image, IMAGES)
    return per_image.mean(axis=1), WEIGHTS @ per_image.T


@pytest.mark.parametrize(
    ("seeds", "spread"),
    [
        (3, (0.01, 0.5, 0.1)),
        (3, (0.03, 0.1, 0.5)),
        (5, (0.0, 0.3, 0.5)),
        (5, (0.02, 0.3, 0.3)),
        (10, (0.01, 0.3, 0.3)),
    ],
    ids=["images", "seeds", "no-seed-effect", "both", "ten-seeds"],
)
def test_seeds_and_images_together_cover(seeds: int, spread: tuple[float, float, float]) -> None:
    rng = np.random.default_rng(7)
    covered = 0
    for _ in range(STUDIES):
        estimate = mean_interval(*_study(rng, seeds, spread))  # type: ignore[arg-type]
        covered += estimate.low <= 0.03 <= estimate.high  # type: ignore[operator]
    assert 0.95 <= covered / STUDIES <= 0.98


def test_seeds_alone_do_not_cover_what_the_images_move() -> None:
    """Why the images' variance is added: without it the interval of a few seeds on one test set is far too short."""
    rng = np.random.default_rng(7)
    covered = 0
    for _ in range(500):
        estimate = mean_interval(_study(rng, 5, (0.005, 0.5, 0.05))[0])  # type: ignore[arg-type]
        covered += estimate.low <= 0.03 <= estimate.high  # type: ignore[operator]
    assert covered / 500 < 0.6


def test_binary_flags_of_correlated_runs_are_covered() -> None:
    """Accuracies of models that mostly fail on the same images, as real ones do."""
    rng = np.random.default_rng(11)
    covered = 0
    for _ in range(STUDIES):
        difficulty = rng.beta(2, 1, IMAGES)
        hits = rng.random((4, IMAGES)) < difficulty
        estimate = mean_interval(hits.mean(axis=1), WEIGHTS @ hits.T)
        covered += estimate.low <= 2 / 3 <= estimate.high  # type: ignore[operator]
    assert 0.95 <= covered / STUDIES <= 0.98

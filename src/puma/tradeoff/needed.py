"""Data saving: how many random images give the accuracy that a strategy reaches with fewer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from puma.tradeoff.frontier import Axis
from puma.tradeoff.intervals import LEVEL, Estimate, mean_interval
from puma.tradeoff.results import BASELINE, Group, Results, RunResult, Setting, read_runs

REDUNDANT = 0.01
"""A pool is redundant where random pruning loses less accuracy than this, with 95 % confidence."""

RANDOM = ("random", BASELINE)
"""Strategies whose images are a random sample: random subsets, and whole pools of each size."""


@dataclass(frozen=True)
class Needed:
    """Random images needed to equal one setting.

    Args:
        group: study, pool, recipe and checkpoint of the setting.
        setting: the setting that is to be equalled.
        axis: the accuracy that is to be equalled, ``"clean"`` or ``"robust"``.
        kept: images the setting was trained on.
        images: geometric mean over seeds with its interval; None unless every seed lies inside the measured curve.
        note: why there is none.
    """

    group: Group
    setting: Setting
    axis: Axis
    kept: float
    images: Estimate | None
    note: str = ""


def images_needed(images: ArrayLike, accuracy: ArrayLike, target: float) -> tuple[float, str]:
    """The smallest number of images at which a learning curve reaches ``target``.

    The measured curve is made monotone (least-squares isotonic regression: more random images do not hurt) and joined
    by straight lines over log(images).

    Args:
        images: how many images were trained on ``[P]``, positive.
        accuracy: accuracies ``[P]``.
        target: the accuracy to reach.

    Returns:
        The number and an empty text; or NaN and why the measured curve does not contain it.

    >>> round(images_needed([100, 1000, 10_000], [0.5, 0.7, 0.9], 0.8)[0])
    3162
    >>> images_needed([100, 1000], [0.5, 0.7], 0.8)
    (nan, 'more than 1000: beyond the measured curve')
    """
    from scipy.optimize import isotonic_regression  # 0.5 s to import

    counts, accuracies = np.asarray(images, np.float64), np.asarray(accuracy, np.float64)
    measured = np.isfinite(accuracies) & (counts > 0)
    sizes, place = np.unique(counts[measured], return_inverse=True)
    if len(sizes) < 2:
        return math.nan, "not comparable: random data of at least 2 sizes is needed"
    if not math.isfinite(target):
        return math.nan, "not comparable: no accuracy to reach"
    weights = np.bincount(place).astype(np.float64)
    level = isotonic_regression(np.bincount(place, accuracies[measured]) / weights, weights=weights).x
    level, target = level.round(12), round(target, 12)  # pooled means that are equal in all but the last bit
    if target > level[-1]:
        return math.nan, f"more than {sizes[-1]:.0f}: beyond the measured curve"
    if target < level[0]:
        return math.nan, f"fewer than {sizes[0]:.0f}: before the measured curve"
    right = int(np.argmax(level >= target))
    if right == 0:
        return float(sizes[0]), ""
    share = (target - level[right - 1]) / (level[right] - level[right - 1])
    return float(np.exp(np.interp(share, [0, 1], np.log(sizes[right - 1 : right + 1])))), ""


def random_images_needed(
    results: Results,
    strategies: Sequence[str] = ("puma", "puma-plus"),
    *,
    robust: str = "robust_accuracy",
    level: float = LEVEL,
) -> list[Needed]:
    """Random images needed to equal each setting of ``strategies``, for clean and for robust accuracy.

    The curve of random data goes through the settings ``random`` and ``none`` of all pools of the same study, recipe
    and checkpoint, seed by seed.

    Raises:
        DataError: the table is broken, see `puma.tradeoff.results.read_runs`.
    """
    runs = read_runs(results, robust)
    chosen: dict[tuple[Group, Setting], list[RunResult]] = {}
    for run in runs:
        if run.setting.strategy in strategies:
            chosen.setdefault((run.group, run.setting), []).append(run)
    axes: tuple[Axis, ...] = ("clean", "robust")
    return [_needed(own, runs, axis, level) for own in chosen.values() for axis in axes]


def _needed(own: Sequence[RunResult], runs: Sequence[RunResult], axis: Axis, level: float) -> Needed:
    def curve_of(run: RunResult) -> tuple[Group, int]:
        return Group(run.group.study, "", run.group.recipe, run.group.checkpoint), run.seed

    logs, notes = [], []
    for run in own:
        curve = [r for r in runs if r.setting.strategy in RANDOM and curve_of(r) == curve_of(run)]
        count, note = images_needed([r.kept for r in curve], [getattr(r, axis) for r in curve], getattr(run, axis))
        logs.append(math.log(count)) if not note else notes.append(note)
    images = None
    if not notes:
        mean = mean_interval(logs, level=level)
        low, high = (None if end is None else math.exp(end) for end in (mean.low, mean.high))
        images = Estimate(math.exp(mean.value), low, high, mean.seeds)
    note = f"{len(notes)} of {len(own)} seeds: {notes[0]}" if notes else ""
    return Needed(own[0].group, own[0].setting, axis, float(np.mean([run.kept for run in own])), images, note)


def redundant(difference: Estimate | None, tolerance: float = REDUNDANT) -> bool:
    """Whether random pruning loses less than ``tolerance`` (lower end of its interval): no data saving can be shown.

    Args:
        difference: accuracy of ``random`` minus that of ``none``, paired by seed.
        tolerance: a loss that counts as next to nothing.
    """
    return difference is not None and difference.low is not None and difference.low > -tolerance

"""Less data: how many random images give the accuracy that a strategy reaches with fewer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import isotonic_regression

from puma.tradeoff.arms import BASELINE, Arm, Cell, Results, Setting, read_cells
from puma.tradeoff.gap import Axis
from puma.tradeoff.intervals import LEVEL, Estimate, mean_interval

REDUNDANT = 0.01
"""Random pruning that surely loses less accuracy than this shows that a pool is redundant."""

RANDOM = ("random", BASELINE)
"""Arms whose images are a random draw: random subsets, and whole pools of each size."""


@dataclass(frozen=True)
class Needed:
    """Random images needed to equal one arm.

    Args:
        setting: study, pool, recipe and checkpoint of the arm.
        arm: the arm that is to be equalled.
        axis: the accuracy that is to be equalled, ``"clean"`` or ``"robust"``.
        kept: images the arm was trained on.
        images: geometric mean over seeds with its interval; None unless every seed lies inside the measured curve.
        note: why there is none.
    """

    setting: Setting
    arm: Arm
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
        The number, and an empty text; or NaN and why the measured curve does not say.

    >>> round(images_needed([100, 1000, 10_000], [0.5, 0.7, 0.9], 0.8)[0])
    3162
    >>> images_needed([100, 1000], [0.5, 0.7], 0.8)
    (nan, 'more than 1000: beyond the measured curve')
    """
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
    """Random images needed to equal each arm of ``strategies``, for clean and for robust accuracy.

    The curve of random data goes through the arms ``random`` and ``none`` of all pools of the same study, recipe and
    checkpoint, seed by seed.

    Raises:
        DataError: the table is broken, see `puma.tradeoff.arms.read_cells`.
    """
    cells = read_cells(results, robust)
    groups: dict[tuple[Setting, Arm], list[Cell]] = {}
    for cell in cells:
        if cell.arm.strategy in strategies:
            groups.setdefault((cell.setting, cell.arm), []).append(cell)
    axes: tuple[Axis, ...] = ("clean", "robust")
    return [_needed(runs, cells, axis, level) for runs in groups.values() for axis in axes]


def _needed(runs: Sequence[Cell], cells: Sequence[Cell], axis: Axis, level: float) -> Needed:
    logs, notes = [], []
    for run in runs:
        curve = [
            cell
            for cell in cells
            if cell.arm.strategy in RANDOM
            and cell.seed == run.seed
            and (cell.setting.study, cell.setting.recipe, cell.setting.checkpoint)
            == (run.setting.study, run.setting.recipe, run.setting.checkpoint)
        ]
        count, note = images_needed([c.kept for c in curve], [getattr(c, axis) for c in curve], getattr(run, axis))
        logs.append(math.log(count)) if not note else notes.append(note)
    images = None
    if not notes:
        mean = mean_interval(logs, level=level)
        low, high = (None if end is None else math.exp(end) for end in (mean.low, mean.high))
        images = Estimate(math.exp(mean.value), low, high, mean.seeds)
    kept = float(np.mean([run.kept for run in runs]))
    note = f"{len(notes)} of {len(runs)} seeds: {notes[0]}" if notes else ""
    return Needed(runs[0].setting, runs[0].arm, axis, kept, images, note)


def redundant(difference: Estimate | None, tolerance: float = REDUNDANT) -> bool:
    """Whether random pruning surely loses less than ``tolerance``, so that no saving of data can be shown on the pool.

    Args:
        difference: accuracy of ``random`` minus that of ``none``, paired by seed.
        tolerance: a loss that counts as next to nothing.
    """
    return difference is not None and difference.low is not None and difference.low > -tolerance

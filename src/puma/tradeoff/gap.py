"""How far a point lies above the higher of the control frontiers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from puma.tradeoff.frontier import MIN_POINTS, Frontier

Axis = Literal["clean", "robust"]


def gap(
    robust: ArrayLike, clean: ArrayLike, frontiers: Sequence[Frontier], axis: Axis = "clean"
) -> NDArray[np.float64]:
    """Distance above the higher frontier: clean accuracy at equal robust (the headline), or the other way round.

    Args:
        robust: robust accuracies ``[P]`` of the points that are compared.
        clean: their clean accuracies ``[P]``.
        frontiers: the controls; at each point those whose measured range covers it count, the highest of them decides.
        axis: ``"clean"`` (clean accuracy at equal robust accuracy) or ``"robust"`` (robust at equal clean).

    Returns:
        float64 ``[P]``, positive = better than the controls; NaN where no frontier reaches (not comparable).

    >>> dial = Frontier("uniform-eps", [0.2, 0.4], [0.9, 0.7])
    >>> gap([0.3, 0.5], [0.85, 0.85], [dial]).round(3)
    array([0.05,  nan])
    >>> gap(0.3, 0.85, [dial], "robust").round(3).item()
    0.05
    """
    robust, clean = np.asarray(robust, np.float64), np.asarray(clean, np.float64)
    if axis == "clean":
        return clean - highest([frontier.clean_at(robust) for frontier in frontiers], robust.shape)
    return robust - highest([frontier.robust_at(clean) for frontier in frontiers], clean.shape)


def highest(reached: Sequence[NDArray[np.float64]], shape: tuple[int, ...]) -> NDArray[np.float64]:
    """The highest of several frontiers' values where any has one, else NaN."""
    best = np.full(shape, np.nan)
    for value in reached:
        best = np.fmax(best, value)
    return best


def why_not(robust: float, clean: float, frontiers: Sequence[Frontier], axis: Axis = "clean") -> str:
    """Why a point cannot be compared, in words; empty if it can."""
    if not np.isnan(gap(robust, clean, frontiers, axis)):
        return ""
    usable = [frontier for frontier in frontiers if len(frontier.robust) >= MIN_POINTS]
    if not usable:
        return f"not comparable: no control frontier of at least {MIN_POINTS} points"
    other: Axis = "robust" if axis == "clean" else "clean"
    value = robust if axis == "clean" else clean
    if np.isnan(value):
        return f"not comparable: no {other} accuracy"
    ranges = [getattr(frontier, other) for frontier in usable]
    low, high = min(points.min() for points in ranges), max(points.max() for points in ranges)
    side = "above" if value > high else "below" if value < low else "between"
    return f"not comparable: {other} accuracy {value:.3f} is {side} what the controls reach ({low:.3f} to {high:.3f})"
